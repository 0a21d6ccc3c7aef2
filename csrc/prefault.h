// Has the system give memory before it is written. Where a machine is virtual, the first write to 2 MB can take 10 to 20
// ms, because the host has yet to find them; in a step everybody would wait for that.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>

namespace pagemill {

// Keeps some memory ahead of what is used, which grows from the start. Its thread works where no step has begun for a
// while, a huge page at a time, and touches pages as a step would: what is there already is left as it is.
class Prefault {
public:
    Prefault() = default;
    ~Prefault() { stop(); }
    Prefault(const Prefault&) = delete;
    Prefault& operator=(const Prefault&) = delete;
    // From now on of this memory, which must stay until the next call or the end; nothing before `begins` is called. Waits
    // for the page under way.
    void watch(uint8_t* memory, size_t bytes);
    // A step begins, which uses so many bytes from the start; and has ended. From one thread.
    void begins(size_t bytes);
    void ended() { steps_.fetch_add(1, std::memory_order_release); }
    // True once everything asked for is there; false where that takes longer.
    bool wait(double seconds);
    // Bytes from the start that are there because they were asked for, or used.
    size_t done();

private:
    bool is_quiet();
    void stop();
    void work();

    uint8_t* memory_ = nullptr;
    size_t bytes_ = 0, used_ = 0, refill_at_ = 0;
    std::atomic<uint64_t> steps_{0};  // begun and ended: odd while one runs
    uint64_t seen_ = 0;
    size_t done_ = 0, wanted_ = 0;  // these and what follows under mutex_
    bool stop_ = false;
    std::mutex mutex_;
    std::condition_variable wake_, settled_;
    std::thread thread_;
};

}  // namespace pagemill
