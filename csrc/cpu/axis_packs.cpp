// The weights of an axis, laid out for the horizontal kernels.
#include <algorithm>
#include <cstring>

#include "axis.h"

namespace vtengine {
namespace {

int32_t groups(int64_t outputs, int lanes) { return static_cast<int32_t>((outputs + lanes - 1) / lanes); }

// Entries of `step` taps that the outputs [begin, end) need.
int32_t entries_of(const Axis& axis, int64_t begin, int64_t end, int step) {
    int32_t most = 1;
    for (int64_t i = begin; i < end; ++i) most = std::max(most, (axis.count[i] + step - 1) / step);
    return most;
}

std::vector<int32_t> entry_begins(const Axis& axis, int lanes, int step) {
    std::vector<int32_t> begin{0};
    for (int64_t g = 0; g < groups(axis.size_out, lanes); ++g) {
        const int64_t end = std::min<int64_t>(axis.size_out, (g + 1) * lanes);
        begin.push_back(begin.back() + entries_of(axis, g * lanes, end, step));
    }
    return begin;
}

// First and one-past-last source index of the taps [tap, tap + step) of the outputs [begin, end).
void span(const Axis& axis, int64_t begin, int64_t end, int tap, int step, int32_t* low, int32_t* high) {
    *low = INT32_MAX;
    *high = 0;
    for (int64_t i = begin; i < end; ++i) {
        if (axis.count[i] <= tap) continue;
        *low = std::min(*low, axis.first[i] + tap);
        *high = std::max(*high, axis.first[i] + std::min(axis.count[i], tap + step));
    }
}

void fill_wide(const Axis& axis, int64_t begin, int64_t end, int tap, int32_t window, bool gather, WideQuad* quad) {
    std::memset(quad, 0, sizeof(*quad));
    for (int64_t i = begin; i < end; ++i) {
        const int lane = static_cast<int>(i - begin);
        const int32_t offset = axis.count[i] > tap ? axis.first[i] + tap - window : 0;
        if (gather) std::memcpy(quad->index + 4 * lane, &offset, 4);
        for (int t = 0; t < 4 && tap + t < axis.count[i]; ++t) {
            const int byte = 4 * lane + t;
            if (!gather) quad->index[byte] = static_cast<uint8_t>(offset + t);
            split_bytes(axis.weight[i * axis.taps + tap + t], &quad->w2[byte], &quad->w1[byte], &quad->w0[byte]);
        }
    }
}

void fill_pair(const Axis& axis, int64_t begin, int64_t end, int tap, int32_t window, int half, PairQuad* quad) {
    for (int64_t i = begin; i < end; ++i) {
        for (int t = 0; t < 2 && tap + t < axis.count[i]; ++t) {
            const int word = 8 * half + 2 * static_cast<int>(i - begin) + t;
            quad->index[2 * word] = static_cast<uint8_t>(axis.first[i] + tap + t - window);
            split_words(axis.weight[i * axis.taps + tap + t], &quad->low[word], &quad->high[word]);
        }
    }
}

void find_tail(int64_t size_in, WidePack* pack) {
    const auto window = pack->window.begin();
    for (size_t g = 0; g + 1 < pack->begin.size(); ++g) {
        const auto [low, high] = std::minmax_element(window + pack->begin[g], window + pack->begin[g + 1]);
        if (pack->tail == SIZE_MAX && *high + 22 > size_in) {
            pack->tail = g;
            pack->tail_pixel = *low;
        }
        if (pack->tail != SIZE_MAX) pack->tail_pixel = std::min(pack->tail_pixel, *low);
    }
}

WidePack make_wide(const Axis& axis) {
    WidePack pack;
    pack.begin = entry_begins(axis, kWideGroup * kWideLanes, 4);
    for (int32_t& begin : pack.begin) begin *= kWideGroup;
    for (int64_t r = 0; r < kWideGroup * groups(axis.size_out, kWideGroup * kWideLanes); ++r) {
        const int64_t begin = r * kWideLanes, end = std::min<int64_t>(axis.size_out, begin + kWideLanes);
        pack.used.push_back(entries_of(axis, begin, end, 4));
    }
    pack.window.resize(pack.begin.back());
    pack.entries.reset(new WideQuad[pack.begin.back()]);
    for (int pass = 0; pass < 2; ++pass) {  // first the windows, which decide on gathering
        for (size_t g = 0; g + 1 < pack.begin.size(); ++g) {
            for (int32_t e = pack.begin[g]; e < pack.begin[g + 1]; ++e) {
                const int tap = 4 * ((e - pack.begin[g]) / kWideGroup), part = (e - pack.begin[g]) % kWideGroup;
                const int64_t begin = std::min<int64_t>(axis.size_out, (g * kWideGroup + part) * kWideLanes);
                const int64_t end = std::min<int64_t>(axis.size_out, begin + kWideLanes);
                int32_t low = 0, high = 0;
                span(axis, begin, end, tap, 4, &low, &high);
                if (high == 0) low = high = pack.window[e - 1];  // no output here has so many taps
                pack.window[e] = low;
                if (pass == 0) pack.gather = pack.gather || high - low > 64;
                if (pass == 0) pack.pixels = pack.pixels && high - low <= 21 && tap <= 4;
                if (pass == 1) fill_wide(axis, begin, end, tap, low, pack.gather, &pack.entries[e]);
            }
        }
    }
    find_tail(axis.size_in, &pack);
    return pack;
}

PairPack make_pair(const Axis& axis) {
    PairPack pack;
    pack.begin = entry_begins(axis, kPairLanes, 2);
    pack.window.resize(2 * pack.begin.back());
    pack.entries.reset(new PairQuad[pack.begin.back()]);
    for (size_t g = 0; g + 1 < pack.begin.size(); ++g) {
        for (int32_t e = pack.begin[g]; e < pack.begin[g + 1]; ++e) {
            const int tap = 2 * (e - pack.begin[g]);
            PairQuad* quad = &pack.entries[e];
            std::memset(quad, 0, sizeof(*quad));
            std::memset(quad->index, 0x80, sizeof(quad->index));  // picks a zero
            for (int half = 0; half < 2; ++half) {
                const int64_t begin = std::min<int64_t>(axis.size_out, g * kPairLanes + 4 * half);
                const int64_t end = std::min<int64_t>(axis.size_out, begin + 4);
                int32_t low = 0, high = 0;
                span(axis, begin, end, tap, 2, &low, &high);
                low = high == 0 ? 0 : low;  // no output here has so many taps
                pack.window[2 * e + half] = low;
                pack.fits = pack.fits && high - low <= 16;
                if (pack.fits) fill_pair(axis, begin, end, tap, low, half, quad);
            }
        }
    }
    return pack;
}

ColumnPack make_column(const Axis& axis) {
    ColumnPack pack;
    pack.quads = (axis.taps + 3) / 4;
    pack.pairs = (axis.taps + 1) / 2;
    pack.bytes.assign(3 * axis.size_out * pack.quads, 0);
    pack.words.assign(2 * axis.size_out * pack.pairs, 0);
    for (int64_t row = 0; row < axis.size_out; ++row) {
        for (int t = 0; t < axis.taps; ++t) {
            int8_t bytes[3];
            int16_t words[2];
            split_bytes(axis.weight[row * axis.taps + t], &bytes[0], &bytes[1], &bytes[2]);
            split_words(axis.weight[row * axis.taps + t], &words[0], &words[1]);
            int32_t* quad = &pack.bytes[3 * (row * pack.quads + t / 4)];
            int32_t* pair = &pack.words[2 * (row * pack.pairs + t / 2)];
            for (int i = 0; i < 3; ++i) reinterpret_cast<int8_t*>(quad + i)[t % 4] = bytes[i];
            for (int i = 0; i < 2; ++i) reinterpret_cast<int16_t*>(pair + i)[t % 2] = words[i];
        }
    }
    return pack;
}

}  // namespace

const WidePack& Axis::wide() const {
    std::call_once(wide_once_, [this] { wide_ = make_wide(*this); });
    return wide_;
}

const PairPack& Axis::pair() const {
    std::call_once(pair_once_, [this] { pair_ = make_pair(*this); });
    return pair_;
}

const ColumnPack& Axis::column() const {
    std::call_once(column_once_, [this] { column_ = make_column(*this); });
    return column_;
}

}  // namespace vtengine
