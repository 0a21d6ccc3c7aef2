// Rows on their way into a product: normalise or activate, then put them into the forms that the weights read.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

enum Form : int { kFormF32 = 1, kFormBf16 = 2, kFormI8 = 4, kFormTiles = 8, kFormRotated = 16 };

constexpr float kMostI16 = 32512.0f;  // 127 * 256: its high byte, beside a signed low one, is a signed byte

// 0, or NaN where a value is not finite, which a maximum does not always tell.
PM_INLINE float not_finite(F a, F b) { return fsum(fmla(a, fzero(), fmul(b, fzero()))); }

static int form_of(Format format) {
    switch (format) {
        case Format::f32:
        case Format::f16: return kFormF32;
        case Format::bf16: return kFormBf16;
        case Format::q4_0_tiles:
        case Format::q4_1_tiles:
        case Format::q8_0_tiles: return kFormBf16 | kFormTiles;
        case Format::i8_rotated: return kFormRotated;
        default: return kFormI8;
    }
}

// One group of 32 values to signed bytes: scale = max|x| / 127, q = round(x * (127 / max|x|)), to nearest even.
PM_INLINE void quantize_group(const float* x, int8_t* q, float* scale, int32_t* sum, float* scaled_sum) {
    const F a = fload(x), b = fload(x + 16);
    const float peak = fpeak(fmax2(fabs1(a), fabs1(b)));
    const F inverse = fset(peak > 0.0f ? 127.0f / peak : 0.0f);
    istore_i8(q, fmul(a, inverse));
    istore_i8(q + 16, fmul(b, inverse));
    int total = 0;
    for (int i = 0; i < kGroup; i++) total += q[i];
    *scale = peak / 127.0f + not_finite(a, b);
    *sum = total;
    *scaled_sum = *scale * float(total);
}

// The same in 16 bits: q = 256 * high + low, both signed bytes, scale = max|x| / 32512.
static void quantize_group_fine(const float* x, int8_t* high, int8_t* low, float* scale, int32_t* sum, float* scaled_sum) {
    const F values[2] = {fload(x), fload(x + 16)};
    const float peak = fpeak(fmax2(fabs1(values[0]), fabs1(values[1])));
    const F inverse = fset(peak > 0.0f ? kMostI16 / peak : 0.0f), least = fset(-kMostI16);
    F total = fzero();
    for (int i = 0; i < 2; i++) {
        const F y = fsub(fzero(), fmax2(fsub(fzero(), fmax2(fmul(values[i], inverse), least)), least));
        const F q = fround(y);
        const F h = fround(fmul(fadd(q, fset(0.5f)), fset(1.0f / 256.0f)));  // never halfway
        istore_i8(high + 16 * i, h);
        istore_i8(low + 16 * i, fmla(h, fset(-256.0f), q));
        total = fadd(total, q);
    }
    *scale = peak / kMostI16 + not_finite(values[0], values[1]);
    *sum = int32_t(fsum(total));
    *scaled_sum = *scale * float(*sum);
}

// Where a row stands before it takes its forms: in its row of act.f32, which products of floats read, or, when only its bytes
// are read, in row `spare`, which stays in the nearest cache.
PM_INLINE float* float_row(const Activations& act, int row, int spare, int forms) {
    return act.f32 + size_t(forms == kFormRotated ? spare : row) * size_t(act.ld);
}

// Columns [from, to) of x (zero beyond `width`) into the forms of a row. from: a multiple of 32.
static void fill_forms(const Activations& act, int row, float* x, int from, int to, int width, int forms) {
    if (forms & kFormBf16) {
        uint16_t* out = act.bf16 + size_t(row) * act.ld;
        for (int c = from; c < to; c += kLanes) fstore_bf16(out + c, fload_first(x + c, width - c));
    }
    if (forms & kFormRotated) quantize_rotated_row(act, row, x, x, width);  // whole rows, and no other form beside it
    if (forms & kFormI8) {
        const size_t base = size_t(row) * act.groups();
        for (int c = from; c < to; c += kGroup) {
            const size_t g = base + size_t(c / kGroup);
            const size_t at = size_t(row) * act.ld + size_t(c);
            if (act.two_bytes) quantize_group_fine(x + c, act.i8 + at, act.low + at, act.scale + g, act.sum + g, act.scaled_sum + g);
            else quantize_group(x + c, act.i8 + at, act.scale + g, act.sum + g, act.scaled_sum + g);
        }
    }
}

static void normalize_row(const Phase& p, const float* src, int width, float* out) {
    F sum = fzero(), squares = fzero();
    const float inverse_width = 1.0f / float(width);
    float mean = 0.0f;
    if (p.norm == NormKind::layer) {
        for (int c = 0; c < width; c += kLanes) sum = fadd(sum, fload_first(src + c, width - c));
        mean = fsum(sum) * inverse_width;
    }
    for (int c = 0; c < width; c += kLanes) {
        const F d = fsub(fload_first(src + c, width - c), fselect(0, width - c, fset(mean), fzero()));
        squares = fmla(d, d, squares);
    }
    const F factor = fset(1.0f / std::sqrt(fsum(squares) * inverse_width + p.norm_eps));
    for (int c = 0; c < width; c += kLanes) {
        const int n = width - c;
        F y = fmul(fsub(fload_first(src + c, n), fset(mean)), factor);
        y = fmul(y, fload_first(p.norm_weight + c, n));
        if (p.norm_bias) y = fadd(y, fload_first(p.norm_bias + c, n));
        fstore_first(out + c, y, n);
    }
}

// Row `src` through the phase's norm into row `row` of the activations.
static void prepare_row(const Phase& p, const float* src, int width, const Activations& act, int row, int spare, int forms) {
    float* x = float_row(act, row, spare, forms);
    if (p.norm == NormKind::none) std::memcpy(x, src, size_t(width) * sizeof(float));
    else normalize_row(p, src, width, x);
    fill_forms(act, row, x, 0, width, width, forms);
}

// Columns [from, to) of a row without a norm: copied (attention output, or activated already) or activated (MLP).
static void prepare_columns(const Phase& p, const float* src, int width, int from, int to, const Activations& act, int row, int spare, int forms, bool activated) {
    float* x = float_row(act, row, spare, forms);
    const bool as_is = activated || p.activation == ActivationKind::none;
    if (as_is && forms == kFormRotated) return quantize_rotated_row(act, row, src, x, width);
    if (as_is) std::memcpy(x + from, src + from, size_t(to - from) * sizeof(float));
    else for (int c = from; c < to; c += kLanes) {
        const int n = to - c;
        F y = factivate(p.activation, fload_first(src + c, n));
        if (p.gated) y = fmul(y, fload_first(src + width + c, n));
        fstore_first(x + c, y, n);
    }
    fill_forms(act, row, x, from, to, width, forms);
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
