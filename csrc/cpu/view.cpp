#include "view.h"

#include <algorithm>

namespace vtengine {
namespace {

constexpr int64_t kStreamBytes = 16 << 20;  // outputs from this size on bypass the caches

std::vector<Resize> make_chain(const View& view, const vt_target& target, const vt_options& options) {
    std::vector<Resize> chain;
    int64_t height = view.height_in, width = view.width_in;
    for (int32_t i = 0; i < target.steps; ++i) {
        const vt_step& step = target.step[i];
        chain.emplace_back(height, width, step.height, step.width, step.filter, options.mode, kBatch);
        height = step.height;
        width = step.width;
    }
    chain.emplace_back(height, width, view.height, view.width, options.filter, options.mode, view.window);
    return chain;
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
      window(2 * options.patch),
      chain(make_chain(*this, target, options)),
      norm(make_normaliser(options)),
      out(static_cast<char*>(target.out)) {
    const int64_t value_bytes = options.dtype == VT_FLOAT32 ? 4 : 2;
    window_bytes = (options.layout == VT_FULL ? 2 : 1) * 3 * window * window * value_bytes;
    stream = options.stream < 0 ? window_bytes * (height / window) * (width / window) >= kStreamBytes
                                : options.stream != 0;
    const int patch = options.patch == kPatches[0] ? 0 : 1;
    emit = table.emit[patch][options.layout][options.dtype];
    if (table.emit_lines != nullptr && (norm.exact || options.dtype == VT_BFLOAT16)) {
        emit_lines = table.emit_lines[patch][options.layout][options.dtype];
    }
    at_band = 0;
    for (const Resize& resize : chain) at_band += resize.scratch_bytes;
    pitch_band = pitch_of(chain.back().ends_down() ? kTile : width);
    at_staging = at_band + 3 * window * pitch_band + 64;
    scratch_bytes = (at_staging + 64 + window_bytes + kSpill + 63) / 64 * 64;
}

double View::source_row(int64_t window_row) const {
    return static_cast<double>(window_row) * window * height_in / height;
}

Stripe::Stripe(const View& view, int64_t begin, int64_t end, uint8_t* scratch)
    : view_(view),
      row_(begin),
      end_(end),
      band_(scratch + view.at_band),
      staging_(scratch + view.at_staging),
      to_(view.out + begin * (view.width / view.window) * view.window_bytes) {
    const Kernels& kernels = *view.kernels;
    lines_.push_back(std::make_unique<RgbLines>(view.pixels, view.row_bytes, view.width_in, kernels));
    for (const Resize& resize : view.chain) {
        auto resampler = std::make_unique<Resampler>(resize, kernels, *lines_.back(), scratch);
        scratch += resize.scratch_bytes;
        if (&resize == &view.chain.back()) {
            last_ = std::move(resampler);
        } else {
            lines_.push_back(std::move(resampler));
        }
    }
    skip_ = held_ = view.stream ? reinterpret_cast<uintptr_t>(to_) % 64 : 0;
}

double Stripe::position() const { return view_.source_row(row_); }

void Stripe::step() {
    const int64_t window = view_.window, top = row_ * window;
    if (view_.chain.back().ends_down()) {
        last_->fill(top, window);
        for (int64_t x = 0; x < view_.width; x += kTile) {
            const int64_t columns = std::min(kTile, view_.width - x);
            for (int64_t y = 0; y < window; ++y) {
                uint8_t* const to[3] = {band_line(0, y), band_line(1, y), band_line(2, y)};
                last_->down(top + y, x, columns, to);
            }
            emit(columns / window);
        }
    } else {
        for (int64_t y = 0; y < window; y += kBatch) {
            uint8_t* to[3 * kBatch];
            for (int64_t i = 0; i < 3 * kBatch; ++i) to[i] = band_line(i % 3, y + i / 3);
            last_->read(top + y, kBatch, to);
        }
        emit(view_.width / window);
    }
    if (++row_ == end_) flush();
}

void Stripe::emit(int64_t windows) {
    const char* stripe_end = view_.out + end_ * (view_.width / view_.window) * view_.window_bytes;
    for (int64_t i = 0; i < windows; ++i) {
        const uint8_t* const planes[3] = {band_line(0, 0) + i * view_.window, band_line(1, 0) + i * view_.window,
                                          band_line(2, 0) + i * view_.window};
        if (view_.stream) {
            stream_window(planes);
        } else if (to_ + view_.window_bytes < stripe_end) {
            view_.emit(planes, view_.pitch_band, view_.norm, to_);
            to_ += view_.window_bytes;
        } else {  // nothing may spill over the end
            view_.emit(planes, view_.pitch_band, view_.norm, staging_);
            std::copy_n(reinterpret_cast<char*>(staging_), view_.window_bytes, to_);
            to_ += view_.window_bytes;
        }
    }
}

// In whole lines of 64 bytes, which go out past the caches; through staging memory where the kernels make no lines.
void Stripe::stream_window(const uint8_t* const planes[3]) {
    if (view_.emit_lines != nullptr && skip_ == 0) {
        held_ = view_.emit_lines(planes, view_.pitch_band, view_.norm, to_ - held_, staging_, held_);
        to_ += view_.window_bytes;
        return;
    }
    view_.emit(planes, view_.pitch_band, view_.norm, staging_ + held_);
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
