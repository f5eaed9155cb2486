// AVX-512: levels to values, a register at a time.
#pragma once

#include <immintrin.h>

#include "kernels_avx512.h"

namespace vtengine {
namespace avx512 {

struct Channel {
    __m512 unit_high, unit_low, mean, inverse_high, inverse_low;
};

VT_AVX512 inline Channel channel(const Normaliser& norm, int c) {
    return {_mm512_set1_ps(norm.unit_high), _mm512_set1_ps(norm.unit_low), _mm512_set1_ps(norm.mean[c]),
            _mm512_set1_ps(norm.inverse_high[c]), _mm512_set1_ps(norm.inverse_low[c])};
}

VT_AVX512 inline __m512 values(const uint8_t* from, const Channel& k) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m512 level = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    const __m512 unit = _mm512_fmadd_ps(level, k.unit_high, _mm512_mul_ps(level, k.unit_low));
    const __m512 centered = _mm512_sub_ps(unit, k.mean);
    return _mm512_fmadd_ps(centered, k.inverse_high, _mm512_mul_ps(centered, k.inverse_low));
}

// 32 bytes looked up in a table of 256 words, which fills eight registers.
VT_AVX512 inline __m512i lookup(const uint8_t* from, const __m512i table[8]) {
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
    const __m512i low = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(table[0], index, table[1]),
                                                _mm512_permutex2var_epi16(table[2], index, table[3]));
    const __m512i high = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(table[4], index, table[5]),
                                                 _mm512_permutex2var_epi16(table[6], index, table[7]));
    return _mm512_mask_blend_epi16(bit7, low, high);
}

}  // namespace avx512
}  // namespace vtengine
