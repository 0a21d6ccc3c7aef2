// Products of 4-bit and 8-bit weights on AMX tiles. Each weight is widened to bfloat16, round to nearest even of its exact
// value, and multiplied with bfloat16 activations: the same integers of the same checkpoint, in the arithmetic that this
// unit is fastest at. The weights stand in tiles of 16 columns x 32 k, the activations in tiles of 32 k x 16 rows, so that
// a group of weights is one vector and a 4-bit code an index into a table of 16 values (pack.h, the .._tiles layouts).
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

// Transposes 16 x 16 dwords: v[i] lane j <-> v[j] lane i.
#ifdef PAGEMILL_AMX

PM_INLINE void transpose(__m512i (&v)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// Columns [from, to) of rows [r0, r1) of act.bf16 into act.tiles. from: a multiple of 32; to is rounded up to one.
static void fill_tiles(const Activations& act, int r0, int r1, int from, int to) {
    for (int row = r0 / 16 * 16; row < r1; row += 16) {
        const int first = r0 > row ? r0 - row : 0, last = r1 - row < 16 ? r1 - row : 16;
        const __mmask16 rows = __mmask16(((1u << last) - 1) & ~((1u << first) - 1));
        for (int c = from; c < to; c += 32) {
            __m512i v[16];
            for (int m = 0; m < 16; m++)
                v[m] = rows >> m & 1 ? _mm512_loadu_si512(act.bf16 + size_t(row + m) * act.ld + c) : _mm512_setzero_si512();
            transpose(v);
            uint16_t* tile = act.tiles + size_t(row) * act.ld + size_t(c) * 16;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_mask_storeu_epi32(tile + 32 * i, rows, v[i]);
        }
    }
}

constexpr int wide_chunk_bytes(Format f) { return f == Format::q4_0_tiles ? 576 : f == Format::q4_1_tiles ? 640 : 1088; }

// One group of 32 columns to bfloat16 [32 columns][32 k].
template <Format FMT>
PM_INLINE void widen_group(const uint8_t* chunk, uint16_t* wide) {
    constexpr bool four_bits = FMT != Format::q8_0_tiles;
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(chunk + (four_bits ? 512 : 1024));
    alignas(64) float scale[32], low[32];
    for (int h = 0; h < 32; h += 16) {
        fstore(scale + h, fload_f16(halves + h));
        if constexpr (FMT == Format::q4_1_tiles) fstore(low + h, fload_f16(halves + 32 + h));
    }
    if constexpr (FMT == Format::q8_0_tiles)
        for (int h = 0; h < 32; h += 16) fstore(low + h, fmul(fload(scale + h), fset(-32896.0f)));
    // Broadcasts from memory are free; without this gcc makes them of the registers, by two shuffles for each column.
    stores_before_tiles();
    if constexpr (four_bits) {
        const F codes = FMT == Format::q4_0_tiles ? _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
                                                  : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i code = _mm512_set1_epi16(0x0f0f), second = _mm512_set1_epi16(0x1010);
        auto values = [&](int c) { return FMT == Format::q4_1_tiles ? fmla(codes, fset(scale[c]), fset(low[c])) : fmul(codes, fset(scale[c])); };
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {  // four columns; two share a table of 32 words, so that bit 4 of an index tells which
            const __m512i nibbles = _mm512_loadu_si512(chunk + 64 * i);
            const __m512i even = _mm512_and_si512(nibbles, code);
            const __m512i odd = _mm512_ternarylogic_epi32(_mm512_srli_epi16(nibbles, 4), code, second, 0xea);  // (x & code) | second
            const int c = 4 * i;
            const __m512i t = (__m512i)_mm512_cvtne2ps_pbh(values(c + 1), values(c));
            const __m512i u = (__m512i)_mm512_cvtne2ps_pbh(values(c + 3), values(c + 2));
            _mm512_storeu_si512(wide + 32 * c, _mm512_permutexvar_epi16(even, t));
            _mm512_storeu_si512(wide + 32 * c + 32, _mm512_permutexvar_epi16(odd, t));
            _mm512_storeu_si512(wide + 32 * c + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), u));
            _mm512_storeu_si512(wide + 32 * c + 96, _mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), u));
        }
    } else {
        // A byte u = code + 128 within the mantissa of 2^15 makes 2^15 + u, so that scale * (2^15 + u) - scale * (2^15 + 128)
        // is the weight, exact in f32.
        const __m512i base = _mm512_set1_epi32(0x47000000), flip = _mm512_set1_epi8(char(0x80));
        const __m512i lane = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 8);
        constexpr __mmask64 second_byte = 0x2222222222222222;
        auto values = [&](__m512i bytes, int from, int c) {
            const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(from << 8));
            return fmla(_mm512_castsi512_ps(_mm512_mask_permutexvar_epi8(base, second_byte, at, bytes)), fset(scale[c]), fset(low[c]));
        };
#pragma GCC unroll 4
        for (int c = 0; c < 32; c += 2) {
            const __m512i bytes = _mm512_xor_si512(_mm512_loadu_si512(chunk + 32 * c), flip);
            _mm512_storeu_si512(wide + 32 * c, (__m512i)_mm512_cvtne2ps_pbh(values(bytes, 16, c), values(bytes, 0, c)));
            _mm512_storeu_si512(wide + 32 * c + 32, (__m512i)_mm512_cvtne2ps_pbh(values(bytes, 48, c + 1), values(bytes, 32, c + 1)));
        }
    }
}

