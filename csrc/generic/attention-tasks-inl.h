// Attention tasks: a tile of rows over its splits, and the merge of rows whose splits were separate tasks.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

struct AttentionCall {
    const KvArena* arena;
    const Step* step;
    const Phase* phase;
    const AttentionTasks* list;
    const float* q;  // [rows][q_ld], heads side by side
    int q_ld;
    float* out;      // [rows][out_ld]
    int out_ld;
    float* partials;

    const LayerKv& kv() const { return arena->layers[size_t(phase->layer)]; }
    const AttentionRow& row(const AttentionTask& task, int r) const { return list->rows[size_t(task.first_row + r)]; }
    // [16 + dim_pad]: maximum, sum, 14 unused, output.
    float* partial(const AttentionTask& task, int r, int part) const {
        const AttentionRow& at = row(task, r);
        return partials + size_t(at.partial + task.kv_head * at.num_parts + part) * (16 + size_t(kv().dim_pad));
    }
    HeadPages pages(const AttentionTask& task) const {
        const KvGroup& group = arena->groups[size_t(kv().group)];
        return {group.base + kv().offset + size_t(task.kv_head) * size_t(arena->pages_per_block) * kv().page_bytes, group.block_bytes,
                kv().page_bytes, step->table(kv().group, task.seq), arena->pages_per_block};
    }
    size_t value_offset() const {
        return size_t(kPage) * size_t(kv().dim_pad) * (arena->codec == Codec::int8 ? 1 : arena->codec == Codec::f32 ? 4 : 2);
    }
};

#ifdef PAGEMILL_AMX
// Whether tiles attend to a task's rows.
static bool in_tiles(const AttentionCall& call, int num_rows) {
    return call.arena->codec == Codec::int8 && num_rows > kFewRows && tiles_read(call.kv().dim_pad);
}
#endif

// Up to `rows` rows from r0 on over one split, as many as the vector unit takes at once: maxima, sums and output.
static int attend_batch(const AttentionCall& call, TileState& t, SplitBatch& b, int r0, int rows, const HeadPages& pages, int split) {
    const LayerKv& kv = call.kv();
    const float scale = call.phase->scale, softcap = call.phase->softcap;
    const int base = split * kSplit, batch = rows < kAttendRows ? rows : kAttendRows;
    const SplitRange range = split_range(t, r0, batch, split);
    if (range.page0 >= range.page1) {
        for (int r = 0; r < batch; r++) b.max[r] = kMasked;
        return batch;
    }
    switch (call.arena->codec) {
        case Codec::f32: attend_from<Codec::f32, kAttendRows>(batch, t, b, r0, pages, range, base, kv, scale, softcap); break;
        case Codec::f16: attend_from<Codec::f16, kAttendRows>(batch, t, b, r0, pages, range, base, kv, scale, softcap); break;
        case Codec::bf16: attend_from<Codec::bf16, kAttendRows>(batch, t, b, r0, pages, range, base, kv, scale, softcap); break;
        case Codec::int8: attend_from_int8<kAttendRows>(batch, t, b, r0, range, base, kv.dim_pad, scale, softcap); break;
    }
    return batch;
}

// What all rows of a task share of a split.
static void prepare_split(const AttentionCall& call, const AttentionTask& task, TileState& t, const HeadPages& pages, int split) {
    if (call.arena->codec != Codec::int8) return;
    const int dim_pad = call.kv().dim_pad;
    const SplitRange range = split_range(t, 0, task.num_rows, split);
    load_scales(t, pages, range, split * kSplit, dim_pad, key_factor(call.phase->scale, call.phase->softcap));
#ifdef PAGEMILL_AMX
    if (in_tiles(call, task.num_rows)) gather_values(t, pages, range, split * kSplit, dim_pad);
#endif
}

static void prepare_rows_of(const AttentionCall& call, const AttentionTask& task, TileState& t) {
    const Phase& p = *call.phase;
    const int group = call.list->group, dim_pad = call.kv().dim_pad;
    for (int r = 0; r < task.num_rows; r++) {
        const AttentionRow& at = call.row(task, r);
        const float* q = call.q + size_t(at.row) * call.q_ld + size_t(task.kv_head * group + at.head) * p.head_dim;
        if (call.arena->codec == Codec::int8) prepare_query(t, q, p.head_dim, dim_pad, r);
        else
            for (int d = 0; d < p.head_dim; d++) t.q[d][r] = q[d];
        t.to[r] = call.step->positions[at.row] + 1;
        t.from[r] = p.window > 0 && t.to[r] > p.window ? t.to[r] - p.window : 0;
        t.max[r] = kMasked;
        t.sum[r] = 0.0f;
        std::memset(t.out + r * dim_pad, 0, sizeof(float) * size_t(dim_pad));
    }
}

