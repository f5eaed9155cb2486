// AVX-512 with VBMI and VNNI: weights in three signed bytes, four taps per 32-bit lane, three exact dot products.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels_avx512.h"

namespace vtengine {
namespace avx512 {
namespace {

// The rounding constant 2^21 enters as 32 before the two shifts by 8.
constexpr int32_t kStart = 1 << (kPrecisionBits - 1 - 16);

// 16 totals from the four-tap groups x[0..Q) with weights w (entry q: w2, w1, w0), shifted down to levels.
template <int Q>
VT_AVX512 inline __m512i levels(const __m512i* x, const __m512i (*w)[3]) {
    __m512i total = _mm512_set1_epi32(kStart);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) total = _mm512_dpbusd_epi32(total, x[q], w[q][0]);
    total = _mm512_slli_epi32(total, 8);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) total = _mm512_dpbusd_epi32(total, x[q], w[q][1]);
    total = _mm512_slli_epi32(total, 8);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) total = _mm512_dpbusd_epi32(total, x[q], w[q][2]);
    return _mm512_srai_epi32(total, kPrecisionBits);
}

VT_AVX512 inline void store_levels(uint8_t* to, __m512i level) {
    level = _mm512_max_epi32(level, _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(level));
}

VT_AVX512 inline __m512i pick(const uint8_t* from, const WideQuad& quad) {
    return _mm512_permutexvar_epi8(_mm512_load_si512(quad.index), _mm512_loadu_si512(from));
}

VT_AVX512 inline __m512i gather(const uint8_t* from, const WideQuad& quad) {
    return _mm512_i32gather_epi32(_mm512_load_si512(quad.index), from, 1);
}

template <int Q>
VT_AVX512 void group(const WideQuad* quad, const int32_t* window, const uint8_t* const* in, uint8_t* const* out,
                     int64_t lines, int64_t at) {
    __m512i index[Q], w[Q][3];
    for (int q = 0; q < Q; ++q) {
        index[q] = _mm512_load_si512(quad[q].index);
        w[q][0] = _mm512_load_si512(quad[q].w2);
        w[q][1] = _mm512_load_si512(quad[q].w1);
        w[q][2] = _mm512_load_si512(quad[q].w0);
    }
    for (int64_t line = 0; line < lines; ++line) {
        __m512i x[Q];
        for (int q = 0; q < Q; ++q) {
            x[q] = _mm512_permutexvar_epi8(index[q], _mm512_loadu_si512(in[line] + window[q]));
        }
        store_levels(out[line] + at, levels<Q>(x, w));
    }
}

// Any number of entries, any span.
template <__m512i (*kPick)(const uint8_t*, const WideQuad&)>
VT_AVX512 void long_group(const WideQuad* quad, const int32_t* window, int32_t entries, const uint8_t* const* in,
                          uint8_t* const* out, int64_t lines, int64_t at) {
    for (int64_t line = 0; line < lines; ++line) {
        __m512i total2 = _mm512_set1_epi32(kStart), total1 = _mm512_setzero_si512(), total0 = total1;
        for (int32_t e = 0; e < entries; ++e) {
            const __m512i x = kPick(in[line] + window[e], quad[e]);
            total2 = _mm512_dpbusd_epi32(total2, x, _mm512_load_si512(quad[e].w2));
            total1 = _mm512_dpbusd_epi32(total1, x, _mm512_load_si512(quad[e].w1));
            total0 = _mm512_dpbusd_epi32(total0, x, _mm512_load_si512(quad[e].w0));
        }
        total1 = _mm512_add_epi32(_mm512_slli_epi32(total2, 8), total1);
        total0 = _mm512_add_epi32(_mm512_slli_epi32(total1, 8), total0);
        store_levels(out[line] + at, _mm512_srai_epi32(total0, kPrecisionBits));
    }
}

// Four lines of 64 bytes -> four registers whose 32-bit lanes hold one byte of each line.
VT_AVX512 inline void interleave(const __m512i line[4], __m512i* to, int step) {
    const __m512i a = _mm512_unpacklo_epi8(line[0], line[1]), b = _mm512_unpackhi_epi8(line[0], line[1]);
    const __m512i c = _mm512_unpacklo_epi8(line[2], line[3]), d = _mm512_unpackhi_epi8(line[2], line[3]);
    to[0] = _mm512_unpacklo_epi16(a, c);
    to[step] = _mm512_unpackhi_epi16(a, c);
    to[2 * step] = _mm512_unpacklo_epi16(b, d);
    to[3 * step] = _mm512_unpackhi_epi16(b, d);
}

VT_AVX512 inline __m512i pack(const __m512i level[4]) {
    return _mm512_packus_epi16(_mm512_packs_epi32(level[0], level[1]), _mm512_packs_epi32(level[2], level[3]));
}

