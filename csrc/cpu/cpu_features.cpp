// Which of the kernels this machine can run, asked of the processor once.
#include "kernels.h"

namespace vtengine {

int available_isas() {
    int found = 1 << VT_ISA_SCALAR;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= 1 << VT_ISA_AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) {
        found |= 1 << VT_ISA_AVX512;
    }
#endif
    return found;
}

int usable_isa(int isa) {
    static const int available = available_isas();
    if (isa == VT_ISA_AUTO) {
        isa = VT_ISA_SCALAR;
        if (available & (1 << VT_ISA_AVX2)) isa = VT_ISA_AVX2;
        if (available & (1 << VT_ISA_AVX512)) isa = VT_ISA_AVX512;
    }
    const bool known = isa >= VT_ISA_SCALAR && isa <= VT_ISA_AVX512;
    return known && (available & (1 << isa)) ? isa : kNoIsa;
}

const Kernels* kernels_of(int isa) {
#if defined(__x86_64__)
    return pick(isa, &kAvx512Kernels, &kAvx2Kernels, &kScalarKernels);
#else
    return pick(isa, &kScalarKernels, &kScalarKernels, &kScalarKernels);
#endif
}

}  // namespace vtengine
