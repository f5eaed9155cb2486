// AVX2: weights in two signed 16-bit words, two taps per 32-bit lane, two exact multiply-adds.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels_avx2.h"

namespace vtengine {
namespace avx2 {
namespace {

VT_AVX2 inline __m256i loaded(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }

VT_AVX2 inline __m128i window(const uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// low + 65536 high, rounded and shifted down to levels.
VT_AVX2 inline __m256i levels(__m256i low, __m256i high) {
    const __m256i total = _mm256_add_epi32(low, _mm256_slli_epi32(high, 16));
    return _mm256_srai_epi32(total, kPrecisionBits);
}

VT_AVX2 inline __m256i picked(const uint8_t* line, const int32_t* windows, __m256i index) {
    const __m256i from = _mm256_inserti128_si256(_mm256_castsi128_si256(window(line + windows[0])),
                                                 window(line + windows[1]), 1);
    return _mm256_shuffle_epi8(from, index);
}

VT_AVX2 inline void store_levels(uint8_t* to, __m256i low, __m256i high) {
    const __m256i words = _mm256_packs_epi32(levels(low, high), _mm256_setzero_si256());
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const __m128i all = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), all);
}

// Few entries: their weights stay in registers over all lines.
template <int E>
VT_AVX2 void group(const PairQuad* quad, const int32_t* windows, const uint8_t* const* in, uint8_t* const* out,
                   int64_t lines, int64_t at) {
    __m256i index[E], w_low[E], w_high[E];
    for (int e = 0; e < E; ++e) {
        index[e] = loaded(quad[e].index);
        w_low[e] = loaded(quad[e].low);
        w_high[e] = loaded(quad[e].high);
    }
    for (int64_t line = 0; line < lines; ++line) {
        __m256i low = _mm256_set1_epi32(1 << (kPrecisionBits - 1)), high = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int e = 0; e < E; ++e) {
            const __m256i x = picked(in[line], windows + 2 * e, index[e]);
            low = _mm256_add_epi32(low, _mm256_madd_epi16(x, w_low[e]));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(x, w_high[e]));
        }
        store_levels(out[line] + at, low, high);
    }
}

// Many entries: their weights are read once for L lines.
template <int L>
VT_AVX2 void long_group(const PairQuad* quad, const int32_t* windows, int32_t entries, const uint8_t* const* in,
                        uint8_t* const* out, int64_t at) {
    __m256i low[L], high[L];
    for (int l = 0; l < L; ++l) {
        low[l] = _mm256_set1_epi32(1 << (kPrecisionBits - 1));
        high[l] = _mm256_setzero_si256();
    }
    for (int32_t e = 0; e < entries; ++e) {
        const __m256i index = loaded(quad[e].index), w_low = loaded(quad[e].low), w_high = loaded(quad[e].high);
#pragma GCC unroll 3
        for (int l = 0; l < L; ++l) {
            const __m256i x = picked(in[l], windows + 2 * e, index);
            low[l] = _mm256_add_epi32(low[l], _mm256_madd_epi16(x, w_low));
            high[l] = _mm256_add_epi32(high[l], _mm256_madd_epi16(x, w_high));
        }
    }
    for (int l = 0; l < L; ++l) store_levels(out[l] + at, low[l], high[l]);
}

VT_AVX2 void column(const int32_t* weight, int count, const uint8_t* const* in, int64_t at, uint8_t* out) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i low[4], high[4];
    for (int i = 0; i < 4; ++i) {
        low[i] = _mm256_set1_epi32(1 << (kPrecisionBits - 1));
        high[i] = zero;
    }
    for (int t = 0; t < count; t += 2) {
        const uint8_t* second = in[t + 1 < count ? t + 1 : t];  // a line past the last has weight 0
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in[t] + at));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + at));
        const __m256i first = _mm256_unpacklo_epi8(a, b), last = _mm256_unpackhi_epi8(a, b);
        const __m256i x[4] = {_mm256_unpacklo_epi8(first, zero), _mm256_unpackhi_epi8(first, zero),
                              _mm256_unpacklo_epi8(last, zero), _mm256_unpackhi_epi8(last, zero)};
        const __m256i w_low = _mm256_set1_epi32(weight[t]), w_high = _mm256_set1_epi32(weight[t + 1]);
        for (int i = 0; i < 4; ++i) {
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(x[i], w_low));
            high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(x[i], w_high));
        }
    }
    const __m256i front = _mm256_packs_epi32(levels(low[0], high[0]), levels(low[1], high[1]));
    const __m256i back = _mm256_packs_epi32(levels(low[2], high[2]), levels(low[3], high[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), _mm256_packus_epi16(front, back));
}

}  // namespace

VT_AVX2 void horizontal(const Axis& axis, const uint8_t* const* in, uint8_t* const* out, int64_t lines) {
    const PairPack& pack = axis.pair();
    if (!pack.fits) return horizontal_scalar(axis, in, out, lines);
    for (size_t g = 0; g + 1 < pack.begin.size(); ++g) {
        const int32_t begin = pack.begin[g], entries = pack.begin[g + 1] - begin;
        const PairQuad* quad = &pack.entries[begin];
        const int32_t* windows = &pack.window[2 * begin];
        const int64_t at = static_cast<int64_t>(g) * kPairLanes;
        if (entries == 1) {
            group<1>(quad, windows, in, out, lines, at);
        } else if (entries == 2) {
            group<2>(quad, windows, in, out, lines, at);
        } else if (entries == 3) {
            group<3>(quad, windows, in, out, lines, at);
        } else {
            int64_t line = 0;
            for (; line + 3 <= lines; line += 3) long_group<3>(quad, windows, entries, in + line, out + line, at);
            for (; line < lines; ++line) long_group<1>(quad, windows, entries, in + line, out + line, at);
        }
    }
}

VT_AVX2 void vertical(const Axis& axis, int64_t row, const uint8_t* const* in, int64_t bytes, uint8_t* out) {
    const ColumnPack& pack = axis.column();
    const int32_t* weight = &pack.words[2 * row * pack.pairs];
    int64_t at = 0;
    for (; at + 32 <= bytes; at += 32) column(weight, axis.count[row], in, at, out);
    vertical_scalar(axis, row, in, at, bytes, out);
}

}  // namespace avx2
}  // namespace vtengine
#endif
