#include <cmath>
#include <cstring>

#include "view.h"

namespace vtengine {

// A division by a constant c is (x * high + x * low) with high + low = 1 / c to twice the precision: rounded like the
// division in all but rare cases, so all 768 results are compared with the table.
Normaliser make_normaliser(const vt_options& options) {
    Normaliser norm;
    norm.table = options.table;
    norm.unit_high = static_cast<float>(options.unit);
    norm.unit_low = static_cast<float>(options.unit - norm.unit_high);
    norm.exact = true;
    for (int c = 0; c < 3; ++c) {
        const double inverse = 1.0 / options.std[c];
        norm.mean[c] = options.mean[c];
        norm.inverse_high[c] = static_cast<float>(inverse);
        norm.inverse_low[c] = static_cast<float>(inverse - norm.inverse_high[c]);
        for (int x = 0; x < 256; ++x) {
            norm.table16[c][x] = to_bfloat16(norm.table[256 * c + x]);
            const float level = static_cast<float>(x);
            const float low_part = level * norm.unit_low;
            const float unit = std::fma(level, norm.unit_high, low_part);
            const float centered = unit - norm.mean[c];
            const float small = centered * norm.inverse_low[c];
            const float value = std::fma(centered, norm.inverse_high[c], small);
            norm.exact = norm.exact && std::memcmp(&value, &norm.table[256 * c + x], 4) == 0;
        }
    }
    return norm;
}

}  // namespace vtengine
