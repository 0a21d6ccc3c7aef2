// Attention over int8 pages, on the integer unit. A page: keys u8 (value + 128) [dim_pad/4][16][4], values s8
// [4][dim_pad][4], then 16 f16 key scales and 16 f16 value scales. Queries become signed bytes per row; probabilities times
// value scales become unsigned bytes per row and run of 64 positions. Integer sums are exact.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

constexpr int kRun = 64;  // positions that share a probability scale; runs begin at absolute multiples

struct Int8State {
    alignas(64) int32_t q[64][kTileRows];  // four signed bytes of the query, [dim/4][row]
    alignas(64) uint8_t p[kTileRows][kSplit];
    float p_scale[kTileRows][kSplit / kRun];
    float q_scale[kTileRows];
    int32_t start[kTileRows];  // -128 * sum of the query's bytes: keys are stored unsigned
};

PM_INLINE const uint16_t* key_scales(const uint8_t* page, int dim_pad) {
    return reinterpret_cast<const uint16_t*>(page + size_t(2 * kPage) * size_t(dim_pad));
}
PM_INLINE const uint16_t* value_scales(const uint8_t* page, int dim_pad) { return key_scales(page, dim_pad) + kPage; }

// Hadamard rotation in place (orthonormal, blocks of the largest power of two that divides dim): spreads outlier channels.
// Applied to queries and keys alike, it leaves their products as they are.
static void hadamard(float* x, int dim) {
    const int block = dim & -dim;
    for (int base = 0; base < dim; base += block) {
        float* b = x + base;
        for (int half = 1; half < block; half *= 2)
            for (int i = 0; i < block; i += 2 * half)
                for (int j = i; j < i + half; j++) {
                    const float s = b[j] + b[j + half], d = b[j] - b[j + half];
                    b[j] = s;
                    b[j + half] = d;
                }
    }
    const float scale = 1.0f / std::sqrt(float(block));
    for (int i = 0; i < dim; i++) x[i] *= scale;
}

// A vector of dim values as signed bytes, times the scale that is returned: max|x| / 127, rounded to f16 where it is stored.
static float quantize_head(const float* x, int dim, int dim_pad, bool stored, int8_t* q) {
    F peak = fzero();
    for (int c = 0; c < dim; c += kLanes) peak = fmax2(peak, fabs1(fload_first(x + c, dim - c)));
    float scale = fpeak(peak) / 127.0f;
    if (stored) scale = f16_to_f32(f32_to_f16(scale));
    const F inverse = fset(scale > 0.0f ? 1.0f / scale : 0.0f);
    for (int c = 0; c < dim_pad; c += kLanes) {
        F y = fmul(fload_first(x + c, dim - c), inverse);
        y = fsub(fzero(), fmax2(fsub(fzero(), fmax2(y, fset(-127.0f))), fset(-127.0f)));
        istore_i8(q + c, y);
    }
    return scale;
}

static void write_head_int8(uint8_t* page, const LayerKv& kv, int slot, const float* k, const float* v) {
    int8_t q[256];
    uint16_t* scales = const_cast<uint16_t*>(key_scales(page, kv.dim_pad));
    scales[slot] = f32_to_f16(quantize_head(k, kv.head_dim, kv.dim_pad, true, q));
    for (int d = 0; d < kv.dim_pad; d++) page[(d / 4) * 64 + slot * 4 + d % 4] = uint8_t(int(q[d]) + 128);
    scales[kPage + slot] = f32_to_f16(quantize_head(v, kv.head_dim, kv.dim_pad, true, q));
    uint8_t* values = page + size_t(kPage) * size_t(kv.dim_pad) + size_t(slot / 4) * size_t(kv.dim_pad) * 4 + size_t(slot % 4);
    for (int d = 0; d < kv.dim_pad; d++) values[size_t(d) * 4] = uint8_t(q[d]);
}

static void prepare_query(Int8State& s, const float* q, int dim, int dim_pad, int r) {
    int8_t bytes[256];
    s.q_scale[r] = quantize_head(q, dim, dim_pad, false, bytes);
    int total = 0;
    for (int d = 0; d < dim_pad; d++) total += bytes[d];
    s.start[r] = -128 * total;
    for (int d = 0; d < dim_pad / 4; d++) s.q[d][r] = quad_at(bytes + 4 * d);
}

template <int R, int P>
static void score_pages_int8(TileState& t, const Int8State& s, int r0, const HeadPages& pages, int page, int base, int dim_pad, float scale, float softcap, F (&peak)[R]) {
    const uint8_t* k[P];
    for (int p = 0; p < P; p++) k[p] = pages.at(page + p);
    I acc[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) acc[r][p] = iset(s.start[r0 + r]);
    for (int d = 0; d < dim_pad / 4; d++) {
        U key[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) key[p] = uload(k[p] + 64 * d);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const int x = s.q[d][r0 + r];
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) acc[r][p] = idot(acc[r][p], key[p], x);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
        const int first_position = (page + p) * kPage;
        const F ks = fload_f16(key_scales(k[p], dim_pad));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            F y = fmul(fmul(itof(acc[r][p]), ks), fset(s.q_scale[r0 + r]));
            y = fselect(t.from[r0 + r] - first_position, t.to[r0 + r] - first_position, scaled_score(y, scale, softcap), fset(kMasked));
            peak[r] = fmax2(peak[r], y);
            fstore(&t.scores[r0 + r][first_position - base], y);
        }
    }
}

