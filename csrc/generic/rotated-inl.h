// Products of int8 weights with int8 activations, one scale for each row of either, after a rotation that spreads
// outliers: x W' = (x H)(W H)' for an orthonormal H. The weights were rotated when they were converted
// (execution/convert.py), activations are on their way in. Sums are exact integers over the whole of k, whatever unit
// makes them, so that every target gives the same bits.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

#ifdef PAGEMILL_AMX

constexpr int kRotatedTileRows = 3;  // from so many rows on, tiles are faster

// Sums of a block of rows that wait to become values: a few rows with each step along k of the next block, beside its tiles.
// finish(sums, row, m) does it for row `row` of the step, which is the block's m-th.
template <class Finish> struct Waiting {
    Finish finish;
    const int share;
    const int32_t (*sums)[256] = nullptr;
    int row = 0, next = 0, rows = 0;

    Waiting(const Finish& f, int steps) : finish(f), share((32 + steps - 1) / steps) {}
    inline __attribute__((always_inline)) void some() {
        for (const int end = rows - next < share ? rows : next + share; next < end; next++) finish(sums, row + next, next);
    }
    void all() {
        for (; next < rows; next++) finish(sums, row + next, next);
    }
    void add(const Finish& f, const int32_t (*block)[256], int first_row, int num_rows) {
        all();
        finish = f;
        sums = block;
        row = first_row;
        next = 0;
        rows = num_rows;
    }
};

