#include "threads.h"

#include <algorithm>
#include <chrono>

namespace pagemill {

Pool::Pool(int workers) : count_(workers), barrier_(workers) {
    for (int worker = 1; worker < workers; worker++) threads_.emplace_back([this, worker] { work(worker); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Pool::run(const std::function<void(int)>& job) {
    job_ = &job;
    turn_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
        { std::lock_guard<std::mutex> lock(mutex_); }
        wake_.notify_all();
    }
    job(0);
    barrier_.wait(0);
}

void Pool::work(int worker) {
    uint32_t seen = 0;
    for (;;) {
        // Some 20 to 40 us of spinning bridges the gap between steps; then the thread sleeps.
        for (int spins = 0; turn_.load(std::memory_order_acquire) == seen && !stop_ && spins < 600; spins++) cpu_relax();
        if (turn_.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleeping_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, [&] { return turn_.load(std::memory_order_seq_cst) != seen || stop_; });
            sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        }
        if (stop_) return;
        seen++;
        (*job_)(worker);
        barrier_.wait(worker);
    }
}

double barrier_nanoseconds(int workers) {
    Pool pool(workers);
    constexpr int rounds = 2000, samples = 9;
    std::vector<double> times;
    for (int i = 0; i < samples; i++) {
        const auto start = std::chrono::steady_clock::now();
        pool.run([&](int worker) {
            for (int r = 0; r < rounds; r++) pool.barrier().wait(worker);
        });
        times.push_back(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / rounds);
    }
    std::sort(times.begin(), times.end());
    return times[samples / 2];
}

}  // namespace pagemill
