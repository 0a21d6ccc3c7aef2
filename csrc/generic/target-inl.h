// Stamps every algorithm for one target. Included once by each file of targets/, after its vector type.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../dispatch.h"
#include "../pack.h"
#include "../threads.h"
#include "math-inl.h"
#include "rotation-inl.h"
#include "prepare-inl.h"
#include "product-inl.h"
#include "amx-inl.h"
#include "wide-inl.h"
#include "rotated-rows-inl.h"
#include "rotated-inl.h"
#include "dispatch-inl.h"
#include "attention-inl.h"
#include "attention-int8-inl.h"
#include "attention-amx-inl.h"
#include "attention-tasks-inl.h"
#include "heads-inl.h"
#include "ranking-inl.h"
#include "step-inl.h"
#include "sampling-inl.h"
#include "measure-inl.h"

namespace pagemill {
namespace PAGEMILL_TARGET {

static void quantize_rows(const float* x, int rows, int width, bool rotated, Activations& act) {
    for (int row = 0; row < rows; row++) {
        float* at = act.f32 + size_t(row) * act.ld;
        std::memcpy(at, x + size_t(row) * width, size_t(width) * sizeof(float));
        fill_forms(act, row, at, 0, width, width, rotated ? kFormRotated : kFormI8 | kFormBf16);
    }
    if (!rotated) fill_tiles(act, 0, rows, 0, width);
}

static void multiply(const Activations& act, int rows, const Matrix& w, float* y) {
    std::vector<uint16_t> wide(size_t(w.k) * kPanel + 4096);
    enter_tiles();
    run_product(act, 0, rows, w, PanelRange{0, w.panels()}, wide.data(), Output{y, w.n, false, 1.0f});
    leave_tiles();
}

template <Format FMT, int BYTES>
static void sums_of_group(const Activations& act, int row, const Matrix& w, int group, int32_t* out) {
    const size_t at = size_t(row) * act.ld + size_t(group * kGroup);
    const int8_t* a[BYTES];
    a[0] = act.i8 + at;
    if constexpr (BYTES == 2) a[1] = act.low + at;
    for (int panel = 0; panel < w.panels(); panel++) {
        I s[BYTES][1][2];
        s[0][0][0] = s[0][0][1] = iset(0);
        s[BYTES - 1][0][0] = s[BYTES - 1][0][1] = iset(group_start<FMT>(act.sum[size_t(row) * size_t(act.groups()) + size_t(group)]));
        group_sums<FMT, 1, BYTES>(a, act.ld, w.data + size_t(panel) * w.panel_bytes + size_t(group) * chunk_size<FMT>(), s);
        int32_t lanes[32];
        for (int h = 0; h < 2; h++) {
            I sum = s[0][0][h];
            if constexpr (BYTES == 2) sum = ijoin(sum, s[1][0][h]);
            std::memcpy(lanes + 16 * h, &sum, 64);
        }
        for (int c = 0; c < kPanel && panel * kPanel + c < w.n; c++) out[panel * kPanel + c] = lanes[c];
    }
}

template <Format FMT>
static void sums_of_group(const Activations& act, int row, const Matrix& w, int group, int32_t* out) {
    if (act.two_bytes) sums_of_group<FMT, 2>(act, row, w, group, out);
    else sums_of_group<FMT, 1>(act, row, w, group, out);
}

// Integer sums per group: out [rows][groups][n].
static void integer_sums(const Activations& act, int rows, const Matrix& w, int32_t* out) {
    for (int row = 0; row < rows; row++)
        for (int g = 0; g < w.k / kGroup; g++, out += w.n) {
            if (w.format == Format::q4_0) sums_of_group<Format::q4_0>(act, row, w, g, out);
            else if (w.format == Format::q4_1) sums_of_group<Format::q4_1>(act, row, w, g, out);
            else sums_of_group<Format::q8_0>(act, row, w, g, out);
        }
}

extern const Kernels kernels;
#ifdef PAGEMILL_AMX
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif
const Kernels kernels{PAGEMILL_TARGET_NAME, kTiles, sizeof(TileState), run_step, sample_row, quantize_rows, multiply, integer_sums, &peaks};

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
