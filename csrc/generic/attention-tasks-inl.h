// Attention tasks: a tile over its splits, and the merge of tiles whose splits were separate tasks.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

// One split of a tile, in as many rows at a time as the target has registers for.
static void attend_tile(Codec codec, int rows, TileState& t, Int8State& s, const HeadPages& pages, int split, const LayerKv& kv, float scale, float softcap) {
    for (int r0 = 0; r0 < rows; r0 += kAttendRows) {
        const int n = rows - r0;
        switch (codec) {
            case Codec::f32: attend_from<Codec::f32, kAttendRows>(n, t, r0, pages, split, kv, scale, softcap); break;
            case Codec::f16: attend_from<Codec::f16, kAttendRows>(n, t, r0, pages, split, kv, scale, softcap); break;
            case Codec::bf16: attend_from<Codec::bf16, kAttendRows>(n, t, r0, pages, split, kv, scale, softcap); break;
            case Codec::int8: attend_from_int8<kAttendRows>(n, t, s, r0, pages, split, kv, scale, softcap); break;
        }
    }
}

PM_INLINE size_t partial_floats(int dim_pad) { return size_t(kTileRows) * (16 + size_t(dim_pad)); }

struct AttentionCall {
    const KvArena* arena;
    const Step* step;
    const Phase* phase;
    const float* q;  // [rows][q_ld], heads side by side
    int q_ld;
    float* out;      // [rows][out_ld]
    int out_ld;
    float* partials;
};

PM_INLINE void finish_row(const AttentionCall& call, const AttentionTask& task, int r, const float* out, float sum, int head_dim, int group) {
    const int index = task.first_row + r, row = call.step->starts[task.seq] + index / group;
    float* y = call.out + size_t(row) * call.out_ld + size_t(task.kv_head * group + index % group) * head_dim;
    const F inverse = fset(1.0f / sum);
    for (int c = 0; c < head_dim; c += kLanes) fstore_first(y + c, fmul(fload(out + c), inverse), head_dim - c);
}

static void run_attention_task(const AttentionCall& call, const AttentionTask& task, TileState& t, Int8State& s) {
    const Phase& p = *call.phase;
    const KvArena& arena = *call.arena;
    const LayerKv& kv = arena.layers[size_t(p.layer)];
    const int group = p.q_heads / p.kv_heads;
    for (int r = 0; r < task.num_rows; r++) {
        const int index = task.first_row + r, row = call.step->starts[task.seq] + index / group;
        const float* q = call.q + size_t(row) * call.q_ld + size_t(task.kv_head * group + index % group) * p.head_dim;
        if (arena.codec == Codec::int8) prepare_query(s, q, p.head_dim, kv.dim_pad, r);
        else
            for (int d = 0; d < p.head_dim; d++) t.q[d][r] = q[d];
        t.to[r] = call.step->positions[row] + 1;
        t.from[r] = p.window > 0 && t.to[r] > p.window ? t.to[r] - p.window : 0;
        t.max[r] = kMasked;
        t.sum[r] = 0.0f;
        std::memset(t.out[r], 0, sizeof(float) * size_t(kv.dim_pad));
    }
    const HeadPages pages{arena.base + kv.offset + size_t(task.kv_head) * size_t(arena.pages_per_block) * kv.page_bytes, arena.block_bytes,
                          kv.page_bytes, call.step->tables + size_t(task.seq) * size_t(call.step->table_stride), arena.pages_per_block};
    for (int split = task.split_from; split < task.split_to; split++) {
        attend_tile(arena.codec, task.num_rows, t, s, pages, split, kv, p.scale, p.softcap);
        for (int r = 0; r < task.num_rows; r++) {
            if (task.partial < 0) {
                merge_split(&t.max[r], &t.sum[r], t.out[r], t.split_max[r], t.split_sum[r], t.split_out[r], kv.dim_pad);
            } else {
                float* part = call.partials + size_t(task.partial + split - task.split_from) * partial_floats(kv.dim_pad) + size_t(r) * (16 + size_t(kv.dim_pad));
                part[0] = t.split_max[r];
                part[1] = t.split_sum[r];
                std::memcpy(part + 16, t.split_out[r], sizeof(float) * size_t(kv.dim_pad));
            }
        }
    }
    if (task.partial < 0)
        for (int r = 0; r < task.num_rows; r++) finish_row(call, task, r, t.out[r], t.sum[r], p.head_dim, group);
}

// A tile whose splits were separate tasks: the same merges in the same order.
static void run_merge(const AttentionCall& call, const AttentionTask& task, TileState& t) {
    const LayerKv& kv = call.arena->layers[size_t(call.phase->layer)];
    const int group = call.phase->q_heads / call.phase->kv_heads;
    for (int r = 0; r < task.num_rows; r++) {
        t.max[r] = kMasked;
        t.sum[r] = 0.0f;
        std::memset(t.out[r], 0, sizeof(float) * size_t(kv.dim_pad));
        for (int split = task.split_from; split < task.split_to; split++) {
            const float* part = call.partials + size_t(task.partial + split - task.split_from) * partial_floats(kv.dim_pad) + size_t(r) * (16 + size_t(kv.dim_pad));
            merge_split(&t.max[r], &t.sum[r], t.out[r], part[0], part[1], part + 16, kv.dim_pad);
        }
        finish_row(call, task, r, t.out[r], t.sum[r], call.phase->head_dim, group);
    }
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
