// A model in native memory as Python builds it, phase by phase; checks everything before a kernel reads it.
#pragma once
#include "../prefault.h"
#include "bindings.h"

namespace pagemill {

struct PhaseArguments {
    Phase phase;
    std::vector<nb::object> kept;
    int norm_width = 0, norm_bias_width = 0, q_norm_width = 0, k_norm_width = 0, table_rows = 0, table_width = 0;
    int position_rows = 0, position_width = 0;
};

using WindowGroup = std::tuple<Bytes, size_t, int, int, std::vector<int>>;  // arena, block bytes, blocks, window, layers

class NativeModel {
public:
    NativeModel(const std::string& target, int threads, int hidden, int vocab, int max_positions);
    int add_matrix(int format, int n, int k, ConstBytes packed, nb::object bias);
    void set_kv(Bytes arena, size_t block_bytes, int num_blocks, int pages_per_block, int codec,
                const std::vector<std::tuple<size_t, size_t, int, int, int>>& layers, const std::vector<WindowGroup>& windows);
    void add_phase(const PhaseArguments& a);
    void step(Ints tokens, Ints positions, Ints starts, Ints2 tables, Ints logit_rows, Floats2 logits, MutableInts best, bool best_only);
    void wipe_activations() { runner_->wipe_activations(); }
    const char* target() const { return kernels_.name; }
    int threads() const { return runner_->threads(); }
    int64_t shared_splits() const { return runner_->shared_splits(); }
    int64_t ranked_panels() const { return runner_->ranked_panels(); }
    int vocab() const { return model_.vocab; }
    bool wait_prefaulted(double seconds) { return prefault_.wait(seconds); }
    size_t prefaulted_bytes() { return prefault_.done(); }
    const Kernels& kernels() const { return kernels_; }
    Pool& pool() { return runner_->pool(); }

private:
    void check_phase(const PhaseArguments& a) const;
    // One more than the highest block of the first group that the step names.
    int check_step(Step& s) const;

    const Kernels& kernels_;
    Model model_;
    std::unique_ptr<Runner> runner_;
    std::vector<nb::object> kept_;
    std::vector<nb::object> arenas_;
    Prefault prefault_;  // of the first of these arenas; ends before they do
};

}  // namespace pagemill
