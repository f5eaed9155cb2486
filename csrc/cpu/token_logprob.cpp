// Log-probabilities, entropies and gradients of rows of scores: each row is read once for the former and once for the
// latter, with no copy of it.
#include "vtengine/token_logprob.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "thread_pool.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a function boundary by value

namespace vtengine {
namespace {

struct Row {
    float* scores;
    int64_t target, vocabulary;
    float cold, cap;
    float *logprob, *entropy, *log_sum;
    float to_logprob, to_entropy;
};

constexpr int64_t kPiece = 1024;

using Run = void (*)(const Row&);

#define VT_BODY "token_logprob.h"
#include "per_isa.h"

int32_t each_row(const vt_token_rows_args& a, bool gradients) {
    const Run run = gradients ? VT_PICK(a.isa, gradients) : VT_PICK(a.isa, statistics);
    if (run == nullptr) return VT_ISA_MISSING;
    if (a.vocabulary < 1) return VT_INVALID;
    try {
        parallel_for(a.num_threads, a.rows, [&](int64_t n) {
            run({a.scores + n * a.row_stride, a.targets[n], a.vocabulary, a.cold, a.cap, a.logprobs + n, a.entropies + n,
                 a.log_sums + n, gradients ? a.to_logprob[n] : 0.0f, gradients ? a.to_entropy[n] : 0.0f});
        });
    } catch (...) {
        return VT_FAILED;
    }
    return VT_OK;
}

}  // namespace
}  // namespace vtengine

int32_t vt_token_statistics(const vt_token_rows_args* args) { return vtengine::each_row(*args, false); }

int32_t vt_token_gradients(const vt_token_rows_args* args) { return vtengine::each_row(*args, true); }
