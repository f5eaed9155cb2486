// Shared by the AVX-512 files: compiled for that instruction set function by function, chosen at run time.
#pragma once

#include "kernels.h"

#define VT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,avx2")))

namespace vtengine {
namespace avx512 {

void horizontal(const Axis& axis, const uint8_t* const* in, uint8_t* const* out, int64_t lines);
void vertical(const Axis& axis, int64_t row, const uint8_t* const* in, int64_t bytes, uint8_t* out);
bool horizontal_pixels(const Axis& axis, const uint8_t* rgb, int64_t row_bytes, uint8_t* const* out, int64_t lines);

extern const EmitLines kEmitLines[2][2][2];  // as Kernels::emit

}  // namespace avx512
}  // namespace vtengine
