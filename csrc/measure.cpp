#include "measure.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <limits>
#include <stdexcept>

#include "dispatch.h"
#include "threads.h"

namespace pagemill {

static const Peaks& peaks_of(const std::string& target) {
    const Kernels* kernels = find_target(target);
    if (!kernels) throw std::invalid_argument("target not available on this machine: " + target);
    return *kernels->peaks;
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
    if (size == 0) return 0;
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

double piece_rate(const std::string& target, const uint8_t* data, size_t bytes, size_t piece, size_t stride, int threads, int samples) {
    const Peaks& peaks = peaks_of(target);
    const size_t rows = bytes / stride / size_t(threads), columns = stride / piece;
    if (rows == 0) throw std::invalid_argument("too little memory to read on so many threads");
    const double seconds = fastest_round(threads, samples, [&](int worker, int64_t passes) {
        const uint8_t* first = data + size_t(worker) * rows * stride;
        for (int64_t pass = 0; pass < passes; pass++) {
            uint64_t sum = 0;
            for (size_t column = 0; column < columns; column++)
                for (size_t row = 0; row < rows; row++) sum += peaks.read(first + row * stride + column * piece, piece);
            sink.fetch_add(sum, std::memory_order_relaxed);
        }
    });
    return double(rows * columns * piece) * double(threads) / seconds;
}

}  // namespace pagemill
