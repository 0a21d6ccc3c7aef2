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

// The sums of a whole panel, where nothing but scales and perhaps an addition is left to do.
template <bool ADD>
PM_INLINE void store_whole_panel(const Activations& act, const Output& out, int row, int rows, int column, const int32_t (*sums)[256], const float* w_scale) {
    const F first = fload(w_scale), second = fload(w_scale + 16);
    const size_t stride = size_t(act.groups());
    const int32_t* sum = act.sum + size_t(row) * stride;
    const float* scale = act.scale + size_t(row) * stride;
    float* y = out.y + size_t(row) * size_t(out.ld) + column;
    for (int m = 0; m < rows; m++, sum += stride, scale += stride, y += out.ld) {
        const int32_t* s = sums[m / 16 * 2] + m % 16 * 16;
        const __m512i offset = _mm512_set1_epi32(-128 * *sum);
        const F a = fset(*scale);
        F v = fmul(fmul(itof((I)_mm512_add_epi32(_mm512_load_si512(s), offset)), a), first);
        F u = fmul(fmul(itof((I)_mm512_add_epi32(_mm512_load_si512(s + 256), offset)), a), second);
        if (ADD) {
            v = fadd(v, fload(y));
            u = fadd(u, fload(y + 16));
        }
        fstore(y, v);
        fstore(y + 16, u);
    }
}

static void store_tiles(const Activations& act, const Output& out, const Matrix& w, int row, int rows, int panel, const int32_t (*sums)[256], const float* w_scale) {
    if (panel * kPanel + kPanel <= w.n && !w.bias && out.scale == 1.0f) {
        if (out.accumulate) store_whole_panel<true>(act, out, row, rows, panel * kPanel, sums, w_scale);
        else store_whole_panel<false>(act, out, row, rows, panel * kPanel, sums, w_scale);
        return;
    }
    const F first = fload(w_scale), second = fload(w_scale + 16);
    for (int m = 0; m < rows; m++) {
        const __m512i offset = _mm512_set1_epi32(-128 * act.sum[size_t(row + m) * act.groups()]);
        const int32_t* s = sums[m / 16 * 2] + m % 16 * 16;
        store_rotated(act, out, w, row + m, panel * kPanel, (I)_mm512_add_epi32(_mm512_load_si512(s), offset), first);
        store_rotated(act, out, w, row + m, panel * kPanel + 16, (I)_mm512_add_epi32(_mm512_load_si512(s + 256), offset), second);
    }
}

// The panel that is read next, on its way into the cache: a few lines with each step along k, spread over all rows.
struct Fetch {
    const uint8_t *at, *end;
    int lines;
    Fetch(const Matrix& w, int panel, int steps) {
        at = end = w.data + size_t(panel + 1) * w.panel_bytes;
        if (panel + 1 < w.panels()) end += w.panel_bytes;
        lines = int((w.panel_bytes / 64 + size_t(steps) - 1) / size_t(steps));
    }
    inline __attribute__((always_inline)) void some() {
        if (at >= end) return;
        for (int i = 0; i < lines; i++, at += 64) __builtin_prefetch(at);
    }
};

// Integer sums of up to 32 rows x one panel: two tiles of 16 columns for rows 0 to 15, then, where `TWO`, for 16 to 31.
template <bool TWO>
PM_INLINE void rotated_sums(const Activations& act, int row, const uint8_t* p, int k, Fetch& next, int32_t (*sums)[256]) {
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
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (TWO) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
}

template <bool TWO>
static void rotated_tiles(const Activations& act, int row, int rows, const Matrix& w, int panel, Fetch& next, const Output& out) {
    const uint8_t* p = w.data + size_t(panel) * w.panel_bytes;
    alignas(64) int32_t sums[4][256];
    rotated_sums<TWO>(act, row, p, w.k, next, sums);
    store_tiles(act, out, w, row, rows, panel, sums, reinterpret_cast<const float*>(p + size_t(w.k) * kPanel));
}

