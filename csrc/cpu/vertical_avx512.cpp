// AVX-512: lines of planes resampled along the columns.
#if defined(__x86_64__)
#include "levels_avx512.h"

namespace vtengine {
namespace avx512 {
namespace {

// Four lines of 64 bytes -> four registers whose 32-bit lanes hold one byte of each line.
VT_AVX512 inline void interleave(const __m512i line[4], __m512i* to, int step) {
    const __m512i a = _mm512_unpacklo_epi8(line[0], line[1]), b = _mm512_unpackhi_epi8(line[0], line[1]);
    const __m512i c = _mm512_unpacklo_epi8(line[2], line[3]), d = _mm512_unpackhi_epi8(line[2], line[3]);
    to[0] = _mm512_unpacklo_epi16(a, c);
    to[step] = _mm512_unpackhi_epi16(a, c);
    to[2 * step] = _mm512_unpacklo_epi16(b, d);
    to[3 * step] = _mm512_unpackhi_epi16(b, d);
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
            total[0][i] = total[1][i] = _mm512_setzero_si512();
            total[2][i] = _mm512_set1_epi32(kStart);
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
        for (int i = 0; i < 4; ++i)
            total[0][i] = joined(total[0][i], total[1][i], total[2][i]);
        _mm512_mask_storeu_epi8(out + at, mask, pack(total[0]));
    }
}

}  // namespace

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