template <int Q>
VT_AVX512 void column(const int32_t* weight, const uint8_t* const* in, int64_t bytes, uint8_t* out) {
    __m512i w[Q][3];
    for (int q = 0; q < Q; ++q) {
        for (int i = 0; i < 3; ++i) w[q][i] = _mm512_set1_epi32(weight[3 * q + i]);
    }
    for (int64_t at = 0; at < bytes; at += 64) {
        const int64_t left = bytes - at;
        const __mmask64 mask = left >= 64 ? ~0ull : ~0ull >> (64 - left);
        __m512i x[4 * Q], level[4];
        for (int q = 0; q < Q; ++q) {
            __m512i line[4];
            for (int i = 0; i < 4; ++i) line[i] = _mm512_maskz_loadu_epi8(mask, in[4 * q + i] + at);
            interleave(line, x + q, Q);
        }
        for (int i = 0; i < 4; ++i) level[i] = levels<Q>(x + i * Q, w);
        if (left >= 64) {
            _mm512_storeu_si512(out + at, pack(level));
        } else {
            _mm512_mask_storeu_epi8(out + at, mask, pack(level));
        }
    }
}

VT_AVX512 void long_column(const int32_t* weight, int quads, const uint8_t* const* in, int64_t bytes, uint8_t* out) {
    for (int64_t at = 0; at < bytes; at += 64) {
        const int64_t left = bytes - at;
        const __mmask64 mask = left >= 64 ? ~0ull : ~0ull >> (64 - left);
        __m512i total[3][4];
        for (int i = 0; i < 4; ++i) {
            total[0][i] = _mm512_set1_epi32(kStart);
            total[1][i] = total[2][i] = _mm512_setzero_si512();
        }
        for (int q = 0; q < quads; ++q) {
            __m512i line[4], x[4];
            for (int i = 0; i < 4; ++i) line[i] = _mm512_maskz_loadu_epi8(mask, in[4 * q + i] + at);
            interleave(line, x, 1);
            for (int k = 0; k < 3; ++k) {
                const __m512i w = _mm512_set1_epi32(weight[3 * q + k]);
                for (int i = 0; i < 4; ++i) total[k][i] = _mm512_dpbusd_epi32(total[k][i], x[i], w);
            }
        }
        for (int i = 0; i < 4; ++i) {
            const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(total[0][i], 8), total[1][i]);
            const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(high, 8), total[2][i]);
            total[0][i] = _mm512_srai_epi32(all, kPrecisionBits);
        }
        _mm512_mask_storeu_epi8(out + at, mask, pack(total[0]));
    }
}

}  // namespace

VT_AVX512 void horizontal(const Axis& axis, const uint8_t* const* in, uint8_t* const* out, int64_t lines) {
    if (!axis.narrow) return horizontal_scalar(axis, in, out, lines);
    const WidePack& pack = axis.wide();
    for (size_t g = 0; g + 1 < pack.begin.size(); ++g) {
        const int32_t begin = pack.begin[g], entries = pack.begin[g + 1] - begin;
        const WideQuad* quad = &pack.entries[begin];
        const int32_t* window = &pack.window[begin];
        const int64_t at = static_cast<int64_t>(g) * kWideLanes;
        if (pack.gather) {
            long_group<gather>(quad, window, entries, in, out, lines, at);
        } else if (entries == 1) {
            group<1>(quad, window, in, out, lines, at);
        } else if (entries == 2) {
            group<2>(quad, window, in, out, lines, at);
        } else if (entries == 3) {
            group<3>(quad, window, in, out, lines, at);
        } else if (entries == 4) {
            group<4>(quad, window, in, out, lines, at);
        } else {
            long_group<pick>(quad, window, entries, in, out, lines, at);
        }
    }
}

VT_AVX512 void vertical(const Axis& axis, int64_t row, const uint8_t* const* in, int64_t bytes, uint8_t* out) {
    if (!axis.narrow) return vertical_scalar(axis, row, in, 0, bytes, out);
    const ColumnPack& pack = axis.column();
    const int32_t* weight = &pack.bytes[3 * row * pack.quads];
    const int count = axis.count[row], quads = (count + 3) / 4;
    const uint8_t* few[16];
    if (quads <= 4) {  // lines past the last have weight 0: any readable line does
        for (int i = 0; i < 4 * quads; ++i) few[i] = in[i < count ? i : 0];
        if (quads == 1) return column<1>(weight, few, bytes, out);
        if (quads == 2) return column<2>(weight, few, bytes, out);
        if (quads == 3) return column<3>(weight, few, bytes, out);
        return column<4>(weight, few, bytes, out);
    }
    long_column(weight, quads, in, bytes, out);
}

}  // namespace avx512
}  // namespace vtengine
#endif
