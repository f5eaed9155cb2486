// What a transformer layer does between its matrix products, float32 or bfloat16 (computed in float32), each in one pass. Plain C ABI; no Python, no torch.
// Contract: kernels/vtengine_kernels/layer_ops. The caller has checked shapes; outputs are contiguous.
#ifndef VTENGINE_LAYER_OPS_H
#define VTENGINE_LAYER_OPS_H

#include <stdint.h>

#include "vtengine/patchify.h"

#ifdef __cplusplus
extern "C" {
#endif

// Rows of numbers at x + n * x_stride, n = 0 .. rows - 1; x and out both floats, or both bfloat16.
typedef struct vt_rows {
    const void* x;
    void* out;
    int64_t rows, x_stride;
    int32_t is_bfloat16, isa, num_threads;
} vt_rows;

// All are thread-safe and return a vt_status.

// out[rows, size] = x / sqrt(mean(x * x) + eps) * weight[size]
VT_API int32_t vt_rms_norm(const vt_rows* rows, int64_t size, const float* weight, float eps);

// x: [rows, 2 * size], gate before up. out[rows, size] = gate / (1 + e^-gate) * up
VT_API int32_t vt_swiglu(const vt_rows* rows, int64_t size);

// x: [rows, heads, size]; cos and sin [rows, size], size even. out = x * cos + (x with its halves swapped) * sin
VT_API int32_t vt_rotary(const vt_rows* rows, int64_t heads, int64_t size, const float* cos, const float* sin);

#ifdef __cplusplus
}
#endif
#endif
