// One token for each row of logits. What is computed is said in decoding/sampling.py, which the kernels follow bit for bit.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "threads.h"

namespace pagemill {

struct Kernels;

// How a row is sampled; the fields of kernels.sampling.ROW_DTYPE, in its order.
struct SamplingRow {
    double temperature, top_p, min_p;
    uint64_t seed, choice, position;
    int32_t top_k;     // 0 or less: all
    int32_t logprobs;  // -1: none wanted
};
static_assert(sizeof(SamplingRow) == 56, "the row's layout is part of the Python face");

enum class SampleStatus : int32_t { chosen = 0, not_a_number = 1, nothing_left = 2 };

struct SamplingJob {
    int rows = 0, vocab = 0, most_logprobs = 0;
    const float* logits = nullptr;           // [rows][vocab]
    const int32_t* best = nullptr;           // [rows] first largest logit, the first NaN where there is one
    const SamplingRow* requests = nullptr;   // [rows]
    const int32_t* forbid_starts = nullptr;  // [rows + 1] into forbid, or null
    const int32_t* forbid = nullptr;         // token ids; those beyond the vocabulary are ignored
    int32_t* tokens = nullptr;               // [rows]
    int32_t* status = nullptr;               // [rows] SampleStatus
    int32_t* ranks = nullptr;                // [rows] where logprobs >= 0, as the next three
    double* logprobs = nullptr;              // [rows]
    int32_t* top_ids = nullptr;              // [rows][most_logprobs]
    double* top_logprobs = nullptr;          // [rows][most_logprobs]
};

constexpr int kChunk = 128;  // columns of a chunk, which has a largest logit and a mass

struct Scan {
    std::unique_ptr<float[]> peaks;     // [chunks]
    std::unique_ptr<int64_t[]> masses;  // [chunks]
    int64_t total = 0;
};

// Memory of one worker for rows of `vocab` columns.
struct SamplingScratch {
    explicit SamplingScratch(int vocab);
    Scan raw, own;                       // of the logits as given; of the allowed ones
    std::unique_ptr<float[]> row;        // [vocab] the allowed logits, where some are forbidden
    std::unique_ptr<int32_t[]> ids;      // [vocab + kChunk] candidates, ascending
    std::unique_ptr<float[]> values;     // their logits
    std::unique_ptr<int64_t[]> weights;  // their weights
    std::unique_ptr<uint32_t[]> keys;    // of a selection
    std::unique_ptr<int64_t[]> masses;
    std::unique_ptr<float[]> peaks;      // [chunks]
};

class Sampler {
public:
    Sampler(const Kernels& kernels, Pool& pool, int vocab);
    Sampler(const Sampler&) = delete;
    Sampler& operator=(const Sampler&) = delete;
    void run(const SamplingJob& job);

private:
    const Kernels& kernels_;
    Pool& pool_;
    std::vector<SamplingScratch> scratch_;
};

// 53 random bits for a key: Philox4x64-10, as decoding/random.py has it.
uint64_t random_bits(uint64_t seed, uint64_t choice, uint64_t position);

}  // namespace pagemill
