// Includes VT_BODY, a header of functions, once per instruction set, in the namespaces `wide`, `middle` and `plain`, with
// VT_TARGET (the function attribute) and VT_LANES (floats per vector). Define VT_BODY, include this inside your own
// namespace, and take the function that is to run with VT_PICK(isa, function); nullptr: not on this machine.
#if defined(__x86_64__)
namespace wide {
#define VT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2")))
#define VT_LANES 16
#include VT_BODY
#undef VT_TARGET
#undef VT_LANES
}  // namespace wide
namespace middle {
#define VT_TARGET __attribute__((target("avx2,fma")))
#define VT_LANES 8
#include VT_BODY
#undef VT_TARGET
#undef VT_LANES
}  // namespace middle
#endif
namespace plain {
#define VT_TARGET
#define VT_LANES 8
#include VT_BODY
#undef VT_TARGET
#undef VT_LANES
}  // namespace plain
#undef VT_BODY

#if defined(__x86_64__)
#define VT_PICK(isa, function) pick(isa, &wide::function, &middle::function, &plain::function)
#else
#define VT_PICK(isa, function) pick(isa, &plain::function, &plain::function, &plain::function)
#endif
