// AVX-512 with VBMI and VNNI: weights in three signed bytes, four taps per 32-bit lane, three exact dot products.
#pragma once

#include <immintrin.h>

#include "kernels_avx512.h"

namespace vtengine {
namespace avx512 {

constexpr int32_t kStart = 1 << (kPrecisionBits - 1);
constexpr int kLevelBits = kPrecisionBits - 16;  // fractional bits of what `levels` makes

// 16 levels from the four-tap groups x[0..Q) with weights w (entry q: w2, w1, w0). The lowest byte goes first, and what it
// carries into the next one is all that is left of it.
template <int Q>
VT_AVX512 inline __m512i levels(const __m512i* x, const __m512i (*w)[3]) {
    __m512i total = _mm512_set1_epi32(kStart);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) total = _mm512_dpbusd_epi32(total, x[q], w[q][2]);
    total = _mm512_srai_epi32(total, 8);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) total = _mm512_dpbusd_epi32(total, x[q], w[q][1]);
    total = _mm512_srai_epi32(total, 8);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) total = _mm512_dpbusd_epi32(total, x[q], w[q][0]);
    return total;
}

// The same from three sums.
VT_AVX512 inline __m512i joined(__m512i total2, __m512i total1, __m512i total0) {
    total1 = _mm512_add_epi32(total1, _mm512_srai_epi32(total0, 8));
    return _mm512_add_epi32(total2, _mm512_srai_epi32(total1, 8));
}

// To bytes, clipped to 0..255 on the way: four of each register in turn.
VT_AVX512 inline __m512i pack(const __m512i level[4]) {
    const __m512i low = _mm512_srai_epi16(_mm512_packs_epi32(level[0], level[1]), kLevelBits);
    const __m512i high = _mm512_srai_epi16(_mm512_packs_epi32(level[2], level[3]), kLevelBits);
    return _mm512_packus_epi16(low, high);
}

}  // namespace avx512
}  // namespace vtengine