// Probabilities of one row over a run of 64 positions, as bytes; pages outside [page0, page1) count as zero.
static F weigh_run(TileState& t, Int8State& s, const HeadPages& pages, int r, int run, int base, int page0, int page1, int dim_pad, float top, F sum) {
    F weighted[kRun / kPage];
    F peak = fzero();
    for (int j = 0; j < kRun / kPage; j++) {
        const int page = (base + run * kRun) / kPage + j, position = page * kPage;
        weighted[j] = fzero();
        if (page < page0 || page >= page1) continue;
        const int from = t.from[r] - position, to = t.to[r] - position;
        const F p = fselect(from, to, fexp2(fsub(fload(&t.scores[r][position - base]), fset(top))), fzero());
        sum = fadd(sum, p);
        weighted[j] = fselect(from, to, fmul(p, fload_f16(value_scales(pages.at(page), dim_pad))), fzero());
        peak = fmax2(peak, weighted[j]);
    }
    const float most = fpeak(peak);
    s.p_scale[r][run] = most / 255.0f;
    const F inverse = fset(most > 0.0f ? 255.0f / most : 0.0f);
    for (int j = 0; j < kRun / kPage; j++) istore_u8(&s.p[r][run * kRun + j * kPage], fmul(weighted[j], inverse));
    return sum;
}

template <int R, int V>
static void weigh_values_int8(TileState& t, const Int8State& s, int r0, const HeadPages& pages, int base, int run0, int run1, int page0, int page1, int dim_pad, int column) {
    F out[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) out[r][v] = fzero();
    for (int run = run0; run < run1; run++) {
        I acc[R][V];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[r][v] = iset(0);
        const int first = (base + run * kRun) / kPage;
        for (int page = first < page0 ? page0 : first; page < first + kRun / kPage && page < page1; page++) {
            const uint8_t* values = pages.at(page) + size_t(kPage) * size_t(dim_pad) + size_t(column) * 4;
#pragma GCC unroll 4
            for (int quad = 0; quad < 4; quad++) {
                U value[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) value[v] = uload(values + size_t(quad) * size_t(dim_pad) * 4 + 64 * v);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const int p = quad_at(reinterpret_cast<const int8_t*>(&s.p[r0 + r][page * kPage - base + 4 * quad]));
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) acc[r][v] = idot_signed(acc[r][v], p, value[v]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) out[r][v] = fmla(itof(acc[r][v]), fset(s.p_scale[r0 + r][run]), out[r][v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) fstore(&t.split_out[r0 + r][column + v * kLanes], out[r][v]);
}

template <int R>
static __attribute__((noinline)) void attend_split_int8(TileState& t, Int8State& s, int r0, const HeadPages& pages, int split, const LayerKv& kv, float scale, float softcap) {
    const SplitRange range = split_range<R>(t, r0, split);
    const int base = split * kSplit;
    F peak[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) peak[r] = fset(kMasked);
    constexpr int pair = kScorePages;
    int page = range.page0;
    for (; page + pair <= range.page1; page += pair) score_pages_int8<R, pair>(t, s, r0, pages, page, base, kv.dim_pad, scale, softcap, peak);
    if constexpr (pair > 1) {
        for (; page < range.page1; page++) score_pages_int8<R, 1>(t, s, r0, pages, page, base, kv.dim_pad, scale, softcap, peak);
    }
    const int run0 = (range.page0 * kPage - base) / kRun, run1 = (range.page1 * kPage - base + kRun - 1) / kRun;
    for (int r = 0; r < R; r++) {
        t.split_max[r0 + r] = fpeak(peak[r]);
        F sum = fzero();
        for (int run = run0; run < run1; run++)
            sum = weigh_run(t, s, pages, r0 + r, run, base, range.page0, range.page1, kv.dim_pad, t.split_max[r0 + r], sum);
        t.split_sum[r0 + r] = fsum(sum);
    }
    int column = 0;
    for (; column + kValueVectors * kLanes <= kv.dim_pad; column += kValueVectors * kLanes)
        weigh_values_int8<R, kValueVectors>(t, s, r0, pages, base, run0, run1, range.page0, range.page1, kv.dim_pad, column);
    if constexpr (kValueVectors > 1) {
        for (; column < kv.dim_pad; column += kLanes)
            weigh_values_int8<R, 1>(t, s, r0, pages, base, run0, run1, range.page0, range.page1, kv.dim_pad, column);
    }
}

// One split of `rows` rows from r0 on, at most R.
template <int R>
static void attend_from_int8(int rows, TileState& t, Int8State& s, int r0, const HeadPages& pages, int split, const LayerKv& kv, float scale, float softcap) {
    if constexpr (R > 1) {
        if (rows < R) return attend_from_int8<R - 1>(rows, t, s, r0, pages, split, kv, scale, softcap);
    }
    attend_split_int8<R>(t, s, r0, pages, split, kv, scale, softcap);
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
