// Matrix products of few rows, bfloat16, as fast as the weights come from memory. Plain C ABI; no Python, no torch.
// Contract: kernels/vtengine_kernels/few_rows.py. The caller has checked shapes; rows are contiguous.
#ifndef VTENGINE_FEW_ROWS_H
#define VTENGINE_FEW_ROWS_H

#include <stdint.h>

#include "vtengine/patchify.h"

#ifdef __cplusplus
extern "C" {
#endif

// out[n, o] = sum over i of x[n, i] * weight[o, i], + bias[o]; x and weight by rows, strides in numbers, bias may be null.
// out[rows, outputs]: bfloat16, or float where out_is_float.
typedef struct vt_few_rows_args {
    const uint16_t *x, *weight, *bias;
    void* out;
    int64_t rows, outputs, size, x_stride, weight_stride;
    int32_t out_is_float, num_threads;
} vt_few_rows_args;

// 1: this processor has the instruction for it (AVX-512 BF16), and the compiler knew it.
VT_API int32_t vt_few_rows_here(void);

// Thread-safe; returns a vt_status.
VT_API int32_t vt_few_rows(const vt_few_rows_args* args);

#ifdef __cplusplus
}
#endif
#endif
