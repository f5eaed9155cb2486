// The kernel of one row and one key head, compiled once per instruction set: the including file defines VT_TARGET (the
// function attribute) and VT_LANES (floats per vector) inside its own namespace. Include it there, more than once.
#include "lanes.h"

// scores[0..length) become weights that add up to the returned sum; entries up to a multiple of VT_LANES become 0.
VT_TARGET static inline float softmax_row(float* scores, int64_t length) {
    float highest = scores[0];
    for (int64_t t = 1; t < length; ++t) highest = scores[t] > highest ? scores[t] : highest;
    const int64_t padded = (length + VT_LANES - 1) / VT_LANES * VT_LANES;
    for (int64_t t = length; t < padded; ++t) scores[t] = -1e30f;
    Vec total = {};
    for (int64_t t = 0; t < padded; t += VT_LANES) {
        Vec x = vec(scores + t) - highest;
        exp_lanes(x);
        vec(scores + t) = x;
        total += x;
    }
    return sum_lanes(total);
}

// NV vectors per head. Queries q[group] against every key, then the weighted values. scores: [group, stride].
template <int NV>
VT_TARGET static void attend(const Task& task, float* scores, int64_t stride) {
    constexpr int kSize = NV * VT_LANES;
    constexpr int kTogether = NV <= 4 ? 4 : (NV <= 8 ? 2 : 1);  // query heads whose sums stay in registers
    const int64_t token_stride = task.kv_heads * kSize;
    for (int64_t first = 0, page = 0; first < task.length; first += task.page_size, ++page) {
        const int64_t count = std::min(task.page_size, task.length - first);
        const float* key = task.keys + task.table[page] * task.page_size * token_stride;
        for (int64_t t = 0; t < count; ++t, key += token_stride) {
            Vec k[NV];
#pragma GCC unroll 16
            for (int i = 0; i < NV; ++i) k[i] = vec(key + i * VT_LANES);
            for (int64_t g = 0; g < task.group; ++g) {
                const float* q = task.q + g * kSize;
                Vec dot = vec(q) * k[0];
#pragma GCC unroll 16
                for (int i = 1; i < NV; ++i) dot += vec(q + i * VT_LANES) * k[i];
                scores[g * stride + first + t] = sum_lanes(dot) * task.scale;
            }
        }
    }
    for (int64_t g0 = 0; g0 < task.group; g0 += kTogether) {
        const int64_t heads = std::min<int64_t>(kTogether, task.group - g0);
        Vec sums[kTogether][NV] = {};
        float totals[kTogether];
        for (int64_t g = 0; g < heads; ++g) totals[g] = softmax_row(scores + (g0 + g) * stride, task.length);
        for (int64_t first = 0, page = 0; first < task.length; first += task.page_size, ++page) {
            const int64_t count = std::min(task.page_size, task.length - first);
            const float* value = task.values + task.table[page] * task.page_size * token_stride;
            for (int64_t t = 0; t < count; ++t, value += token_stride) {
#pragma GCC unroll 4
                for (int g = 0; g < kTogether; ++g) {
                    const float weight = g < heads ? scores[(g0 + g) * stride + first + t] : 0.0f;
#pragma GCC unroll 16
                    for (int i = 0; i < NV; ++i) sums[g][i] += vec(value + i * VT_LANES) * weight;
                }
            }
        }
        for (int64_t g = 0; g < heads; ++g) {
            for (int i = 0; i < NV; ++i) vec(task.out + (g0 + g) * kSize + i * VT_LANES) = sums[g][i] / totals[g];
        }
    }
}

VT_TARGET static void run(const Task& task, int64_t size, float* scores, int64_t stride) {
    switch (size / VT_LANES) {
        case 1: return attend<1>(task, scores, stride);
        case 2: return attend<2>(task, scores, stride);
        case 4: return attend<4>(task, scores, stride);
        case 5: return attend<5>(task, scores, stride);
        case 6: return attend<6>(task, scores, stride);
        case 8: return attend<8>(task, scores, stride);
        case 10: return attend<10>(task, scores, stride);
        case 12: return attend<12>(task, scores, stride);
        case 16: return attend<16>(task, scores, stride);
        case 32: return attend<32>(task, scores, stride);
    }
}
