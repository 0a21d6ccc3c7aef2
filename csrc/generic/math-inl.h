// Elementary functions on 16 lanes, the same operations in the same order on every target.
#pragma once
#include <cmath>

namespace pagemill {
namespace PAGEMILL_TARGET {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kMasked = -1e30f;  // score of a position that a row must not see

// Sum and maximum of the lanes in a fixed tree.
PM_INLINE float fsum(F x) {
    x = fadd(x, fswap<8>(x));
    x = fadd(x, fswap<4>(x));
    x = fadd(x, fswap<2>(x));
    return ffirst(fadd(x, fswap<1>(x)));
}
PM_INLINE float fpeak(F x) {
    x = fmax2(x, fswap<8>(x));
    x = fmax2(x, fswap<4>(x));
    x = fmax2(x, fswap<2>(x));
    return ffirst(fmax2(x, fswap<1>(x)));
}

// The nearest whole number, to even in the middle, for |x| < 2^22: in a sum with 1.5 * 2^23 no bit is left for a fraction.
PM_INLINE F fround(F x) {
    const F shift = fset(12582912.0f);
    return fsub(fadd(x, shift), shift);
}

// 2^x, relative error below 3e-7. Clamped at 2^-100, so that products with it stay clear of denormals, and at 2^126.
PM_INLINE F fexp2_below(F x) {  // for x <= 0
    x = fmax2(x, fset(-100.0f));
    const F n = fround(x), r = fsub(x, n);
    F p = fmla(r, fset(1.54035304e-4f), fset(1.33335581e-3f));
    p = fmla(r, p, fset(9.61812911e-3f));
    p = fmla(r, p, fset(5.55041087e-2f));
    p = fmla(r, p, fset(2.40226507e-1f));
    p = fmla(r, p, fset(6.93147181e-1f));
    p = fmla(r, p, fset(1.0f));
    return fscale2(p, n);
}
// 2^x for x <= 0, relative error below 4e-6 and exact for 0; clamped at 2^-100. For what becomes whole numbers of 16 bits.
PM_INLINE F fexp2_near(F x) {
    x = fmax2(x, fset(-100.0f));
    const F shift = fset(12582912.0f), shifted = fadd(x, shift), r = fsub(x, fsub(shifted, shift));
    F p = fmla(r, fset(0.0095828531f), fset(0.0559064269f));
    p = fmla(r, p, fset(0.240240986f));
    p = fmla(r, p, fset(0.693124193f));
    p = fmla(r, p, fset(1.0f));
    return fscale2_shifted(p, shifted);
}
PM_INLINE F fexp2(F x) {
    x = fmax2(x, fset(-100.0f));
    return fexp2_below(fsub(fzero(), fmax2(fsub(fzero(), x), fset(-126.0f))));
}
PM_INLINE float exp2_scalar(float x) {
    float v[16];
    fstore(v, fexp2(fset(x)));
    return v[0];
}
PM_INLINE F fsigmoid(F x) { return fdiv(fset(1.0f), fadd(fset(1.0f), fexp2(fmul(x, fset(-kLog2e))))); }
PM_INLINE F ftanh(F x) {  // 1 - 2 / (1 + e^2x)
    return fsub(fset(1.0f), fdiv(fset(2.0f), fadd(fset(1.0f), fexp2(fmul(x, fset(2.0f * kLog2e))))));
}

PM_INLINE F factivate(ActivationKind kind, F x) {
    switch (kind) {
        case ActivationKind::silu: return fmul(x, fsigmoid(x));
        case ActivationKind::relu: return fmax2(x, fzero());
        case ActivationKind::gelu_tanh: {
            const F cubic = fmul(fmul(x, x), x);
            const F inner = fmul(fset(0.7978845608028654f), fmla(fset(0.044715f), cubic, x));
            return fmul(fmul(fset(0.5f), x), fadd(fset(1.0f), ftanh(inner)));
        }
        case ActivationKind::gelu: {
            float v[16];
            fstore(v, x);
            for (float& e : v) e = 0.5f * e * (1.0f + std::erf(e * 0.70710678118654752f));
            return fload(v);
        }
        case ActivationKind::none: break;
    }
    return x;
}

// Index of the first largest of x[from..to), or of the first NaN.
static int first_peak(const float* x, int from, int to) {
    constexpr int chunk = 256;
    int best = from;
    float most = x[from];
    for (int c = from; c < to; c += chunk) {
        const int end = c + chunk < to ? c + chunk : to;
        F peak = fset(x[c]), sum = fzero();
        for (int i = c; i < end; i += kLanes) {
            const F v = fselect(0, end - i, fload_first(x + i, end - i), fset(x[c]));
            peak = fmax2(v, peak);
            sum = fmla(v, fzero(), sum);  // NaN where a value is NaN or infinite
        }
        const float zero = fsum(sum);
        if (zero == 0.0f && !(fpeak(peak) > most)) continue;
        for (int i = c; i < end; i++) {
            if (x[i] != x[i]) return i;
            if (x[i] > most) {
                most = x[i];
                best = i;
            }
        }
    }
    return most == most ? best : from;
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
