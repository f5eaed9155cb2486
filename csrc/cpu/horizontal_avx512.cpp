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

// Lines that a horizontal pass reads, neighbours `step` bytes apart: 1 in planes, 3 in interleaved pixels.
struct Source {
    const uint8_t* const* line;
    int step;

    VT_AVX512 __m512i index(const WideQuad& quad) const {
        const __m512i at = _mm512_load_si512(quad.index);
        return step == 1 ? at : _mm512_add_epi8(_mm512_add_epi8(at, at), at);
    }
    VT_AVX512 __m512i taps(int64_t i, int32_t window, __m512i index) const {
        return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(line[i] + step * window));
    }
};

// 64 outputs with up to four taps.
VT_AVX512 void short_group(const WideQuad* quad, const int32_t* window, const Source& in, uint8_t* const* out,
                           int64_t lines, int64_t at) {
    __m512i index[kWideGroup], w[kWideGroup][1][3];
#pragma GCC unroll 4
    for (int r = 0; r < kWideGroup; ++r) {
        index[r] = in.index(quad[r]);
        w[r][0][0] = _mm512_load_si512(quad[r].w2);
        w[r][0][1] = _mm512_load_si512(quad[r].w1);
        w[r][0][2] = _mm512_load_si512(quad[r].w0);
    }
    for (int64_t line = 0; line < lines; ++line) {
        __m512i level[kWideGroup];
#pragma GCC unroll 4
        for (int r = 0; r < kWideGroup; ++r) {
            const __m512i x = in.taps(line, window[r], index[r]);
            level[r] = levels<1>(&x, w[r]);
        }
        store_in_order(out[line] + at, level);
    }
}

using Levels = __m512i[kWideGroup];

// 16 outputs, those of register r.
template <int Q>
VT_AVX512 void group(const WideQuad* quad, const int32_t* window, const Source& in, int64_t lines, Levels* level, int r) {
    __m512i index[Q], w[Q][3];
    for (int q = 0; q < Q; ++q) {
        const WideQuad& entry = quad[kWideGroup * q + r];
        index[q] = in.index(entry);
        w[q][0] = _mm512_load_si512(entry.w2);
        w[q][1] = _mm512_load_si512(entry.w1);
        w[q][2] = _mm512_load_si512(entry.w0);
    }
    for (int64_t line = 0; line < lines; ++line) {
        __m512i x[Q];
        for (int q = 0; q < Q; ++q) x[q] = in.taps(line, window[kWideGroup * q + r], index[q]);
        level[line][r] = levels<Q>(x, w);
    }
}

// Any number of entries, any span.
VT_AVX512 void long_group(const WideQuad* quad, const int32_t* window, int32_t entries, bool gather, const Source& in,
                          int64_t lines, Levels* level, int r) {
    for (int64_t line = 0; line < lines; ++line) {
        __m512i total2 = _mm512_setzero_si512(), total1 = total2, total0 = _mm512_set1_epi32(kStart);
        for (int32_t e = r; e < entries; e += kWideGroup) {
            const __m512i x = gather ? _mm512_i32gather_epi32(_mm512_load_si512(quad[e].index), in.line[line] + window[e], 1)
                                     : in.taps(line, window[e], in.index(quad[e]));
            total2 = _mm512_dpbusd_epi32(total2, x, _mm512_load_si512(quad[e].w2));
            total1 = _mm512_dpbusd_epi32(total1, x, _mm512_load_si512(quad[e].w1));
            total0 = _mm512_dpbusd_epi32(total0, x, _mm512_load_si512(quad[e].w0));
        }
        level[line][r] = joined(total2, total1, total0);
    }
}

// Group g of the axis.
VT_AVX512 void resample(const WidePack& pack, size_t g, const Source& in, uint8_t* const* out, int64_t lines) {
    const int32_t begin = pack.begin[g], entries = pack.begin[g + 1] - begin;
    const WideQuad* quad = &pack.entries[begin];
    const int32_t* window = &pack.window[begin];
    const int64_t at = static_cast<int64_t>(g) * kWideGroup * kWideLanes;
    if (entries == kWideGroup && !pack.gather) return short_group(quad, window, in, out, lines, at);
    Levels level[3 * kBatch];
    for (int r = 0; r < kWideGroup; ++r) {
        if (pack.gather || entries > 4 * kWideGroup) {
            long_group(quad, window, entries, pack.gather, in, lines, level, r);
        } else if (entries == 2 * kWideGroup) {
            group<2>(quad, window, in, lines, level, r);
        } else if (entries == 3 * kWideGroup) {
            group<3>(quad, window, in, lines, level, r);
        } else {
            group<4>(quad, window, in, lines, level, r);
        }
    }
    for (int64_t line = 0; line < lines; ++line) store_in_order(out[line] + at, level[line]);
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
    uint8_t tail[kBatch][512];  // 64 outputs of as few taps and the padding: of less than 400 bytes
    for (int64_t i = 0; i < 3 * lines; ++i) line[i] = rgb + i / 3 * row_bytes + i % 3;
    bool copied = false;
    for (size_t g = 0; g + 1 < pack.begin.size(); ++g) {
        const auto window = pack.window.begin();
        const auto span = std::minmax_element(window + pack.begin[g], window + pack.begin[g + 1]);
        const int64_t first = 3 * *span.first, size = 3 * axis.size_in;
        if (!copied && 3 * *span.second + 2 + 64 > size) {  // nothing past the image may be read
            for (int64_t i = 0; i < lines; ++i) std::copy_n(rgb + i * row_bytes + first, size - first, tail[i]);
            for (int64_t i = 0; i < 3 * lines; ++i) line[i] = tail[i / 3] + i % 3 - first;
            copied = true;
        }
        resample(pack, g, {line, 3}, out, 3 * lines);
    }
    return true;
}

}  // namespace avx512
}  // namespace vtengine
#endif
