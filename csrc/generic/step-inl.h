// The phases of a step, in order; every worker runs this function. Barriers stand where one worker reads what another wrote.
#pragma once
#include <new>

namespace pagemill {
namespace PAGEMILL_TARGET {

struct Worker {
    const StepContext* ctx;
    const int id;
    TileState& tile;

    Worker(const StepContext& context, int worker)
        : ctx(&context), id(worker), tile(*::new (context.scratch->workers + size_t(worker) * context.scratch->worker_stride) TileState) {}
    void barrier() { ctx->barrier->wait(id); }
    // Where a thread keeps its own rows, nothing that it reads was written by another.
    void between_stages() { if (!ctx->by_rows) barrier(); }
    int begin_of(int count) const { return int(int64_t(count) * id / ctx->threads); }
    int end_of(int count) const { return int(int64_t(count) * (id + 1) / ctx->threads); }
    // Rows of the step: where a thread keeps its own, they are whole tiles of 16.
    int first_row() const { return row_before(id); }
    int last_row() const { return row_before(id + 1); }
    // Before the first barrier, behind which the first product of few rows stands.
    void clear_shares() const {
        if (!ctx->shares) return;
        for (size_t i = 0; i < ctx->model->phases.size() * kMostMatrices; i++) {
            PanelShare& share = ctx->shares[i * size_t(ctx->threads) + size_t(id)];
            share.taken.store(0, std::memory_order_relaxed);
            share.by_others.store(0, std::memory_order_relaxed);
        }
    }
    uint16_t* panel() const { return ctx->scratch->panel + size_t(id) * ctx->scratch->panel_stride; }

private:
    int row_before(int worker) const {
        const int rows = ctx->step->rows;
        if (!ctx->by_rows) return int(int64_t(rows) * worker / ctx->threads);
        return std::min(rows, int(int64_t((rows + 15) / 16) * worker / ctx->threads) * 16);
    }
};

static int forms_of(const Model& model, const Phase& p) {
    int forms = 0;
    for (int m : p.matrices) forms |= form_of(model.matrices[size_t(m)].format);
    return forms;
}

// Rows [from, to) of src through the phase's norm, as the products read them; rows: of the whole product.
static void prepare_rows(const Phase& p, const float* src, int ld, int width, const Activations& act, int from, int to, int rows, int forms) {
    for (int row = from; row < to; row++) prepare_row(p, src + size_t(row) * ld, width, act, row, from, forms);
    if (forms & kFormTiles && rows > 1) fill_tiles(act, from, to, 0, width);
}

// The first panel that a worker reads behind the nth matrix of phase `index`: what it waits for unless it is asked for before.
static Stretch first_panel_behind(const Worker& w, size_t index, size_t nth) {
    const Model& model = *w.ctx->model;
    for (; index < model.phases.size(); index++, nth = size_t(-1)) {
        const std::vector<int>& matrices = model.phases[index].matrices;
        if (++nth >= matrices.size()) continue;
        const Matrix& next = model.matrices[size_t(matrices[nth])];
        return {next.data + size_t(w.begin_of(next.panels())) * next.panel_bytes, next.panel_bytes};
    }
    return {};
}

// All matrices of phase `index` side by side into y [rows][ld]: a thread's own rows, or panels as they are claimed. claimed:
// they were all claimed before, for something else.
static void run_products(Worker& w, const Activations& act, size_t index, int rows, float* y, int ld, bool accumulate, float scale, bool by_rows,
                         bool claimed = false) {
    const Model& model = *w.ctx->model;
    const int threads = w.ctx->threads;
    int column = 0, nth = 0;
    for (int m : model.phases[index].matrices) {
        const Matrix& matrix = model.matrices[size_t(m)];
        const Output out{y + column, ld, accumulate, scale, by_rows ? Stretch{} : first_panel_behind(w, index, size_t(nth))};
        if (by_rows) run_product(act, w.first_row(), w.last_row(), matrix, PanelRange{0, matrix.panels()}, w.panel(), out);
        else if (w.ctx->shares && nth < kMostMatrices && !claimed) {
            PanelShare* shares = w.ctx->shares + (index * kMostMatrices + size_t(nth)) * size_t(threads);
            run_product(act, 0, rows, matrix, PanelClaims{shares, matrix.panels(), threads, w.id}, w.panel(), out);
        } else run_product(act, 0, rows, matrix, PanelRange{w.begin_of(matrix.panels()), w.end_of(matrix.panels())}, w.panel(), out);
        column += matrix.n;
        nth++;
    }
}

static void run_embed(Worker& w, const Phase& p) {
    const Model& model = *w.ctx->model;
    const Step& step = *w.ctx->step;
    const Scratch& s = *w.ctx->scratch;
    for (int row = w.first_row(); row < w.last_row(); row++) {
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

static void run_attention_in(Worker& w, const Phase& p, size_t index) {
    const Step& step = *w.ctx->step;
    const Scratch& s = *w.ctx->scratch;
    const Model& model = *w.ctx->model;
    const int forms = forms_of(model, p), r0 = w.first_row(), r1 = w.last_row();
    prepare_rows(p, s.x, s.hidden_ld, model.hidden, s.act, r0, r1, step.rows, forms);
    w.between_stages();
    run_products(w, s.act, index, step.rows, s.wide, s.wide_ld, false, 1.0f, w.ctx->by_rows);
    w.between_stages();
    for (int row = r0; row < r1; row++) finish_heads(model, step, p, row, s.wide + size_t(row) * s.wide_ld);
    w.barrier();
}

static void run_attention(Worker& w, const Phase& p, size_t phase_index) {
    const Scratch& s = *w.ctx->scratch;
    const AttentionTasks& list = w.ctx->task_lists[size_t(w.ctx->phase_tasks[phase_index])];
    const AttentionCall call{&w.ctx->model->kv, w.ctx->step, &p, &list, s.wide, s.wide_ld, s.attn, s.attn_ld, s.partials};
    const int count = int(list.tasks.size()), bundle = list.bundle;
    const auto claim = [&] { return w.ctx->claims[phase_index].fetch_add(bundle, std::memory_order_relaxed); };
    // Claimed one ahead, so that the next task's pages are on their way while this one runs.
    for (int claimed = claim(); claimed < count;) {
        const int upcoming = claim();
        for (int at = claimed; at < claimed + bundle; at++) {
            const int next = at + 1 < claimed + bundle ? at + 1 : upcoming;
            run_attention_task(call, list.tasks[size_t(at)], next < count ? &list.tasks[size_t(next)] : nullptr, w.tile);
        }
        claimed = upcoming;
    }
    w.barrier();
    if (list.merges.empty()) return;
    const int merges = int(list.merges.size());
    for (int i = w.begin_of(merges); i < w.end_of(merges); i++) run_merge(call, list.merges[size_t(i)], w.tile);
    w.barrier();
}

// attention_out and mlp_out: x += scale * (W f(src) + bias), f the activation or nothing.
// activated: src holds f(src) already.
static void run_out(Worker& w, const Phase& p, size_t index, const float* src, int src_ld, bool activated) {
    const Step& step = *w.ctx->step;
    const Scratch& s = *w.ctx->scratch;
    const Model& model = *w.ctx->model;
    const int forms = forms_of(model, p), width = model.matrices[size_t(p.matrices[0])].k;
    if (w.ctx->by_rows || forms & kFormRotated) {
        for (int row = w.first_row(); row < w.last_row(); row++)
            prepare_columns(p, src + size_t(row) * src_ld, width, 0, width, s.act, row, w.first_row(), forms, activated);
        if (forms & kFormTiles && step.rows > 1) fill_tiles(s.act, w.first_row(), w.last_row(), 0, width);
    } else {  // few rows: the columns of each are dealt out in groups
        const int groups = (width + kGroup - 1) / kGroup;
        const int from = w.begin_of(groups) * kGroup, to = w.id + 1 == w.ctx->threads ? width : w.end_of(groups) * kGroup;
        for (int row = 0; row < step.rows; row++) prepare_columns(p, src + size_t(row) * src_ld, width, from, to, s.act, row, row, forms, activated);
        if (forms & kFormTiles && step.rows > 1) fill_tiles(s.act, 0, step.rows, from, to);
    }
    w.between_stages();
    run_products(w, s.act, index, step.rows, s.x, s.hidden_ld, true, p.scale, w.ctx->by_rows);
    w.between_stages();
}

// Whether the MLP's input products hand on f(gate) * up instead of both: where a thread has all columns of its rows.
static bool gates(const Worker& w, size_t in_index) {
    const std::vector<Phase>& phases = w.ctx->model->phases;
    if (in_index + 1 >= phases.size() || phases[in_index + 1].kind != PhaseKind::mlp_out) return false;
    const Phase &in = phases[in_index], &out = phases[in_index + 1];
    const std::vector<Matrix>& matrices = w.ctx->model->matrices;
    return w.ctx->by_rows && out.gated && in.matrices.size() == 2 && can_gate(matrices[size_t(in.matrices[0])], matrices[size_t(in.matrices[1])]);
}

static void run_mlp_in(Worker& w, size_t index) {
    const Phase& p = w.ctx->model->phases[index];
    const Step& step = *w.ctx->step;
    const Scratch& s = *w.ctx->scratch;
    const Model& model = *w.ctx->model;
    const int forms = forms_of(model, p);
    prepare_rows(p, s.x, s.hidden_ld, model.hidden, s.act, w.first_row(), w.last_row(), step.rows, forms);
    w.between_stages();
    if (gates(w, index))
        product_gated(s.act, w.first_row(), w.last_row(), model.matrices[size_t(p.matrices[0])], model.matrices[size_t(p.matrices[1])],
                      model.phases[index + 1].activation, s.wide, s.wide_ld);
    else run_products(w, s.act, index, step.rows, s.wide, s.wide_ld, false, 1.0f, w.ctx->by_rows);
    w.between_stages();
}

// Coarse logits of all panels, then the exact ones of those that may hold a row's largest. False where too many may: then
// nothing is found.
template <Format FMT>
static bool rank_logits(Worker& w, const Ranking& ranking, size_t index) {
    const Step& step = *w.ctx->step;
    const int panels = ranking.w->panels(), threads = w.ctx->threads, rows = step.num_logits;
    const auto product = [&](auto claims) {
        product_to<FMT, 1>(ranking.coarse, 0, rows, *ranking.w, MeasuredPanels<FMT, decltype(claims)>{claims, &ranking}, Stretch{}, TopOfPanel{&ranking});
    };
    if (w.ctx->shares) product(PanelClaims{w.ctx->shares + index * kMostMatrices * size_t(threads), panels, threads, w.id});
    else product(PanelRange{w.begin_of(panels), w.end_of(panels)});
    w.barrier();
    int32_t* left = w.ctx->scratch->peaks;
    for (int i = w.begin_of(rows); i < w.end_of(rows); i++) left[i] = count_left(ranking, i);
    w.barrier();
    int64_t total = 0;
    for (int i = 0; i < rows; i++) total += left[i];
    if (total * kMostLeft > int64_t(rows) * panels) return false;
    if (w.id == 0) *w.ctx->ranked_panels = total;
    const auto claim = [&] { return w.ctx->claims[index].fetch_add(1, std::memory_order_relaxed); };
    for (int i = claim(); i < rows; i = claim()) {
        float value = 0.0f;
        rank_row<FMT>(ranking, i, step.best[i], value);
        step.logits[size_t(i) * size_t(w.ctx->model->vocab) + size_t(step.best[i])] = value;
    }
    return true;
}

static bool rank_any(Worker& w, const Ranking& ranking, size_t index) {
    return ranking.w->format == Format::q4_0 ? rank_logits<Format::q4_0>(w, ranking, index) : rank_logits<Format::q8_0>(w, ranking, index);
}

static void cap_logits(Worker& w, const Phase& p) {
    const Step& step = *w.ctx->step;
    const int vocab = w.ctx->model->vocab;
    w.barrier();
    for (int i = w.begin_of(step.num_logits); i < w.end_of(step.num_logits); i++) {
        float* y = step.logits + size_t(i) * size_t(vocab);
        for (int c = 0; c < vocab; c += kLanes) {
            const F capped = fmul(fset(p.softcap), ftanh(fmul(fload_first(y + c, vocab - c), fset(1.0f / p.softcap))));
            fstore_first(y + c, capped, vocab - c);
        }
    }
}

// The largest logit of each row: every worker looks through a part of the columns, worker 0 compares the finds.
static void run_best(Worker& w) {
    w.barrier();
    const Step& step = *w.ctx->step;
    const int vocab = w.ctx->model->vocab, rows = step.num_logits;
    int32_t* peaks = w.ctx->scratch->peaks;
    const int panels = (vocab + kPanel - 1) / kPanel;
    const int from = w.begin_of(panels) * kPanel, to = std::min(vocab, w.end_of(panels) * kPanel);
    for (int i = 0; i < rows; i++) peaks[w.id * rows + i] = from < to ? first_peak(step.logits + size_t(i) * size_t(vocab), from, to) : -1;
    w.barrier();
    if (w.id != 0) return;
    for (int i = 0; i < rows; i++) {
        const float* y = step.logits + size_t(i) * size_t(vocab);
        int best = -1;
        for (int t = 0; t < w.ctx->threads; t++) {
            const int found = peaks[t * rows + i];
            if (found < 0) continue;
            if (best < 0 || y[found] > y[best] || y[found] != y[found]) best = found;
            if (y[best] != y[best]) break;
        }
        step.best[i] = best;
    }
}

static void run_head(Worker& w, const Phase& p, size_t index) {
    const Step& step = *w.ctx->step;
    const Scratch& s = *w.ctx->scratch;
    const Model& model = *w.ctx->model;
    const int forms = forms_of(model, p), rows = step.num_logits;
    const bool ranks = step.best_only && rows >= kRankRows && can_rank(model, p, s);
    Activations act = s.act;
    act.two_bytes = true;
    const Ranking ranking(model, p, s, act, rows);
    w.barrier();
    for (int i = w.begin_of(rows); i < w.end_of(rows); i++) {
        prepare_row(p, s.x + size_t(step.logit_rows[i]) * s.hidden_ld, model.hidden, act, i, w.begin_of(rows), forms);
        if (ranks) ranking.prepare(i);
    }
    if (forms & kFormTiles && rows > 1) fill_tiles(act, w.begin_of(rows), w.end_of(rows), 0, model.hidden);
    w.barrier();
    if (ranks && rank_any(w, ranking, index)) return;
    run_products(w, act, index, rows, step.logits, model.vocab, false, p.scale, false, ranks);
    if (p.softcap > 0.0f) cap_logits(w, p);
    run_best(w);
}

// After the last attention only rows whose logits are wanted go on: they move to the front.
static void keep_logit_rows(Worker& w) {
    const Step& step = *w.ctx->step;
    const Scratch& s = *w.ctx->scratch;
    if (w.id == 0)
        for (int i = 0; i < step.num_logits; i++) {
            const size_t row = size_t(step.logit_rows[i]);
            if (row == size_t(i)) continue;
            std::memcpy(s.x + size_t(i) * s.hidden_ld, s.x + row * size_t(s.hidden_ld), size_t(s.hidden_ld) * sizeof(float));
            std::memcpy(s.attn + size_t(i) * s.attn_ld, s.attn + row * size_t(s.attn_ld), size_t(s.attn_ld) * sizeof(float));
        }
    w.ctx = w.ctx->rest;
    w.barrier();
}

static void run_phase(Worker& w, size_t i) {
    const Scratch& s = *w.ctx->scratch;
    const Phase& p = w.ctx->model->phases[i];
    switch (p.kind) {
        case PhaseKind::embed: run_embed(w, p); break;
        case PhaseKind::attention_in: run_attention_in(w, p, i); break;
        case PhaseKind::attention: run_attention(w, p, i); break;
        case PhaseKind::attention_out: run_out(w, p, i, s.attn, s.attn_ld, false); break;
        case PhaseKind::mlp_in: run_mlp_in(w, i); break;
        case PhaseKind::mlp_out: run_out(w, p, i, s.wide, s.wide_ld, gates(w, i - 1)); break;
        case PhaseKind::head:
            if (w.ctx->step->num_logits > 0) run_head(w, p, i);
            break;
    }
}

// What `run_phases` has left on this thread's stack, which nobody wipes when a text is purged: its frame began where this one does.
static __attribute__((noinline)) void forget_stack() {
    uint8_t frames[48 << 10];
    std::memset(frames, 0, sizeof frames);
    asm volatile("" : : "r"(frames) : "memory");  // so that it is done
}

static __attribute__((noinline)) void run_phases(const StepContext& ctx, int worker) {
    Worker w(ctx, worker);
    w.clear_shares();
    enter_tiles();
    for (size_t i = 0; i < ctx.model->phases.size(); i++) {
        if (ctx.rest && i == ctx.last_attention && ctx.step->num_logits == 0) break;  // keys and values are written
        run_phase(w, i);
        if (ctx.rest && i == ctx.last_attention) keep_logit_rows(w);
    }
    leave_tiles();
}

static void run_step(const StepContext& ctx, int worker) {
    run_phases(ctx, worker);
    forget_stack();
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
