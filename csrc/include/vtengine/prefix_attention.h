// Attention of single query tokens over paged keys and values, float32 or bfloat16 (computed in float32). Plain C ABI; no Python, no torch.
// Contract: kernels/vtengine_kernels/prefix_attention. The caller has checked shapes, tables and lengths.
#ifndef VTENGINE_PREFIX_ATTENTION_H
#define VTENGINE_PREFIX_ATTENTION_H

#include <stdint.h>

#include "vtengine/patchify.h"

#ifdef __cplusplus
extern "C" {
#endif

// Tokens that are taken together, from a multiple of it on; rows share whole blocks only.
#define VT_PREFIX_ATTENTION_BLOCK 64

// q, keys, values and out: all floats, or all bfloat16.
// Row n: heads query heads of `size` numbers at q + n * q_stride, over tokens 0 .. lengths[n] - 1, which lie in pages
// tables[n * table_stride + token / page_size]. Keys and values: [pages, page_size, kv_heads, size]. out: [rows, heads, size].
// order, shared (both or neither, else null): rows in an order in which the n-th has its first shared[n] tokens in the same
// pages as the one before it. They change the time, never the result.
typedef struct vt_prefix_attention_args {
    const void *q, *keys, *values;
    const int64_t *tables, *lengths, *order, *shared;
    void* out;
    int64_t rows, heads, kv_heads, size, page_size, q_stride, table_stride;
    float scale;
    int32_t is_bfloat16, isa, num_threads;
} vt_prefix_attention_args;

// size must be a multiple of 16, at most 256. Thread-safe. Returns a vt_status.
VT_API int32_t vt_prefix_attention_shared(const vt_prefix_attention_args* args);

#ifdef __cplusplus
}
#endif
#endif
