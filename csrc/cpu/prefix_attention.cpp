// Decode attention on the CPU: keys and values are read once, from their pages, with no copy and no padding.
#include "vtengine/prefix_attention.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "kernels.h"
#include "thread_pool.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a function boundary by value

namespace vtengine {
namespace {

// One row of the batch and one key head: `group` query heads.
struct Task {
    const float *q, *keys, *values;  // keys and values of this head in page 0
    const int64_t* table;
    float* out;
    int64_t length, group, kv_heads, page_size;
    float scale;
};

using Run = void (*)(const Task&, int64_t size, float* scores, int64_t stride);

#define VT_BODY "prefix_attention.h"
#include "per_isa.h"

constexpr int64_t kMaxLanes = 16;

bool size_is_supported(int64_t size) {
    for (int64_t known : {16, 32, 64, 80, 96, 128, 256}) {
        if (size == known) return true;
    }
    return false;
}

}  // namespace
}  // namespace vtengine

int32_t vt_prefix_attention(const vt_prefix_attention_args* args) {
    using namespace vtengine;
    const vt_prefix_attention_args& a = *args;
    const Run run = VT_PICK(a.isa, run);
    if (run == nullptr) return VT_ISA_MISSING;
    if (!size_is_supported(a.size) || a.kv_heads < 1 || a.heads % a.kv_heads != 0) return VT_INVALID;
    const int64_t group = a.heads / a.kv_heads;
    try {
        parallel_for(a.num_threads, a.rows, [&](int64_t row) {
            const int64_t stride = (a.lengths[row] + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
            thread_local std::unique_ptr<float[]> scores;
            thread_local int64_t room = 0;
            if (room < group * stride) {
                scores.reset(new float[2 * group * stride]);
                room = 2 * group * stride;
            }
            for (int64_t head = 0; head < a.kv_heads; ++head) {
                const Task task = {
                    a.q + row * a.q_stride + head * group * a.size,
                    a.keys + head * a.size,
                    a.values + head * a.size,
                    a.tables + row * a.table_stride,
                    a.out + (row * a.heads + head * group) * a.size,
                    a.lengths[row], group, a.kv_heads, a.page_size, a.scale,
                };
                run(task, a.size, scores.get(), stride);
            }
        });
    } catch (const std::bad_alloc&) {
        return VT_NO_MEMORY;
    } catch (...) {
        return VT_FAILED;
    }
    return VT_OK;
}
