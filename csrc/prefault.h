// Has the system give memory before it is written. Where a machine is virtual, the first write to 2 MB can take 10 to 20
// ms, because the host has yet to find them; in a step everybody would wait for that.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>

namespace pagemill {

// Keeps some memory ahead of what is used, which grows from the start. Its thread runs only where a core has nothing else
// to do. What is there already is left as it is; a system that cannot do this (Linux before 5.14) is left alone.
class Prefault {
public:
    Prefault() = default;
    ~Prefault() { stop(); }
    Prefault(const Prefault&) = delete;
    Prefault& operator=(const Prefault&) = delete;
    // From now on of this memory, which must stay until the next call or the end; nothing before `used` is called.
    void watch(uint8_t* memory, size_t bytes);
    // So many bytes from the start are written or are about to be. From one thread.
    void used(size_t bytes);
    // True once everything asked for is there; false where the time was too short.
    bool wait(double seconds);
    // Bytes from the start that were asked of the system, or used.
    size_t done();

private:
    void stop();
    void work();

    uint8_t* memory_ = nullptr;
    size_t bytes_ = 0, used_ = 0, refill_at_ = 0;
    size_t done_ = 0, wanted_ = 0;  // these and what follows under mutex_
    bool stop_ = false;
    std::mutex mutex_;
    std::condition_variable wake_, settled_;
    std::thread thread_;
};

}  // namespace pagemill
