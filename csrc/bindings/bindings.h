// What all files of the Python face share: array types, checks, arrays owned by Python. No arithmetic.
#pragma once
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

namespace pagemill {

namespace nb = nanobind;
using namespace nb::literals;

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstRows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstFloats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstFloats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableInts = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints2 = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

inline Format format_of(int format) {
    require(format >= 0 && format <= int(Format::i8_rotated), "unknown weight format");
    return Format(format);
}

inline const Kernels& target_of(const std::string& name) {
    const Kernels* kernels = find_target(name);
    if (!kernels) throw std::invalid_argument("target not available on this machine: " + name);
    return *kernels;
}

inline void check_k(Format format, int n, int k) {
    require(n > 0 && k > 0 && n <= (1 << 24) && k <= (1 << 20), "matrix sizes out of range");
    require(int(format) < int(Format::q4_0) || k % kGroup == 0, "rows of quantised formats are multiples of 32 long");
    require(format != Format::i8_rotated || k % 64 == 0, "rotated rows are multiples of 64 long");
}

inline void require_layout(const Kernels& kernels, Format format) {
    const bool tiles = int(format) >= int(Format::q4_0_tiles) && int(format) <= int(Format::q8_0_tiles);
    require(!tiles || kernels.tiles, "this target does not read weights in tiles");
}

inline Matrix matrix_of(int format, int n, int k, const ConstBytes& packed) {
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

template <class T> nb::ndarray<nb::numpy, T> array_of(std::vector<size_t> shape) {
    size_t count = 1;
    for (size_t n : shape) count *= n;
    T* data = new T[count]();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::ndarray<nb::numpy, T>(data, shape.size(), shape.data(), owner);
}

// One for each file of this directory.
void bind_weights(nb::module_& m);
void bind_model(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_measure(nb::module_& m);
void bind_policies(nb::module_& m);

}  // namespace pagemill
