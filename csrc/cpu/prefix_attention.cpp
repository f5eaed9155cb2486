// Decode attention on the CPU: keys and values are read from their pages, with no copy and no padding, and once for all
// rows that share them.
#include "vtengine/prefix_attention.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a function boundary by value

namespace vtengine {
namespace {

constexpr int64_t kBlock = VT_PREFIX_ATTENTION_BLOCK;
constexpr int64_t kTogether = 32;  // queries of a task: their copies stay in the first cache

// T: float, or uint16_t for bfloat16.
template <typename T>
struct Row {
    const T* q;  // of the first of `group` query heads
    T* out;
    const int64_t* table;
    int64_t length;
    int64_t shared;  // leading tokens that lie in the same pages as those of the row before; never more than both have
};

struct Scratch {
    float *q, *sums, *scores, *highest, *totals;  // [queries, size] twice, [queries, kBlock], [queries] twice
};

// Rows that share, and one key head.
template <typename T>
struct Task {
    const T *keys, *values;  // of this head in page 0
    const Row<T>* rows;
    int64_t num_rows, group, kv_heads, page_size;
    float scale;
    Scratch scratch;
};

// Where the keys of tokens first .. first + count - 1 lie, in numbers; filled up with the last one to a multiple of 8.
template <typename T>
inline void find_places(const Task<T>& task, const int64_t* table, int64_t first, int64_t count, int64_t size, int64_t* places) {
    const int64_t token_stride = task.kv_heads * size;
    int64_t page = first / task.page_size, in_page = first % task.page_size;
    int64_t t = 0;
    for (; t < count; ++page, in_page = 0) {
        const int64_t begin = table[page] * task.page_size * token_stride;
        for (; in_page < task.page_size && t < count; ++in_page, ++t) places[t] = begin + in_page * token_stride;
    }
    for (; t % 8; ++t) places[t] = places[count - 1];
}

template <typename T>
using Run = void (*)(const Task<T>&, int64_t size);

#define VT_BODY "prefix_attention.h"
#include "per_isa.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define VT_HAS_DOTS
namespace dots {  // as `wide`, with products of bfloat16
#define VT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")))
#define VT_LANES 16
#define VT_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define VT_DOTS
#include "prefix_attention.h"
#undef VT_TARGET
#undef VT_LANES
#undef VT_FMA
#undef VT_DOTS
}  // namespace dots
#endif

template <typename T>
Run<T> run_of(int isa) {
#ifdef VT_HAS_DOTS
    if constexpr (sizeof(T) == 2) {
        if (isa == VT_ISA_AUTO && usable_isa(isa) == VT_ISA_AVX512 && __builtin_cpu_supports("avx512bf16")) return dots::run<T>;
    }
#endif
    return VT_PICK(isa, run<T>);
}

bool size_is_supported(int64_t size) {
    for (int64_t known : {16, 32, 64, 80, 96, 128, 256}) {
        if (size == known) return true;
    }
    return false;
}

// Rows in order, cut where there is nothing to share, where a task would grow too large, and so that no thread is idle.
std::vector<int64_t> task_starts(const vt_prefix_attention_args& a, const int64_t* shared) {
    const int64_t fair = (a.rows * a.kv_heads + a.num_threads - 1) / a.num_threads;
    const int64_t most = std::max<int64_t>(1, std::min(kTogether * a.kv_heads / a.heads, fair));
    std::vector<int64_t> starts;
    for (int64_t n = 0; n < a.rows; ++n) {
        if (n == 0 || shared == nullptr || shared[n] < kBlock || n - starts.back() == most) starts.push_back(n);
    }
    starts.push_back(a.rows);
    return starts;
}

template <typename T>
void run_rows(const vt_prefix_attention_args& a, Run<T> run, int64_t begin, int64_t end, int64_t head) {
    const int64_t group = a.heads / a.kv_heads, queries = (end - begin) * group;
    thread_local std::unique_ptr<float[]> memory;
    thread_local int64_t room = 0;
    const int64_t needed = queries * (2 * a.size + kBlock + 2);
    if (room < needed) {
        memory.reset(new float[needed]);
        room = needed;
    }
    float* at = memory.get();
    const Scratch scratch = {at, at + queries * a.size, at + 2 * queries * a.size, at + queries * (2 * a.size + kBlock),
                             at + queries * (2 * a.size + kBlock + 1)};
    thread_local std::vector<Row<T>> rows;
    rows.clear();
    for (int64_t n = begin; n < end; ++n) {
        const int64_t row = a.order == nullptr ? n : a.order[n], length = a.lengths[row];
        const int64_t shared = n == begin ? 0 : std::min({a.shared[n], length, rows.back().length});
        rows.push_back({static_cast<const T*>(a.q) + row * a.q_stride + head * group * a.size,
                        static_cast<T*>(a.out) + (row * a.heads + head * group) * a.size, a.tables + row * a.table_stride, length,
                        shared});
    }
    run({static_cast<const T*>(a.keys) + head * a.size, static_cast<const T*>(a.values) + head * a.size, rows.data(), end - begin,
         group, a.kv_heads, a.page_size, a.scale, scratch}, a.size);
}

template <typename T>
int32_t attention(const vt_prefix_attention_args& a) {
    const Run<T> run = run_of<T>(a.isa);
    if (run == nullptr) return VT_ISA_MISSING;
    if (!size_is_supported(a.size) || a.kv_heads < 1 || a.heads % a.kv_heads != 0 || a.num_threads < 1) return VT_INVALID;
    try {
        const std::vector<int64_t> starts = task_starts(a, a.order == nullptr ? nullptr : a.shared);
        const int64_t chunks = static_cast<int64_t>(starts.size()) - 1;
        parallel_for(a.num_threads, chunks * a.kv_heads, [&](int64_t task) {
            const int64_t chunk = task / a.kv_heads;
            run_rows<T>(a, run, starts[chunk], starts[chunk + 1], task % a.kv_heads);
        });
    } catch (const std::bad_alloc&) {
        return VT_NO_MEMORY;
    } catch (...) {
        return VT_FAILED;
    }
    return VT_OK;
}

}  // namespace
}  // namespace vtengine

int32_t vt_prefix_attention_shared(const vt_prefix_attention_args* args) {
    return args->is_bfloat16 ? vtengine::attention<uint16_t>(*args) : vtengine::attention<float>(*args);
}
