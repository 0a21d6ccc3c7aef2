// Products of i8_rotated weights (rotated-inl.h) on the vector unit: a few rows x one panel at a time, and what becomes of
// their sums.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

// The values of one row of a panel, from its sums: both scales, then the bias and what `Output` says.
struct PanelRow {
    const Activations* act;
    const Output* out;
    const Matrix* w;
    bool plain;  // nothing but scales and perhaps an addition is left to do
    int column = 0;
    const float* scale = nullptr;

    PanelRow(const Activations& a, const Output& o, const Matrix& m) : act(&a), out(&o), w(&m), plain(!m.bias && o.scale == 1.0f) {}
    PanelRow at(int panel) const {
        PanelRow copy = *this;
        copy.plain = plain && panel * kPanel + kPanel <= w->n;
        copy.column = panel * kPanel;
        copy.scale = reinterpret_cast<const float*>(w->data + size_t(panel) * w->panel_bytes + size_t(w->k) * kPanel);
        return copy;
    }
    inline __attribute__((always_inline)) void operator()(int row, int, I first, I second) const {
        const F a = fset(act->scale[size_t(row) * size_t(act->groups())]);
        F v = fmul(fmul(itof(first), a), fload(scale)), u = fmul(fmul(itof(second), a), fload(scale + 16));
        if (!plain) {
            store_columns(*out, *w, row, column, v);
            store_columns(*out, *w, row, column + 16, u);
            return;
        }
        float* y = out->y + size_t(row) * size_t(out->ld) + column;
        if (out->accumulate) {
            v = fadd(v, fload(y));
            u = fadd(u, fload(y + 16));
        }
        fstore(y, v);
        fstore(y + 16, u);
    }
};

// Integer sums of MR rows x one panel p; finish(row, m, sums of 16 columns, of the next 16) for row `row`, the m-th of them.
template <int MR, class Finish>
static __attribute__((noinline)) void rotated_tile(const Activations& act, int row, const uint8_t* p, int k, Fetch<kIntoSecond>& next, const Finish& finish) {
    const int8_t* a = act.i8 + size_t(row) * act.ld;
    I s[MR][2];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) s[m][0] = s[m][1] = iset(-128 * act.sum[size_t(row + m) * act.groups()]);  // weights are + 128
    for (const uint8_t* end = p + size_t(k) * kPanel; p < end; p += 128, a += 4) {
        fetch_on<MR>(p, 128, next);
        const U w0 = uload(p), w1 = uload(p + 64);
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) {
            const int x = quad_at(a + size_t(m) * act.ld);
            s[m][0] = idot(s[m][0], w0, x);
            s[m][1] = idot(s[m][1], w1, x);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) finish(row + m, m, s[m][0], s[m][1]);
}

template <int MR, class Finish>
static void rotated_rows(int rows, const Activations& act, int row, const uint8_t* p, int k, Fetch<kIntoSecond>& next, const Finish& finish) {
    if constexpr (MR > 1) {
        if (rows < MR) return rotated_rows<MR - 1>(rows, act, row, p, k, next, finish);
    }
    rotated_tile<MR>(act, row, p, k, next, finish);
}

// Rows [r0, r1) dealt evenly to tiles: tile t begins at `begin(t)`.
struct RowTiles {
    int r0, rows, count;
    RowTiles(int from, int to) : r0(from), rows(to - from), count((rows + kRotatedRows - 1) / kRotatedRows) {}
    int begin(int t) const { return r0 + int(int64_t(rows) * t / count); }
    int size(int t) const { return begin(t + 1) - begin(t); }
};

// A panel stays in cache while the tiles pass over it, and the next one is on its way.
template <class Panels>
static void product_rotated_rows(const Activations& act, int r0, int r1, const Matrix& w, Panels& panels, const Output& out) {
    const PanelRow finish(act, out, w);
    const RowTiles tiles(r0, r1);
    Following<Panels> following(panels, r1 - r0);
    for (int panel = following.first(); panel >= 0; panel = following.next()) {
        const uint8_t* p = w.data + size_t(panel) * w.panel_bytes;
        const PanelRow here = finish.at(panel);
        Fetch<kIntoSecond> next(w, following.known, tiles.count * (w.k / 4), out.then);
        for (int t = 0; t < tiles.count; t++) rotated_rows<kRotatedRows>(tiles.size(t), act, tiles.begin(t), p, w.k, next, here);
    }
}

static bool can_gate(const Matrix& gate, const Matrix& up) {
    return gate.format == Format::i8_rotated && up.format == Format::i8_rotated && gate.n == up.n && gate.n % kPanel == 0 && !gate.bias && !up.bias;
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
