// The entry points: cuts a call into stripes and lets the threads make them.
#include "vtengine/patchify.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <new>
#include <vector>

#include "thread_pool.h"
#include "view.h"

namespace vtengine {
namespace {

constexpr int64_t kKeptScratch = 32 << 20;  // a thread keeps no more than this between calls

class Scratch {
  public:
    uint8_t* at_least(int64_t bytes) {
        if (bytes > size_) {
            release();
            memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
            if (memory_ == nullptr) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_;
    }
    void trim() {
        if (size_ > kKeptScratch) release();
    }
    ~Scratch() { release(); }

  private:
    void release() {
        std::free(memory_);
        memory_ = nullptr;
        size_ = 0;
    }
    uint8_t* memory_ = nullptr;
    int64_t size_ = 0;
};

thread_local Scratch scratch;

// Piece `piece` of `pieces` of every view, their rows of windows in the order in which they lie in the source.
void make_piece(const std::vector<View>& views, int64_t piece, int64_t pieces) {
    int64_t bytes = 0;
    for (const View& view : views) bytes += view.scratch_bytes;
    uint8_t* memory = scratch.at_least(bytes);
    std::vector<Stripe> stripes;
    for (const View& view : views) {
        const int64_t rows = view.window_rows();
        const int64_t begin = piece * rows / pieces, end = (piece + 1) * rows / pieces;
        if (begin < end) stripes.emplace_back(view, begin, end, memory);
        memory += view.scratch_bytes;
    }
    for (;;) {
        Stripe* next = nullptr;
        for (Stripe& stripe : stripes) {
            if (!stripe.done() && (next == nullptr || stripe.position() < next->position())) next = &stripe;
        }
        if (next == nullptr) break;
        next->step();
    }
    scratch.trim();
}

// Each piece resamples a few lines that its neighbour has too, so they are few, but enough to even out the threads.
int64_t pieces_for(const std::vector<View>& views, int threads) {
    int64_t rows = 0;
    for (const View& view : views) rows = std::max(rows, view.window_rows());
    if (threads == 1 || rows == 1) return 1;
    return std::min(rows, threads * std::clamp<int64_t>(rows / (threads * 12), 1, 4));
}

}  // namespace
}  // namespace vtengine

extern "C" {

int32_t vt_patchify(const vt_image* image, const vt_target* targets, int64_t count, const vt_options* options) {
    using namespace vtengine;
    if (image == nullptr || options == nullptr || count < 0 || options->num_threads < 1) return VT_INVALID;
    if (std::find(std::begin(kPatches), std::end(kPatches), options->patch) == std::end(kPatches)) return VT_INVALID;
    const Kernels* kernels = kernels_of(options->isa);
    if (kernels == nullptr) return VT_ISA_MISSING;
    try {
        std::vector<View> views;
        views.reserve(count);
        for (int64_t i = 0; i < count; ++i) views.emplace_back(*image, targets[i], *options, *kernels);
        if (views.empty()) return VT_OK;
        const int64_t pieces = pieces_for(views, options->num_threads);
        parallel_for(options->num_threads, pieces, [&](int64_t piece) { make_piece(views, piece, pieces); });
    } catch (const std::bad_alloc&) {
        return VT_NO_MEMORY;
    } catch (...) {
        return VT_FAILED;
    }
    return VT_OK;
}

int32_t vt_available_isas(void) { return vtengine::available_isas(); }

int32_t vt_abi_version(void) { return VT_ABI_VERSION; }

}  // extern "C"
