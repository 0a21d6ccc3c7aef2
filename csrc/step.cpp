#include "step.h"

#include "attention_tasks.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <memory>
#include <new>

namespace pagemill {

static constexpr size_t kHuge = size_t(2) << 20;
static size_t mapped_size(size_t bytes) { return (bytes + kHuge - 1) / kHuge * kHuge; }

// Large memory comes from the kernel in zero pages that cost nothing until they are touched.
static uint8_t* map_huge(size_t bytes) {
    const size_t size = mapped_size(bytes), reserve = size + kHuge;
    if (reserve < bytes) throw std::bad_alloc();
    void* memory = mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory), aligned = (start + kHuge - 1) / kHuge * kHuge;
    if (aligned > start) munmap(memory, aligned - start);
    munmap(reinterpret_cast<void*>(aligned + size), start + reserve - aligned - size);
    madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
    return reinterpret_cast<uint8_t*>(aligned);
}

uint8_t* allocate(size_t bytes) {
    if (bytes >= kHuge / 2) return map_huge(bytes);
    const size_t size = (bytes + 63) / 64 * 64 + 64;
    void* memory = std::aligned_alloc(64, size);
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0, size);
    return static_cast<uint8_t*>(memory);
}

void release(uint8_t* memory, size_t bytes) {
    if (bytes >= kHuge / 2) {
        munmap(memory, mapped_size(bytes));
        return;
    }
    explicit_bzero(memory, bytes);  // the allocator hands it on as it is
    std::free(memory);
}

