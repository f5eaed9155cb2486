// Plain C++: every machine, and the truth that the vector kernels are tested against.
#include <cstring>

#include "kernels.h"

namespace vtengine {
namespace {

constexpr int32_t kHalf = 1 << (kPrecisionBits - 1);

inline uint8_t clip(int32_t total) {
    const int32_t level = total >> kPrecisionBits;
    return static_cast<uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
}

void deinterleave(const uint8_t* rgb, int64_t pixels, uint8_t* const planes[3], const uint8_t*) {
    for (int64_t i = 0; i < pixels; ++i) {
        for (int c = 0; c < 3; ++c) planes[c][i] = rgb[3 * i + c];
    }
}

void vertical(const Axis& axis, int64_t row, const uint8_t* const* in, int64_t bytes, uint8_t* out) {
    vertical_scalar(axis, row, in, 0, bytes, out);
}

inline const float* table_of(const Normaliser& norm, int c, float) { return norm.table + 256 * c; }
inline const uint16_t* table_of(const Normaliser& norm, int c, uint16_t) { return norm.table16[c]; }

template <typename T, int kFrames, int64_t kPatch>
void emit(const uint8_t* const planes[3], int64_t stride, const Normaliser& norm, void* out) {
    T* to = static_cast<T*>(out);
    for (int patch = 0; patch < 4; ++patch) {
        const int64_t corner = (patch / 2) * kPatch * stride + (patch % 2) * kPatch;
        for (int c = 0; c < 3; ++c) {
            const T* table = table_of(norm, c, T());
            for (int64_t y = 0; y < kPatch; ++y) {
                const uint8_t* from = planes[c] + corner + y * stride;
                for (int64_t x = 0; x < kPatch; ++x) to[y * kPatch + x] = table[from[x]];
            }
            if (kFrames == 2) std::memcpy(to + kPatch * kPatch, to, sizeof(T) * kPatch * kPatch);
            to += kFrames * kPatch * kPatch;
        }
    }
}

void stream(void* to, const void* from, int64_t lines) { std::memcpy(to, from, 64 * lines); }
void fence() {}

}  // namespace

void horizontal_scalar(const Axis& axis, const uint8_t* const* in, uint8_t* const* out, int64_t lines) {
    for (int64_t line = 0; line < lines; ++line) {
        for (int64_t x = 0; x < axis.size_out; ++x) {
            const int32_t* weight = &axis.weight[x * axis.taps];
            const uint8_t* from = in[line] + axis.first[x];
            uint32_t total = kHalf;
            for (int32_t t = 0; t < axis.count[x]; ++t) total += static_cast<uint32_t>(from[t] * weight[t]);
            out[line][x] = clip(static_cast<int32_t>(total));
        }
    }
}

void vertical_scalar(const Axis& axis, int64_t row, const uint8_t* const* in, int64_t begin, int64_t end,
                     uint8_t* out) {
    const int32_t* weight = &axis.weight[row * axis.taps];
    uint32_t total[64];
    for (int64_t at = begin; at < end; at += 64) {
        const int64_t size = end - at < 64 ? end - at : 64;
        for (int64_t i = 0; i < size; ++i) total[i] = kHalf;
        for (int32_t t = 0; t < axis.count[row]; ++t) {
            const uint8_t* from = in[t] + at;
            for (int64_t i = 0; i < size; ++i) total[i] += static_cast<uint32_t>(from[i] * weight[t]);
        }
        for (int64_t i = 0; i < size; ++i) out[at + i] = clip(static_cast<int32_t>(total[i]));
    }
}

const Kernels kScalarKernels = {
    deinterleave,
    horizontal_scalar,
    vertical,
    {{{emit<float, 2, 14>, emit<uint16_t, 2, 14>}, {emit<float, 1, 14>, emit<uint16_t, 1, 14>}},
     {{emit<float, 2, 16>, emit<uint16_t, 2, 16>}, {emit<float, 1, 16>, emit<uint16_t, 1, 16>}}},
    stream,
    fence,
    nullptr,
    nullptr,
};

}  // namespace vtengine
