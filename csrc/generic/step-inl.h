// The phases of a step, in order; every worker runs this function. Barriers stand where one worker reads what another wrote.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

struct Worker {
    const StepContext& ctx;
    const int id;
    TileState tile;
    Int8State int8;

    explicit Worker(const StepContext& context, int worker) : ctx(context), id(worker) {}
    void barrier() { ctx.barrier->wait(id); }
    // Where a thread keeps its own rows, nothing that it reads was written by another.
    void between_stages() { if (!ctx.by_rows) barrier(); }
    int begin_of(int count) const { return int(int64_t(count) * id / ctx.threads); }
    int end_of(int count) const { return int(int64_t(count) * (id + 1) / ctx.threads); }
};

static int forms_of(const Model& model, const Phase& p) {
    int forms = 0;
    for (int m : p.matrices) forms |= form_of(model.matrices[size_t(m)].format);
    return forms;
}

// All matrices of a phase side by side into y [rows][ld].
static void run_products(Worker& w, const Phase& p, int rows, float* y, int ld, bool accumulate, float scale, bool by_rows) {
    const Model& model = *w.ctx.model;
    int column = 0;
    for (int m : p.matrices) {
        const Matrix& matrix = model.matrices[size_t(m)];
        const Output out{y + column, ld, accumulate, scale};
        const Activations& act = w.ctx.scratch->act;
        if (by_rows) run_product(act, w.begin_of(rows), w.end_of(rows), matrix, 0, matrix.panels(), out);
        else run_product(act, 0, rows, matrix, w.begin_of(matrix.panels()), w.end_of(matrix.panels()), out);
        column += matrix.n;
    }
}

static void run_embed(Worker& w, const Phase& p) {
    const Model& model = *w.ctx.model;
    const Step& step = *w.ctx.step;
    const Scratch& s = *w.ctx.scratch;
    for (int row = w.begin_of(step.rows); row < w.end_of(step.rows); row++) {
        float* x = s.x + size_t(row) * s.hidden_ld;
        unpack_row(model.matrices[size_t(p.matrices[0])], step.tokens[row], x);
        if (p.scale != 1.0f)
            for (int c = 0; c < model.hidden; c++) x[c] *= p.scale;
        if (p.position_table) {
            const float* table = p.position_table + size_t(step.positions[row]) * model.hidden;
            for (int c = 0; c < model.hidden; c++) x[c] += table[c];
        }
    }
    w.between_stages();
}

static void normalize_head(float* x, const float* weight, float eps, int dim) {
    F squares = fzero();
    for (int c = 0; c < dim; c += kLanes) {
        const F v = fload_first(x + c, dim - c);
        squares = fmla(v, v, squares);
    }
    const F factor = fset(1.0f / std::sqrt(fsum(squares) / float(dim) + eps));
    for (int c = 0; c < dim; c += kLanes)
        fstore_first(x + c, fmul(fmul(fload_first(x + c, dim - c), factor), fload_first(weight + c, dim - c)), dim - c);
}

static void rotate_head(float* x, const float* table, int rotary_dim, RopeStyle style) {
    const int half = rotary_dim / 2;
    for (int i = 0; i < half; i++) {
        float& a = style == RopeStyle::halves ? x[i] : x[2 * i];
        float& b = style == RopeStyle::halves ? x[half + i] : x[2 * i + 1];
        const float cosine = table[i], sine = table[half + i], p = a, q = b;
        a = p * cosine - q * sine;
        b = q * cosine + p * sine;
    }
}

template <Codec C> static void put_value(uint8_t* page, size_t index, float x) {
    if constexpr (C == Codec::f32) reinterpret_cast<float*>(page)[index] = x;
    else if constexpr (C == Codec::f16) reinterpret_cast<uint16_t*>(page)[index] = f32_to_f16(x);
    else reinterpret_cast<uint16_t*>(page)[index] = f32_to_bf16(x);
}

template <Codec C> static void write_head(uint8_t* page, const LayerKv& kv, int slot, const float* k, const float* v) {
    for (int d = 0; d < kv.dim_pad; d++) put_value<C>(page, size_t(d) * kPage + size_t(slot), d < kv.head_dim ? k[d] : 0.0f);
    const size_t values = size_t(kv.dim_pad) * kPage + size_t(slot) * size_t(kv.dim_pad);
    for (int d = 0; d < kv.dim_pad; d++) put_value<C>(page, values + size_t(d), d < kv.head_dim ? v[d] : 0.0f);
}

