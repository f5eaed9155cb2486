// A few sleeping threads for work that is cut into pieces. One pool per process; several callers may use it at once.
#pragma once

#include <cstdint>
#include <functional>

namespace vtengine {

// Runs work(0) .. work(pieces - 1) on the calling thread and up to threads - 1 others; returns when all are done.
// The caller never waits for a free thread: it does what nobody else has taken. The first exception is thrown again.
void parallel_for(int threads, int64_t pieces, const std::function<void(int64_t)>& work);

}  // namespace vtengine
