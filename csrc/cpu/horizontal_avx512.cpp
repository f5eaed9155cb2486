// AVX-512: lines of planes, or of pixels, resampled along the rows.
#if defined(__x86_64__)
#include <algorithm>

#include "levels_avx512.h"

namespace vtengine {
namespace avx512 {
namespace {

VT_AVX512 inline void store_in_order(uint8_t* to, const __m512i level[4]) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, pack(level)));
}

VT_AVX512 inline void store_register(uint8_t* to, __m512i level) {
    level = _mm512_max_epi32(_mm512_srai_epi32(level, kLevelBits), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(level));
}

// Lines that a horizontal pass reads, neighbours `step` bytes apart: 1 in planes, 3 in interleaved pixels.
struct Source {
    const uint8_t* const* line;
    int step;

    VT_AVX512 __m512i index(const WideQuad& quad) const {
        const __m512i at = _mm512_load_si512(quad.index);
        return step == 1 ? at : _mm512_add_epi8(_mm512_add_epi8(at, at), at);
    }
    VT_AVX512 __m512i taps(int64_t i, int64_t offset, __m512i index) const {
        return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(line[i] + offset));
    }
};

// 64 outputs with up to four taps.
VT_AVX512 void short_group(const WideQuad* quad, const int32_t* window, Source in, uint8_t* const* out,
                           int64_t lines, int64_t at) {
    __m512i index[kWideGroup], w[kWideGroup][1][3];
    int64_t offset[kWideGroup];
#pragma GCC unroll 4
    for (int r = 0; r < kWideGroup; ++r) {
        index[r] = in.index(quad[r]);
        offset[r] = in.step * window[r];
        w[r][0][0] = _mm512_load_si512(quad[r].w2);
        w[r][0][1] = _mm512_load_si512(quad[r].w1);
        w[r][0][2] = _mm512_load_si512(quad[r].w0);
    }
    for (int64_t line = 0; line < lines; ++line) {
        __m512i level[kWideGroup];
#pragma GCC unroll 4
        for (int r = 0; r < kWideGroup; ++r) {
            const __m512i x = in.taps(line, offset[r], index[r]);
            level[r] = levels<1>(&x, w[r]);
        }
        store_in_order(out[line] + at, level);
    }
}

// 16 outputs.
template <int Q>
VT_AVX512 void group(const WideQuad* quad, const int32_t* window, Source in, uint8_t* const* out, int64_t lines,
                     int64_t at) {
    __m512i index[Q], w[Q][3];
    int64_t offset[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
        const WideQuad& entry = quad[kWideGroup * q];
        index[q] = in.index(entry);
        offset[q] = in.step * window[kWideGroup * q];
        w[q][0] = _mm512_load_si512(entry.w2);
        w[q][1] = _mm512_load_si512(entry.w1);
        w[q][2] = _mm512_load_si512(entry.w0);
    }
    for (int64_t line = 0; line < lines; ++line) {
        __m512i x[Q];
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) x[q] = in.taps(line, offset[q], index[q]);
        store_register(out[line] + at, levels<Q>(x, w));
    }
}

// Any number of entries, any span.
VT_AVX512 void long_group(const WideQuad* quad, const int32_t* window, int32_t used, bool gather, Source in,
                          uint8_t* const* out, int64_t lines, int64_t at) {
    for (int64_t line = 0; line < lines; ++line) {
        __m512i total2 = _mm512_setzero_si512(), total1 = total2, total0 = _mm512_set1_epi32(kStart);
        for (int32_t e = 0; e < kWideGroup * used; e += kWideGroup) {
            const __m512i x = gather ? _mm512_i32gather_epi32(_mm512_load_si512(quad[e].index), in.line[line] + window[e], 1)
                                     : in.taps(line, in.step * window[e], in.index(quad[e]));
            total2 = _mm512_dpbusd_epi32(total2, x, _mm512_load_si512(quad[e].w2));
            total1 = _mm512_dpbusd_epi32(total1, x, _mm512_load_si512(quad[e].w1));
            total0 = _mm512_dpbusd_epi32(total0, x, _mm512_load_si512(quad[e].w0));
        }
        store_register(out[line] + at, joined(total2, total1, total0));
    }
}

// Group g of the axis.
VT_AVX512 void resample(const WidePack& pack, size_t g, Source in, uint8_t* const* out, int64_t lines) {
    const int32_t begin = pack.begin[g], *used = &pack.used[kWideGroup * g];
    const WideQuad* quad = &pack.entries[begin];
    const int32_t* window = &pack.window[begin];
    int64_t at = static_cast<int64_t>(g) * kWideGroup * kWideLanes;
    if (pack.begin[g + 1] - begin == kWideGroup && !pack.gather) return short_group(quad, window, in, out, lines, at);
    for (int r = 0; r < kWideGroup; ++r, ++quad, ++window, at += kWideLanes) {
        if (pack.gather || used[r] > 4) {
            long_group(quad, window, used[r], pack.gather, in, out, lines, at);
        } else if (used[r] == 1) {
            group<1>(quad, window, in, out, lines, at);
        } else if (used[r] == 2) {
            group<2>(quad, window, in, out, lines, at);
        } else if (used[r] == 3) {
            group<3>(quad, window, in, out, lines, at);
        } else {
            group<4>(quad, window, in, out, lines, at);
        }
    }
}

}  // namespace

VT_AVX512 void horizontal(const Axis& axis, const uint8_t* const* in, uint8_t* const* out, int64_t lines) {
    if (!axis.narrow) return horizontal_scalar(axis, in, out, lines);
    const WidePack& pack = axis.wide();
    for (size_t g = 0; g + 1 < pack.begin.size(); ++g) resample(pack, g, {in, 1}, out, lines);
}

VT_AVX512 bool horizontal_pixels(const Axis& axis, const uint8_t* rgb, int64_t row_bytes, uint8_t* const* out,
                                 int64_t lines) {
    if (!axis.narrow || !axis.wide().pixels) return false;
    const WidePack& pack = axis.wide();
    const uint8_t* line[3 * kBatch];
    uint8_t tail[kBatch][512];  // the pixels of 64 outputs with as few taps, and the padding: less than 400 bytes
    for (int64_t i = 0; i < 3 * lines; ++i) line[i] = rgb + i / 3 * row_bytes + i % 3;
    for (size_t g = 0; g + 1 < pack.begin.size(); ++g) {
        if (g == pack.tail) {  // nothing past the image may be read
            const int64_t first = 3 * pack.tail_pixel, size = 3 * axis.size_in - first;
            for (int64_t i = 0; i < lines; ++i) std::copy_n(rgb + i * row_bytes + first, size, tail[i]);
            for (int64_t i = 0; i < 3 * lines; ++i) line[i] = tail[i / 3] + i % 3 - first;
        }
        resample(pack, g, {line, 3}, out, 3 * lines);
    }
    return true;
}

}  // namespace avx512
}  // namespace vtengine
#endif
