// The kernel's own thread pool. The caller is worker 0; a step is one job with barriers inside.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace pagemill {

static inline void cpu_relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// All workers wait for each other. Each arrival is a store to the worker's own cache line; waiting spins briefly, then
// yields the core, so that more workers than cores still make progress.
struct Barrier {
    struct alignas(128) Flag { std::atomic<uint32_t> value{0}; };
    explicit Barrier(int workers) : count(workers), flags(size_t(workers)) {}
    void wait(int worker) {
        if (count == 1) return;
        const uint32_t turn = flags[size_t(worker)].value.load(std::memory_order_relaxed) + 1;
        flags[size_t(worker)].value.store(turn, std::memory_order_release);
        for (int other = 0; other < count; other++) {
            int spins = 0;
            while (int32_t(flags[size_t(other)].value.load(std::memory_order_acquire) - turn) < 0) {
                if (++spins < 400) cpu_relax();
                else std::this_thread::yield();
            }
        }
    }
    const int count;
    std::vector<Flag> flags;
};

class Pool {
public:
    explicit Pool(int workers);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    // Runs job(worker) on every worker and returns when all have ended. The job must not throw.
    void run(const std::function<void(int)>& job);
    int size() const { return count_; }
    Barrier& barrier() { return barrier_; }

private:
    void work(int worker);
    const int count_;
    Barrier barrier_;
    std::atomic<uint32_t> turn_{0};
    std::atomic<bool> stop_{false};
    std::atomic<int> sleeping_{0};
    const std::function<void(int)>* job_ = nullptr;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
};

// Median time of one barrier: tells where the host has placed the cores, and so which figures may be compared.
double barrier_nanoseconds(int workers);

}  // namespace pagemill
