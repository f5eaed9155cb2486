// Rows of scores over a vocabulary, float32: log-probabilities and entropies, and gradients in place. Plain C ABI.
// Contract: kernels/vtengine_kernels/token_logprob. The caller has checked shapes and targets.
#ifndef VTENGINE_TOKEN_LOGPROB_H
#define VTENGINE_TOKEN_LOGPROB_H

#include <stdint.h>

#include "vtengine/patchify.h"

#ifdef __cplusplus
extern "C" {
#endif

// Row n: `vocabulary` scores at scores + n * row_stride. A score counts as cap * tanh(score / cap) * cold; cap 0 = none.
// Scores of at most -5e29 are banned ids' and pass the cap as they are.
typedef struct vt_token_rows_args {
    float* scores;
    const int64_t* targets;
    float *logprobs, *entropies, *log_sums;    // [rows]; written by statistics, the last two read by gradients
    const float *to_logprob, *to_entropy;      // [rows]: slopes of the loss; read by gradients
    int64_t rows, vocabulary, row_stride;
    float cold, cap;
    int32_t isa, num_threads;
} vt_token_rows_args;

// Thread-safe. Both return a vt_status.
VT_API int32_t vt_token_statistics(const vt_token_rows_args* args);
VT_API int32_t vt_token_gradients(const vt_token_rows_args* args);  // scores become their own gradients

#ifdef __cplusplus
}
#endif
#endif