static bool can_gate(const Matrix& gate, const Matrix& up) {
    return gate.format == Format::i8_rotated && up.format == Format::i8_rotated && gate.n == up.n && gate.n % kPanel == 0 && !gate.bias && !up.bias;
}

// f(gate) * up of rows [r0, r1) to y, where `can_gate`: what two products and prepare_columns would give, bit for bit.
static void product_gated(const Activations& act, int r0, int r1, const Matrix& gate, const Matrix& up, ActivationKind kind, float* y, int ld) {
    if (r1 <= r0) return;
    const int k = gate.k, steps = (r1 - r0 + 31) / 32 * (k / 64);
    const size_t stride = size_t(act.groups());
    for (int panel = 0; panel < gate.panels(); panel++) {
        const uint8_t *g = gate.data + size_t(panel) * gate.panel_bytes, *u = up.data + size_t(panel) * up.panel_bytes;
        const float *g_scale = reinterpret_cast<const float*>(g + size_t(k) * kPanel), *u_scale = reinterpret_cast<const float*>(u + size_t(k) * kPanel);
        Fetch next_gate(gate, panel, steps), next_up(up, panel, steps);
        for (int row = r0; row < r1; row += 32) {
            alignas(64) int32_t sums[8][256];
            if (r1 - row > 16) {
                rotated_sums<true>(act, row, g, k, next_gate, sums);
                rotated_sums<true>(act, row, u, k, next_up, sums + 4);
            } else {
                rotated_sums<false>(act, row, g, k, next_gate, sums);
                rotated_sums<false>(act, row, u, k, next_up, sums + 4);
            }
            for (int m = 0; m < 32 && row + m < r1; m++) {
                const __m512i offset = _mm512_set1_epi32(-128 * act.sum[size_t(row + m) * stride]);
                const F a = fset(act.scale[size_t(row + m) * stride]);
                const int32_t* s = sums[m / 16 * 2] + m % 16 * 16;
                float* out = y + size_t(row + m) * size_t(ld) + panel * kPanel;
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const F v = fmul(fmul(itof((I)_mm512_add_epi32(_mm512_load_si512(s + 256 * h), offset)), a), fload(g_scale + 16 * h));
                    const F x = fmul(fmul(itof((I)_mm512_add_epi32(_mm512_load_si512(s + 1024 + 256 * h), offset)), a), fload(u_scale + 16 * h));
                    fstore(out + 16 * h, fmul(factivate(kind, v), x));
                }
            }
        }
    }
}

#else

static bool can_gate(const Matrix&, const Matrix&) { return false; }
static void product_gated(const Activations&, int, int, const Matrix&, const Matrix&, ActivationKind, float*, int) {}

#endif

static void product_rotated(const Activations& act, int r0, int r1, const Matrix& w, int p0, int p1, const Output& out) {
    const int rows = r1 - r0;
    if (rows <= 0) return;
#ifdef PAGEMILL_AMX
    if (rows >= kRotatedTileRows) {
        const int steps = (rows + 31) / 32 * (w.k / 64);
        for (int panel = p0; panel < p1; panel++) {
            Fetch next(w, panel, steps);
            for (int row = r0; row < r1; row += 32) {
                const int here = r1 - row < 32 ? r1 - row : 32;
                if (here > 16) rotated_tiles<true>(act, row, here, w, panel, next, out);
                else rotated_tiles<false>(act, row, here, w, panel, next, out);
            }
        }
        return;
    }
#endif
    const int tiles = (rows + kRotatedRows - 1) / kRotatedRows;
    for (int panel = p0; panel < p1; panel++)
        for (int t = 0; t < tiles; t++) {
            const int begin = int(int64_t(rows) * t / tiles), end = int(int64_t(rows) * (t + 1) / tiles);
            rotated_rows<kRotatedRows>(end - begin, act, r0 + begin, w, panel, out);
        }
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
