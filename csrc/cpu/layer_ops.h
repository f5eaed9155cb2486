// The work on one row, compiled once per instruction set: the including file defines VT_TARGET (the function attribute) and
// VT_LANES (floats per vector) inside its own namespace. Include it there, more than once.
#include "lanes.h"

VT_TARGET static void rms_norm_row(const float* x, int64_t size, const float* weight, float eps, float* out) {
    Vec sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * VT_LANES <= size; i += 2 * VT_LANES) {
        sums[0] += vec(x + i) * vec(x + i);
        sums[1] += vec(x + i + VT_LANES) * vec(x + i + VT_LANES);
    }
    float rest = 0.0f;
    for (; i < size; ++i) rest += x[i] * x[i];
    const float mean = (sum_lanes(sums[0] + sums[1]) + rest) / static_cast<float>(size);
    const float scale = 1.0f / std::sqrt(mean + eps);
    for (i = 0; i + VT_LANES <= size; i += VT_LANES) vec(out + i) = vec(x + i) * scale * vec(weight + i);
    for (; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

VT_TARGET static inline void gated(const float* gate, const float* up, float* out) {
    const Vec g = vec(gate);
    Vec e = g < 0.0f ? g : -g;
    exp_lanes(e);  // e^-|g|, which never overflows
    vec(out) = (g < 0.0f ? g * e : g) / (e + 1.0f) * vec(up);
}

VT_TARGET static void swiglu_row(const float* x, int64_t size, float* out) {
    int64_t i = 0;
    for (; i + VT_LANES <= size; i += VT_LANES) gated(x + i, x + size + i, out + i);
    if (i == size) return;
    float gate[VT_LANES] = {}, up[VT_LANES] = {}, tail[VT_LANES];
    const size_t bytes = static_cast<size_t>(size - i) * sizeof(float);
    std::memcpy(gate, x + i, bytes);
    std::memcpy(up, x + size + i, bytes);
    gated(gate, up, tail);
    std::memcpy(out + i, tail, bytes);
}

VT_TARGET static void rotary_row(
    const float* x, int64_t heads, int64_t size, const float* cos, const float* sin, float* out) {
    const int64_t half = size / 2;
    for (int64_t head = 0; head < heads; ++head, x += size, out += size) {
        int64_t i = 0;
        for (; i + VT_LANES <= half; i += VT_LANES) {
            const Vec low = vec(x + i), high = vec(x + half + i);
            vec(out + i) = low * vec(cos + i) + high * vec(sin + i);
            vec(out + half + i) = high * vec(cos + half + i) + low * vec(sin + half + i);
        }
        for (; i < half; ++i) {
            out[i] = x[i] * cos[i] + x[half + i] * sin[i];
            out[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
        }
    }
}
