// The Python face of the native core: checks shapes and ranges, keeps arrays alive, releases the GIL. No arithmetic.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <new>
#include <stdexcept>

#include "../pack.h"
#include "../step.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace pagemill;

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstRows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstFloats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstFloats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableInts = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints2 = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

static void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

static Format format_of(int format) {
    require(format >= 0 && format <= int(Format::q8_0), "unknown weight format");
    return Format(format);
}

static const Kernels& target_of(const std::string& name) {
    const Kernels* kernels = find_target(name);
    if (!kernels) throw std::invalid_argument("target not available on this machine: " + name);
    return *kernels;
}

static void check_k(Format format, int n, int k) {
    require(n > 0 && k > 0 && n <= (1 << 24) && k <= (1 << 20), "matrix sizes out of range");
    require(int(format) < int(Format::q4_0) || k % kGroup == 0, "rows of quantised formats are multiples of 32 long");
}

static Matrix matrix_of(int format, int n, int k, const ConstBytes& packed) {
    Matrix m;
    m.format = format_of(format);
    check_k(m.format, n, k);
    m.n = n;
    m.k = k;
    m.panel_bytes = panel_bytes(m.format, k);
    m.data = packed.data();
    require(packed.size() == m.panel_bytes * size_t(m.panels()), "packed matrix has the wrong size");
    return m;
}

struct PhaseArguments {
    Phase phase;
    std::vector<nb::object> kept;
    int norm_width = 0, norm_bias_width = 0, q_norm_width = 0, k_norm_width = 0, table_rows = 0, table_width = 0;
    int position_rows = 0, position_width = 0;
};

class NativeModel {
public:
    NativeModel(const std::string& target, int threads, int hidden, int vocab, int max_positions) : kernels_(target_of(target)) {
        require(threads >= 1 && threads <= 256, "threads out of range");
        require(hidden > 0 && vocab > 0 && max_positions > 0, "model sizes out of range");
        model_.hidden = hidden;
        model_.vocab = vocab;
        model_.max_positions = max_positions;
        runner_ = std::make_unique<Runner>(model_, kernels_, threads);
    }

