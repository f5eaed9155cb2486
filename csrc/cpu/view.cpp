#include "view.h"

#include <algorithm>

namespace vtengine {
namespace {

constexpr int64_t kStreamBytes = 16 << 20;  // outputs from this size on bypass the caches

// Room for `bytes` and the padding, an odd number of cache lines: neighbours in a column share no cache set.
int64_t pitch_of(int64_t bytes) { return 64 * (((bytes + kPad + 63) / 64) | 1); }

bool vertical_first(const View& v, int order) {
    const int64_t shrink = v.height_in - v.height;
    return order == VT_PIL13 && shrink > 0 && shrink > 2 * (v.width_in - v.width);
}

// First source line and one past the last that a row of windows needs.
void source_span(const Axis& down, int64_t window_row, int64_t* low, int64_t* high) {
    *low = INT64_MAX;
    *high = 0;
    for (int64_t y = window_row * kWindow; y < (window_row + 1) * kWindow; ++y) {
        *low = std::min<int64_t>(*low, down.first[y]);
        *high = std::max(*high, down.last(y));
    }
}

int64_t most_lines(const Axis& down) {
    int64_t most = 0;
    for (int64_t row = 0; row < down.size_out / kWindow; ++row) {
        int64_t low, high;
        source_span(down, row, &low, &high);
        most = std::max(most, high - low);
    }
    return most;
}

}  // namespace

View::View(const vt_image& image, const vt_target& target, const vt_options& options, const Kernels& table)
    : kernels(&table),
      pixels(image.pixels + target.top * image.row_bytes + 3 * target.left),
      row_bytes(image.row_bytes),
      height_in(target.bottom - target.top),
      width_in(target.right - target.left),
      height(target.height),
      width(target.width),
      norm(make_normaliser(options)),
      layout(options.layout),
      dtype(options.dtype),
      out(static_cast<char*>(target.out)) {
    if (width != width_in) across = find_axis(width_in, width, options.filter);
    if (height != height_in) down = find_axis(height_in, height, options.filter);
    ring = down && across && !vertical_first(*this, options.order);
    ring_lines = ring ? most_lines(*down) : 0;
    const int64_t value_bytes = dtype == VT_FLOAT32 ? 4 : 2;
    window_bytes = 4 * (layout == VT_FULL ? 2 : 1) * 3 * kPatch * kPatch * value_bytes;
    stream = options.stream < 0 ? window_bytes * (height / kWindow) * (width / kWindow) >= kStreamBytes
                                : options.stream != 0;

    pitch_in = pitch_of(width_in);
    pitch_out = pitch_of(width);
    pitch_tile = pitch_of(kTile);
    at_source = 0;
    at_mixed = at_source + (across ? 3 * kBatch * pitch_in : 0);
    at_lines = at_mixed + (down && !ring ? pitch_of(3 * width_in) : 0);
    at_tile = at_lines + 3 * pitch_out * (ring ? ring_lines : kWindow);
    at_staging = at_tile + (ring ? 3 * kWindow * pitch_tile : 0);
    scratch_bytes = (at_staging + 64 + window_bytes + kSpill + 63) / 64 * 64;
}

double View::source_row(int64_t window_row) const {
    return static_cast<double>(window_row) * kWindow * height_in / height;
}

Stripe::Stripe(const View& view, int64_t begin, int64_t end, uint8_t* scratch)
    : view_(view),
      row_(begin),
      end_(end),
      source_(scratch + view.at_source),
      mixed_(scratch + view.at_mixed),
      lines_(scratch + view.at_lines),
      tile_(scratch + view.at_tile),
      staging_(scratch + view.at_staging),
      to_(view.out + begin * (view.width / kWindow) * view.window_bytes) {
    skip_ = held_ = view.stream ? reinterpret_cast<uintptr_t>(to_) % 64 : 0;
}

double Stripe::position() const { return view_.source_row(row_); }

void Stripe::step() {
    if (view_.ring) {
        fill_ring();
        for (int64_t x = 0; x < view_.width; x += kTile) {
            const int64_t columns = std::min(kTile, view_.width - x);
            resample_down(x, columns);
            emit(tile_, view_.pitch_tile, columns / kWindow);
        }
    } else {
        fill_band();
        emit(lines_, view_.pitch_out, view_.width / kWindow);
    }
    if (++row_ == end_) flush();
}

uint8_t* Stripe::ring_line(int64_t source_row) const {
    return lines_ + 3 * view_.pitch_out * (source_row % view_.ring_lines);
}

// Planes of a band or a tile are kWindow lines each, so that a window is one block with one stride.
uint8_t* Stripe::band_line(int64_t y) const { return lines_ + y * view_.pitch_out; }

// The three planes of a line of pixels: resampled later through source_, or in place.
void Stripe::planes_of(const uint8_t* rgb, const uint8_t* ahead, int64_t line, uint8_t* const* planes) const {
    uint8_t* source[3];
    for (int c = 0; c < 3; ++c) source[c] = source_ + (3 * line + c) * view_.pitch_in;
    view_.kernels->deinterleave(rgb, view_.width_in, view_.across ? source : planes, ahead);
}

// Lines of the source, deinterleaved and resampled across, to to[3 * line + channel].
void Stripe::lines_from(int64_t source_row, int64_t lines, uint8_t* const* to) {
    for (int64_t i = 0; i < lines; ++i) {
        const uint8_t* rgb = view_.pixels + (source_row + i) * view_.row_bytes;
        planes_of(rgb, rgb + kAhead, i, to + 3 * i);
    }
    if (!view_.across) return;
    const uint8_t* from[3 * kBatch];
    for (int64_t i = 0; i < 3 * lines; ++i) from[i] = source_ + i * view_.pitch_in;
    view_.kernels->horizontal(*view_.across, from, to, 3 * lines);
}

void Stripe::fill_ring() {
    int64_t low, high;
    source_span(*view_.down, row_, &low, &high);
    next_line_ = std::max(next_line_, low);
    while (next_line_ < high) {
        const int64_t lines = std::min(kBatch, high - next_line_);
        uint8_t* to[3 * kBatch];
        for (int64_t i = 0; i < 3 * lines; ++i) to[i] = ring_line(next_line_ + i / 3) + (i % 3) * view_.pitch_out;
        lines_from(next_line_, lines, to);
        next_line_ += lines;
    }
}

void Stripe::fill_band() {
    std::vector<const uint8_t*> rows;
    for (int64_t y = 0; y < kWindow; y += kBatch) {
        uint8_t* to[3 * kBatch];
        for (int64_t i = 0; i < 3 * kBatch; ++i) to[i] = band_line((i % 3) * kWindow + y + i / 3);
        if (!view_.down) {
            lines_from(row_ * kWindow + y, kBatch, to);
            continue;
        }
        const uint8_t* from[3 * kBatch];
        for (int64_t i = 0; i < 3 * kBatch; ++i) from[i] = source_ + i * view_.pitch_in;
        for (int64_t i = 0; i < kBatch; ++i) {
            const int64_t out_row = row_ * kWindow + y + i;
            const int64_t count = view_.down->count[out_row];
            rows.assign(count + 3, view_.pixels + view_.down->first[out_row] * view_.row_bytes);
            for (int64_t t = 1; t < count; ++t) rows[t] = rows[t - 1] + view_.row_bytes;
            view_.kernels->vertical(*view_.down, out_row, rows.data(), 3 * view_.width_in, mixed_);
            planes_of(mixed_, rows[count - 1] + view_.row_bytes, i, to + 3 * i);
        }
        if (view_.across) view_.kernels->horizontal(*view_.across, from, to, 3 * kBatch);
    }
}

void Stripe::resample_down(int64_t column, int64_t columns) {
    std::vector<const uint8_t*> rows(view_.down->taps + 3);
    for (int64_t y = 0; y < kWindow; ++y) {
        const int64_t out_row = row_ * kWindow + y, first = view_.down->first[out_row];
        const int64_t count = view_.down->count[out_row];
        for (int64_t t = 0; t < count; ++t) rows[t] = ring_line(first + t) + column;
        for (int64_t t = count; t < count + 3; ++t) rows[t] = rows[0];  // weight 0
        for (int64_t c = 0; c < 3; ++c) {
            view_.kernels->vertical(*view_.down, out_row, rows.data(), columns,
                                    tile_ + (c * kWindow + y) * view_.pitch_tile);
            for (const uint8_t*& row : rows) row += view_.pitch_out;
        }
    }
}

void Stripe::emit(const uint8_t* top_left, int64_t stride, int64_t windows) {
    const auto write = view_.kernels->emit[view_.layout][view_.dtype];
    for (int64_t i = 0; i < windows; ++i) {
        const uint8_t* corner = top_left + i * kWindow;
        const uint8_t* const planes[3] = {corner, corner + kWindow * stride, corner + 2 * kWindow * stride};
        const char* stripe_end = view_.out + end_ * (view_.width / kWindow) * view_.window_bytes;
        if (view_.stream) {
            stream_window(planes, stride);
        } else if (to_ + view_.window_bytes < stripe_end) {
            write(planes, stride, view_.norm, to_);
            to_ += view_.window_bytes;
        } else {  // nothing may spill over the end
            write(planes, stride, view_.norm, staging_);
            std::copy_n(reinterpret_cast<char*>(staging_), view_.window_bytes, to_);
            to_ += view_.window_bytes;
        }
    }
}

// Through staging memory, so that whole lines of 64 bytes go out past the caches.
void Stripe::stream_window(const uint8_t* const planes[3], int64_t stride) {
    view_.kernels->emit[view_.layout][view_.dtype](planes, stride, view_.norm, staging_ + held_);
    const int64_t total = held_ + view_.window_bytes, whole = total / 64 * 64;
    char* line = to_ - held_;
    int64_t begin = 0;
    if (skip_ > 0) {
        std::copy_n(reinterpret_cast<char*>(staging_) + skip_, 64 - skip_, to_);
        begin = 64;
        skip_ = 0;
    }
    view_.kernels->stream(line + begin, staging_ + begin, (whole - begin) / 64);
    to_ += view_.window_bytes;
    held_ = total - whole;
    std::copy_n(staging_ + whole, held_, staging_);
}

void Stripe::flush() {
    if (!view_.stream) return;
    std::copy_n(reinterpret_cast<char*>(staging_), held_, to_ - held_);
    held_ = 0;
    view_.kernels->fence();
}

}  // namespace vtengine
