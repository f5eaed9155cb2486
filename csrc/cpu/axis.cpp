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

int32_t fixed_point(double weight) {
    const double scaled = weight * (1 << kPrecisionBits);
    return static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
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

Axis::Axis(int64_t in, int64_t out, int kind) : size_in(in), size_out(out), filter(kind), taps(0) {
    const double scale = static_cast<double>(in) / static_cast<double>(out);
    const double stretch = std::max(scale, 1.0);
    const double support = (kind == VT_LANCZOS ? 3.0 : 2.0) * stretch;
    const double shrink = 1.0 / stretch;
    std::vector<std::vector<int32_t>> rows(out);
    std::vector<double> values;
    first.resize(out);
    count.resize(out);
    for (int64_t i = 0; i < out; ++i) {
        const double center = (i + 0.5) * scale;
        const int64_t low = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
        const int64_t high = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in);
        values.resize(high - low);
        double total = 0.0;
        for (int64_t x = low; x < high; ++x) {
            const double distance = (x - low + low - center + 0.5) * shrink;
            values[x - low] = kind == VT_LANCZOS ? lanczos(distance) : bicubic(distance);
            total += values[x - low];
        }
        for (double value : values) rows[i].push_back(fixed_point(total != 0.0 ? value / total : value));
        int32_t skip = 0;
        trim(rows[i], &skip, &count[i]);
        rows[i].erase(rows[i].begin(), rows[i].begin() + skip);
        first[i] = static_cast<int32_t>(low + skip);
        taps = std::max(taps, static_cast<int>(count[i]));
    }
    weight.assign(out * taps, 0);
    for (int64_t i = 0; i < out; ++i) {
        std::copy_n(rows[i].begin(), count[i], weight.begin() + i * taps);
        for (int32_t value : rows[i]) narrow = narrow && std::abs(value) < 127 * 65536;
    }
}

std::shared_ptr<const Axis> find_axis(int64_t size_in, int64_t size_out, int filter) {
    static std::mutex mutex;
    static std::list<std::shared_ptr<const Axis>> cache;
    {
        std::lock_guard<std::mutex> lock(mutex);
        for (auto it = cache.begin(); it != cache.end(); ++it) {
            if ((*it)->size_in == size_in && (*it)->size_out == size_out && (*it)->filter == filter) {
                cache.splice(cache.begin(), cache, it);
                return cache.front();
            }
        }
    }
    auto made = std::make_shared<const Axis>(size_in, size_out, filter);
    std::lock_guard<std::mutex> lock(mutex);
    cache.push_front(made);
    if (cache.size() > kCachedAxes) cache.pop_back();
    return made;
}

}  // namespace vtengine
