// The kernel of some rows and one key head, compiled once per instruction set: the including file defines VT_TARGET (the
// function attribute), VT_LANES (floats per vector) and VT_FMA inside its own namespace; for bfloat16 alone also VT_DOTS, where
// the processor multiplies it. Include it there, more than once.
//
// Tokens pass in blocks that begin at multiples of kBlock. What a query gets from a block, and the order in which it gets
// it, depends on that query alone: a block that several rows share gives each of them the same bits as alone.
#include "lanes.h"

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t EightIndices __attribute__((vector_size(32)));
#if defined(__clang__)
#define VT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (EightIndices){__VA_ARGS__})
#endif

// The first eight lanes of x; where there are sixteen, each with the one eight further on added.
VT_TARGET static inline void fold(const Vec& x, Eight& out) {
    float lane[VT_LANES];
    vec(lane) = x;
    out = *reinterpret_cast<const Eight*>(lane);
    if (VT_LANES == 16) out += *reinterpret_cast<const Eight*>(lane + VT_LANES - 8);
}

// out[i] = the sum of the lanes of x[i].
VT_TARGET static inline void sum_eight(const Vec* x, float* out) {
    Eight v[8], a[4], b[2];
    for (int i = 0; i < 8; ++i) fold(x[i], v[i]);
    for (int i = 0; i < 4; ++i) {
        a[i] = VT_SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) + VT_SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 2; ++i) {
        b[i] = VT_SHUFFLE(a[2 * i], a[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               VT_SHUFFLE(a[2 * i], a[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    *reinterpret_cast<Eight*>(out) =
        VT_SHUFFLE(b[0], b[1], 0, 2, 8, 10, 4, 6, 12, 14) + VT_SHUFFLE(b[0], b[1], 1, 3, 9, 11, 5, 7, 13, 15);
}
#undef VT_SHUFFLE

// A vector of the queries and keys that are multiplied, at i of a head.
#ifdef VT_DOTS
typedef uint16_t Number;
typedef __m512bh Numbers;
template <int kSize>
VT_TARGET static inline Numbers numbers(const Number* at, int i) {
    if (kSize % 32 != 0 && i + 32 > kSize) return reinterpret_cast<Numbers>(_mm512_maskz_loadu_epi16(0xffffu, at + i));
    return reinterpret_cast<Numbers>(_mm512_loadu_si512(at + i));
}
#define VT_DOT(q, k, sum) _mm512_dpbf16_ps(sum, q, k)
#else
typedef float Number;
typedef Vec Numbers;
template <int>
VT_TARGET static inline const Numbers& numbers(const Number* at, int i) { return vec(at + i); }
#define VT_DOT(q, k, sum) VT_FMA(q, k, sum)
#endif

// Q queries against 8 / Q keys; NV vectors of floats per head.
template <int NV, int Q>
VT_TARGET static inline void score(const Number* q, const Number* keys, const int64_t* places, float scale, float* scores) {
    constexpr int kSize = NV * VT_LANES, kKeys = 8 / Q;
    Vec dots[8] = {};
#pragma GCC unroll 4
    for (int i = 0; i < kSize; i += static_cast<int>(sizeof(Numbers) / sizeof(Number))) {
#pragma GCC unroll 8
        for (int t = 0; t < kKeys; ++t) {
            const Numbers k = numbers<kSize>(keys + places[t], i);
#pragma GCC unroll 2
            for (int g = 0; g < Q; ++g) {
                dots[g * kKeys + t] = VT_DOT(numbers<kSize>(q + g * kSize, i), k, dots[g * kKeys + t]);
            }
        }
    }
    float sums[8];
    sum_eight(dots, sums);
    for (int g = 0; g < Q; ++g) {
        for (int t = 0; t < kKeys; ++t) scores[g * kBlock + t] = sums[g * kKeys + t] * scale;
    }
}
#undef VT_DOT

// scores[0..count) of a query become weights relative to its highest score so far; what it summed before fades.
template <int NV>
VT_TARGET static inline void weigh(float* scores, int64_t count, float& highest, float& total, float* sums) {
    const int64_t padded = (count + VT_LANES - 1) / VT_LANES * VT_LANES;
    for (int64_t t = count; t < padded; ++t) scores[t] = -1e30f;
    const float now = highest_of(scores, padded, highest);
    Vec part = {};
    for (int64_t t = 0; t < padded; t += VT_LANES) {
        Vec x = vec(scores + t) - now;
        exp_lanes(x);
        vec(scores + t) = x;
        part += x;
    }
    Vec fade = (highest - now) - Vec{};
    exp_lanes(fade);
    float lane[VT_LANES];
    vec(lane) = fade;
    total = total * lane[0] + sum_lanes(part);
    highest = now;
    if (lane[0] != 1.0f) {
        for (int i = 0; i < NV; ++i) vec(sums + i * VT_LANES) *= fade;
    }
}

// Adds the weighted values of up to 8 tokens to V vectors of each of Q queries.
template <int NV, int Q, int V>
VT_TARGET static inline void add_values(const float* weights, const float* values, const int64_t* places, int64_t count, float* sums) {
    constexpr int kSize = NV * VT_LANES;
    Vec kept[Q][V];
#pragma GCC unroll 8
    for (int g = 0; g < Q; ++g) {
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) kept[g][i] = vec(sums + g * kSize + i * VT_LANES);
    }
    for (int64_t t = 0; t < count; ++t) {
        const float* value = values + places[t];
        Vec v[V];
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) v[i] = vec(value + i * VT_LANES);
#pragma GCC unroll 8
        for (int g = 0; g < Q; ++g) {
            const Vec weight = weights[g * kBlock + t] - Vec{};
#pragma GCC unroll 8
            for (int i = 0; i < V; ++i) kept[g][i] = VT_FMA(v[i], weight, kept[g][i]);
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < Q; ++g) {
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) vec(sums + g * kSize + i * VT_LANES) = kept[g][i];
    }
}

template <int NV, int Q>
VT_TARGET static inline void add_columns(const float* weights, const float* values, const int64_t* places, int64_t count, float* sums) {
    constexpr int V = 8 / Q < NV ? 8 / Q : NV, kWhole = NV / V * V;
    for (int i = 0; i < kWhole; i += V) add_values<NV, Q, V>(weights, values + i * VT_LANES, places, count, sums + i * VT_LANES);
    for (int i = kWhole; i < NV; ++i) add_values<NV, Q, 1>(weights, values + i * VT_LANES, places, count, sums + i * VT_LANES);
}

// Numbers of up to eight tokens as floats, and where these lie; bfloat16 is widened into `room`, once for all queries.
template <int NV>
VT_TARGET static inline const float* floats(const float* cache, const int64_t*&, int64_t, float*) {
    return cache;
}

template <int NV>
VT_TARGET static inline const float* floats(const uint16_t* cache, const int64_t*& places, int64_t count, float* room) {
    constexpr int kSize = NV * VT_LANES;
    static const int64_t kPlaces[8] = {0, kSize, 2 * kSize, 3 * kSize, 4 * kSize, 5 * kSize, 6 * kSize, 7 * kSize};
    for (int64_t t = 0; t < count; ++t) {
#pragma GCC unroll 8
        for (int i = 0; i < kSize; i += VT_LANES) widen_lanes(cache + places[t] + i, room + t * kSize + i);
    }
    places = kPlaces;
    return room;
}

// Queries [begin, end) of the scratch meet the tokens at `places`, `count` of which are real. Eight tokens at a time: their
// keys or values stay in the first cache while the queries pass by.
template <int NV, typename T>
VT_TARGET static void meet(const Task<T>& task, int64_t begin, int64_t end, const int64_t* places, int64_t count) {
    constexpr int kSize = NV * VT_LANES;
    const Scratch& s = task.scratch;
    float room[8 * kSize];
    for (int64_t t = 0; t < count; t += 8) {
        const int64_t* at = places + t;
        const Number* q = reinterpret_cast<const Number*>(s.q);
#ifdef VT_DOTS
        const Number* keys = task.keys;
        const float scale = task.scale;
#else
        const Number* keys = floats<NV>(task.keys, at, 8, room);
        const float scale = 1.0f;
#endif
        int64_t g = begin;
        for (; g + 2 <= end; g += 2) {
            score<NV, 2>(q + g * kSize, keys, at, scale, s.scores + g * kBlock + t);
            score<NV, 2>(q + g * kSize, keys, at + 4, scale, s.scores + g * kBlock + t + 4);
        }
        if (g < end) score<NV, 1>(q + g * kSize, keys, at, scale, s.scores + g * kBlock + t);
    }
    for (int64_t g = begin; g < end; ++g) weigh<NV>(s.scores + g * kBlock, count, s.highest[g], s.totals[g], s.sums + g * kSize);
    for (int64_t t = 0; t < count; t += 8) {
        const int64_t some = std::min<int64_t>(8, count - t);
        const float* w = s.scores + t;
        const int64_t* at = places + t;
        const float* values = floats<NV>(task.values, at, some, room);
        int64_t g = begin;
        for (; g + 4 <= end; g += 4) add_columns<NV, 4>(w + g * kBlock, values, at, some, s.sums + g * kSize);
        for (; g + 2 <= end; g += 2) add_columns<NV, 2>(w + g * kBlock, values, at, some, s.sums + g * kSize);
        if (g < end) add_columns<NV, 1>(w + g * kBlock, values, at, some, s.sums + g * kSize);
    }
}

// A vector of a query, or of a result, from and to where the caller has it.
VT_TARGET static inline void take(const float* x, float* out) { vec(out) = vec(x); }
VT_TARGET static inline void take(const uint16_t* x, float* out) { widen_lanes(x, out); }
VT_TARGET static inline void put(const float* x, float* out) { vec(out) = vec(x); }
VT_TARGET static inline void put(const float* x, uint16_t* out) { narrow_lanes(x, out); }

template <int NV, typename T>
VT_TARGET static void attend(const Task<T>& task) {
    constexpr int kSize = NV * VT_LANES;
    const Scratch& s = task.scratch;
    const int64_t group = task.group;
    int64_t longest = 0;
    for (int64_t n = 0; n < task.num_rows; ++n) {
        Number* q = reinterpret_cast<Number*>(s.q) + n * group * kSize;
#ifdef VT_DOTS
        std::memcpy(q, task.rows[n].q, group * kSize * sizeof *q);  // scaled after the products
#else
        for (int64_t i = 0; i < group * kSize; i += VT_LANES) {
            take(task.rows[n].q + i, q + i);
            vec(q + i) *= task.scale;
        }
#endif
        longest = std::max(longest, task.rows[n].length);
    }
    for (int64_t g = 0; g < task.num_rows * group; ++g) {
        s.highest[g] = -1e38f;  // what is below it by a score still is a number
        s.totals[g] = 0.0f;
    }
    std::fill(s.sums, s.sums + task.num_rows * group * kSize, 0.0f);
    int64_t places[kBlock];
    for (int64_t first = 0; first < longest; first += kBlock) {
        for (int64_t n = 0, end; n < task.num_rows; n = end) {
            end = n + 1;
            const int64_t count = std::min(kBlock, task.rows[n].length - first);
            if (count <= 0) continue;
            while (end < task.num_rows && task.rows[end].shared >= first + kBlock) ++end;
            find_places(task, task.rows[n].table, first, count, kSize, places);
            meet<NV>(task, n * group, end * group, places, count);
        }
    }
    for (int64_t n = 0; n < task.num_rows; ++n) {
        for (int64_t g = 0; g < group; ++g) {
            float* sums = s.sums + (n * group + g) * kSize;
            for (int i = 0; i < kSize; i += VT_LANES) {
                vec(sums + i) /= s.totals[n * group + g];
                put(sums + i, task.rows[n].out + g * kSize + i);
            }
        }
    }
}

template <typename T>
VT_TARGET static void run(const Task<T>& task, int64_t size) {
    switch (size) {
        case 16: return attend<16 / VT_LANES>(task);
        case 32: return attend<32 / VT_LANES>(task);
        case 64: return attend<64 / VT_LANES>(task);
        case 80: return attend<80 / VT_LANES>(task);
        case 96: return attend<96 / VT_LANES>(task);
        case 128: return attend<128 / VT_LANES>(task);
        case 256: return attend<256 / VT_LANES>(task);
    }
}