    int add_matrix(int format, int n, int k, ConstBytes packed, nb::object bias) {
        Matrix m = matrix_of(format, n, k, packed);
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

    void set_kv(Bytes arena, size_t block_bytes, int num_blocks, int pages_per_block, int codec,
                const std::vector<std::tuple<size_t, size_t, int, int, int>>& layers) {
        require(codec >= 0 && codec <= int(Codec::int8), "unknown KV codec");
        require(num_blocks > 0 && pages_per_block > 0 && block_bytes > 0, "KV geometry out of range");
        require(arena.size() / block_bytes >= size_t(num_blocks), "arena is smaller than its blocks");
        const bool bytes = Codec(codec) == Codec::int8;
        const size_t value = bytes ? 1 : codec == 0 ? 4 : 2, scales = bytes ? 2 * kPage * 2 : 0;
        KvArena kv;
        kv.base = arena.data();
        kv.block_bytes = block_bytes;
        kv.num_blocks = num_blocks;
        kv.pages_per_block = pages_per_block;
        kv.codec = Codec(codec);
        for (const auto& [offset, page, heads, dim, pad] : layers) {
            require(dim > 0 && dim <= 256 && pad >= dim && pad % 16 == 0 && heads > 0, "KV layer geometry out of range");
            require(page == 2 * size_t(kPage) * size_t(pad) * value + scales, "KV page has the wrong size");
            require(offset + page * size_t(heads) * size_t(pages_per_block) <= block_bytes, "KV layer lies outside its block");
            kv.layers.push_back({offset, page, heads, dim, pad});
        }
        model_.kv = kv;
        arena_ = nb::cast(arena);
    }

    void add_phase(const PhaseArguments& a) {
        check_phase(a);
        model_.phases.push_back(a.phase);
        kept_.insert(kept_.end(), a.kept.begin(), a.kept.end());
    }

    void step(Ints tokens, Ints positions, Ints starts, Ints2 tables, Ints logit_rows, Floats2 logits, MutableInts best) {
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
        require(s.rows > 0 && int(positions.size()) == s.rows, "tokens and positions differ in length, or are empty");
        require(int(tables.shape(0)) == s.num_seqs, "one block table for each sequence");
        require(int(logits.shape(0)) == s.num_logits && int(logits.shape(1)) == model_.vocab, "logits have the wrong shape");
        require(int(best.size()) == s.num_logits, "one best token for each row of logits");
        check_step(s);
        nb::gil_scoped_release released;
        runner_->run(s);
    }

    const char* target() const { return kernels_.name; }
    int threads() const { return runner_->threads(); }

private:
    void check_phase(const PhaseArguments& a) const {
        const Phase& p = a.phase;
        int n = 0, k = 0;
        for (int m : p.matrices) {
            require(m >= 0 && m < int(model_.matrices.size()), "phase names a matrix that does not exist");
            n += model_.matrices[size_t(m)].n;
            require(k == 0 || k == model_.matrices[size_t(m)].k, "matrices of a phase differ in width");
            k = model_.matrices[size_t(m)].k;
        }
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
            case PhaseKind::attention: require(p.matrices.empty() && p.window >= 0, "attention has no matrices"); break;
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

    void check_step(Step& s) const {
        require(s.num_seqs > 0 && s.starts[0] == 0 && s.starts[s.num_seqs] == s.rows, "starts do not cover the rows");
        require(model_.kv.base != nullptr || model_.kv.layers.empty(), "no KV arena");
        const int block = model_.kv.pages_per_block * kPage;
        s.row_seq.resize(size_t(s.rows));
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
            for (int b = 0; b < blocks; b++) {
                const int id = s.tables[size_t(seq) * size_t(s.table_stride) + size_t(b)];
                require(id >= 0 && id < model_.kv.num_blocks, "block id out of range");
            }
        }
        for (int i = 0; i < s.num_logits; i++) require(s.logit_rows[i] >= 0 && s.logit_rows[i] < s.rows, "logit row out of range");
    }

    const Kernels& kernels_;
    Model model_;
    std::unique_ptr<Runner> runner_;
    std::vector<nb::object> kept_;
    nb::object arena_;
};

// Activations owned for one call of a contract entry point.
struct OwnedActivations {
    std::vector<float> f32, scale, scaled_sum;
    std::vector<uint16_t> bf16;
    std::vector<int8_t> i8;
    std::vector<int32_t> sum;
    Activations view;
    OwnedActivations(int rows, int width) {
        view.ld = (width + 63) / 64 * 64;
        const size_t n = size_t(rows + 32) * size_t(view.ld), g = n / kGroup;  // as the step has it
        f32.resize(n); bf16.resize(n); i8.resize(n); scale.resize(g); scaled_sum.resize(g); sum.resize(g);
        view.f32 = f32.data(); view.bf16 = bf16.data(); view.i8 = i8.data();
        view.scale = scale.data(); view.scaled_sum = scaled_sum.data(); view.sum = sum.data();
    }
};

template <class T> static nb::ndarray<nb::numpy, T> array_of(std::vector<size_t> shape) {
    size_t count = 1;
    for (size_t n : shape) count *= n;
    T* data = new T[count]();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::ndarray<nb::numpy, T>(data, shape.size(), shape.data(), owner);
}

static nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> allocate_array(size_t bytes) {
    struct Owned {
        uint8_t* memory;
        size_t bytes;
    };
    auto* owned = new Owned{allocate(bytes), bytes};
    uint8_t* memory = owned->memory;
    nb::capsule owner(owned, [](void* p) noexcept {
        auto* o = static_cast<Owned*>(p);
        release(o->memory, o->bytes);
        delete o;
    });
    return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(memory, {bytes}, owner);
}

static nb::tuple quantize_rows(const std::string& target, ConstFloats2 x) {
    const int rows = int(x.shape(0)), width = int(x.shape(1));
    require(rows > 0 && width > 0 && width % kGroup == 0, "rows of multiples of 32 values");
    OwnedActivations act(rows, width);
    target_of(target).quantize_rows(x.data(), rows, width, act.view);
    auto q = array_of<int8_t>({size_t(rows), size_t(width)});
    auto scale = array_of<float>({size_t(rows), size_t(width / kGroup)});
    auto sum = array_of<int32_t>({size_t(rows), size_t(width / kGroup)});
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < width; c++) q.data()[size_t(r) * size_t(width) + size_t(c)] = act.i8[size_t(r) * size_t(act.view.ld) + size_t(c)];
        for (int g = 0; g < width / kGroup; g++) {
            scale.data()[size_t(r) * size_t(width / kGroup) + size_t(g)] = act.scale[size_t(r) * size_t(act.view.groups()) + size_t(g)];
            sum.data()[size_t(r) * size_t(width / kGroup) + size_t(g)] = act.sum[size_t(r) * size_t(act.view.groups()) + size_t(g)];
        }
    }
    return nb::make_tuple(q, scale, sum);
}

