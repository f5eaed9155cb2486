#include "axis.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>

#include "vtengine/patchify.h"

namespace vtengine {
namespace {

constexpr size_t kCachedAxes = 64;
constexpr double kPi = 3.14159265358979323846;

double bicubic(double x) {
    x = std::fabs(x);
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0.0;
}

double sinc(double x) {
    if (x == 0.0) return 1.0;
    x *= kPi;
    return std::sin(x) / x;
}

double lanczos(double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

// Fractional bits with which weights up to `largest` fit 16 bits.
int int16_bits(double largest) {
    int bits = 0;
    while (bits < kPrecisionBits && static_cast<int>(0.5 + largest * (1 << (bits + 1))) < 1 << 15) ++bits;
    return bits;
}

// Rounded to `bits` fractional bits; has kPrecisionBits of them.
int32_t fixed_point(double weight, int bits) {
    const double scaled = weight * (1 << bits);
    return static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5) * (1 << (kPrecisionBits - bits));
}

// Taps [first, last) of one output, weights that round to zero cut off at both ends; at least one is left.
void trim(const std::vector<int32_t>& row, int32_t* skip, int32_t* count) {
    int32_t begin = 0, end = static_cast<int32_t>(row.size());
    while (end - begin > 1 && row[end - 1] == 0) --end;
    while (end - begin > 1 && row[begin] == 0) ++begin;
    *skip = begin;
    *count = end - begin;
}

}  // namespace

Axis::Axis(int64_t in, int64_t out, int kind, bool sixteen)
    : size_in(in), size_out(out), filter(kind), int16(sixteen), taps(0) {
    const double scale = static_cast<double>(in) / static_cast<double>(out);
    const double stretch = std::max(scale, 1.0);
    const double support = (kind == VT_LANCZOS ? 3.0 : 2.0) * stretch;
    const double shrink = 1.0 / stretch;
    std::vector<std::vector<double>> exact(out);
    std::vector<std::vector<int32_t>> rows(out);
    double largest = 0.0;
    first.resize(out);
    count.resize(out);
    for (int64_t i = 0; i < out; ++i) {
        const double center = (i + 0.5) * scale;
        const int64_t low = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
        const int64_t high = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in);
        std::vector<double>& values = exact[i];
        values.resize(high - low);
        first[i] = static_cast<int32_t>(low);
        double total = 0.0;
        for (int64_t x = low; x < high; ++x) {
            const double distance = (x - low + low - center + 0.5) * shrink;
            values[x - low] = kind == VT_LANCZOS ? lanczos(distance) : bicubic(distance);
            total += values[x - low];
        }
        for (double& value : values) {
            if (total != 0.0) value /= total;
            largest = std::max(largest, value);
        }
    }
    const int bits = int16 ? int16_bits(largest) : kPrecisionBits;
    for (int64_t i = 0; i < out; ++i) {
        for (double value : exact[i]) rows[i].push_back(fixed_point(value, bits));
        int32_t skip = 0;
        trim(rows[i], &skip, &count[i]);
        rows[i].erase(rows[i].begin(), rows[i].begin() + skip);
        first[i] += skip;
        taps = std::max(taps, static_cast<int>(count[i]));
    }
    weight.assign(out * taps, 0);
    for (int64_t i = 0; i < out; ++i) {
        std::copy_n(rows[i].begin(), count[i], weight.begin() + i * taps);
        for (int32_t value : rows[i]) narrow = narrow && std::abs(value) < 127 * 65536;
    }
}

std::shared_ptr<const Axis> find_axis(int64_t size_in, int64_t size_out, int filter, bool int16) {
    static std::mutex mutex;
    static std::list<std::shared_ptr<const Axis>> cache;
    {
        std::lock_guard<std::mutex> lock(mutex);
        for (auto it = cache.begin(); it != cache.end(); ++it) {
            const Axis& axis = **it;
            if (axis.size_in == size_in && axis.size_out == size_out && axis.filter == filter && axis.int16 == int16) {
                cache.splice(cache.begin(), cache, it);
                return cache.front();
            }
        }
    }
    auto made = std::make_shared<const Axis>(size_in, size_out, filter, int16);
    std::lock_guard<std::mutex> lock(mutex);
    cache.push_front(made);
    if (cache.size() > kCachedAxes) cache.pop_back();
    return made;
}

}  // namespace vtengine
