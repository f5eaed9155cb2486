// Includes VT_BODY, a header of functions, once per instruction set, in the namespaces `wide`, `middle` and `plain`, with
// VT_TARGET (the function attribute), VT_LANES (floats per vector) and VT_FMA(a, b, c) (a * b + c, rounded once where the
// processor can; needs <immintrin.h>). Define VT_BODY, include this inside your own namespace, and take the function that is
// to run with VT_PICK(isa, function); nullptr: not on this machine.
#if defined(__x86_64__)
namespace wide {
#define VT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2")))
#define VT_LANES 16
#define VT_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#include VT_BODY
#undef VT_TARGET
#undef VT_LANES
#undef VT_FMA
}  // namespace wide
namespace middle {
#define VT_TARGET __attribute__((target("avx2,fma")))
#define VT_LANES 8
#define VT_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#include VT_BODY
#undef VT_TARGET
#undef VT_LANES
#undef VT_FMA
}  // namespace middle
#endif
namespace plain {
#define VT_TARGET
#define VT_LANES 8
#define VT_FMA(a, b, c) ((a) * (b) + (c))
#include VT_BODY
#undef VT_TARGET
#undef VT_LANES
#undef VT_FMA
}  // namespace plain
#undef VT_BODY

#if defined(__x86_64__)
#define VT_PICK(isa, function) pick(isa, &wide::function, &middle::function, &plain::function)
#else
#define VT_PICK(isa, function) pick(isa, &plain::function, &plain::function, &plain::function)
#endif
