#include "resize.h"

#include <algorithm>

#include "vtengine/patchify.h"

namespace vtengine {
namespace {

bool vertical_first(const Resize& r, int mode) {
    const int64_t shrink = r.height_in - r.height;
    return mode == VT_PIL13 && shrink > 0 && shrink > 2 * (r.width_in - r.width);
}

// First source line and one past the last that `count` rows need.
void source_span(const Axis& down, int64_t row, int64_t count, int64_t* low, int64_t* high) {
    *low = INT64_MAX;
    *high = 0;
    for (int64_t y = row; y < row + count; ++y) {
        *low = std::min<int64_t>(*low, down.first[y]);
        *high = std::max(*high, down.last(y));
    }
}

// Lines that must be kept so that none is needed again after it went. (Taps of weight 0 being left out, a row may begin
// a line before the one above it, or end so.)
int64_t most_lines(const Axis& down, int64_t rows) {
    std::vector<int64_t> low(down.first.begin(), down.first.end()), high(down.size_out);
    for (int64_t y = down.size_out - 2; y >= 0; --y) low[y] = std::min(low[y], low[y + 1]);
    for (int64_t y = 0; y < down.size_out; ++y) high[y] = std::max(down.last(y), y > 0 ? high[y - 1] : 0);
    int64_t most = 0;
    for (int64_t y = 0; y < down.size_out; ++y) {
        most = std::max(most, high[std::min(y + rows, down.size_out) - 1] - low[y]);
    }
    return most;
}

}  // namespace

Resize::Resize(int64_t in_height, int64_t in_width, int64_t out_height, int64_t out_width, int filter, int mode,
               int64_t rows)
    : height_in(in_height), width_in(in_width), height(out_height), width(out_width) {
    if (width != width_in) across = find_axis(width_in, width, filter, mode == VT_TV);
    if (height != height_in) down = find_axis(height_in, height, filter, mode == VT_TV);
    columns_first = down && across && vertical_first(*this, mode);
    ring_lines = down ? most_lines(*down, rows) : 0;
    pitch_in = pitch_of(width_in);
    pitch_ring = pitch_of(columns_first ? width_in : width);
    at_ring = across ? 3 * kBatch * pitch_in : 0;
    scratch_bytes = at_ring + 3 * pitch_ring * ring_lines;
}

void RgbLines::read(int64_t row, int64_t count, uint8_t* const* to) {
    for (int64_t i = 0; i < count; ++i) {
        const uint8_t* rgb = pixels_ + (row + i) * row_bytes_;
        kernels_.deinterleave(rgb, width_, to + 3 * i, rgb + kAhead);
    }
}

bool RgbLines::read_across(const Axis& axis, int64_t row, int64_t count, uint8_t* const* to) {
    return kernels_.horizontal_pixels != nullptr &&
           kernels_.horizontal_pixels(axis, pixels_ + row * row_bytes_, row_bytes_, to, count);
}

void Resampler::read(int64_t row, int64_t count, uint8_t* const* to) {
    if (!resize_.down) {
        if (resize_.across) return across(row, count, to);
        return from_.read(row, count, to);
    }
    fill(row, count);
    if (!resize_.columns_first) {
        for (int64_t i = 0; i < count; ++i) down(row + i, 0, resize_.width, to + 3 * i);
        return;
    }
    uint8_t* mixed[3 * kBatch];
    for (int64_t i = 0; i < 3 * count; ++i) mixed[i] = source_ + i * resize_.pitch_in;
    for (int64_t i = 0; i < count; ++i) down(row + i, 0, resize_.width_in, mixed + 3 * i);
    kernels_.horizontal(*resize_.across, mixed, to, 3 * count);
}

void Resampler::fill(int64_t row, int64_t count) {
    int64_t low, high;
    source_span(*resize_.down, row, count, &low, &high);
    next_ = std::max(next_, low);
    while (next_ < high) {
        const int64_t lines = std::min(kBatch, high - next_);
        uint8_t* to[3 * kBatch];
        for (int64_t i = 0; i < 3 * lines; ++i) to[i] = ring_line(next_ + i / 3) + (i % 3) * resize_.pitch_ring;
        if (resize_.across && !resize_.columns_first) {
            across(next_, lines, to);
        } else {
            from_.read(next_, lines, to);
        }
        next_ += lines;
    }
}

void Resampler::down(int64_t row, int64_t column, int64_t columns, uint8_t* const* to) {
    const Axis& axis = *resize_.down;
    const int64_t count = axis.count[row];
    taps_.resize(axis.taps + 3);
    for (int64_t t = 0; t < count; ++t) taps_[t] = ring_line(axis.first[row] + t) + column;
    for (int64_t t = count; t < count + 3; ++t) taps_[t] = taps_[0];  // weight 0
    for (int64_t c = 0; c < 3; ++c) {
        kernels_.vertical(axis, row, taps_.data(), columns, to[c]);
        for (int64_t t = 0; t < count + 3; ++t) taps_[t] += resize_.pitch_ring;
    }
}

void Resampler::across(int64_t row, int64_t count, uint8_t* const* to) {
    if (from_.read_across(*resize_.across, row, count, to)) return;
    uint8_t* source[3 * kBatch];
    for (int64_t i = 0; i < 3 * count; ++i) source[i] = source_ + i * resize_.pitch_in;
    from_.read(row, count, source);
    kernels_.horizontal(*resize_.across, source, to, 3 * count);
}

}  // namespace vtengine
