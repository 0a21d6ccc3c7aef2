// From a checked batch to the workers: scratch memory, attention tasks, one pool job. Target-independent.
#pragma once
#include "dispatch.h"
#include "threads.h"
#include "views.h"

namespace pagemill {

// Zeroed, 64-byte aligned; from 1 MiB on 2 MiB aligned, in huge pages where there are any. Throws std::bad_alloc.
uint8_t* allocate(size_t bytes);
void release(uint8_t* memory, size_t bytes);  // bytes: as asked for

class Runner {
public:
    Runner(Model& model, const Kernels& kernels, int threads);
    ~Runner();
    Runner(const Runner&) = delete;
    Runner& operator=(const Runner&) = delete;
    void run(const Step& step);
    void wipe_activations();  // nothing that the steps so far have computed is left in scratch memory
    int threads() const { return pool_.size(); }
    int64_t shared_splits() const { return shared_splits_; }  // see AttentionTasks; summed over steps and kinds of attention
    // Of the last step, where it had no more to find than each row's largest logit: panels of the head that were multiplied whole for a
    // row, over all rows. -1: all logits were computed.
    int64_t ranked_panels() const { return ranked_panels_; }
    Pool& pool() { return pool_; }  // idle between steps

private:
    void reserve(int rows, int logits, int partials);
    void reserve_norms();
    size_t worker_bytes() const { return scratch_.worker_stride * size_t(pool_.size()); }
    Model& model_;
    const Kernels& kernels_;
    Pool pool_;
    Scratch scratch_;
    int rows_ = 0, partials_ = 0, used_rows_ = 0;
    int64_t shared_splits_ = 0, ranked_panels_ = -1;
    std::vector<int32_t> first_rows_;
    std::vector<float> norms_;  // as Scratch has them: of weights alone, so that they stay when activations are wiped
    const uint8_t* norms_of_ = nullptr;  // the head's weights
    std::vector<PanelShare> shares_;  // as StepContext has them; each worker clears its own when a step begins
    std::vector<std::pair<uint8_t*, size_t>> memory_;
    std::pair<uint8_t*, size_t> partial_memory_{nullptr, 0};
};

}  // namespace pagemill
