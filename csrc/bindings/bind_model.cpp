// Checks of a model and of each step, and their Python face.
#include <algorithm>
#include <tuple>

#include "native_model.h"

namespace pagemill {

NativeModel::NativeModel(const std::string& target, int threads, int hidden, int vocab, int max_positions) : kernels_(target_of(target)) {
    require(threads >= 1 && threads <= 256, "threads out of range");
    require(hidden > 0 && vocab > 0 && max_positions > 0, "model sizes out of range");
    model_.hidden = hidden;
    model_.vocab = vocab;
    model_.max_positions = max_positions;
    runner_ = std::make_unique<Runner>(model_, kernels_, threads);
}

int NativeModel::add_matrix(int format, int n, int k, ConstBytes packed, nb::object bias) {
    Matrix m = matrix_of(format, n, k, packed);
    require_layout(kernels_, m.format);
    if (!bias.is_none()) {
        ConstFloats values = nb::cast<ConstFloats>(bias);
        require(int(values.size()) == n, "bias has the wrong size");
        m.bias = values.data();
        kept_.push_back(bias);
    }
    kept_.push_back(nb::cast(packed));
    model_.matrices.push_back(m);
    return int(model_.matrices.size()) - 1;
}

void NativeModel::set_kv(Bytes arena, size_t block_bytes, int num_blocks, int pages_per_block, int codec,
                         const std::vector<std::tuple<size_t, size_t, int, int, int>>& layers, const std::vector<WindowGroup>& windows) {
    require(codec >= 0 && codec <= int(Codec::int8), "unknown KV codec");
    require(num_blocks > 0 && pages_per_block > 0 && (block_bytes > 0 || !windows.empty()), "KV geometry out of range");
    require(block_bytes == 0 || arena.size() / block_bytes >= size_t(num_blocks), "arena is smaller than its blocks");
    const bool bytes = Codec(codec) == Codec::int8;
    const size_t value = bytes ? 1 : codec == 0 ? 4 : 2, scales = bytes ? 2 * kPage * 2 : 0;
    KvArena kv;
    kv.groups[0] = {arena.data(), block_bytes, num_blocks, 0};
    std::vector<nb::object> arenas{nb::cast(arena)};
    std::vector<int> group_of(layers.size(), 0);
    for (const auto& [memory, bytes, count, window, members] : windows) {
        require(bytes > 0 && count > 0 && window > 0, "window group out of range");
        require(memory.size() / bytes >= size_t(count), "arena of a window group is smaller than its blocks");
        for (int layer : members) {
            require(layer >= 0 && layer < int(layers.size()) && group_of[size_t(layer)] == 0, "a layer is in one window group");
            group_of[size_t(layer)] = int(kv.groups.size());
        }
        kv.groups.push_back({memory.data(), bytes, count, window});
        arenas.push_back(nb::cast(memory));
    }
    kv.pages_per_block = pages_per_block;
    kv.codec = Codec(codec);
    for (const auto& [offset, page, heads, dim, pad] : layers) {
        require(dim > 0 && dim <= 256 && pad >= dim && pad % 16 == 0 && heads > 0, "KV layer geometry out of range");
        require(page == 2 * size_t(kPage) * size_t(pad) * value + scales, "KV page has the wrong size");
        const int group = group_of[kv.layers.size()];
        require(offset + page * size_t(heads) * size_t(pages_per_block) <= kv.groups[size_t(group)].block_bytes, "KV layer lies outside its block");
        kv.layers.push_back({offset, page, heads, dim, pad, group});
    }
    const auto same = [](const LayerKv& a, const LayerKv& b) {
        return std::tie(a.offset, a.page_bytes, a.kv_heads, a.head_dim, a.dim_pad, a.group) == std::tie(b.offset, b.page_bytes, b.kv_heads, b.head_dim, b.dim_pad, b.group);
    };
    const auto alike = [](const KvGroup& a, const KvGroup& b) { return a.block_bytes == b.block_bytes && a.window == b.window; };
    const KvArena& old = model_.kv;
    require(model_.phases.empty() || (kv.codec == old.codec && kv.pages_per_block == old.pages_per_block &&
                                      std::equal(kv.groups.begin(), kv.groups.end(), old.groups.begin(), old.groups.end(), alike) &&
                                      std::equal(kv.layers.begin(), kv.layers.end(), old.layers.begin(), old.layers.end(), same)),
            "the KV geometry of a model with phases cannot change");
    model_.kv = kv;
    {
        nb::gil_scoped_release released;  // it may have to wait for the system
        prefault_.watch(arena.data(), block_bytes * size_t(num_blocks));
    }
    arenas_ = std::move(arenas);
}

void NativeModel::add_phase(const PhaseArguments& a) {
    check_phase(a);
    model_.phases.push_back(a.phase);
    kept_.insert(kept_.end(), a.kept.begin(), a.kept.end());
}

void NativeModel::step(Ints tokens, Ints positions, Ints starts, Ints2 tables, Ints logit_rows, Floats2 logits, MutableInts best, bool best_only) {
    Step s;
    s.rows = int(tokens.size());
    s.num_seqs = int(starts.size()) - 1;
    s.num_logits = int(logit_rows.size());
    s.tokens = tokens.data();
    s.positions = positions.data();
    s.starts = starts.data();
    s.tables = tables.data();
    s.table_stride = int(tables.shape(1));
    s.logit_rows = logit_rows.data();
    s.logits = logits.data();
    s.best = best.data();
    s.best_only = best_only;
    require(s.rows > 0 && int(positions.size()) == s.rows, "tokens and positions differ in length, or are empty");
    require(tables.shape(0) == model_.kv.groups.size() * size_t(s.num_seqs), "one block table for each sequence and KV group");
    require(int(logits.shape(0)) == s.num_logits && int(logits.shape(1)) == model_.vocab, "logits have the wrong shape");
    require(int(best.size()) == s.num_logits, "one best token for each row of logits");
    const int num_used = check_step(s);
    nb::gil_scoped_release released;
    prefault_.begins(size_t(num_used) * model_.kv.groups[0].block_bytes);
    struct End {
        Prefault& prefault;
        ~End() { prefault.ended(); }
    } end{prefault_};
    runner_->run(s);
}

void NativeModel::check_phase(const PhaseArguments& a) const {
    const Phase& p = a.phase;
    int n = 0, k = 0, rotated = 0;
    for (int m : p.matrices) {
        require(m >= 0 && m < int(model_.matrices.size()), "phase names a matrix that does not exist");
        n += model_.matrices[size_t(m)].n;
        rotated += model_.matrices[size_t(m)].format == Format::i8_rotated;
        require(k == 0 || k == model_.matrices[size_t(m)].k, "matrices of a phase differ in width");
        k = model_.matrices[size_t(m)].k;
    }
    require(rotated == 0 || (rotated == int(p.matrices.size()) && p.kind != PhaseKind::embed), "rotated rows are for products, all of a phase");
    require((p.norm == NormKind::none) == (a.norm_width == 0), "a norm has a weight");
    require(a.norm_width == 0 || a.norm_width == model_.hidden, "norm weight has the wrong size");
    require(a.norm_bias_width == 0 || a.norm_bias_width == model_.hidden, "norm bias has the wrong size");
    const bool core = p.kind == PhaseKind::attention || p.kind == PhaseKind::attention_in;
    if (core) {
        require(p.layer >= 0 && p.layer < int(model_.kv.layers.size()), "phase names a KV layer that does not exist");
        const LayerKv& kv = model_.kv.layers[size_t(p.layer)];
        require(kv.kv_heads == p.kv_heads && kv.head_dim == p.head_dim, "phase and KV layer differ");
        require(p.q_heads > 0 && p.q_heads % p.kv_heads == 0, "query heads are a multiple of KV heads");
    }
    switch (p.kind) {
        case PhaseKind::embed:
            require(p.matrices.size() == 1 && n >= model_.vocab && k == model_.hidden, "embedding has the wrong shape");
            require(!p.position_table || (a.position_rows >= model_.max_positions && a.position_width == model_.hidden), "position table has the wrong shape");
            break;
        case PhaseKind::attention_in:
            require(n == (p.q_heads + 2 * p.kv_heads) * p.head_dim && k == model_.hidden, "q, k, v have the wrong shape");
            require(a.q_norm_width == 0 || a.q_norm_width == p.head_dim, "q norm has the wrong size");
            require(a.k_norm_width == 0 || a.k_norm_width == p.head_dim, "k norm has the wrong size");
            require(p.rope == RopeStyle::none ||
                        (p.rotary_dim > 0 && p.rotary_dim <= p.head_dim && p.rotary_dim % 2 == 0 && a.table_width == p.rotary_dim && a.table_rows >= model_.max_positions),
                    "rope table has the wrong shape");
            break;
        case PhaseKind::attention: {
            require(p.matrices.empty() && p.window >= 0, "attention has no matrices");
            const int kept = model_.kv.groups[size_t(model_.kv.layers[size_t(p.layer)].group)].window;
            require(kept == 0 || (p.window > 0 && p.window <= kept), "a layer reads more than its window group keeps");
            break;
        }
        case PhaseKind::attention_out: require(n == model_.hidden && p.matrices.size() == 1, "output product has the wrong shape"); break;
        case PhaseKind::mlp_in: require(!p.matrices.empty() && k == model_.hidden, "MLP input has the wrong shape"); break;
        case PhaseKind::mlp_out: {
            require(n == model_.hidden && p.matrices.size() == 1 && !model_.phases.empty() && model_.phases.back().kind == PhaseKind::mlp_in, "MLP output has the wrong shape");
            int wide = 0;
            for (int m : model_.phases.back().matrices) wide += model_.matrices[size_t(m)].n;
            require(wide == (p.gated ? 2 * k : k), "MLP output does not fit its input");
            break;
        }
        case PhaseKind::head: require(n == model_.vocab && k == model_.hidden, "head has the wrong shape"); break;
    }
}

int NativeModel::check_step(Step& s) const {
    require(s.num_seqs > 0 && s.starts[0] == 0 && s.starts[s.num_seqs] == s.rows, "starts do not cover the rows");
    require(model_.kv.groups[0].num_blocks > 0, "no KV arena");
    const int block = model_.kv.pages_per_block * kPage;
    s.row_seq.resize(size_t(s.rows));
    int highest = -1;
    for (int seq = 0; seq < s.num_seqs; seq++) {
        const int from = s.starts[seq], to = s.starts[seq + 1];
        require(from < to && to <= s.rows, "a sequence without rows");
        for (int row = from; row < to; row++) {
            require(s.positions[row] >= 0 && s.positions[row] < model_.max_positions, "position out of range");
            require(row == from || s.positions[row] == s.positions[row - 1] + 1, "positions of a sequence are consecutive");
            require(s.tokens[row] >= 0 && s.tokens[row] < model_.vocab, "token id out of range");
            s.row_seq[size_t(row)] = seq;
        }
        const int blocks = s.positions[to - 1] / block + 1;
        require(blocks <= s.table_stride, "block table is too short");
        for (size_t g = 0; g < model_.kv.groups.size(); g++) {
            const KvGroup& group = model_.kv.groups[g];
            const int first = group.window > 0 ? std::max(s.positions[from] + 1 - group.window, 0) / block : 0;
            const int32_t* table = s.table(int(g), seq);
            for (int b = first; b < blocks; b++) {
                require(table[b] >= 0 && table[b] < group.num_blocks, "block id out of range");
                if (g == 0) highest = std::max(highest, int(table[b]));
            }
        }
    }
    for (int i = 0; i < s.num_logits; i++) require(s.logit_rows[i] >= 0 && s.logit_rows[i] < s.rows, "logit row out of range");
    return highest + 1;
}

static void set_vector(PhaseArguments& a, nb::object value, const float*& pointer, int& width) {
    if (value.is_none()) return;
    ConstFloats v = nb::cast<ConstFloats>(value);
    pointer = v.data();
    width = int(v.size());
    a.kept.push_back(value);
}

static void set_table(PhaseArguments& a, nb::object value, const float*& pointer, int& rows, int& width) {
    if (value.is_none()) return;
    ConstFloats2 v = nb::cast<ConstFloats2>(value);
    pointer = v.data();
    rows = int(v.shape(0));
    width = int(v.shape(1));
    a.kept.push_back(value);
}

void bind_model(nb::module_& m) {
    nb::class_<NativeModel>(m, "NativeModel")
        .def(nb::init<const std::string&, int, int, int, int>(), "target"_a, "threads"_a, "hidden"_a, "vocab"_a, "max_positions"_a)
        .def("add_matrix", &NativeModel::add_matrix, "format"_a, "n"_a, "k"_a, "packed"_a, "bias"_a.none())
        .def("set_kv", &NativeModel::set_kv, "arena"_a, "block_bytes"_a, "num_blocks"_a, "pages_per_block"_a, "codec"_a, "layers"_a,
             "windows"_a = std::vector<WindowGroup>())
        .def("step", &NativeModel::step, "tokens"_a, "positions"_a, "starts"_a, "tables"_a, "logit_rows"_a, "logits"_a, "best"_a, "best_only"_a = false)
        .def_prop_ro("target", &NativeModel::target)
        .def_prop_ro("threads", &NativeModel::threads)
        .def("wait_prefaulted", &NativeModel::wait_prefaulted, "seconds"_a, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("prefaulted_bytes", &NativeModel::prefaulted_bytes)
        .def("wipe_activations", &NativeModel::wipe_activations)
        .def_prop_ro("shared_splits", &NativeModel::shared_splits)
        .def_prop_ro("ranked_panels", &NativeModel::ranked_panels)
        .def(
            "add_phase",
            [](NativeModel& model, int kind, std::vector<int> matrices, int norm, nb::object norm_weight, nb::object norm_bias, float norm_eps, int layer,
               int q_heads, int kv_heads, int head_dim, nb::object q_norm, nb::object k_norm, float qk_eps, int rope, nb::object rope_table, int rotary_dim,
               float scale, float softcap, int window, int activation, bool gated, nb::object position_table) {
                require(kind >= 0 && kind <= int(PhaseKind::head) && norm >= 0 && norm <= 2 && rope >= 0 && rope <= 2 && activation >= 0 && activation <= 4,
                        "phase fields out of range");
                PhaseArguments a;
                Phase& p = a.phase;
                p.kind = PhaseKind(kind);
                p.matrices = std::move(matrices);
                p.norm = NormKind(norm);
                set_vector(a, norm_weight, p.norm_weight, a.norm_width);
                set_vector(a, norm_bias, p.norm_bias, a.norm_bias_width);
                p.norm_eps = norm_eps;
                p.layer = layer;
                p.q_heads = q_heads;
                p.kv_heads = kv_heads;
                p.head_dim = head_dim;
                set_vector(a, q_norm, p.q_norm, a.q_norm_width);
                set_vector(a, k_norm, p.k_norm, a.k_norm_width);
                p.qk_eps = qk_eps;
                p.rope = RopeStyle(rope);
                set_table(a, rope_table, p.rope_table, a.table_rows, a.table_width);
                p.rotary_dim = rotary_dim;
                p.scale = scale;
                p.softcap = softcap;
                p.window = window;
                p.activation = ActivationKind(activation);
                p.gated = gated;
                set_table(a, position_table, p.position_table, a.position_rows, a.position_width);
                model.add_phase(a);
            },
            "kind"_a, "matrices"_a, "norm"_a = 0, "norm_weight"_a = nb::none(), "norm_bias"_a = nb::none(), "norm_eps"_a = 0.0f, "layer"_a = 0,
            "q_heads"_a = 0, "kv_heads"_a = 0, "head_dim"_a = 0, "q_norm"_a = nb::none(), "k_norm"_a = nb::none(), "qk_eps"_a = 0.0f, "rope"_a = 0,
            "rope_table"_a = nb::none(), "rotary_dim"_a = 0, "scale"_a = 1.0f, "softcap"_a = 0.0f, "window"_a = 0, "activation"_a = 0, "gated"_a = false,
            "position_table"_a = nb::none());
}

}  // namespace pagemill
