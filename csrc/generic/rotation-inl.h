// A rotation that spreads outliers before values are rounded to signed bytes: Hadamard matrices in blocks.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

template <int H> struct Signs {
    alignas(64) float lanes[16];
    constexpr Signs() : lanes() {
        for (int i = 0; i < 16; i++) lanes[i] = i & H ? -1.0f : 1.0f;
    }
};
// One butterfly between lanes: x[i] + x[i + H] and x[i] - x[i + H].
template <int H> PM_INLINE F butterfly(F x) {
    static constexpr Signs<H> signs;
    return fmla(x, fload(signs.lanes), fswap<H>(x));
}

// Sylvester's Hadamard matrix times 16 V values, scaled to be orthonormal, to x, which may be where they are. peak: grows
// to |x|; bad: becomes NaN where x is not finite, which a maximum would not tell.
template <int V> PM_INLINE void rotate_block(const float* from, float* x, F& peak, F& bad) {
    F v[V];
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(fload(from + 16 * i)))));
#pragma GCC unroll 4
    for (int half = 1; half < V; half *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < V; i++)
            if (!(i & half)) {
                const F a = v[i], b = v[i + half];
                v[i] = fadd(a, b);
                v[i + half] = fsub(a, b);
            }
    const F scale = fset(V == 4 ? 0.125f : V == 8 ? 0.088388347648318447f : 0.0625f);
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) {
        v[i] = fmul(v[i], scale);
        peak = fmax2(peak, fabs1(v[i]));
        bad = fmla(v[i], fzero(), bad);
        fstore(x + 16 * i, v[i]);
    }
}

// Rotates a row into x, in blocks of 256, the rest in one of 128 and one of 64. width: a multiple of 64. Returns the largest
// |x|, NaN where one is not finite.
static float rotate_row(const float* from, float* x, int width) {
    F peak = fzero(), bad = fzero();
    int c = 0;
    for (; c + 256 <= width; c += 256) rotate_block<16>(from + c, x + c, peak, bad);
    if (c + 128 <= width) {
        rotate_block<8>(from + c, x + c, peak, bad);
        c += 128;
    }
    if (c < width) rotate_block<4>(from + c, x + c, peak, bad);
    return fpeak(peak) + fsum(bad);
}

// A row to signed bytes, after it was rotated into x, which may be where it is: scale = max|x| / 127,
// q = round(x * (127 / max|x|)), to nearest even.
static void quantize_rotated_row(const Activations& act, int row, const float* from, float* x, int width) {
    int8_t* q = act.i8 + size_t(row) * act.ld;
    const float peak = rotate_row(from, x, width);
    const F inverse = fset(peak > 0.0f ? 127.0f / peak : 0.0f);
    I total = iset(0);
    for (int c = 0; c < width; c += 64)
#pragma GCC unroll 4
        for (int i = 0; i < 64; i += kLanes) istore_i8(q + c + i, fmul(fload(x + c + i), inverse));
    // Not beside the stores: 64 bytes that four stores have just written cannot be read before they are all done.
    for (int c = 0; c < width; c += 64) total = idot_signed(total, 0x01010101, uload(q + c));
    int32_t lanes[16], sum = 0;
    std::memcpy(lanes, &total, 64);
    for (int lane : lanes) sum += lane;
    const size_t at = size_t(row) * act.groups();
    act.scale[at] = peak / 127.0f;
    act.sum[at] = sum;
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