// Sums of one tile of 16 columns x 16 rows, as they come, to y.
static void store_sums(const Output& out, const Matrix& w, int row, int rows, int column, const float* sums) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(sums + 16 * i);
    transpose(v);
#pragma GCC unroll 16
    for (int m = 0; m < 16; m++)
        if (m < rows) store_columns(out, w, row + m, column, _mm512_castsi512_ps(v[m]));
}

static void store_panel_sums(const Output& out, const Matrix& w, int row, int rows, int panel, bool two) {
    alignas(64) float sums[4][256];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (two) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
    for (int t = 0; t < (two ? 2 : 1); t++)
        for (int h = 0; h < 2; h++)
            store_sums(out, w, row + 16 * t, rows - 16 * t < 16 ? rows - 16 * t : 16, panel * kPanel + 16 * h, sums[2 * t + h]);
}

// One row: its operand is the row itself.
template <Format FMT>
static void wide_row(const Activations& act, int row, const Matrix& w, int panel, uint16_t* wide, const Output& out) {
    const uint8_t* chunk = w.data + size_t(panel) * w.panel_bytes;
    const uint16_t* x = act.bf16 + size_t(row) * act.ld;
    _tile_zero(0);
    _tile_zero(1);
    for (int g = 0; g < w.k / kGroup; g++, chunk += wide_chunk_bytes(FMT), x += 32) {
        uint16_t* at = wide + g % 4 * 1024;
        for (int line = 0; line < wide_chunk_bytes(FMT); line += 64) __builtin_prefetch(chunk + 4096 + line);
        widen_group<FMT>(chunk, at);
        PM_TILE_LOAD(6, x, 4);
        PM_TILE_LOAD(4, at, 64);
        _tile_dpbf16ps(0, 4, 6);
        PM_TILE_LOAD(5, at + 512, 64);
        _tile_dpbf16ps(1, 5, 6);
    }
    alignas(64) float sums[32];
    _tile_stored(0, sums, 4);
    _tile_stored(1, sums + 16, 4);
    store_columns(out, w, row, panel * kPanel, fload(sums));
    store_columns(out, w, row, panel * kPanel + 16, fload(sums + 16));
}

// Up to 32 rows from `row`, a multiple of 16: weights are widened as they are used.
template <Format FMT, bool TWO>
static void wide_rows(const Activations& act, int row, int rows, const Matrix& w, int panel, uint16_t* wide, const Output& out) {
    const uint8_t* chunk = w.data + size_t(panel) * w.panel_bytes;
    const uint16_t *x0 = act.tiles + size_t(row) * act.ld, *x1 = x0 + size_t(16) * act.ld;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int g = 0; g < w.k / kGroup; g++, chunk += wide_chunk_bytes(FMT)) {
        uint16_t* at = wide + g % 4 * 1024;
        for (int line = 0; line < wide_chunk_bytes(FMT); line += 64) __builtin_prefetch(chunk + 4096 + line);
        widen_group<FMT>(chunk, at);
        PM_TILE_LOAD(6, x0 + 512 * g, 64);
        PM_TILE_LOAD(4, at, 64);
        _tile_dpbf16ps(0, 4, 6);
        PM_TILE_LOAD(5, at + 512, 64);
        _tile_dpbf16ps(1, 5, 6);
        if (TWO) {
            PM_TILE_LOAD(7, x1 + 512 * g, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_panel_sums(out, w, row, rows, panel, TWO);
}

// Up to 32 rows of a panel that is widened already: wide [groups][32][32].
static void widened_rows(const Activations& act, int row, int rows, const Matrix& w, int panel, const uint16_t* wide, const Output& out) {
    const uint16_t *x0 = act.tiles + size_t(row) * act.ld, *x1 = x0 + size_t(16) * act.ld;
    const bool two = rows > 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int g = 0; g < w.k / kGroup; g++, wide += 1024) {
        PM_TILE_LOAD(6, x0 + 512 * g, 64);
        PM_TILE_LOAD(4, wide, 64);
        PM_TILE_LOAD(5, wide + 512, 64);
        if (two) PM_TILE_LOAD(7, x1 + 512 * g, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (two) {
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_panel_sums(out, w, row, rows, panel, two);
}

template <Format FMT, class Panels>
static void product_wide(const Activations& act, int r0, int r1, const Matrix& w, Panels panels, uint16_t* wide, const Output& out) {
    const int rows = r1 - r0;
    if (rows <= 0) return;
    if (rows == 1) {
        shape_tiles(true);
        for (int panel = panels.next(); panel >= 0; panel = panels.next()) wide_row<FMT>(act, r0, w, panel, wide, out);
        shape_tiles(false);
        return;
    }
    for (int panel = panels.next(); panel >= 0; panel = panels.next()) {
        if (rows <= 16) wide_rows<FMT, false>(act, r0, rows, w, panel, wide, out);
        else if (rows <= 32) wide_rows<FMT, true>(act, r0, rows, w, panel, wide, out);
        else {
            const uint8_t* chunk = w.data + size_t(panel) * w.panel_bytes;
            for (int g = 0; g < w.k / kGroup; g++, chunk += wide_chunk_bytes(FMT)) widen_group<FMT>(chunk, wide + size_t(g) * 1024);
            for (int row = r0; row < r1; row += 32) widened_rows(act, row, r1 - row < 32 ? r1 - row : 32, w, panel, wide, out);
        }
    }
}

#else

static void fill_tiles(const Activations&, int, int, int, int) {}

#endif

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
