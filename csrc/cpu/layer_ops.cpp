// Norm, gate and rotary embedding: each row is read once and written once, where torch makes three to five passes.
#include "vtengine/layer_ops.h"

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

#define VT_BODY "layer_ops.h"
#include "per_isa.h"

constexpr int64_t kPiece = 1 << 16;  // numbers: less is not worth waking a thread for

// Numbers of a thread's bfloat16 row as floats, before and after.
struct Widened {
    std::vector<float> in, out;
};

// run(n, x, out) for every row, which is read from x, of size_in floats, and written to out, of `size` floats.
template <typename Run>
int32_t each_row(const vt_rows& r, int64_t size_in, int64_t size, const Run& run) {
    const auto widen = VT_PICK(r.isa, widen);
    const auto narrow = VT_PICK(r.isa, narrow);
    const auto row = [&](int64_t n) {
        if (!r.is_bfloat16) {
            return run(n, static_cast<const float*>(r.x) + n * r.x_stride, static_cast<float*>(r.out) + n * size);
        }
        thread_local Widened row;
        if (static_cast<int64_t>(row.in.size()) < size_in) row.in.resize(size_in);
        if (static_cast<int64_t>(row.out.size()) < size) row.out.resize(size);
        widen(static_cast<const uint16_t*>(r.x) + n * r.x_stride, size_in, row.in.data());
        run(n, row.in.data(), row.out.data());
        narrow(row.out.data(), size, static_cast<uint16_t*>(r.out) + n * size);
    };
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
    return each_row(r, size, size, [&](int64_t, const float* x, float* out) { run(x, size, weight, eps, out); });
}

int32_t vt_swiglu(const vt_rows* rows, int64_t size) {
    using namespace vtengine;
    const vt_rows& r = *rows;
    const auto run = VT_PICK(r.isa, swiglu_row);
    if (run == nullptr) return VT_ISA_MISSING;
    if (size < 1) return VT_INVALID;
    return each_row(r, 2 * size, size, [&](int64_t, const float* x, float* out) { run(x, size, out); });
}

int32_t vt_rotary(const vt_rows* rows, int64_t heads, int64_t size, const float* cos, const float* sin) {
    using namespace vtengine;
    const vt_rows& r = *rows;
    const auto run = VT_PICK(r.isa, rotary_row);
    if (run == nullptr) return VT_ISA_MISSING;
    if (heads < 1 || size < 2 || size % 2 != 0) return VT_INVALID;
    return each_row(r, heads * size, heads * size, [&](int64_t n, const float* x, float* out) {
        run(x, heads, size, cos + n * size, sin + n * size, out);
    });
}
