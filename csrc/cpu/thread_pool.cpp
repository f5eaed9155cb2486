#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace vtengine {
namespace {

struct Job {
    const std::function<void(int64_t)>* work;
    int64_t pieces;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable finished;
    int64_t done = 0;
    std::exception_ptr error;

    void run() {  // takes pieces until none is left
        for (int64_t piece = next++; piece < pieces; piece = next++) {
            std::exception_ptr caught;
            try {
                (*work)(piece);
            } catch (...) {
                caught = std::current_exception();
            }
            std::lock_guard<std::mutex> lock(mutex);
            if (caught && !error) error = caught;
            if (++done == pieces) finished.notify_all();
        }
    }
};

class Pool {
  public:
    void offer(const std::shared_ptr<Job>& job, int helpers) {
        std::lock_guard<std::mutex> lock(mutex_);
        while (threads_ < helpers) {
            std::thread([this] { serve(); }).detach();
            ++threads_;
        }
        for (int i = 0; i < helpers; ++i) queue_.push_back(job);
        wake_.notify_all();
    }

  private:
    void serve() {
        for (;;) {
            std::shared_ptr<Job> job;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [this] { return !queue_.empty(); });
                job = std::move(queue_.front());
                queue_.pop_front();
            }
            job->run();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<std::shared_ptr<Job>> queue_;
    int threads_ = 0;
};

Pool* pool = nullptr;  // never deleted: its threads may outlive static objects
std::once_flag pool_once;

void make_pool() {
    pool = new Pool;
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });  // the threads do not exist in the child
#endif
}

}  // namespace

void parallel_for(int threads, int64_t pieces, const std::function<void(int64_t)>& work) {
    const int helpers = static_cast<int>(std::min<int64_t>(threads, pieces)) - 1;
    auto job = std::make_shared<Job>();
    job->work = &work;
    job->pieces = pieces;
    if (helpers > 0) {
        std::call_once(pool_once, make_pool);
        pool->offer(job, helpers);
    }
    job->run();
    std::unique_lock<std::mutex> lock(job->mutex);
    job->finished.wait(lock, [&] { return job->done == job->pieces; });
    if (job->error) std::rethrow_exception(job->error);
}

}  // namespace vtengine
