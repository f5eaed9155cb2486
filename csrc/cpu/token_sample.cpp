// One id of each row of scores. A truncation is found without a sort: only scores near the best are looked at, further
// down as long as they do not suffice, and these are halved around the border (quickselect, by number or by mass).
#include "vtengine/token_sample.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a function boundary by value

namespace vtengine {
namespace {

constexpr int64_t kPiece = 1024;
constexpr int64_t kFew = 64;  // ids that are sorted
constexpr float kDepths[] = {2, 4, 6, 8, 10, 12, 14, 16, 20, INFINITY};  // below the best, in units of the temperature

#define VT_BODY "token_sample.h"
#include "per_isa.h"

struct Passes {
    decltype(&plain::best_of) best_of;
    decltype(&plain::weigh) weigh;
    decltype(&plain::gather) gather;
};

struct Row {
    const float* scores;
    int64_t vocabulary;
    float temperature, best;
    float* weights;  // relative to the best score's
    double total;
};

struct Drawn {
    int64_t id;
    double weight_of_all;
};

// The first id at which the weights so far exceed the draw's share; never one of weight 0.
Drawn draw_from_all(const Row& row, const std::vector<double>& sums, double draw) {
    const double target = draw * row.total;
    double before = 0.0;
    int64_t last = 0;
    for (int64_t first = 0; first < row.vocabulary; first += kPiece) {
        const double sum = sums[first / kPiece];
        if (sum == 0.0) continue;
        const int64_t end = std::min(first + kPiece, row.vocabulary);
        if (before + sum > target || end == row.vocabulary) {
            double so_far = before;
            for (int64_t i = first; i < end; ++i) {
                so_far += row.weights[i];
                if (row.weights[i] > 0.0f) last = i;
                if (so_far > target && row.weights[i] > 0.0f) return {i, row.total};
            }
        }
        before += sum;
    }
    for (int64_t i = row.vocabulary - 1; i > last; --i) {
        if (row.weights[i] > 0.0f) return {i, row.total};
    }
    return {last, row.total};
}

Drawn draw_from(const Row& row, const std::vector<int32_t>& ids, double draw) {
    double total = 0.0;
    for (const int32_t id : ids) total += row.weights[id];
    const double target = draw * total;
    double so_far = 0.0;
    int64_t found = ids.front();
    for (const int32_t id : ids) {
        so_far += row.weights[id];
        if (row.weights[id] > 0.0f) found = id;
        if (so_far > target && row.weights[id] > 0.0f) break;
    }
    return {found, total};
}

// Ascending: the best score first, and of equal ones the lowest id, which is the lower half.
uint64_t rank_of(const Row& row, int32_t id) {
    const float score = row.scores[id] == 0.0f ? 0.0f : row.scores[id];  // 0 has two signs
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    const uint32_t descending = bits >> 31 != 0 ? bits : ~bits & 0x7fffffffu;
    return static_cast<uint64_t>(descending) << 32 | static_cast<uint32_t>(id);
}

double mass_of(const Row& row, const std::vector<uint64_t>& ranks, int64_t begin, int64_t end) {
    double mass = 0.0;
    for (int64_t i = begin; i < end; ++i) mass += row.weights[static_cast<uint32_t>(ranks[i])];
    return mass;
}

// How many of ranks[0, count), best first, weigh `target` together; puts these in front. At least one.
int64_t fewest_of_mass(const Row& row, std::vector<uint64_t>& ranks, int64_t count, double target) {
    const auto at = ranks.begin();
    int64_t low = 0, high = count;
    double before = 0.0;
    while (high - low > kFew) {
        const int64_t middle = low + (high - low) / 2;
        std::nth_element(at + low, at + middle, at + high);
        const double left = mass_of(row, ranks, low, middle);
        if (before + left >= target) {
            high = middle;
        } else {
            before += left;
            low = middle;
        }
    }
    std::sort(at + low, at + high);
    for (; low < high && before < target; ++low) before += row.weights[static_cast<uint32_t>(ranks[low])];
    return std::max<int64_t>(low, 1);
}

// The ids that a truncation keeps, in order. Scores between two depths are gathered until they are enough.
std::vector<int32_t> kept(const Row& row, const Passes& passes, int64_t top_k, float top_p, float min_p) {
    const bool by_count = top_k < row.vocabulary, by_mass = top_p < 1.0f;
    const float least = row.best + row.temperature * std::log(min_p);
    std::vector<int32_t> ids;
    if (!by_count && !by_mass) {
        passes.gather(row.scores, row.vocabulary, least, ids);
        return ids;
    }
    double wanted = static_cast<double>(top_p) * row.total;
    for (const float depth : kDepths) {
        ids.clear();
        passes.gather(row.scores, row.vocabulary, row.best - depth * row.temperature, ids);
        double mass = 0.0;
        for (const int32_t id : ids) mass += row.weights[id];
        if (by_count ? static_cast<int64_t>(ids.size()) >= top_k : mass >= wanted) break;
    }
    std::vector<uint64_t> ranks(ids.size());
    std::transform(ids.begin(), ids.end(), ranks.begin(), [&](int32_t id) { return rank_of(row, id); });
    int64_t count = static_cast<int64_t>(ranks.size());
    if (by_count && top_k < count) {
        count = top_k;
        std::nth_element(ranks.begin(), ranks.begin() + count - 1, ranks.end());
    }
    if (by_count) wanted = static_cast<double>(top_p) * mass_of(row, ranks, 0, count);
    if (by_mass) count = fewest_of_mass(row, ranks, count, wanted);
    const uint64_t last = *std::max_element(ranks.begin(), ranks.begin() + count);
    const auto is_out = [&](int32_t id) { return row.scores[id] < least || rank_of(row, id) > last; };
    ids.erase(std::remove_if(ids.begin(), ids.end(), is_out), ids.end());
    return ids;
}

void sample(const vt_token_sample_args& a, const Passes& passes, int64_t n) {
    const float* scores = a.scores + n * a.row_stride;
    thread_local std::vector<float> weights;  // fresh memory would take as long as the work
    weights.resize(std::max<size_t>(weights.size(), a.vocabulary));
    const float temperature = a.draws == nullptr ? 1.0f : a.temperature[n];
    Row row{scores, a.vocabulary, temperature, passes.best_of(scores, a.vocabulary), weights.data(), 0.0};
    std::vector<double> sums((a.vocabulary + kPiece - 1) / kPiece);
    for (size_t piece = 0; piece < sums.size(); ++piece) {
        const int64_t first = piece * kPiece, count = std::min(kPiece, a.vocabulary - first);
        sums[piece] = passes.weigh(scores + first, count, row.best, row.temperature, row.weights + first);
        row.total += sums[piece];
    }
    if (!(row.total > 0.0) || !(row.total < INFINITY)) {  // a NaN, or nothing that could be drawn
        a.ids[n] = 0;
        a.logprobs[n] = NAN;
        return;
    }
    Drawn drawn;
    if (a.draws == nullptr) {
        drawn = {std::find(scores, scores + a.vocabulary, row.best) - scores, row.total};
    } else if (a.top_k == nullptr) {
        drawn = draw_from_all(row, sums, a.draws[n]);
    } else {
        drawn = draw_from(row, kept(row, passes, a.top_k[n], a.top_p[n], a.min_p[n]), a.draws[n]);
    }
    a.ids[n] = drawn.id;
    const double below = (static_cast<double>(scores[drawn.id]) - row.best) / row.temperature;
    a.logprobs[n] = static_cast<float>(below - std::log(drawn.weight_of_all));
}

}  // namespace
}  // namespace vtengine

int32_t vt_token_sample(const vt_token_sample_args* args) {
    using namespace vtengine;
    const vt_token_sample_args& a = *args;
    const Passes passes{VT_PICK(a.isa, best_of), VT_PICK(a.isa, weigh), VT_PICK(a.isa, gather)};
    if (passes.best_of == nullptr) return VT_ISA_MISSING;
    if (a.vocabulary < 1 || a.vocabulary > INT32_MAX) return VT_INVALID;
    try {
        parallel_for(a.num_threads, a.rows, [&](int64_t n) { sample(a, passes, n); });
    } catch (...) {
        return VT_FAILED;
    }
    return VT_OK;
}
