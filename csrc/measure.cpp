#include "measure.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <limits>
#include <stdexcept>

#include "dispatch.h"
#include "threads.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pagemill {

namespace scalar { extern const Peaks peaks; }
#if defined(__x86_64__)
namespace avx2 { extern const Peaks peaks; }
namespace avx512 { extern const Peaks peaks; }
namespace avx512_bf16 { extern const Peaks peaks; }
namespace amx { extern const Peaks peaks; }
#endif

static const Peaks& peaks_of(const std::string& target) {
    const Peaks* all[] = {
        &scalar::peaks,
#if defined(__x86_64__)
        &avx2::peaks, &avx512::peaks, &avx512_bf16::peaks, &amx::peaks,
#endif
    };
    if (find_target(target) != nullptr)
        for (const Peaks* each : all)
            if (target == each->target) return *each;
    throw std::invalid_argument("target not available on this machine: " + target);
}

static bool has_tile_int8() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 25)) != 0;
#else
    return false;
#endif
}

static constexpr double kSampleSeconds = 2e-3;
static constexpr int64_t kMostRounds = int64_t(1) << 40;

static double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Fewest seconds of one round over all samples; work(worker, rounds) runs on every worker between two barriers.
static double fastest_round(int threads, int samples, const std::function<void(int, int64_t)>& work) {
    Pool pool(threads);
    auto timed = [&](int64_t rounds) {
        double seconds = 0;
        pool.run([&](int worker) {
            pool.barrier().wait(worker);
            const auto start = std::chrono::steady_clock::now();
            work(worker, rounds);
            pool.barrier().wait(worker);
            if (worker == 0) seconds = seconds_since(start);
        });
        return seconds;
    };
    int64_t rounds = 1;
    double seconds = timed(rounds);
    while (seconds < kSampleSeconds / 2 && rounds < kMostRounds) seconds = timed(rounds *= 2);
    double best = seconds / double(rounds);
    rounds = std::max<int64_t>(1, int64_t(kSampleSeconds / best));
    for (int i = 0; i < samples; i++) best = std::min(best, timed(rounds) / double(rounds));
    return best;
}

// Results end here, so that nothing that made them can be left out.
static std::atomic<uint64_t> sink{0};

double multiply_add_rate(const std::string& target, Arithmetic arithmetic, int threads, int samples) {
    const Peaks& peaks = peaks_of(target);
    const int64_t size = peaks.round_size(arithmetic);
    if (size == 0 || (arithmetic == Arithmetic::tile_int8 && !has_tile_int8())) return 0;
    constexpr int64_t unit = 64;  // rounds that one call runs at the least
    const double seconds = fastest_round(threads, samples, [&](int, int64_t rounds) {
        sink.fetch_add(uint64_t(peaks.compute(arithmetic, unit * rounds) != 0), std::memory_order_relaxed);
    });
    return double(size) * double(unit) * double(threads) / seconds;
}

double read_rate(const std::string& target, const uint8_t* data, size_t bytes, int threads, int samples) {
    const Peaks& peaks = peaks_of(target);
    constexpr size_t line = 512;
    const size_t slice = bytes / size_t(threads) / line * line;
    if (slice == 0) throw std::invalid_argument("too little memory to read on so many threads");
    const double seconds = fastest_round(threads, samples, [&](int worker, int64_t passes) {
        for (int64_t pass = 0; pass < passes; pass++)
            sink.fetch_add(peaks.read(data + size_t(worker) * slice, slice), std::memory_order_relaxed);
    });
    return double(slice) * double(threads) / seconds;
}

}  // namespace pagemill
