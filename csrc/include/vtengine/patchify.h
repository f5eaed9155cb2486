// patchify on the CPU: plain C ABI, loaded with dlopen; no Python, no torch. Contract: kernels/vtengine_kernels/patchify.
// The caller has checked every argument; what is not checked here is said so.
#ifndef VTENGINE_PATCHIFY_H
#define VTENGINE_PATCHIFY_H

#include <stdint.h>

#if defined(_WIN32)
#define VT_API __declspec(dllexport)
#else
#define VT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define VT_ABI_VERSION 5
#define VT_MAX_STEPS 2

enum vt_isa { VT_ISA_AUTO = 0, VT_ISA_SCALAR = 1, VT_ISA_AVX2 = 2, VT_ISA_AVX512 = 3 };
enum vt_filter { VT_BICUBIC = 0, VT_LANCZOS = 1 };
enum vt_mode { VT_PIL13 = 0, VT_PIL12 = 1, VT_TV = 2 };
enum vt_layout { VT_FULL = 0, VT_COMPACT = 1 };
enum vt_dtype { VT_FLOAT32 = 0, VT_BFLOAT16 = 1 };
enum vt_status { VT_OK = 0, VT_INVALID = 1, VT_NO_MEMORY = 2, VT_ISA_MISSING = 3, VT_FAILED = 4 };

// uint8 [height, width, 3], rows `row_bytes` apart.
typedef struct vt_image {
    const uint8_t* pixels;
    int64_t height, width, row_bytes;
} vt_image;

// A resize to height x width that comes before the last one.
typedef struct vt_step {
    int64_t height, width;
    int32_t filter;
} vt_step;

// The part [top, bottom) x [left, right) of the image, resized by each of the `steps` and then to height x width
// (multiples of two patches); out holds a row of 6 patch^2 (VT_FULL) or 3 patch^2 (VT_COMPACT) values for each patch.
typedef struct vt_target {
    int64_t left, top, right, bottom, height, width;
    void* out;
    int32_t steps;
    vt_step step[VT_MAX_STEPS];
} vt_target;

typedef struct vt_options {
    int32_t filter, mode, layout, dtype, isa, num_threads;
    int32_t stream;      // 1: stores that bypass the caches, 0: ordinary stores, -1: by the size of the output
    int32_t patch;       // pixels per side of a patch: 14 or 16
    float mean[3], std[3];
    double unit;         // a level becomes (level * unit - mean) / std
    const float* table;  // [3][256]: the value of each level in each channel; unit, mean and std only make it fast
} vt_options;

// Writes every target. Thread-safe. Returns a vt_status.
VT_API int32_t vt_patchify(const vt_image* image, const vt_target* targets, int64_t count, const vt_options* options);

// Bit (1 << vt_isa) for each instruction set that this machine has.
VT_API int32_t vt_available_isas(void);

VT_API int32_t vt_abi_version(void);

#ifdef __cplusplus
}
#endif
#endif
