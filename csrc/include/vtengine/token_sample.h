// One id of each row of scores, float32: the best one, or one that is drawn. Plain C ABI.
// Contract: kernels/vtengine_kernels/token_sample. The caller has checked shapes.
#ifndef VTENGINE_TOKEN_SAMPLE_H
#define VTENGINE_TOKEN_SAMPLE_H

#include <stdint.h>

#include "vtengine/patchify.h"

#ifdef __cplusplus
extern "C" {
#endif

// Row n: `vocabulary` scores at scores + n * row_stride. All others have an entry for each row.
typedef struct vt_token_sample_args {
    const float* scores;
    const double* draws;        // null: the best id of each row
    const float* temperature;   // null with draws
    const int64_t* top_k;       // null, and so are the next two: no truncation
    const float *top_p, *min_p;
    int64_t* ids;               // written
    float* logprobs;            // written
    int64_t rows, vocabulary, row_stride;
    int32_t isa, num_threads;
} vt_token_sample_args;

// Thread-safe. Returns a vt_status.
VT_API int32_t vt_token_sample(const vt_token_sample_args* args);

#ifdef __cplusplus
}
#endif
#endif