// Integer sums of up to 32 rows x one panel: two tiles of 16 columns for rows 0 to 15, then, where `TWO`, for 16 to 31. Sums of
// the block before become values meanwhile.
template <bool TWO, class Finish>
PM_INLINE void rotated_sums(const Activations& act, int row, const uint8_t* p, int k, Fetch<kIntoFirst>& next, Waiting<Finish>& before, int32_t (*sums)[256]) {
    const int8_t* a = act.i8 + size_t(row) * act.ld;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (const uint8_t* end = p + size_t(k) * kPanel; p < end; a += 64, p += 2048) {
        PM_TILE_LOAD(4, a, act.ld);
        PM_TILE_LOAD(6, p, 128);
        PM_TILE_LOAD(7, p + 64, 128);
        next.some();
        if (TWO) PM_TILE_LOAD(5, a + size_t(16) * act.ld, act.ld);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (TWO) {
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        before.some();
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (TWO) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
}

// The values of one row of a panel, from its sums of a block.
struct PanelSums {
    PanelRow values;

    inline __attribute__((always_inline)) void operator()(const int32_t (*sums)[256], int row, int m) const {
        const int32_t* s = sums[m / 16 * 2] + m % 16 * 16;
        const __m512i offset = _mm512_set1_epi32(-128 * values.act->sum[size_t(row) * size_t(values.act->groups())]);
        values(row, m, (I)_mm512_add_epi32(_mm512_load_si512(s), offset), (I)_mm512_add_epi32(_mm512_load_si512(s + 256), offset));
    }
};

template <class Panels>
static void product_rotated_tiles(const Activations& act, int r0, int r1, const Matrix& w, Panels& panels, const Output& out) {
    alignas(64) int32_t sums[2][4][256];
    const PanelRow finish(act, out, w);
    Waiting<PanelSums> before(PanelSums{finish}, w.k / 64);
    int turn = 0;
    for (int panel = panels.next(), upcoming; panel >= 0; panel = upcoming) {
        upcoming = panels.next();
        const uint8_t* p = w.data + size_t(panel) * w.panel_bytes;
        Fetch<kIntoFirst> next(w, upcoming, (r1 - r0 + 31) / 32 * (w.k / 64));
        for (int row = r0; row < r1; row += 32, turn ^= 1) {
            const int rows = r1 - row < 32 ? r1 - row : 32;
            if (rows > 16) rotated_sums<true>(act, row, p, w.k, next, before, sums[turn]);
            else rotated_sums<false>(act, row, p, w.k, next, before, sums[turn]);
            before.add(PanelSums{finish.at(panel)}, sums[turn], row, rows);
        }
    }
    before.all();
}

// f(gate) * up of one row of a panel of each: sums of the gate's, then of the other's.
struct GatedRow {
    const Activations* act;
    ActivationKind kind;
    float* y;
    int ld, column = 0;
    const float *gate_scale = nullptr, *up_scale = nullptr;

    inline __attribute__((always_inline)) void operator()(const int32_t (*sums)[256], int row, int m) const {
        const size_t of_row = size_t(row) * size_t(act->groups());
        const __m512i offset = _mm512_set1_epi32(-128 * act->sum[of_row]);
        const F a = fset(act->scale[of_row]);
        const int32_t* s = sums[m / 16 * 2] + m % 16 * 16;
        float* to = y + size_t(row) * size_t(ld) + column;
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const F v = fmul(fmul(itof((I)_mm512_add_epi32(_mm512_load_si512(s + 256 * h), offset)), a), fload(gate_scale + 16 * h));
            const F x = fmul(fmul(itof((I)_mm512_add_epi32(_mm512_load_si512(s + 1024 + 256 * h), offset)), a), fload(up_scale + 16 * h));
            fstore(to + 16 * h, fmul(factivate(kind, v), x));
        }
    }
};

// f(gate) * up of rows [r0, r1) to y, where `can_gate`: what two products and prepare_columns would give, bit for bit.
static void product_gated(const Activations& act, int r0, int r1, const Matrix& gate, const Matrix& up, ActivationKind kind, float* y, int ld) {
    if (r1 <= r0) return;
    alignas(64) int32_t sums[2][8][256];
    const int k = gate.k, steps = (r1 - r0 + 31) / 32 * (k / 64);
    GatedRow finish{&act, kind, y, ld};
    Waiting<GatedRow> before(finish, k / 64 * 2);
    int turn = 0;
    for (int panel = 0; panel < gate.panels(); panel++) {
        const uint8_t *g = gate.data + size_t(panel) * gate.panel_bytes, *u = up.data + size_t(panel) * up.panel_bytes;
        Fetch<kIntoFirst> next_gate(gate, panel + 1, steps), next_up(up, panel + 1, steps);
        finish.column = panel * kPanel;
        finish.gate_scale = reinterpret_cast<const float*>(g + size_t(k) * kPanel);
        finish.up_scale = reinterpret_cast<const float*>(u + size_t(k) * kPanel);
        for (int row = r0; row < r1; row += 32, turn ^= 1) {
            const int rows = r1 - row < 32 ? r1 - row : 32;
            int32_t (*to)[256] = sums[turn];
            if (rows > 16) {
                rotated_sums<true>(act, row, g, k, next_gate, before, to);
                rotated_sums<true>(act, row, u, k, next_up, before, to + 4);
            } else {
                rotated_sums<false>(act, row, g, k, next_gate, before, to);
                rotated_sums<false>(act, row, u, k, next_up, before, to + 4);
            }
            before.add(finish, to, row, rows);
        }
    }
    before.all();
}

#else

// The gate's values of some rows of a panel, kept for the other half. The activation comes apart from the tile: with it inside, gcc
// keeps the tile's sums in memory.
struct GateRow {
    const Activations* act;
    const float* scale;
    float (*kept)[kPanel];
    inline __attribute__((always_inline)) void operator()(int row, int m, I first, I second) const {
        const F a = fset(act->scale[size_t(row) * size_t(act->groups())]);
        fstore(kept[m], fmul(fmul(itof(first), a), fload(scale)));
        fstore(kept[m] + 16, fmul(fmul(itof(second), a), fload(scale + 16)));
    }
};

static __attribute__((noinline)) void activate_rows(ActivationKind kind, float (*kept)[kPanel], int rows) {
    for (int m = 0; m < rows; m++)
        for (int c = 0; c < kPanel; c += kLanes) fstore(kept[m] + c, factivate(kind, fload(kept[m] + c)));
}

// What was kept times up.
struct UpRow {
    const Activations* act;
    const float* scale;
    const float (*kept)[kPanel];
    float* y;
    int ld, column;
    inline __attribute__((always_inline)) void operator()(int row, int m, I first, I second) const {
        const F a = fset(act->scale[size_t(row) * size_t(act->groups())]);
        float* to = y + size_t(row) * size_t(ld) + column;
        fstore(to, fmul(fload(kept[m]), fmul(fmul(itof(first), a), fload(scale))));
        fstore(to + 16, fmul(fload(kept[m] + 16), fmul(fmul(itof(second), a), fload(scale + 16))));
    }
};

// f(gate) * up of rows [r0, r1) to y, where `can_gate`: what two products and prepare_columns would give, bit for bit.
static void product_gated(const Activations& act, int r0, int r1, const Matrix& gate, const Matrix& up, ActivationKind kind, float* y, int ld) {
    if (r1 <= r0) return;
    alignas(64) float kept[kRotatedRows][kPanel];
    const RowTiles tiles(r0, r1);
    const int k = gate.k, steps = tiles.count * (k / 4);
    for (int panel = 0; panel < gate.panels(); panel++) {
        const uint8_t *g = gate.data + size_t(panel) * gate.panel_bytes, *u = up.data + size_t(panel) * up.panel_bytes;
        const GateRow first{&act, reinterpret_cast<const float*>(g + size_t(k) * kPanel), kept};
        const UpRow second{&act, reinterpret_cast<const float*>(u + size_t(k) * kPanel), kept, y, ld, panel * kPanel};
        Fetch<kIntoSecond> next_gate(gate, panel + 1, steps), next_up(up, panel + 1, steps);
        for (int t = 0; t < tiles.count; t++) {
            rotated_rows<kRotatedRows>(tiles.size(t), act, tiles.begin(t), g, k, next_gate, first);
            activate_rows(kind, kept, tiles.size(t));
            rotated_rows<kRotatedRows>(tiles.size(t), act, tiles.begin(t), u, k, next_up, second);
        }
    }
}

#endif

template <class Panels>
static void product_rotated(const Activations& act, int r0, int r1, const Matrix& w, Panels panels, const Output& out) {
    const int rows = r1 - r0;
    if (rows <= 0) return;
#ifdef PAGEMILL_AMX
    if (rows >= kRotatedTileRows) {
        product_rotated_tiles(act, r0, r1, w, panels, out);
        return;
    }
#endif
    product_rotated_rows(act, r0, r1, w, panels, out);
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
