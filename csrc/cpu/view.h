// One target of a call, and the part of it that one thread makes.
#pragma once

#include <cstdint>
#include <memory>

#include "axis.h"
#include "kernels.h"
#include "vtengine/patchify.h"

namespace vtengine {

constexpr int64_t kTile = 448;     // columns resampled vertically at a time: 16 windows
constexpr int64_t kAhead = 8192;  // bytes between reading the source and asking the memory for it
constexpr int64_t kBatch = 4;      // lines resampled horizontally at a time

// Everything about a target that does not change while it is made.
struct View {
    View(const vt_image& image, const vt_target& target, const vt_options& options, const Kernels& kernels);

    const Kernels* kernels;
    const uint8_t* pixels;  // first pixel of the box
    int64_t row_bytes, height_in, width_in, height, width;
    std::shared_ptr<const Axis> across, down;  // nullptr: the size stays
    bool ring;           // the vertical pass comes last, from a ring of resampled lines
    int64_t ring_lines;  // most source lines that one row of windows needs
    Normaliser norm;
    int layout, dtype;
    char* out;
    int64_t window_bytes;  // four patches
    bool stream;           // stores bypass the caches

    // Scratch memory of a thread: where each part begins, and how much it is.
    int64_t pitch_in, pitch_out, pitch_tile;
    int64_t at_source, at_mixed, at_lines, at_tile, at_staging, scratch_bytes;

    int64_t window_rows() const { return height / kWindow; }
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
    void fill_ring();
    void fill_band();
    void resample_down(int64_t column, int64_t columns);
    void lines_from(int64_t source_row, int64_t lines, uint8_t* const* to);
    void planes_of(const uint8_t* rgb, const uint8_t* ahead, int64_t line, uint8_t* const* planes) const;
    void emit(const uint8_t* top_left, int64_t stride, int64_t windows);
    void stream_window(const uint8_t* const planes[3], int64_t stride);
    void flush();

    uint8_t* ring_line(int64_t source_row) const;
    uint8_t* band_line(int64_t y) const;

    const View& view_;
    int64_t row_, end_, next_line_ = 0;
    uint8_t *source_, *mixed_, *lines_, *tile_, *staging_;
    char* to_;          // where the next value goes
    int64_t held_ = 0;  // bytes of an unfinished line of 64 in staging
    int64_t skip_ = 0;  // of these, bytes that belong to somebody else
};

Normaliser make_normaliser(const vt_options& options);

}  // namespace vtengine
