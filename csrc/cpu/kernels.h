// The inner loops that exist once per instruction set, behind one table of functions.
#pragma once

#include <cstdint>

#include "axis.h"
#include "vtengine/patchify.h"

namespace vtengine {

constexpr int64_t kPatches[2] = {14, 16};  // pixels per side of a patch
constexpr int64_t kPad = 128;     // bytes that may be read and written past the end of a line of a plane
constexpr int64_t kBatch = 4;     // lines resampled horizontally at a time
constexpr int64_t kSpill = 64;    // bytes that `emit` may write past the end of its window

// From levels to values: (x/255 - mean) / std in floats, rounded where the reference rounds.
struct Normaliser {
    const float* table;       // [3][256], the truth
    uint16_t table16[3][256];  // the same in bfloat16
    float unit_high, unit_low, mean[3], inverse_high[3], inverse_low[3];
    bool exact;  // the arithmetic gives the table, to the bit, for all 3 x 256 levels
};

using Emit = void (*)(const uint8_t* const planes[3], int64_t stride, const Normaliser& norm, void* out);

// One window as whole lines of 64 bytes, which go past the caches to `line` and what follows. The first line begins with
// the `held` bytes at `staging`. Returns how many bytes of an unfinished line lie there afterwards; the 64 bytes before
// `staging` are overwritten.
using EmitLines = int64_t (*)(const uint8_t* const planes[3], int64_t stride, const Normaliser& norm, char* line,
                              uint8_t* staging, int64_t held);

struct Kernels {
    // rgb: `pixels` interleaved pixels; planes: three lines; ahead: as many bytes that will be read soon (or not: they
    // need not exist).
    void (*deinterleave)(const uint8_t* rgb, int64_t pixels, uint8_t* const planes[3], const uint8_t* ahead);
    // Resamples lines <= 3 kBatch lines of axis.size_in bytes (kPad readable past the end) to axis.size_out bytes (kPad
    // writable).
    void (*horizontal)(const Axis& axis, const uint8_t* const* in, uint8_t* const* out, int64_t lines);
    // Output row `row` of the axis from axis.count[row] lines of `bytes` bytes, with three more readable lines in
    // the list. Nothing past the end of a line is touched.
    void (*vertical)(const Axis& axis, int64_t row, const uint8_t* const* in, int64_t bytes, uint8_t* out);
    // One window (planes: its first pixel in each channel) as four patches.
    Emit emit[2][2][2];  // [patch: index in kPatches][layout][dtype]
    // Copies lines of 64 bytes past the caches; `to` is aligned to 64 bytes.
    void (*stream)(void* to, const void* from, int64_t lines);
    // Orders the streamed stores before what follows.
    void (*fence)();
    const EmitLines (*emit_lines)[2][2];  // as `emit`; may be nullptr
    // `deinterleave` and `horizontal` at once, of lines <= kBatch lines of pixels, row_bytes apart: channel c of line i goes
    // to out[3 * i + c]. False: this axis does not allow it, and nothing was done. May be nullptr.
    bool (*horizontal_pixels)(const Axis& axis, const uint8_t* rgb, int64_t row_bytes, uint8_t* const* out, int64_t lines);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

// What `emit` is where the arithmetic is not exact: every value looked up.
template <typename T, int kFrames, int64_t kPatch>
void by_table(const uint8_t* const planes[3], int64_t stride, const Normaliser& norm, void* out) {
    kScalarKernels.emit[kPatch == kPatches[0] ? 0 : 1][kFrames == 2 ? 0 : 1][sizeof(T) == 4 ? 0 : 1](planes, stride,
                                                                                                   norm, out);
}

int available_isas();
constexpr int kNoIsa = -1;
int usable_isa(int isa);  // VT_ISA_AUTO: the best; kNoIsa: not on this machine

// The one of three that is to run; nullptr: not on this machine.
template <typename T>
T* pick(int isa, T* avx512, T* avx2, T* scalar) {
    switch (usable_isa(isa)) {
        case VT_ISA_AVX512: return avx512;
        case VT_ISA_AVX2: return avx2;
        case VT_ISA_SCALAR: return scalar;
        default: return nullptr;
    }
}

const Kernels* kernels_of(int isa);  // VT_ISA_AUTO: the best; nullptr: not on this machine

void vertical_scalar(const Axis& axis, int64_t row, const uint8_t* const* in, int64_t begin, int64_t end, uint8_t* out);
void horizontal_scalar(const Axis& axis, const uint8_t* const* in, uint8_t* const* out, int64_t lines);

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    __builtin_memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t to_bfloat16(float value) {  // nearest, ties to even
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace vtengine
