// Few rows times a large matrix: kTile rows of it at a time pass through the first cache, once for all rows of x.
#include "vtengine/few_rows.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "thread_pool.h"

#define VT_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace vtengine {
namespace {

constexpr int kTile = 4, kMostRows = 6;     // their products fill the registers
constexpr int64_t kLine = 32;               // numbers in a register, and in a line of the cache
constexpr int64_t kPieceNumbers = 1 << 17;  // of the matrix, which a thread takes at a time

struct Tile {
    const uint16_t* weight[kTile];  // past the last output: the last one again
    const uint16_t* ahead;          // the next kTile rows; null: there are none
    int64_t fetch_from, fetch_to;   // which lines of each kTile of them to fetch meanwhile
    const uint16_t* x;
    int64_t size, x_stride;
    float sums[kMostRows][kTile];
};

VT_BF16 inline __m512bh numbers(__mmask32 mask, const uint16_t* at) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, at));
}

template <int R>
VT_BF16 void run_tile(Tile& tile) {
    __m512 sums[R][kTile];
#pragma GCC unroll 6
    for (int n = 0; n < R; ++n) {
#pragma GCC unroll 4
        for (int o = 0; o < kTile; ++o) sums[n][o] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < tile.size; i += kLine) {
        const int64_t left = tile.size - i;
        const __mmask32 mask = left >= kLine ? ~0u : ~0u >> (kLine - left);
        __m512bh w[kTile];
#pragma GCC unroll 4
        for (int o = 0; o < kTile; ++o) w[o] = numbers(mask, tile.weight[o] + i);
        if (tile.ahead != nullptr) {
            // into the second cache: the first one is full of x
            for (int64_t line = tile.fetch_from; line < tile.fetch_to; ++line) {
                _mm_prefetch(reinterpret_cast<const char*>(tile.ahead + kTile * i + line * kLine), _MM_HINT_T1);
            }
        }
#pragma GCC unroll 6
        for (int n = 0; n < R; ++n) {
            const __m512bh x = numbers(mask, tile.x + n * tile.x_stride + i);
#pragma GCC unroll 4
            for (int o = 0; o < kTile; ++o) sums[n][o] = _mm512_dpbf16_ps(sums[n][o], w[o], x);
        }
    }
#pragma GCC unroll 6
    for (int n = 0; n < R; ++n) {
#pragma GCC unroll 4
        for (int o = 0; o < kTile; ++o) tile.sums[n][o] = _mm512_reduce_add_ps(sums[n][o]);
    }
}

using Run = void (*)(Tile&);
constexpr Run kRuns[kMostRows] = {run_tile<1>, run_tile<2>, run_tile<3>, run_tile<4>, run_tile<5>, run_tile<6>};

void store(const vt_few_rows_args& a, const Tile& tile, int64_t first_row, int64_t rows, int64_t first) {
    const int64_t outputs = std::min<int64_t>(kTile, a.outputs - first);
    for (int64_t n = 0; n < rows; ++n) {
        const int64_t at = (first_row + n) * a.outputs + first;
        for (int64_t o = 0; o < outputs; ++o) {
            const float sum = tile.sums[n][o] + (a.bias == nullptr ? 0.0f : from_bfloat16(a.bias[first + o]));
            if (a.out_is_float) {
                static_cast<float*>(a.out)[at + o] = sum;
            } else {
                static_cast<uint16_t*>(a.out)[at + o] = to_bfloat16(sum);
            }
        }
    }
}

// Outputs [first, end), which begin at a multiple of kTile.
void run_outputs(const vt_few_rows_args& a, int64_t first, int64_t end) {
    const int64_t groups = (a.rows + kMostRows - 1) / kMostRows;
    Tile tile;
    tile.size = a.size;
    tile.x_stride = a.x_stride;
    for (; first < end; first += kTile) {
        const bool more = first + 2 * kTile <= a.outputs && a.weight_stride == a.size;
        tile.ahead = more ? a.weight + (first + kTile) * a.weight_stride : nullptr;
        for (int o = 0; o < kTile; ++o) {
            tile.weight[o] = a.weight + std::min<int64_t>(first + o, a.outputs - 1) * a.weight_stride;
        }
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t row = a.rows * group / groups, rows = a.rows * (group + 1) / groups - row;
            tile.fetch_from = kTile * group / groups;
            tile.fetch_to = kTile * (group + 1) / groups;
            tile.x = a.x + row * a.x_stride;
            kRuns[rows - 1](tile);
            store(a, tile, row, rows, first);
        }
    }
}

}  // namespace
}  // namespace vtengine

int32_t vt_few_rows_here(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

int32_t vt_few_rows(const vt_few_rows_args* args) {
    using namespace vtengine;
    const vt_few_rows_args& a = *args;
    if (!vt_few_rows_here()) return VT_ISA_MISSING;
    if (a.rows < 1 || a.outputs < 1 || a.size < 0 || a.num_threads < 1) return VT_INVALID;
    const int64_t piece = std::max<int64_t>(1, kPieceNumbers / (kTile * (a.size + 1))) * kTile;
    try {
        parallel_for(a.num_threads, (a.outputs + piece - 1) / piece, [&](int64_t n) {
            run_outputs(a, n * piece, std::min(a.outputs, (n + 1) * piece));
        });
    } catch (...) {
        return VT_FAILED;
    }
    return VT_OK;
}
#else
int32_t vt_few_rows_here(void) { return 0; }

int32_t vt_few_rows(const vt_few_rows_args*) { return VT_ISA_MISSING; }
#endif
