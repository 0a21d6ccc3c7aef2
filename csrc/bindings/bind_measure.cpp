// Python face of measure.h.
#include "../measure.h"

#include "bindings.h"

namespace pagemill {

static void check_measure(int threads, int samples) {
    require(threads >= 1 && threads <= 256, "threads out of range");
    require(samples >= 1 && samples <= 100000, "samples out of range");
}

static double bound_multiply_add_rate(const std::string& target, int arithmetic, int threads, int samples) {
    check_measure(threads, samples);
    require(arithmetic >= 0 && arithmetic <= int(Arithmetic::tile_int8), "unknown arithmetic");
    nb::gil_scoped_release released;
    return multiply_add_rate(target, Arithmetic(arithmetic), threads, samples);
}

static double bound_read_rate(const std::string& target, ConstBytes data, int threads, int samples) {
    check_measure(threads, samples);
    require(reinterpret_cast<uintptr_t>(data.data()) % 64 == 0, "memory is not 64-byte aligned");
    nb::gil_scoped_release released;
    return read_rate(target, data.data(), data.size(), threads, samples);
}

static double bound_piece_rate(const std::string& target, ConstBytes data, size_t piece, size_t stride, int threads, int samples) {
    check_measure(threads, samples);
    require(reinterpret_cast<uintptr_t>(data.data()) % 64 == 0, "memory is not 64-byte aligned");
    require(piece > 0 && piece % 512 == 0, "a piece is not a multiple of 512 bytes");
    require(stride >= piece && stride % 64 == 0, "a stride is shorter than a piece, or not a multiple of 64 bytes");
    nb::gil_scoped_release released;
    return piece_rate(target, data.data(), data.size(), piece, stride, threads, samples);
}

void bind_measure(nb::module_& m) {
    m.def("multiply_add_rate", &bound_multiply_add_rate, "target"_a, "arithmetic"_a, "threads"_a, "samples"_a);
    m.def("read_rate", &bound_read_rate, "target"_a, "data"_a.noconvert(), "threads"_a, "samples"_a);
    m.def("piece_rate", &bound_piece_rate, "target"_a, "data"_a.noconvert(), "piece"_a, "stride"_a, "threads"_a, "samples"_a);
}

}  // namespace pagemill
