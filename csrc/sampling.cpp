#include "sampling.h"

#include <atomic>

#include "dispatch.h"

namespace pagemill {

SamplingScratch::SamplingScratch(int vocab) {
    const size_t n = size_t(vocab) + kChunk, chunks = n / kChunk;
    for (Scan* scan : {&raw, &own}) {
        scan->peaks.reset(new float[chunks]);
        scan->masses.reset(new int64_t[chunks]);
    }
    row.reset(new float[n]);
    ids.reset(new int32_t[n]);
    values.reset(new float[n]);
    weights.reset(new int64_t[n]);
    keys.reset(new uint32_t[n]);
    masses.reset(new int64_t[n]);
    peaks.reset(new float[chunks]);
}

Sampler::Sampler(const Kernels& kernels, Pool& pool, int vocab) : kernels_(kernels), pool_(pool) {
    for (int worker = 0; worker < pool.size(); worker++) scratch_.emplace_back(vocab);
}

// Greedy rows cost next to nothing: the largest logit is known.
static int rows_with_work(const SamplingJob& job) {
    int count = 0;
    for (int row = 0; row < job.rows; row++) {
        const SamplingRow& r = job.requests[row];
        count += r.temperature > 0 || r.logprobs >= 0 || (job.forbid_starts && job.forbid_starts[row] < job.forbid_starts[row + 1]);
    }
    return count;
}

void Sampler::run(const SamplingJob& job) {
    if (rows_with_work(job) < 2) {  // not worth waking anybody
        for (int row = 0; row < job.rows; row++) kernels_.sample_row(job, row, scratch_[0]);
        return;
    }
    std::atomic<int> next{0};
    pool_.run([&](int worker) {
        for (int row = next++; row < job.rows; row = next++) kernels_.sample_row(job, row, scratch_[size_t(worker)]);
    });
}

uint64_t random_bits(uint64_t seed, uint64_t choice, uint64_t position) {
    constexpr uint64_t multipliers[2] = {0xD2E7470EE14C6C93u, 0xCA5A826395121157u}, weyl[2] = {0x9E3779B97F4A7C15u, 0xBB67AE8584CAA73Bu};
    uint64_t c0 = position, c1 = 0, c2 = 0, c3 = 0, k0 = seed, k1 = choice;  // c1: the purpose, 0 for the choice of a token
    for (int round = 0; round < 10; round++) {
        const unsigned __int128 low = (unsigned __int128)c0 * multipliers[0], high = (unsigned __int128)c2 * multipliers[1];
        c0 = uint64_t(high >> 64) ^ c1 ^ k0;
        c1 = uint64_t(high);
        c2 = uint64_t(low >> 64) ^ c3 ^ k1;
        c3 = uint64_t(low);
        k0 += weyl[0];
        k1 += weyl[1];
    }
    return c0 >> 11;
}

}  // namespace pagemill
