#include "prefault.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <system_error>

namespace pagemill {

static constexpr size_t kPiece = size_t(2) << 20;    // a huge page
static constexpr size_t kAhead = size_t(256) << 20;  // kept ahead of what is used, at the most
static constexpr size_t kLeast = size_t(16) << 20;   // smaller memory is not worth a thread
static constexpr auto kQuiet = std::chrono::milliseconds(20);
static constexpr double kLongest = 86400.0;

// A byte of each page is written back as it is, whole even where a step writes it at the same time. Asking the system for the
// range (madvise) would keep the lock of the process's memory meanwhile, which every other mapping waits for.
static void touch(uint8_t* memory, size_t bytes) {
    static const size_t page = size_t(std::max(sysconf(_SC_PAGESIZE), 4096L));
    for (size_t at = 0; at < bytes; at += page) __atomic_fetch_or(memory + at, uint8_t(0), __ATOMIC_RELAXED);
}

void Prefault::watch(uint8_t* memory, size_t bytes) {
    stop();
    std::lock_guard<std::mutex> lock(mutex_);
    memory_ = memory;
    bytes_ = bytes < kLeast ? 0 : bytes;
    used_ = refill_at_ = done_ = wanted_ = 0;
    stop_ = false;
}

void Prefault::begins(size_t bytes) {
    steps_.fetch_add(1, std::memory_order_release);
    if (bytes <= used_) return;
    used_ = bytes;
    if (bytes < refill_at_ || refill_at_ >= bytes_) return;
    const size_t until = std::min(bytes_, bytes + kAhead);
    refill_at_ = until < bytes_ ? until - kAhead / 2 : bytes_;
    std::lock_guard<std::mutex> lock(mutex_);
    done_ = std::max(done_, std::min(bytes, bytes_) / kPiece * kPiece);
    wanted_ = until;
    try {
        if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
        else wake_.notify_one();
    } catch (const std::system_error&) {  // no thread is to be had: memory comes when it is written
        refill_at_ = bytes_;
        wanted_ = done_;
    }
}

// No step has begun or run since the last time that this was asked.
bool Prefault::is_quiet() {
    const uint64_t before = seen_;
    seen_ = steps_.load(std::memory_order_acquire);
    return seen_ == before && seen_ % 2 == 0;
}

void Prefault::work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [&] { return stop_ || done_ < wanted_; });
        while (!stop_ && done_ < wanted_) {
            if (!is_quiet()) {
                wake_.wait_for(lock, kQuiet, [&] { return stop_; });
                continue;
            }
            const size_t from = done_, piece = std::min(kPiece, wanted_ - from);
            lock.unlock();
            touch(memory_ + from, piece);
            lock.lock();
            done_ = std::max(done_, from + piece);
        }
        settled_.notify_all();
        if (stop_) return;
    }
}

bool Prefault::wait(double seconds) {
    const std::chrono::duration<double> most(seconds > 0.0 ? std::min(seconds, kLongest) : 0.0);
    std::unique_lock<std::mutex> lock(mutex_);
    return settled_.wait_for(lock, most, [&] { return stop_ || done_ >= wanted_; }) && done_ >= wanted_;
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