PM_INLINE void store_partial(float* part, float max, float sum, const float* out, int dim_pad) {
    part[0] = max;
    part[1] = sum;
    std::memcpy(part + 16, out, sizeof(float) * size_t(dim_pad));
}

PM_INLINE void finish_row(const AttentionCall& call, const AttentionTask& task, int r, const float* out, float sum) {
    const AttentionRow& at = call.row(task, r);
    const int head_dim = call.phase->head_dim;
    float* y = call.out + size_t(at.row) * call.out_ld + size_t(task.kv_head * call.list->group + at.head) * head_dim;
    const F inverse = fset(1.0f / sum);
    for (int c = 0; c < head_dim; c += kLanes) fstore_first(y + c, fmul(fload(out + c), inverse), head_dim - c);
}

// The pages that a task reads.
static Ahead::Part pages_of(const AttentionCall& call, const AttentionTask& task) {
    const int window = call.phase->window;
    const int from = window > 0 ? call.step->positions[call.row(task, 0).row] + 1 - window : 0;  // a window's table begins there
    const int last = call.step->positions[call.row(task, task.num_rows - 1).row] / kPage + 1;
    const int first = std::max(task.split_from * kSplitPages, from / kPage), end = std::min(task.split_to * kSplitPages, last);
    return {call.pages(task), first, end, first, first};
}

static void look_ahead(const AttentionCall& call, const AttentionTask& task, const AttentionTask* next, Ahead& ahead) {
    ahead.now = ahead.upcoming == &task ? ahead.next : pages_of(call, task);
    ahead.next = next ? pages_of(call, *next) : Ahead::Part{};
    ahead.upcoming = next;
    ahead.value_offset = call.value_offset();
    ahead.beside = task.num_rows <= kAttendRows;
}

static void run_attention_task(const AttentionCall& call, const AttentionTask& task, const AttentionTask* next, TileState& t) {
    const int dim_pad = call.kv().dim_pad;
    look_ahead(call, task, next, t.ahead);
    prepare_rows_of(call, task, t);
    const HeadPages pages = call.pages(task);
    const bool apart = task.part >= 0 && task.num_parts == task.split_to - task.split_from;
    for (int split = task.split_from; split < task.split_to; split++) {
        prepare_split(call, task, t, pages, split);
        const auto done = [&](const SplitBatch& b, int r0, int rows) {
            if (!apart) return merge_batch(t, b, r0, rows, dim_pad);
            for (int r = 0; r < rows; r++)
                store_partial(call.partial(task, r0 + r, task.part + split - task.split_from), b.max[r], b.sum[r], b.out + r * dim_pad, dim_pad);
        };
#ifdef PAGEMILL_AMX
        if (in_tiles(call, task.num_rows)) {
            attend_split_tiles(t, task.num_rows, pages, split, dim_pad, call.phase->scale, call.phase->softcap, done);
            continue;
        }
#endif
        for (int r0 = 0; r0 < task.num_rows;) {
            SplitBatch& b = t.batches[0];
            const int batch = attend_batch(call, t, b, r0, task.num_rows - r0, pages, split);
            done(b, r0, batch);
            r0 += batch;
        }
    }
    if (apart) return;
    for (int r = 0; r < task.num_rows; r++) {
        if (task.part < 0) finish_row(call, task, r, t.out + r * dim_pad, t.sum[r]);
        else store_partial(call.partial(task, r, task.part), t.max[r], t.sum[r], t.out + r * dim_pad, dim_pad);
    }
}

// Rows whose splits were separate tasks: the same merges in the same order. A merged state, merged into an empty one, is itself.
static void run_merge(const AttentionCall& call, const AttentionTask& task, TileState& t) {
    const int dim_pad = call.kv().dim_pad;
    for (int r = 0; r < task.num_rows; r++) {
        float max = kMasked, sum = 0.0f;
        std::memset(t.out, 0, sizeof(float) * size_t(dim_pad));
        for (int part = 0; part < call.row(task, r).num_parts; part++) {
            const float* at = call.partial(task, r, part);
            merge_split(&max, &sum, t.out, at[0], at[1], at + 16, dim_pad);
        }
        finish_row(call, task, r, t.out, sum);
    }
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
