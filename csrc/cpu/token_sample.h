// The passes over one row of scores, compiled once per instruction set: the including file defines VT_TARGET and VT_LANES
// inside its own namespace. Include it there, more than once.
#include "lanes.h"

typedef double WideVec __attribute__((vector_size(VT_LANES * 8), aligned(8)));

VT_TARGET static float best_of(const float* row, int64_t vocabulary) {
    const int64_t whole = vocabulary / VT_LANES * VT_LANES;
    float best = whole > 0 ? highest_of(row, whole, -INFINITY) : -INFINITY;
    for (int64_t i = whole; i < vocabulary; ++i) best = row[i] > best ? row[i] : best;
    return best;
}

// weights[i] = e^((row[i] - best) / temperature); returns their sum.
VT_TARGET static double weigh(const float* row, int64_t count, float best, float temperature, float* weights) {
    WideVec total = {};
    for (int64_t i = 0; i < count; i += VT_LANES) {
        alignas(64) float rest[VT_LANES];
        const int64_t here = std::min<int64_t>(VT_LANES, count - i);
        const float* from = row + i;
        if (here < VT_LANES) {
            std::fill(rest, rest + VT_LANES, -INFINITY);
            std::memcpy(rest, from, here * sizeof(float));
            from = rest;
        }
        Vec weight = (vec(from) - best) / temperature;
        exp_lanes(weight);
        total += __builtin_convertvector(weight, WideVec);
        if (here < VT_LANES) {
            vec(rest) = weight;
            std::memcpy(weights + i, rest, here * sizeof(float));
        } else {
            vec(weights + i) = weight;
        }
    }
    double sum = 0.0;
    for (int lane = 0; lane < VT_LANES; ++lane) sum += total[lane];
    return sum;
}

// Appends the ids whose scores are at least `least`, in order. Most stretches of a row have none.
VT_TARGET static void gather(const float* row, int64_t vocabulary, float least, std::vector<int32_t>& ids) {
    constexpr int64_t kStretch = 16 * VT_LANES;
    for (int64_t first = 0; first < vocabulary; first += kStretch) {
        const int64_t end = std::min(first + kStretch, vocabulary);
        if (end == first + kStretch) {
            IntVec reached = {};
            for (int64_t i = first; i < end; i += VT_LANES) reached |= vec(row + i) >= least;
            int32_t any = 0;
            for (int lane = 0; lane < VT_LANES; ++lane) any |= reached[lane];
            if (any == 0) continue;
        }
        for (int64_t i = first; i < end; ++i) {
            if (row[i] >= least) ids.push_back(static_cast<int32_t>(i));
        }
    }
}
