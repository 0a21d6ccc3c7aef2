// Products on AMX tiles (Intel SDM, TMUL): 16 x 16 results over 32 k of bfloat16 in one instruction, f32 sums. An element's
// chain of additions is the instruction's own, whatever the rows beside it. Rows beyond the last are read (there is memory)
// and their results dropped. Targets without AMX compile two empty functions.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

#ifdef PAGEMILL_AMX

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

// What stands before it in the program is in memory when tiles or their shapes are loaded: gcc 12's intrinsics do not say
// that they read it.
PM_INLINE void stores_before_tiles() { asm volatile("" ::: "memory"); }
#define PM_TILE_LOAD(tile, from, stride) \
    do {                                 \
        stores_before_tiles();           \
        _tile_loadd(tile, from, stride); \
    } while (0)

// Tiles 0..3 hold sums, 4..5 and 6..7 operands. one_row: a single row of activations, so that sums and its operand are
// one column wide and can be loaded and stored without gaps.
static void shape_tiles(bool one_row) {
    TileConfig config;
    for (int i = 0; i < 8; i++) {
        config.column_bytes[i] = uint16_t(one_row && (i < 4 || i >= 6) ? 4 : 64);
        config.rows[i] = 16;
    }
    stores_before_tiles();
    _tile_loadconfig(&config);
}
static void enter_tiles() { shape_tiles(false); }
static void leave_tiles() { _tile_release(); }

static bool tiles_fit(const Matrix& w) { return w.format == Format::bf16 && w.k % 32 == 0; }

// Rows row..row+15 (and +16..+31 where `two`) x one panel of 32 columns into sums [32][32].
static void tile_sums(const Activations& act, int row, bool two, const uint8_t* panel, int k, float* sums) {
    const uint16_t* a = act.bf16 + size_t(row) * act.ld;
    const size_t stride = size_t(act.ld) * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < k; i += 32, a += 32, panel += 2048) {
        if (!two)
            for (int line = 0; line < 2048; line += 64) __builtin_prefetch(panel + 8192 + line);
        PM_TILE_LOAD(4, a, stride);
        PM_TILE_LOAD(6, panel, 128);
        PM_TILE_LOAD(7, panel + 64, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            PM_TILE_LOAD(5, a + 16 * size_t(act.ld), stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    if (two) {
        _tile_stored(2, sums + 512, 128);
        _tile_stored(3, sums + 528, 128);
    }
}

template <class Panels>
static void product_tiles(const Activations& act, int r0, int r1, const Matrix& w, Panels panels, const Output& out) {
    alignas(64) float sums[32 * 32];
    for (int panel = panels.next(); panel >= 0; panel = panels.next())
        for (int row = r0; row < r1; row += 32) {
            const int rows = r1 - row < 32 ? r1 - row : 32;
            tile_sums(act, row, rows > 16, w.data + size_t(panel) * w.panel_bytes, w.k, sums);
            for (int m = 0; m < rows; m++) {
                store_columns(out, w, row + m, panel * kPanel, fload(sums + 32 * m));
                store_columns(out, w, row + m, panel * kPanel + 16, fload(sums + 32 * m + 16));
            }
        }
}

#else

static void enter_tiles() {}
static void leave_tiles() {}

#endif

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