static void write_kv_row(const KvArena& arena, const Step& step, int layer, int row, const float* k, const float* v) {
    const LayerKv& kv = arena.layers[size_t(layer)];
    const int position = step.positions[row], page = position / kPage;
    const int block = step.tables[size_t(step.row_seq[size_t(row)]) * size_t(step.table_stride) + size_t(page / arena.pages_per_block)];
    uint8_t* at = arena.base + size_t(block) * arena.block_bytes + kv.offset + size_t(page % arena.pages_per_block) * kv.page_bytes;
    for (int h = 0; h < kv.kv_heads; h++, at += size_t(arena.pages_per_block) * kv.page_bytes) {
        const float *kh = k + size_t(h) * size_t(kv.head_dim), *vh = v + size_t(h) * size_t(kv.head_dim);
        if (arena.codec == Codec::int8) write_head_int8(at, kv, position % kPage, kh, vh);
        else if (arena.codec == Codec::f32) write_head<Codec::f32>(at, kv, position % kPage, kh, vh);
        else if (arena.codec == Codec::f16) write_head<Codec::f16>(at, kv, position % kPage, kh, vh);
        else write_head<Codec::bf16>(at, kv, position % kPage, kh, vh);
    }
}

static void run_attention_in(Worker& w, const Phase& p) {
    const Step& step = *w.ctx.step;
    const Scratch& s = *w.ctx.scratch;
    const Model& model = *w.ctx.model;
    const int forms = forms_of(model, p), r0 = w.begin_of(step.rows), r1 = w.end_of(step.rows);
    for (int row = r0; row < r1; row++) prepare_row(p, s.x + size_t(row) * s.hidden_ld, model.hidden, s.act, row, forms);
    w.between_stages();
    run_products(w, p, step.rows, s.wide, s.wide_ld, false, 1.0f, w.ctx.by_rows);
    w.between_stages();
    const int q_width = p.q_heads * p.head_dim, kv_width = p.kv_heads * p.head_dim;
    for (int row = r0; row < r1; row++) {
        float *q = s.wide + size_t(row) * s.wide_ld, *k = q + q_width, *v = k + kv_width;
        for (int h = 0; h < p.q_heads + p.kv_heads; h++) {
            float* head = q + size_t(h) * size_t(p.head_dim);
            const float* norm = h < p.q_heads ? p.q_norm : p.k_norm;
            if (norm) normalize_head(head, norm, p.qk_eps, p.head_dim);
            if (p.rope != RopeStyle::none)
                rotate_head(head, p.rope_table + size_t(step.positions[row]) * size_t(p.rotary_dim), p.rotary_dim, p.rope);
            if (model.kv.codec == Codec::int8) hadamard(head, p.head_dim);
        }
        write_kv_row(model.kv, step, p.layer, row, k, v);
    }
    w.barrier();
}

static void run_attention(Worker& w, const Phase& p, size_t phase_index) {
    const Scratch& s = *w.ctx.scratch;
    const AttentionTasks& list = w.ctx.task_lists[size_t(w.ctx.phase_tasks[phase_index])];
    const AttentionCall call{&w.ctx.model->kv, w.ctx.step, &p, s.wide, s.wide_ld, s.attn, s.attn_ld, s.partials};
    const int count = int(list.tasks.size());
    for (;;) {
        const int next = w.ctx.claims[phase_index].fetch_add(1, std::memory_order_relaxed);
        if (next >= count) break;
        run_attention_task(call, list.tasks[size_t(next)], w.tile, w.int8);
    }
    w.barrier();
    if (list.merges.empty()) return;
    const int merges = int(list.merges.size());
    for (int i = w.begin_of(merges); i < w.end_of(merges); i++) run_merge(call, list.merges[size_t(i)], w.tile);
    w.barrier();
}

// attention_out and mlp_out: x += scale * (W f(src) + bias), f the activation or nothing.
static void run_out(Worker& w, const Phase& p, const float* src, int src_ld) {
    const Step& step = *w.ctx.step;
    const Scratch& s = *w.ctx.scratch;
    const Model& model = *w.ctx.model;
    const int forms = forms_of(model, p), width = model.matrices[size_t(p.matrices[0])].k;
    if (w.ctx.by_rows) {
        for (int row = w.begin_of(step.rows); row < w.end_of(step.rows); row++)
            prepare_columns(p, src + size_t(row) * src_ld, width, 0, width, s.act, row, forms);
    } else {  // few rows: the columns of each are dealt out in groups
        const int groups = (width + kGroup - 1) / kGroup;
        const int from = w.begin_of(groups) * kGroup, to = w.id + 1 == w.ctx.threads ? width : w.end_of(groups) * kGroup;
        for (int row = 0; row < step.rows; row++) prepare_columns(p, src + size_t(row) * src_ld, width, from, to, s.act, row, forms);
    }
    w.between_stages();
    run_products(w, p, step.rows, s.x, s.hidden_ld, true, p.scale, w.ctx.by_rows);
    w.between_stages();
}

