// One row of scores, compiled once per instruction set: the including file defines VT_TARGET and VT_LANES inside its own
// namespace. Include it there, more than once. Pieces of a row go through a buffer that stays in the first cache.
#include "lanes.h"

VT_TARGET static inline void tanh_lanes(Vec& x) {
    const Vec size = x < 0.0f ? -x : x;
    Vec t = size * -2.0f;
    exp_lanes(t);
    const Vec share = (1.0f - t) / (1.0f + t);
    x = x < 0.0f ? -share : share;
}

// Scores as they count, in `out`; entries up to a multiple of VT_LANES are those of banned ids. bends: the cap's derivative.
template <bool kCapped>
VT_TARGET static inline int64_t bounded(const float* row, int64_t count, float cold, float cap, float* out, float* bends) {
    const int64_t padded = (count + VT_LANES - 1) / VT_LANES * VT_LANES;
    std::memcpy(out, row, count * sizeof(float));
    for (int64_t i = count; i < padded; ++i) out[i] = -1e30f;
    for (int64_t i = 0; i < padded; i += VT_LANES) {
        Vec x = vec(out + i);
        if (kCapped) {
            Vec share = x / cap;
            tanh_lanes(share);
            if (bends != nullptr) vec(bends + i) = 1.0f - share * share;
            x = x <= -5e29f ? x : share * cap;
        }
        vec(out + i) = x * cold;
    }
    return padded;
}

template <bool kCapped>
VT_TARGET static void statistics_of(const Row& row) {
    alignas(64) float x[kPiece];
    float highest = -3e38f;
    double total = 0.0, moment = 0.0;  // moment: sum of weight * (score - highest)
    for (int64_t first = 0; first < row.vocabulary; first += kPiece) {
        const int64_t count = std::min(kPiece, row.vocabulary - first);
        const int64_t padded = bounded<kCapped>(row.scores + first, count, row.cold, row.cap, x, nullptr);
        const float now = highest_of(x, padded, highest);
        Vec weights = {}, moments = {};
        for (int64_t i = 0; i < padded; i += VT_LANES) {
            const Vec below = vec(x + i) - now;
            Vec weight = below;
            exp_lanes(weight);
            weights += weight;
            moments += weight * below;
        }
        const double fade = std::exp(static_cast<double>(highest) - now);
        moment = (moment + total * (static_cast<double>(highest) - now)) * fade + sum_lanes(moments);
        total = total * fade + sum_lanes(weights);
        highest = now;
    }
    alignas(64) float own[VT_LANES];
    bounded<kCapped>(row.scores + row.target, 1, row.cold, row.cap, own, nullptr);
    const double log_total = std::log(total);
    *row.logprob = static_cast<float>(static_cast<double>(own[0]) - highest - log_total);
    *row.entropy = static_cast<float>(log_total - moment / total);
    *row.log_sum = static_cast<float>(highest + log_total);
}

template <bool kCapped>
VT_TARGET static void gradients_of(const Row& row) {
    alignas(64) float x[kPiece], bends[kPiece];
    const float log_sum = *row.log_sum, entropy = *row.entropy, to_logprob = row.to_logprob, to_entropy = row.to_entropy;
    bounded<kCapped>(row.scores + row.target, 1, row.cold, row.cap, x, bends);
    const float bend = kCapped ? bends[0] * row.cold : row.cold;
    for (int64_t first = 0; first < row.vocabulary; first += kPiece) {
        const int64_t count = std::min(kPiece, row.vocabulary - first);
        const int64_t padded = bounded<kCapped>(row.scores + first, count, row.cold, row.cap, x, bends);
        for (int64_t i = 0; i < padded; i += VT_LANES) {
            const Vec logp = vec(x + i) - log_sum;
            Vec p = logp;
            exp_lanes(p);
            Vec slope = -p * (to_logprob + to_entropy * (logp + entropy)) * row.cold;
            if (kCapped) slope *= vec(bends + i);
            vec(x + i) = slope;
        }
        std::memcpy(row.scores + first, x, count * sizeof(float));
    }
    row.scores[row.target] += to_logprob * bend;
}

VT_TARGET static void statistics(const Row& row) { row.cap > 0 ? statistics_of<true>(row) : statistics_of<false>(row); }
VT_TARGET static void gradients(const Row& row) { row.cap > 0 ? gradients_of<true>(row) : gradients_of<false>(row); }
