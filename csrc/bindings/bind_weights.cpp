// Targets, packed weights and the contract entry points of the products.
#include "bindings.h"

namespace pagemill {

// Activations owned for one call of a contract entry point.
struct OwnedActivations {
    std::vector<float> f32, scale, scaled_sum;
    std::vector<uint16_t> bf16, tiles;
    std::vector<int8_t> i8, low;
    std::vector<int32_t> sum;
    Activations view;
    OwnedActivations(int rows, int width, bool two_bytes) {
        view.ld = (width + 63) / 64 * 64;
        const size_t n = size_t(rows + 32) * size_t(view.ld), g = n / kGroup;  // as the step has it
        f32.resize(n); bf16.resize(n); tiles.resize(n); i8.resize(n); low.resize(n); scale.resize(g); scaled_sum.resize(g); sum.resize(g);
        view.f32 = f32.data(); view.bf16 = bf16.data(); view.tiles = tiles.data(); view.i8 = i8.data(); view.low = low.data();
        view.two_bytes = two_bytes;
        view.scale = scale.data(); view.scaled_sum = scaled_sum.data(); view.sum = sum.data();
    }
};

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

static nb::tuple quantize_rows(const std::string& target, ConstFloats2 x, bool rotated, bool two_bytes) {
    const int rows = int(x.shape(0)), width = int(x.shape(1));
    require(rows > 0 && width > 0 && width % (rotated ? 64 : kGroup) == 0, "rows of multiples of 32 values, 64 if rotated");
    require(!(rotated && two_bytes), "rotated rows are of one byte a value");
    OwnedActivations act(rows, width, two_bytes);
    target_of(target).quantize_rows(x.data(), rows, width, rotated, act.view);
    auto q = array_of<int32_t>({size_t(rows), size_t(width)});
    auto scale = array_of<float>({size_t(rows), size_t(width / kGroup)});
    auto sum = array_of<int32_t>({size_t(rows), size_t(width / kGroup)});
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < width; c++) {
            const size_t at = size_t(r) * size_t(act.view.ld) + size_t(c);
            q.data()[size_t(r) * size_t(width) + size_t(c)] = two_bytes ? 256 * act.i8[at] + act.low[at] : act.i8[at];
        }
        for (int g = 0; g < width / kGroup; g++) {
            scale.data()[size_t(r) * size_t(width / kGroup) + size_t(g)] = act.scale[size_t(r) * size_t(act.view.groups()) + size_t(g)];
            sum.data()[size_t(r) * size_t(width / kGroup) + size_t(g)] = act.sum[size_t(r) * size_t(act.view.groups()) + size_t(g)];
        }
    }
    return nb::make_tuple(q, scale, sum);
}

static nb::ndarray<nb::numpy, float> product(const std::string& target, int format, int n, ConstBytes packed, ConstFloats2 x, bool two_bytes) {
    const int rows = int(x.shape(0)), k = int(x.shape(1));
    const Matrix m = matrix_of(format, n, k, packed);
    require_layout(target_of(target), m.format);
    OwnedActivations act(rows, k, two_bytes);
    target_of(target).quantize_rows(x.data(), rows, k, m.format == Format::i8_rotated, act.view);
    auto y = array_of<float>({size_t(rows), size_t(n)});
    target_of(target).multiply(act.view, rows, m, y.data());
    return y;
}

static nb::ndarray<nb::numpy, int32_t> integer_sums(const std::string& target, int format, int n, ConstBytes packed, ConstFloats2 x, bool two_bytes) {
    const int rows = int(x.shape(0)), k = int(x.shape(1));
    const Matrix m = matrix_of(format, n, k, packed);
    require(int(m.format) >= int(Format::q4_0) && int(m.format) <= int(Format::q8_0), "only quantised formats have integer sums");
    OwnedActivations act(rows, k, two_bytes);
    target_of(target).quantize_rows(x.data(), rows, k, false, act.view);
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

void bind_weights(nb::module_& m) {
    m.def("built_targets", &built_targets);
    m.def("available_targets", &available_targets);
    m.def("allocate", &allocate_array, "bytes"_a);
    m.def("panel_bytes", [](int format, int k) { return panel_bytes(format_of(format), k); }, "format"_a, "k"_a);
    m.def("pack", &pack, "format"_a, "k"_a, "rows"_a, "column0"_a, "packed"_a);
    m.def("unpack_row", &unpack, "format"_a, "n"_a, "k"_a, "packed"_a, "row"_a);
    m.def("quantize_rows", &quantize_rows, "target"_a, "x"_a, "rotated"_a = false, "two_bytes"_a = false);
    m.def("product", &product, "target"_a, "format"_a, "n"_a, "packed"_a, "x"_a, "two_bytes"_a = false);
    m.def("integer_sums", &integer_sums, "target"_a, "format"_a, "n"_a, "packed"_a, "x"_a, "two_bytes"_a = false);
    m.def("barrier_ns", [](int threads) {
        nb::gil_scoped_release released;
        return barrier_nanoseconds(threads);
    }, "threads"_a);
}

}  // namespace pagemill
