// One axis of an exact resize: 22-bit fixed-point weights, and the same weights as each instruction set wants them.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace vtengine {

constexpr int kPrecisionBits = 22;
constexpr int kWideLanes = 16;  // outputs per AVX-512 register
constexpr int kWideGroup = 4;   // registers per group: 64 outputs
constexpr int kPairLanes = 8;   // outputs per AVX2 group

// Four taps of 16 outputs: w0 + 256 w1 + 65536 w2 is the weight, index picks the taps from a 64-byte window.
struct alignas(64) WideQuad {
    uint8_t index[64];
    int8_t w2[64], w1[64], w0[64];
};

// Two taps of 8 outputs: low + 65536 high is the weight; index picks them from two 16-byte windows, as 16-bit values.
struct alignas(32) PairQuad {
    uint8_t index[32];
    int16_t low[16], high[16];
};

// Weights of one axis along the rows, in groups of outputs. Entry e of register r of group g:
// entries[begin[g] + 4 * e + r], all of them with as many entries, of which used[4 * g + r] have weights.
struct WidePack {
    bool gather = false;  // windows span more than 64 bytes: index holds 16 int32 positions relative to the window
    bool pixels = true;   // windows span at most 21 bytes, so that of interleaved pixels they fit 64; at most 8 taps
    size_t tail = SIZE_MAX;   // the first group whose 64 bytes of pixels may end past the line,
    int32_t tail_pixel = 0;   // and the first pixel that it or a later one reads
    std::vector<int32_t> begin, used, window;
    std::unique_ptr<WideQuad[]> entries;
};

// Entry e of group g: entries[begin[g] + e].
struct PairPack {
    bool fits = true;  // else: use the scalar kernel
    std::vector<int32_t> begin, window;  // two windows per entry
    std::unique_ptr<PairQuad[]> entries;
};

// Weights of one axis along the columns. Row r, quad q (four taps): bytes[3 * (r * quads + q)] = the four bytes w2, then
// w1, then w0; row r, pair p (two taps): words[2 * (r * pairs + p)] = both low words, then both high words.
struct ColumnPack {
    int quads = 0, pairs = 0;
    std::vector<int32_t> bytes, words;
};

class Axis {
  public:
    // int16: weights of 16 bits, as torch has them, shifted up to the precision of all.
    Axis(int64_t size_in, int64_t size_out, int filter, bool int16);

    int64_t size_in, size_out;
    int filter;
    bool int16;
    int taps;                      // most taps of any output, weights that round to 0 left out at both ends
    bool narrow = true;            // every weight fits three signed bytes
    std::vector<int32_t> first;    // [size_out] first source index
    std::vector<int32_t> count;    // [size_out] number of taps, at least 1
    std::vector<int32_t> weight;   // [size_out, taps], 0 past count

    int64_t last(int64_t out) const { return first[out] + count[out]; }  // one past the last source index
    const WidePack& wide() const;
    const PairPack& pair() const;
    const ColumnPack& column() const;

  private:
    mutable std::once_flag wide_once_, pair_once_, column_once_;
    mutable WidePack wide_;
    mutable PairPack pair_;
    mutable ColumnPack column_;
};

// The axis from a small cache (computing the weights of a large Lanczos axis takes as long as using them).
std::shared_ptr<const Axis> find_axis(int64_t size_in, int64_t size_out, int filter, bool int16);

// Three signed bytes b2, b1, b0 with b0 + 256 b1 + 65536 b2 = weight.
inline void split_bytes(int32_t weight, int8_t* b2, int8_t* b1, int8_t* b0) {
    *b0 = static_cast<int8_t>(weight & 0xff);
    const int32_t rest = (weight - *b0) / 256;
    *b1 = static_cast<int8_t>(rest & 0xff);
    *b2 = static_cast<int8_t>((rest - *b1) / 256);
}

// low + 65536 high = weight.
inline void split_words(int32_t weight, int16_t* low, int16_t* high) {
    *low = static_cast<int16_t>(weight & 0xffff);
    *high = static_cast<int16_t>((weight - *low) / 65536);
}

}  // namespace vtengine
