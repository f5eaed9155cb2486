// Vectors of floats, compiled once per instruction set: the including file defines VT_TARGET (the function attribute) and
// VT_LANES (floats per vector) inside its own namespace. Include it there, more than once.
typedef float Vec __attribute__((vector_size(VT_LANES * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(VT_LANES * 4), aligned(4), may_alias));

VT_TARGET static inline const Vec& vec(const float* at) { return *reinterpret_cast<const Vec*>(at); }
VT_TARGET static inline Vec& vec(float* at) { return *reinterpret_cast<Vec*>(at); }

typedef uint16_t HalfVec __attribute__((vector_size(VT_LANES * 2), aligned(2), may_alias));
typedef uint32_t BitsVec __attribute__((vector_size(VT_LANES * 4), aligned(4), may_alias));

// A vector of bfloat16 to floats.
VT_TARGET static inline void widen_lanes(const uint16_t* x, float* out) {
    const BitsVec bits = __builtin_convertvector(*reinterpret_cast<const HalfVec*>(x), BitsVec);
    *reinterpret_cast<BitsVec*>(out) = bits << 16;
}

// A vector of floats to bfloat16: the nearest, ties to even; NaN stays NaN.
VT_TARGET static inline void narrow_lanes(const float* x, uint16_t* out) {
    const BitsVec nan = BitsVec{} + 0x7fc00000u, bits = *reinterpret_cast<const BitsVec*>(x);
    const BitsVec rounded = (vec(x) == vec(x)) ? bits + 0x7fffu + ((bits >> 16) & 1u) : nan;
    *reinterpret_cast<HalfVec*>(out) = __builtin_convertvector(rounded >> 16, HalfVec);
}

VT_TARGET static inline void widen(const uint16_t* x, int64_t size, float* out) {
    int64_t i = 0;
    for (; i + VT_LANES <= size; i += VT_LANES) widen_lanes(x + i, out + i);
    for (; i < size; ++i) out[i] = from_bfloat16(x[i]);
}

VT_TARGET static inline void narrow(const float* x, int64_t size, uint16_t* out) {
    int64_t i = 0;
    for (; i + VT_LANES <= size; i += VT_LANES) narrow_lanes(x + i, out + i);
    for (; i < size; ++i) out[i] = x[i] == x[i] ? to_bfloat16(x[i]) : 0x7fc0;
}

VT_TARGET static inline float sum_lanes(const Vec& x) {
    float lane[VT_LANES];
    vec(lane) = x;
    for (int width = VT_LANES / 2; width >= 1; width /= 2) {
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    return lane[0];
}

// The largest of `least` and x[0..count); count: a positive multiple of VT_LANES.
VT_TARGET static inline float highest_of(const float* x, int64_t count, float least) {
    Vec top = vec(x);
    for (int64_t i = VT_LANES; i < count; i += VT_LANES) top = vec(x + i) > top ? vec(x + i) : top;
    float lane[VT_LANES];
    vec(lane) = top;
    for (int i = 0; i < VT_LANES; ++i) least = lane[i] > least ? lane[i] : least;
    return least;
}

// e^x for x in [-inf, 0], relative error below 2e-7 (Cephes expf); 0 below -87.
VT_TARGET static inline void exp_lanes(Vec& x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const IntVec tiny = x < -87.0f;
    const Vec zero = {};
    Vec n = x * 1.44269504088896341f + magic - magic;
    n = tiny ? zero : n;  // an exponent that there is
    const Vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const IntVec bits = (__builtin_convertvector(n, IntVec) + 127) << 23;
    Vec power;
    __builtin_memcpy(&power, &bits, sizeof power);
    x = tiny ? zero : p * power;
}
