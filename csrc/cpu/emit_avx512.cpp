// AVX-512: pixels to planes, and windows of levels to patches of floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "values_avx512.h"

namespace vtengine {
namespace avx512 {
namespace {

// Where byte i of channel c lies in three registers of interleaved pixels.
struct Indices {
    alignas(64) uint8_t low[3][64], high[3][64];
    uint64_t from_third[3];
    Indices() {
        for (int c = 0; c < 3; ++c) {
            from_third[c] = 0;
            for (int i = 0; i < 64; ++i) {
                const int at = 3 * i + c;
                low[c][i] = static_cast<uint8_t>(at < 128 ? at : 0);
                high[c][i] = static_cast<uint8_t>(at < 128 ? 0 : at - 128);
                if (at >= 128) from_third[c] |= 1ull << i;
            }
        }
    }
};

VT_AVX512 void deinterleave(const uint8_t* rgb, int64_t pixels, uint8_t* const planes[3], const uint8_t* ahead) {
    static const Indices indices;
    for (int64_t at = 0; at < pixels; at += 64) {
        const int64_t bytes = 3 * (pixels - at);
        __m512i part[3];
        for (int i = 0; i < 3; ++i) {
            const int64_t left = bytes - 64 * i;
            const __mmask64 mask = left >= 64 ? ~0ull : left <= 0 ? 0 : ~0ull >> (64 - left);
            part[i] = _mm512_maskz_loadu_epi8(mask, rgb + 3 * at + 64 * i);
            _mm_prefetch(reinterpret_cast<const char*>(ahead + 3 * at + 64 * i), _MM_HINT_T0);
        }
        for (int c = 0; c < 3; ++c) {
            const __m512i two = _mm512_permutex2var_epi8(part[0], _mm512_load_si512(indices.low[c]), part[1]);
            const __m512i all = _mm512_mask_permutexvar_epi8(two, indices.from_third[c],
                                                             _mm512_load_si512(indices.high[c]), part[2]);
            _mm512_storeu_si512(planes[c] + at, all);  // the padding of the plane takes what is too much
        }
    }
}

// kPatch values of each of kPatch rows, 16 at a time: of 14 the next row overwrites the two that are too many.
template <int kFrames, int64_t kPatch>
VT_AVX512 inline void emit_channel(const uint8_t* from, int64_t stride, const Channel& k, float* to) {
    __m512 row[kPatch];
#pragma GCC unroll 16
    for (int y = 0; y < kPatch; ++y) row[y] = values(from + y * stride, k);
#pragma GCC unroll 16
    for (int y = 0; y < kPatch; ++y) _mm512_storeu_ps(to + y * kPatch, row[y]);
    if (kFrames == 2) {
#pragma GCC unroll 16
        for (int y = 0; y < kPatch; ++y) _mm512_storeu_ps(to + (kPatch + y) * kPatch, row[y]);
    }
}

template <int kFrames, int64_t kPatch>
VT_AVX512 void emit_float(const uint8_t* const planes[3], int64_t stride, const Normaliser& norm, void* out) {
    if (!norm.exact) return by_table<float, kFrames, kPatch>(planes, stride, norm, out);
    float* to = static_cast<float*>(out);
    for (int patch = 0; patch < 4; ++patch) {
        const int64_t corner = (patch / 2) * kPatch * stride + (patch % 2) * kPatch;
        for (int c = 0; c < 3; ++c) {
            emit_channel<kFrames, kPatch>(planes[c] + corner, stride, channel(norm, c), to);
            to += kFrames * kPatch * kPatch;
        }
    }
}

// kPatch rows of as many words from the low ends of registers. Of 14 a row spills two into the next one, the last one
// does not.
template <int64_t kPatch>
VT_AVX512 inline void store_rows(const __m256i row[kPatch], uint16_t* to) {
#pragma GCC unroll 16
    for (int y = 0; y < kPatch - 1; ++y) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + y * kPatch), row[y]);
    _mm256_mask_storeu_epi16(to + (kPatch - 1) * kPatch, 0xffff >> (16 - kPatch), row[kPatch - 1]);
}

// Two patches side by side at a time: their pixels fit one register.
template <int kFrames, int64_t kPatch>
VT_AVX512 void emit_bfloat16(const uint8_t* const planes[3], int64_t stride, const Normaliser& norm, void* out) {
    constexpr int64_t kValues = kPatch * kPatch;
    uint16_t* to = static_cast<uint16_t*>(out);
    for (int c = 0; c < 3; ++c) {
        __m512i table[8];
        for (int i = 0; i < 8; ++i) table[i] = _mm512_loadu_si512(norm.table16[c] + 32 * i);
        for (int half = 0; half < 2; ++half) {
            const uint8_t* from = planes[c] + half * kPatch * stride;
            __m256i left[kPatch], right[kPatch];
#pragma GCC unroll 16
            for (int y = 0; y < kPatch; ++y) {
                const __m512i both = lookup(from + y * stride, table);
                left[y] = _mm512_castsi512_si256(both);
                right[y] = _mm512_castsi512_si256(_mm512_alignr_epi32(both, both, kPatch / 2));
            }
            uint16_t* corner = to + (6 * half + c) * kFrames * kValues;  // a patch is three channels
            for (int frame = 0; frame < kFrames; ++frame) {
                store_rows<kPatch>(left, corner + frame * kValues);
                store_rows<kPatch>(right, corner + (3 * kFrames + frame) * kValues);
            }
        }
    }
}

VT_AVX512 void stream(void* to, const void* from, int64_t lines) {
    const char* source = static_cast<const char*>(from);
    char* target = static_cast<char*>(to);
    for (int64_t i = 0; i < lines; ++i) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(target + 64 * i), _mm512_loadu_si512(source + 64 * i));
    }
}

void fence() { _mm_sfence(); }

}  // namespace
}  // namespace avx512

const Kernels kAvx512Kernels = {
    avx512::deinterleave,
    avx512::horizontal,
    avx512::vertical,
    {{{avx512::emit_float<2, 14>, avx512::emit_bfloat16<2, 14>}, {avx512::emit_float<1, 14>, avx512::emit_bfloat16<1, 14>}},
     {{avx512::emit_float<2, 16>, avx512::emit_bfloat16<2, 16>}, {avx512::emit_float<1, 16>, avx512::emit_bfloat16<1, 16>}}},
    avx512::stream,
    avx512::fence,
    avx512::kEmitLines,
    avx512::horizontal_pixels,
};

}  // namespace vtengine
#endif
