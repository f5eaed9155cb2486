// One target of a call, and the part of it that one thread makes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "resize.h"
#include "vtengine/patchify.h"

namespace vtengine {

constexpr int64_t kTile = 448;  // columns resampled vertically at a time: 16 windows of 28 pixels, 14 of 32

// Everything about a target that does not change while it is made.
struct View {
    View(const vt_image& image, const vt_target& target, const vt_options& options, const Kernels& kernels);

    const Kernels* kernels;
    const uint8_t* pixels;  // first pixel of the box
    int64_t row_bytes, height_in, width_in, height, width, window;
    std::vector<Resize> chain;  // at least one
    Normaliser norm;
    Emit emit;
    EmitLines emit_lines = nullptr;  // in place of `emit`, where it is there and stores bypass the caches
    char* out;
    int64_t window_bytes;  // four patches
    bool stream;           // stores bypass the caches

    // Scratch memory of a thread: that of each resize, then a band (or a tile of it) of `window` rows, then the staging.
    int64_t pitch_band, at_band, at_staging, scratch_bytes;

    int64_t window_rows() const { return height / window; }
    double source_row(int64_t window_row) const;  // where in the box it lies, for the order of several views
};

// Makes the rows of windows [begin, end) of a view, one after another.
class Stripe {
  public:
    Stripe(const View& view, int64_t begin, int64_t end, uint8_t* scratch);

    bool done() const { return row_ == end_; }
    double position() const;  // in lines of the image
    void step();              // the next row of windows

  private:
    void emit(int64_t windows);
    void stream_window(const uint8_t* const planes[3]);
    void flush();

    // Planes of the band are `window` lines each, so that a window is one block with one stride.
    uint8_t* band_line(int64_t channel, int64_t y) const { return band_ + (channel * view_.window + y) * view_.pitch_band; }

    const View& view_;
    int64_t row_, end_;
    std::vector<std::unique_ptr<Lines>> lines_;  // the source and the resizes but the last
    std::unique_ptr<Resampler> last_;
    uint8_t *band_, *staging_;
    char* to_;          // where the next value goes
    int64_t held_ = 0;  // bytes of an unfinished line of 64 in staging
    int64_t skip_ = 0;  // of these, bytes that belong to somebody else
};

Normaliser make_normaliser(const vt_options& options);

}  // namespace vtengine
