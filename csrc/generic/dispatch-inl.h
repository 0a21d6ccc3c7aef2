// Which kernel a product takes: a property of the matrix, never of the number of rows.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

template <class Panels>
static void run_product(const Activations& act, int r0, int r1, const Matrix& w, Panels panels, uint16_t* wide, const Output& out) {
    (void)wide;
#ifdef PAGEMILL_AMX
    if (tiles_fit(w)) return product_tiles(act, r0, r1, w, panels, out);
#endif
    switch (w.format) {
        case Format::f32: return product<Format::f32>(act, r0, r1, w, panels, out);
        case Format::f16: return product<Format::f16>(act, r0, r1, w, panels, out);
        case Format::bf16: return product<Format::bf16>(act, r0, r1, w, panels, out);
        case Format::q4_0: return product_groups<Format::q4_0>(act, r0, r1, w, panels, out);
        case Format::q4_1: return product_groups<Format::q4_1>(act, r0, r1, w, panels, out);
        case Format::q8_0: return product_groups<Format::q8_0>(act, r0, r1, w, panels, out);
        case Format::i8_rotated: return product_rotated(act, r0, r1, w, panels, out);
#ifdef PAGEMILL_AMX
        case Format::q4_0_tiles: return product_wide<Format::q4_0_tiles>(act, r0, r1, w, panels, wide, out);
        case Format::q4_1_tiles: return product_wide<Format::q4_1_tiles>(act, r0, r1, w, panels, wide, out);
        case Format::q8_0_tiles: return product_wide<Format::q8_0_tiles>(act, r0, r1, w, panels, wide, out);
#endif
        default: return;  // refused when the matrix is added: this target does not read the layout
    }
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
