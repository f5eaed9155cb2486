// Shared by the AVX2 files: compiled for that instruction set function by function, chosen at run time.
#pragma once

#include "kernels.h"

#define VT_AVX2 __attribute__((target("avx2,fma")))

namespace vtengine {
namespace avx2 {

void horizontal(const Axis& axis, const uint8_t* const* in, uint8_t* const* out, int64_t lines);
void vertical(const Axis& axis, int64_t row, const uint8_t* const* in, int64_t bytes, uint8_t* out);

}  // namespace avx2
}  // namespace vtengine
