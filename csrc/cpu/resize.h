// One resize of a chain, and the lines it makes. Lines are pulled by what comes after, a few at a time, so that no image
// in between is ever whole in memory.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "axis.h"
#include "kernels.h"

namespace vtengine {

constexpr int64_t kAhead = 8192;  // bytes between reading the source and asking the memory for it

// Room for `bytes` and the padding, an odd number of cache lines: neighbours in a column share no cache set.
inline int64_t pitch_of(int64_t bytes) { return 64 * (((bytes + kPad + 63) / 64) | 1); }

// Everything about a resize that does not change while it is made.
struct Resize {
    // Its lines will be asked for in ascending order, at most `rows` at a time.
    Resize(int64_t height_in, int64_t width_in, int64_t height, int64_t width, int filter, int mode, int64_t rows);

    int64_t height_in, width_in, height, width;
    std::shared_ptr<const Axis> across, down;  // nullptr: the size stays
    bool columns_first;                        // the vertical pass comes before the horizontal one
    int64_t ring_lines;                        // most lines that the vertical pass needs at a time

    // Scratch memory: lines before the horizontal pass, then the ring of lines before the vertical one.
    int64_t pitch_in, pitch_ring, at_ring, scratch_bytes;

    bool ends_down() const { return down && !columns_first; }
};

// Lines of an image, read in ascending order, each at most once.
class Lines {
  public:
    virtual ~Lines() = default;
    // Channel c of line row + i goes to to[3 * i + c], kPad bytes past its end being writable. count <= kBatch.
    virtual void read(int64_t row, int64_t count, uint8_t* const* to) = 0;
    // The same, resampled by `axis`, where that can be done at once; else false, and nothing was read.
    virtual bool read_across(const Axis&, int64_t, int64_t, uint8_t* const*) { return false; }
};

// The source: interleaved pixels.
class RgbLines : public Lines {
  public:
    RgbLines(const uint8_t* pixels, int64_t row_bytes, int64_t width, const Kernels& kernels)
        : pixels_(pixels), row_bytes_(row_bytes), width_(width), kernels_(kernels) {}
    void read(int64_t row, int64_t count, uint8_t* const* to) override;
    bool read_across(const Axis& axis, int64_t row, int64_t count, uint8_t* const* to) override;

  private:
    const uint8_t* pixels_;
    int64_t row_bytes_, width_;
    const Kernels& kernels_;
};

// The lines of a resize of other lines.
class Resampler : public Lines {
  public:
    Resampler(const Resize& resize, const Kernels& kernels, Lines& from, uint8_t* scratch)
        : resize_(resize), kernels_(kernels), from_(from), source_(scratch), ring_(scratch + resize.at_ring) {}
    void read(int64_t row, int64_t count, uint8_t* const* to) override;

    // The two halves of `read` where the vertical pass comes last, for callers that want parts of lines.
    void fill(int64_t row, int64_t count);
    void down(int64_t row, int64_t column, int64_t columns, uint8_t* const* to);

  private:
    void across(int64_t row, int64_t count, uint8_t* const* to);
    uint8_t* ring_line(int64_t row) const { return ring_ + 3 * resize_.pitch_ring * (row % resize_.ring_lines); }

    const Resize& resize_;
    const Kernels& kernels_;
    Lines& from_;
    uint8_t *source_, *ring_;
    int64_t next_ = 0;  // the first line that was not read yet
    std::vector<const uint8_t*> taps_;
};

}  // namespace vtengine