static void run_mlp_in(Worker& w, const Phase& p) {
    const Step& step = *w.ctx.step;
    const Scratch& s = *w.ctx.scratch;
    const Model& model = *w.ctx.model;
    const int forms = forms_of(model, p);
    for (int row = w.begin_of(step.rows); row < w.end_of(step.rows); row++)
        prepare_row(p, s.x + size_t(row) * s.hidden_ld, model.hidden, s.act, row, forms);
    w.between_stages();
    run_products(w, p, step.rows, s.wide, s.wide_ld, false, 1.0f, w.ctx.by_rows);
    w.between_stages();
}

static void run_head(Worker& w, const Phase& p) {
    const Step& step = *w.ctx.step;
    const Scratch& s = *w.ctx.scratch;
    const Model& model = *w.ctx.model;
    const int forms = forms_of(model, p), rows = step.num_logits;
    w.barrier();
    for (int i = w.begin_of(rows); i < w.end_of(rows); i++)
        prepare_row(p, s.x + size_t(step.logit_rows[i]) * s.hidden_ld, model.hidden, s.act, i, forms);
    w.barrier();
    run_products(w, p, rows, step.logits, model.vocab, false, p.scale, false);
    if (p.softcap > 0.0f) {
        w.barrier();
        for (int i = w.begin_of(rows); i < w.end_of(rows); i++) {
            float* y = step.logits + size_t(i) * size_t(model.vocab);
            for (int c = 0; c < model.vocab; c += kLanes) {
                const F capped = fmul(fset(p.softcap), ftanh(fmul(fload_first(y + c, model.vocab - c), fset(1.0f / p.softcap))));
                fstore_first(y + c, capped, model.vocab - c);
            }
        }
        w.barrier();
    }
}

// The largest logit of each row: every worker looks through the columns that it computed, worker 0 compares the finds.
static void run_best(Worker& w) {
    const Step& step = *w.ctx.step;
    const int vocab = w.ctx.model->vocab, rows = step.num_logits;
    int32_t* peaks = w.ctx.scratch->peaks;
    const int panels = (vocab + kPanel - 1) / kPanel;
    const int from = w.begin_of(panels) * kPanel, to = std::min(vocab, w.end_of(panels) * kPanel);
    for (int i = 0; i < rows; i++) peaks[w.id * rows + i] = from < to ? first_peak(step.logits + size_t(i) * size_t(vocab), from, to) : -1;
    w.barrier();
    if (w.id != 0) return;
    for (int i = 0; i < rows; i++) {
        const float* y = step.logits + size_t(i) * size_t(vocab);
        int best = -1;
        for (int t = 0; t < w.ctx.threads; t++) {
            const int found = peaks[t * rows + i];
            if (found < 0) continue;
            if (best < 0 || y[found] > y[best] || y[found] != y[found]) best = found;
            if (y[best] != y[best]) break;
        }
        step.best[i] = best;
    }
}

static void run_step(const StepContext& ctx, int worker) {
    Worker w(ctx, worker);
    const Scratch& s = *ctx.scratch;
    enter_tiles();
    for (size_t i = 0; i < ctx.model->phases.size(); i++) {
        const Phase& p = ctx.model->phases[i];
        switch (p.kind) {
            case PhaseKind::embed: run_embed(w, p); break;
            case PhaseKind::attention_in: run_attention_in(w, p); break;
            case PhaseKind::attention: run_attention(w, p, i); break;
            case PhaseKind::attention_out: run_out(w, p, s.attn, s.attn_ld); break;
            case PhaseKind::mlp_in: run_mlp_in(w, p); break;
            case PhaseKind::mlp_out: run_out(w, p, s.wide, s.wide_ld); break;
            case PhaseKind::head:
                if (ctx.step->num_logits > 0) {
                    run_head(w, p);
                    run_best(w);
                }
                break;
        }
    }
    leave_tiles();
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