static int padded(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

Runner::Runner(Model& model, const Kernels& kernels, int threads) : model_(model), kernels_(kernels), pool_(threads) {
    scratch_.worker_stride = size_t(padded(int(kernels.worker_bytes), 64));
    scratch_.workers = allocate(worker_bytes());
}

Runner::~Runner() {
    release(scratch_.workers, worker_bytes());
    for (auto& [memory, bytes] : memory_) release(memory, bytes);
    if (partial_memory_.first) release(partial_memory_.first, partial_memory_.second);
}

void Runner::reserve(int rows, int logits, int partials) {
    const int needed = std::max(rows, logits);
    int wide = 0, attn = 0, k = model_.hidden, dim_pad = 0;
    for (const Phase& p : model_.phases) {
        int width = 0;
        for (int m : p.matrices) {
            if (p.kind != PhaseKind::embed) k = std::max(k, model_.matrices[size_t(m)].k);
            width += model_.matrices[size_t(m)].n;
        }
        if (p.kind == PhaseKind::attention_in || p.kind == PhaseKind::mlp_in) wide = std::max(wide, width);
        if (p.kind == PhaseKind::attention) attn = std::max(attn, p.q_heads * p.head_dim);
    }
    for (const LayerKv& layer : model_.kv.layers) dim_pad = std::max(dim_pad, layer.dim_pad);
    if (needed > rows_) {
        for (auto& [memory, bytes] : memory_) release(memory, bytes);
        memory_.clear();
        rows_ = 0;
        const size_t n = size_t(padded(needed, 16)) + 32;  // tiles of 32 rows may begin at any row
        auto take = [&](size_t bytes) {
            uint8_t* memory = allocate(bytes);
            memory_.emplace_back(memory, bytes);
            return memory;
        };
        Scratch& s = scratch_;
        // A row's stride is an odd multiple of 64 bytes, so that rows do not fall on the same cache sets.
        auto stride = [](int width) { return padded(width, 32) + 16; };
        s.hidden_ld = stride(model_.hidden);
        s.wide_ld = stride(wide);
        s.attn_ld = stride(attn);
        s.act.ld = padded(k, 64);
        s.x = reinterpret_cast<float*>(take(n * size_t(s.hidden_ld) * 4));
        s.wide = reinterpret_cast<float*>(take(n * size_t(s.wide_ld) * 4));
        s.attn = reinterpret_cast<float*>(take(n * size_t(s.attn_ld) * 4));
        s.act.f32 = reinterpret_cast<float*>(take(n * size_t(s.act.ld) * 4));
        s.act.bf16 = reinterpret_cast<uint16_t*>(take(n * size_t(s.act.ld) * 2));
        s.act.tiles = reinterpret_cast<uint16_t*>(take(n * size_t(s.act.ld) * 2));
        s.act.i8 = reinterpret_cast<int8_t*>(take(n * size_t(s.act.ld)));
        s.act.low = reinterpret_cast<int8_t*>(take(n * size_t(s.act.ld)));
        const size_t groups = n * size_t(s.act.groups()) * 4;
        s.act.scale = reinterpret_cast<float*>(take(groups));
        s.act.sum = reinterpret_cast<int32_t*>(take(groups));
        s.act.scaled_sum = reinterpret_cast<float*>(take(groups));
        s.panel_stride = size_t(padded(k, 64)) * kPanel + 4096;
        s.panel = reinterpret_cast<uint16_t*>(take(s.panel_stride * size_t(pool_.size()) * 2));
        s.peaks = reinterpret_cast<int32_t*>(take(n * size_t(pool_.size()) * 4));
        rows_ = int(n) - 32;
    }
    if (partials > partials_) {
        if (partial_memory_.first) release(partial_memory_.first, partial_memory_.second);
        partial_memory_ = {nullptr, 0};
        partials_ = 0;
        const size_t bytes = size_t(partials) * (16 + size_t(dim_pad)) * 4;
        partial_memory_ = {allocate(bytes), bytes};
        partials_ = partials;
        scratch_.partials = reinterpret_cast<float*>(partial_memory_.first);
    }
}

void Runner::reserve_norms() {
    if (model_.phases.empty() || model_.phases.back().kind != PhaseKind::head || model_.phases.back().matrices.size() != 1) return;
    const Matrix& head = model_.matrices[size_t(model_.phases.back().matrices[0])];
    if (norms_of_ == head.data) return;
    norms_.assign(size_t(head.panels()) * (kPanel + 1), -1.0f);
    norms_of_ = head.data;
    scratch_.norms = norms_.data();
}

void Runner::wipe_activations() {
    const size_t capacity = size_t(rows_) + 32, used = std::min(size_t(used_rows_) + 32, capacity);
    if (used_rows_) {
        for (auto& [memory, bytes] : memory_) std::memset(memory, 0, bytes / capacity * used);
    }
    if (partial_memory_.first) std::memset(partial_memory_.first, 0, partial_memory_.second);
    std::memset(scratch_.workers, 0, worker_bytes());
    used_rows_ = 0;
}

void Runner::run(const Step& step) {
    StepContext ctx;
    ctx.phase_tasks.assign(model_.phases.size(), -1);
    int partials = 0;
    for (size_t i = 0; i < model_.phases.size(); i++) {
        const Phase& p = model_.phases[i];
        if (p.kind != PhaseKind::attention) continue;
        int found = -1;
        for (size_t j = 0; j < ctx.task_lists.size(); j++) {
            const AttentionTasks& list = ctx.task_lists[j];
            if (list.kv_heads == p.kv_heads && list.group == p.q_heads / p.kv_heads && list.head_dim == p.head_dim && list.window == p.window && list.kv_group == model_.kv.layers[size_t(p.layer)].group) found = int(j);
        }
        if (found < 0) {
            found = int(ctx.task_lists.size());
            ctx.task_lists.emplace_back();
            build_attention_tasks(step, p, model_.kv.layers[size_t(p.layer)].group, model_.kv.pages_per_block * kPage, pool_.size(), ctx.task_lists.back());
            shared_splits_ += ctx.task_lists.back().shared_splits;
            partials = std::max(partials, ctx.task_lists.back().num_partials);
        }
        ctx.phase_tasks[i] = found;
    }
    reserve(step.rows, step.num_logits, partials);
    if (step.best_only) reserve_norms();
    ranked_panels_ = -1;
    ctx.ranked_panels = &ranked_panels_;
    used_rows_ = std::max(used_rows_, std::max(step.rows, step.num_logits));
    std::unique_ptr<std::atomic<int>[]> claims(new std::atomic<int>[model_.phases.size()]());
    ctx.model = &model_;
    ctx.step = &step;
    ctx.scratch = &scratch_;
    ctx.claims = claims.get();
    const size_t shares = pool_.size() > 1 ? model_.phases.size() * kMostMatrices * size_t(pool_.size()) : 0;
    if (shares > shares_.size()) shares_ = std::vector<PanelShare>(shares);
    ctx.shares = shares ? shares_.data() : nullptr;
    ctx.barrier = &pool_.barrier();
    ctx.threads = pool_.size();
    ctx.by_rows = step.rows >= 32 * pool_.size();
    // Logit rows move to the front in their order, which must not overtake one that is still to move.
    Step kept;
    StepContext rest;
    const bool ascending = std::adjacent_find(step.logit_rows, step.logit_rows + step.num_logits, std::greater_equal<>()) == step.logit_rows + step.num_logits;
    const auto last = std::find_if(model_.phases.rbegin(), model_.phases.rend(), [](const Phase& p) { return p.kind == PhaseKind::attention; });
    if (step.num_logits < step.rows && ascending && last != model_.phases.rend()) {
        first_rows_.resize(size_t(step.num_logits));
        std::iota(first_rows_.begin(), first_rows_.end(), 0);
        kept = step;
        kept.rows = step.num_logits;
        kept.logit_rows = first_rows_.data();
        rest.model = ctx.model;
        rest.step = &kept;
        rest.scratch = ctx.scratch;
        rest.claims = ctx.claims;
        rest.shares = ctx.shares;
        rest.barrier = ctx.barrier;
        rest.ranked_panels = ctx.ranked_panels;
        rest.threads = ctx.threads;
        rest.by_rows = kept.rows >= 32 * rest.threads;
        ctx.rest = &rest;
        ctx.last_attention = size_t(last.base() - model_.phases.begin()) - 1;
    }
    pool_.run([&](int worker) { kernels_.run_step(ctx, worker); });
}

}  // namespace pagemill