static nb::ndarray<nb::numpy, float> product(const std::string& target, int format, int n, ConstBytes packed, ConstFloats2 x) {
    const int rows = int(x.shape(0)), k = int(x.shape(1));
    const Matrix m = matrix_of(format, n, k, packed);
    OwnedActivations act(rows, k);
    target_of(target).quantize_rows(x.data(), rows, k, act.view);
    auto y = array_of<float>({size_t(rows), size_t(n)});
    target_of(target).multiply(act.view, rows, m, y.data());
    return y;
}

static nb::ndarray<nb::numpy, int32_t> integer_sums(const std::string& target, int format, int n, ConstBytes packed, ConstFloats2 x) {
    const int rows = int(x.shape(0)), k = int(x.shape(1));
    const Matrix m = matrix_of(format, n, k, packed);
    require(int(m.format) >= int(Format::q4_0), "only quantised formats have integer sums");
    OwnedActivations act(rows, k);
    target_of(target).quantize_rows(x.data(), rows, k, act.view);
    auto y = array_of<int32_t>({size_t(rows), size_t(k / kGroup), size_t(n)});
    target_of(target).integer_sums(act.view, rows, m, y.data());
    return y;
}

static void pack(int format, int k, ConstRows rows, int column0, Bytes packed) {
    const Format f = format_of(format);
    const int n = int(rows.shape(0));
    check_k(f, n, k);
    require(column0 >= 0 && rows.shape(1) == source_row_bytes(f, k), "rows have the wrong size");
    require(packed.size() >= panel_bytes(f, k) * size_t((column0 + n + kPanel - 1) / kPanel), "packed matrix is too small");
    nb::gil_scoped_release released;
    pack_rows(f, rows.data(), n, k, column0, packed.data());
}

static nb::ndarray<nb::numpy, float> unpack(int format, int n, int k, ConstBytes packed, int row) {
    const Matrix m = matrix_of(format, n, k, packed);
    require(row >= 0 && row < n, "row out of range");
    auto out = array_of<float>({size_t(k)});
    unpack_row(m, row, out.data());
    return out;
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

NB_MODULE(_native, m) {
    m.doc() = "Native core of Pagemill; use it through pagemill.kernels, which checks shapes and explains errors.";
    m.def("built_targets", &built_targets);
    m.def("available_targets", &available_targets);
    m.def("allocate", &allocate_array, "bytes"_a);
    m.def("panel_bytes", [](int format, int k) { return panel_bytes(format_of(format), k); }, "format"_a, "k"_a);
    m.def("pack", &pack, "format"_a, "k"_a, "rows"_a, "column0"_a, "packed"_a);
    m.def("unpack_row", &unpack, "format"_a, "n"_a, "k"_a, "packed"_a, "row"_a);
    m.def("quantize_rows", &quantize_rows, "target"_a, "x"_a);
    m.def("product", &product, "target"_a, "format"_a, "n"_a, "packed"_a, "x"_a);
    m.def("integer_sums", &integer_sums, "target"_a, "format"_a, "n"_a, "packed"_a, "x"_a);
    m.def("barrier_ns", [](int threads) {
        nb::gil_scoped_release released;
        return barrier_nanoseconds(threads);
    }, "threads"_a);

    nb::class_<NativeModel>(m, "NativeModel")
        .def(nb::init<const std::string&, int, int, int, int>(), "target"_a, "threads"_a, "hidden"_a, "vocab"_a, "max_positions"_a)
        .def("add_matrix", &NativeModel::add_matrix, "format"_a, "n"_a, "k"_a, "packed"_a, "bias"_a.none())
        .def("set_kv", &NativeModel::set_kv, "arena"_a, "block_bytes"_a, "num_blocks"_a, "pages_per_block"_a, "codec"_a, "layers"_a)
        .def("step", &NativeModel::step, "tokens"_a, "positions"_a, "starts"_a, "tables"_a, "logit_rows"_a, "logits"_a, "best"_a)
        .def_prop_ro("target", &NativeModel::target)
        .def_prop_ro("threads", &NativeModel::threads)
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
