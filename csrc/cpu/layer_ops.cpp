// Norm, gate and rotary embedding: each row is read once and written once, where torch makes three to five passes.
#include "vtengine/layer_ops.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "thread_pool.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a function boundary by value

namespace vtengine {
namespace {

#define VT_BODY "layer_ops.h"
#include "per_isa.h"

constexpr int64_t kPiece = 1 << 16;  // numbers: less is not worth waking a thread for

// row(n) for every row; `size` numbers are written for each.
template <typename Row>
int32_t each_row(const vt_rows& r, int64_t size, const Row& row) {
    const int64_t together = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, size));
    const int64_t pieces = (r.rows + together - 1) / together;
    try {
        parallel_for(r.num_threads, pieces, [&](int64_t piece) {
            const int64_t end = std::min(r.rows, (piece + 1) * together);
            for (int64_t n = piece * together; n < end; ++n) row(n);
        });
    } catch (...) {
        return VT_FAILED;
    }
    return VT_OK;
}

}  // namespace
}  // namespace vtengine

int32_t vt_rms_norm(const vt_rows* rows, int64_t size, const float* weight, float eps) {
    using namespace vtengine;
    const vt_rows& r = *rows;
    const auto run = VT_PICK(r.isa, rms_norm_row);
    if (run == nullptr) return VT_ISA_MISSING;
    if (size < 1) return VT_INVALID;
    return each_row(r, size, [&](int64_t n) { run(r.x + n * r.x_stride, size, weight, eps, r.out + n * size); });
}

int32_t vt_swiglu(const vt_rows* rows, int64_t size) {
    using namespace vtengine;
    const vt_rows& r = *rows;
    const auto run = VT_PICK(r.isa, swiglu_row);
    if (run == nullptr) return VT_ISA_MISSING;
    if (size < 1) return VT_INVALID;
    return each_row(r, size, [&](int64_t n) { run(r.x + n * r.x_stride, size, r.out + n * size); });
}

int32_t vt_rotary(const vt_rows* rows, int64_t heads, int64_t size, const float* cos, const float* sin) {
    using namespace vtengine;
    const vt_rows& r = *rows;
    const auto run = VT_PICK(r.isa, rotary_row);
    if (run == nullptr) return VT_ISA_MISSING;
    if (heads < 1 || size < 2 || size % 2 != 0) return VT_INVALID;
    return each_row(r, heads * size, [&](int64_t n) {
        run(r.x + n * r.x_stride, heads, size, cos + n * size, sin + n * size, r.out + n * heads * size);
    });
}
