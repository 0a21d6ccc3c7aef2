#include "prefault.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <system_error>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#endif

namespace pagemill {

static constexpr size_t kPiece = size_t(2) << 20;    // of one call: a huge page
static constexpr size_t kAhead = size_t(256) << 20;  // kept ahead of what is used, at the most
static constexpr size_t kLeast = size_t(16) << 20;   // smaller memory is not worth a thread

static bool populate(uint8_t* memory, size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t page = 4096;
    const uintptr_t from = reinterpret_cast<uintptr_t>(memory) / page * page;
    return madvise(reinterpret_cast<void*>(from), reinterpret_cast<uintptr_t>(memory) + bytes - from, MADV_POPULATE_WRITE) == 0;
#else
    return false;
#endif
}

static void yield_to_all_others() {
#if defined(__linux__) && defined(SCHED_IDLE)
    sched_param none{};
    pthread_setschedparam(pthread_self(), SCHED_IDLE, &none);
#endif
}

void Prefault::watch(uint8_t* memory, size_t bytes) {
    stop();
    memory_ = memory;
    bytes_ = bytes < kLeast ? 0 : bytes;
    used_ = refill_at_ = done_ = wanted_ = 0;
    stop_ = false;
}

void Prefault::used(size_t bytes) {
    if (bytes <= used_) return;
    used_ = bytes;
    if (bytes < refill_at_ || refill_at_ >= bytes_) return;
    const size_t until = std::min(bytes_, bytes + kAhead);
    refill_at_ = until < bytes_ ? until - kAhead / 2 : bytes_;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        done_ = std::max(done_, std::min(bytes, bytes_) / kPiece * kPiece);
        wanted_ = until;
    }
    try {
        if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
    } catch (const std::system_error&) {  // no thread is to be had: memory comes when it is written
        refill_at_ = bytes_;
        done_ = wanted_;
        return;
    }
    wake_.notify_one();
}

void Prefault::work() {
    yield_to_all_others();
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [&] { return stop_ || done_ < wanted_; });
        if (stop_) return;
        const size_t from = done_, piece = std::min(kPiece, wanted_ - from);
        lock.unlock();
        const bool could = populate(memory_ + from, piece);
        lock.lock();
        done_ = could ? std::max(done_, from + piece) : wanted_;
        if (done_ >= wanted_) settled_.notify_all();
    }
}

bool Prefault::wait(double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    return settled_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return done_ >= wanted_; });
}

size_t Prefault::done() {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_;
}

void Prefault::stop() {
    if (!thread_.joinable()) return;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    thread_.join();
    thread_ = std::thread();
}

}  // namespace pagemill
