// Products of int8 weights with int8 activations, one scale for each row of either, after a rotation that spreads
// outliers: x W' = (x H)(W H)' for an orthonormal H. The weights were rotated when they were converted
// (execution/convert.py), activations are on their way in. Sums are exact integers over the whole of k, whatever unit
// makes them, so that every target gives the same bits.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

// Integer sums to y: compensation for the weights' + 128, then both scales.
PM_INLINE void store_rotated(const Activations& act, const Output& out, const Matrix& w, int row, int column, I sums, F w_scale) {
    const size_t at = size_t(row) * act.groups();
    store_columns(out, w, row, column, fmul(fmul(itof(sums), fset(act.scale[at])), w_scale));
}

template <int MR>
static __attribute__((noinline)) void rotated_tile(const Activations& act, int row, const Matrix& w, int panel, const Output& out) {
    const int8_t* a = act.i8 + size_t(row) * act.ld;
    const uint8_t* p = w.data + size_t(panel) * w.panel_bytes;
    const float* w_scale = reinterpret_cast<const float*>(p + size_t(w.k) * kPanel);
    I s[MR][2];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) s[m][0] = s[m][1] = iset(-128 * act.sum[size_t(row + m) * act.groups()]);
    for (int k = 0; k < w.k; k += 4, p += 128, a += 4) {
        if constexpr (MR <= 2) {
            __builtin_prefetch(p + 4096);
            __builtin_prefetch(p + 4096 + 64);
        }
        const U w0 = uload(p), w1 = uload(p + 64);
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) {
            const int x = quad_at(a + size_t(m) * act.ld);
            s[m][0] = idot(s[m][0], w0, x);
            s[m][1] = idot(s[m][1], w1, x);
        }
    }
    const F first = fload(w_scale), second = fload(w_scale + 16);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
        store_rotated(act, out, w, row + m, panel * kPanel, s[m][0], first);
        store_rotated(act, out, w, row + m, panel * kPanel + 16, s[m][1], second);
    }
}

template <int MR>
static void rotated_rows(int rows, const Activations& act, int row, const Matrix& w, int panel, const Output& out) {
    if constexpr (MR > 1) {
        if (rows < MR) return rotated_rows<MR - 1>(rows, act, row, w, panel, out);
    }
    rotated_tile<MR>(act, row, w, panel, out);
}

#ifdef PAGEMILL_AMX

constexpr int kRotatedTileRows = 3;  // from so many rows on, tiles are faster

// The panel that is read next, on its way into the cache: a few lines with each step along k, spread over all rows.
struct Fetch {
    const uint8_t *at, *end;
    int lines;
    // panel: -1 for none.
    Fetch(const Matrix& w, int panel, int steps) {
        at = end = w.data + size_t(panel < 0 ? 0 : panel) * w.panel_bytes;
        if (panel >= 0 && panel < w.panels()) end += w.panel_bytes;
        lines = int((w.panel_bytes / 64 + size_t(steps) - 1) / size_t(steps));
    }
    inline __attribute__((always_inline)) void some() {
        if (at >= end) return;
        for (int i = 0; i < lines; i++, at += 64) __builtin_prefetch(at);
    }
};

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
PM_INLINE void rotated_sums(const Activations& act, int row, const uint8_t* p, int k, Fetch& next, Waiting<Finish>& before, int32_t (*sums)[256]) {
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

// The values of one row of a panel.
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
    inline __attribute__((always_inline)) void operator()(const int32_t (*sums)[256], int row, int m) const {
        const int32_t* s = sums[m / 16 * 2] + m % 16 * 16;
        const size_t of_row = size_t(row) * size_t(act->groups());
        const __m512i offset = _mm512_set1_epi32(-128 * act->sum[of_row]);
        const I first = (I)_mm512_add_epi32(_mm512_load_si512(s), offset), second = (I)_mm512_add_epi32(_mm512_load_si512(s + 256), offset);
        if (!plain) {
            store_rotated(*act, *out, *w, row, column, first, fload(scale));
            store_rotated(*act, *out, *w, row, column + 16, second, fload(scale + 16));
            return;
        }
        const F a = fset(act->scale[of_row]);
        F v = fmul(fmul(itof(first), a), fload(scale)), u = fmul(fmul(itof(second), a), fload(scale + 16));
        float* y = out->y + size_t(row) * size_t(out->ld) + column;
        if (out->accumulate) {
            v = fadd(v, fload(y));
            u = fadd(u, fload(y + 16));
        }
        fstore(y, v);
        fstore(y + 16, u);
    }
};

template <class Panels>
static void product_rotated_tiles(const Activations& act, int r0, int r1, const Matrix& w, Panels& panels, const Output& out) {
    alignas(64) int32_t sums[2][4][256];
    const PanelRow finish(act, out, w);
    Waiting<PanelRow> before(finish, w.k / 64);
    int turn = 0;
    for (int panel = panels.next(), upcoming; panel >= 0; panel = upcoming) {
        upcoming = panels.next();
        const uint8_t* p = w.data + size_t(panel) * w.panel_bytes;
        Fetch next(w, upcoming, (r1 - r0 + 31) / 32 * (w.k / 64));
        for (int row = r0; row < r1; row += 32, turn ^= 1) {
            const int rows = r1 - row < 32 ? r1 - row : 32;
            if (rows > 16) rotated_sums<true>(act, row, p, w.k, next, before, sums[turn]);
            else rotated_sums<false>(act, row, p, w.k, next, before, sums[turn]);
            before.add(finish.at(panel), sums[turn], row, rows);
        }
    }
    before.all();
}

static bool can_gate(const Matrix& gate, const Matrix& up) {
    return gate.format == Format::i8_rotated && up.format == Format::i8_rotated && gate.n == up.n && gate.n % kPanel == 0 && !gate.bias && !up.bias;
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
        Fetch next_gate(gate, panel + 1, steps), next_up(up, panel + 1, steps);
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

static bool can_gate(const Matrix&, const Matrix&) { return false; }
static void product_gated(const Activations&, int, int, const Matrix&, const Matrix&, ActivationKind, float*, int) {}

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
    const int tiles = (rows + kRotatedRows - 1) / kRotatedRows;
    for (int panel = panels.next(); panel >= 0; panel = panels.next())
        for (int t = 0; t < tiles; t++) {
            const int begin = int(int64_t(rows) * t / tiles), end = int(int64_t(rows) * (t + 1) / tiles);
            rotated_rows<kRotatedRows>(end - begin, act, r0 + begin, w, panel, out);
        }
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
