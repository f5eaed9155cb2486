// AVX2: pixels to planes, and windows of levels to patches of floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels_avx2.h"

namespace vtengine {
namespace avx2 {
namespace {

// index[c][part]: which bytes of 16 of each third of 48 belong to channel c, and where; 0x80 elsewhere.
struct Indices {
    alignas(16) uint8_t index[3][3][16];
    Indices() {
        for (int c = 0; c < 3; ++c) {
            for (int i = 0; i < 48; ++i) index[c][i / 16][i % 16] = 0x80;
            for (int i = 0; i < 16; ++i) index[c][(3 * i + c) / 16][i] = static_cast<uint8_t>((3 * i + c) % 16);
        }
    }
};

VT_AVX2 inline __m128i bytes16(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

VT_AVX2 void deinterleave(const uint8_t* rgb, int64_t pixels, uint8_t* const planes[3], const uint8_t* ahead) {
    static const Indices indices;
    int64_t at = 0;
    for (; at + 16 <= pixels; at += 16) {
        const uint8_t* from = rgb + 3 * at;
        _mm_prefetch(reinterpret_cast<const char*>(ahead + 3 * at), _MM_HINT_T0);
        const __m128i part[3] = {bytes16(from), bytes16(from + 16), bytes16(from + 32)};
        for (int c = 0; c < 3; ++c) {
            __m128i all = _mm_setzero_si128();
            for (int i = 0; i < 3; ++i) {
                all = _mm_or_si128(all, _mm_shuffle_epi8(part[i], bytes16(indices.index[c][i])));
            }
            _mm_storeu_si128(reinterpret_cast<__m128i*>(planes[c] + at), all);
        }
    }
    uint8_t* const rest[3] = {planes[0] + at, planes[1] + at, planes[2] + at};
    kScalarKernels.deinterleave(rgb + 3 * at, pixels - at, rest, ahead);
}

struct Channel {
    __m256 unit_high, unit_low, mean, inverse_high, inverse_low;
};

VT_AVX2 inline Channel channel(const Normaliser& norm, int c) {
    return {_mm256_set1_ps(norm.unit_high), _mm256_set1_ps(norm.unit_low), _mm256_set1_ps(norm.mean[c]),
            _mm256_set1_ps(norm.inverse_high[c]), _mm256_set1_ps(norm.inverse_low[c])};
}

VT_AVX2 inline __m256 values(const uint8_t* from, const Channel& k) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m256 level = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    const __m256 unit = _mm256_fmadd_ps(level, k.unit_high, _mm256_mul_ps(level, k.unit_low));
    const __m256 centered = _mm256_sub_ps(unit, k.mean);
    return _mm256_fmadd_ps(centered, k.inverse_high, _mm256_mul_ps(centered, k.inverse_low));
}

VT_AVX2 inline __m256i bfloat16(__m256 value) {  // in the low halves of 32-bit lanes
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    return _mm256_srli_epi32(rounded, 16);
}

// kPatch values: 8 from the left edge and 8 up to the right edge, of 14 two of them twice.
template <int64_t kPatch>
VT_AVX2 inline void emit_row(const uint8_t* from, const Channel& k, float* to, int64_t frame, int frames) {
    const __m256 left = values(from, k), right = values(from + kPatch - 8, k);
    for (int i = 0; i < frames; ++i) {
        _mm256_storeu_ps(to + i * frame, left);
        _mm256_storeu_ps(to + i * frame + kPatch - 8, right);
    }
}

template <int64_t kPatch>
VT_AVX2 inline void emit_row(const uint8_t* from, const Channel& k, uint16_t* to, int64_t frame, int frames) {
    const __m256i mixed = _mm256_packus_epi32(bfloat16(values(from, k)), bfloat16(values(from + kPatch - 8, k)));
    const __m256i both = _mm256_permute4x64_epi64(mixed, 0xd8);
    for (int i = 0; i < frames; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * frame), _mm256_castsi256_si128(both));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * frame + kPatch - 8), _mm256_extracti128_si256(both, 1));
    }
}

template <typename T, int kFrames, int64_t kPatch>
VT_AVX2 void emit(const uint8_t* const planes[3], int64_t stride, const Normaliser& norm, void* out) {
    if (!norm.exact) return by_table<T, kFrames, kPatch>(planes, stride, norm, out);
    T* to = static_cast<T*>(out);
    for (int patch = 0; patch < 4; ++patch) {
        const int64_t corner = (patch / 2) * kPatch * stride + (patch % 2) * kPatch;
        for (int c = 0; c < 3; ++c) {
            const Channel k = channel(norm, c);
            for (int y = 0; y < kPatch; ++y) {
                emit_row<kPatch>(planes[c] + corner + y * stride, k, to + y * kPatch, kPatch * kPatch, kFrames);
            }
            to += kFrames * kPatch * kPatch;
        }
    }
}

VT_AVX2 void stream(void* to, const void* from, int64_t lines) {
    const __m256i* source = static_cast<const __m256i*>(from);
    __m256i* target = static_cast<__m256i*>(to);
    for (int64_t i = 0; i < 2 * lines; ++i) _mm256_stream_si256(target + i, _mm256_loadu_si256(source + i));
}

void fence() { _mm_sfence(); }

}  // namespace
}  // namespace avx2

const Kernels kAvx2Kernels = {
    avx2::deinterleave,
    avx2::horizontal,
    avx2::vertical,
    {{{avx2::emit<float, 2, 14>, avx2::emit<uint16_t, 2, 14>}, {avx2::emit<float, 1, 14>, avx2::emit<uint16_t, 1, 14>}},
     {{avx2::emit<float, 2, 16>, avx2::emit<uint16_t, 2, 16>}, {avx2::emit<float, 1, 16>, avx2::emit<uint16_t, 1, 16>}}},
    avx2::stream,
    avx2::fence,
    nullptr,
    nullptr,
};

}  // namespace vtengine
#endif
