// AVX-512: windows of levels to whole cache lines of values, made in registers and stored past the caches.
#if defined(__x86_64__)
#include "values_avx512.h"

namespace vtengine {
namespace avx512 {
namespace {

// A register of float32 from as many levels.
struct Floats {
    static constexpr int64_t kLanes = 16;
    Channel channel_;

    VT_AVX512 Floats(const Normaliser& norm, int c) : channel_(channel(norm, c)) {}
    VT_AVX512 __m512i made(const uint8_t* from) const { return _mm512_castps_si512(values(from, channel_)); }

    // The lanes [begin, begin + kLanes) of two registers: the index, and the choice.
    VT_AVX512 static __m512i index(int64_t begin) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(begin)));
    }
    VT_AVX512 static __m512i chosen(__m512i a, __m512i index, __m512i b) { return _mm512_permutex2var_epi32(a, index, b); }
};

// A register of bfloat16, likewise.
struct Words {
    static constexpr int64_t kLanes = 32;
    __m512i table_[8];

    VT_AVX512 Words(const Normaliser& norm, int c) {
        for (int i = 0; i < 8; ++i) table_[i] = _mm512_loadu_si512(norm.table16[c] + 32 * i);
    }
    VT_AVX512 __m512i made(const uint8_t* from) const { return lookup(from, table_); }

    VT_AVX512 static __m512i index(int64_t begin) {
        const __m512i even = _mm512_mullo_epi32(Floats::index(0), _mm512_set1_epi32(0x00020002));
        const __m512i lane = _mm512_add_epi32(even, _mm512_set1_epi32(0x00010000));
        return _mm512_add_epi16(lane, _mm512_set1_epi16(static_cast<short>(begin)));
    }
    VT_AVX512 static __m512i chosen(__m512i a, __m512i index, __m512i b) { return _mm512_permutex2var_epi16(a, index, b); }
};

// Values that come one register after another and may begin anywhere in a line.
template <typename Values>
struct Writer {
    static constexpr int64_t kLanes = Values::kLanes, kBytes = 64 / kLanes;
    char* line;
    int64_t held;         // values that wait for the rest of their line:
    __m512i last, index;  // the last ones of `last`

    VT_AVX512 Writer(char* to, const uint8_t* staging, int64_t held_bytes)
        : line(to),
          held(held_bytes / kBytes),
          last(_mm512_loadu_si512(staging + held_bytes - 64)),
          index(Values::index(kLanes - held)) {}

    VT_AVX512 void append(__m512i next) {
        store(next);
        last = next;
    }

    // The first four of `next`.
    VT_AVX512 void append_four(__m512i next) {
        held += 4;
        if (held >= kLanes) {
            store(next);
            held -= kLanes;
        }
        last = _mm512_alignr_epi32(next, last, 4 * kBytes / 4);
        index = Values::index(kLanes - held);
    }

    VT_AVX512 void store(__m512i next) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(line), Values::chosen(last, index, next));
        line += 64;
    }

    VT_AVX512 int64_t keep(uint8_t* staging) const {
        _mm512_storeu_si512(staging + held * kBytes - 64, last);
        return held * kBytes;
    }
};

// The levels of a window in the order of its values. 16 at a time: of 14 the next row overwrites the two that are too many.
template <int64_t kPatch>
VT_AVX512 void arrange(const uint8_t* const planes[3], int64_t stride, uint8_t* to) {
    for (int part = 0; part < 12; ++part) {
        const int patch = part / 3;
        const uint8_t* from = planes[part % 3] + (patch / 2) * kPatch * stride + (patch % 2) * kPatch;
#pragma GCC unroll 16
        for (int y = 0; y < kPatch; ++y) {
            const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + y * stride));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + y * kPatch), row);
        }
        to += kPatch * kPatch;
    }
}

template <typename Values, int kFrames, int64_t kPatch>
VT_AVX512 int64_t emit_lines(const uint8_t* const planes[3], int64_t stride, const Normaliser& norm, char* line,
                             uint8_t* staging, int64_t held) {
    constexpr int64_t kArea = kPatch * kPatch, kWhole = kArea / Values::kLanes, kRest = kArea % Values::kLanes;
    constexpr int64_t kRegisters = kWhole + (kRest > 0);
    static_assert(kRest == 0 || kRest == 4, "what is left of a channel is appended four by four");
    alignas(64) uint8_t level[12 * kArea + 64];
    arrange<kPatch>(planes, stride, level);
    Writer<Values> out(line, staging, held);
    for (int part = 0; part < 12; ++part) {
        const Values channel(norm, part % 3);
        __m512i value[kRegisters];
#pragma GCC unroll 17
        for (int i = 0; i < kRegisters; ++i) value[i] = channel.made(level + part * kArea + i * Values::kLanes);
#pragma GCC unroll 2
        for (int frame = 0; frame < kFrames; ++frame) {
#pragma GCC unroll 17
            for (int i = 0; i < kWhole; ++i) out.append(value[i]);
            if (kRest > 0) out.append_four(value[kRegisters - 1]);
        }
    }
    return out.keep(staging);
}

}  // namespace

const EmitLines kEmitLines[2][2][2] = {
    {{emit_lines<Floats, 2, 14>, emit_lines<Words, 2, 14>}, {emit_lines<Floats, 1, 14>, emit_lines<Words, 1, 14>}},
    {{emit_lines<Floats, 2, 16>, emit_lines<Words, 2, 16>}, {emit_lines<Floats, 1, 16>, emit_lines<Words, 1, 16>}},
};

}  // namespace avx512
}  // namespace vtengine
#endif
