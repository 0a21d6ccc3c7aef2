// Attention over int8 pages, on the integer unit. A page: keys u8 (value + 128) [dim_pad/4][16][4], values s8
// [4][dim_pad][4], then 16 f16 key scales and 16 f16 value scales. Queries become signed bytes per row; probabilities times
// value scales become unsigned numbers of 16 bits per row and split, in two bytes. Integer sums are exact: the largest,
// 256 * 65535 * 127, fits 32 bits.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

PM_INLINE const uint16_t* key_scales(const uint8_t* page, int dim_pad) {
    return reinterpret_cast<const uint16_t*>(page + size_t(2 * kPage) * size_t(dim_pad));
}
PM_INLINE const uint16_t* value_scales(const uint8_t* page, int dim_pad) { return key_scales(page, dim_pad) + kPage; }
PM_INLINE const uint8_t* page_values(const uint8_t* page, int dim_pad) { return page + size_t(kPage) * size_t(dim_pad); }

// A vector of dim values as signed bytes, times the scale that is returned: max|x| / 127, rounded to f16 where it is stored.
// total: their sum.
static float quantize_head(const float* x, int dim, int dim_pad, bool stored, int8_t* q, int* total = nullptr) {
    F peak = fzero(), sum = fzero();
    for (int c = 0; c < dim; c += kLanes) peak = fmax2(peak, fabs1(fload_first(x + c, dim - c)));
    float scale = fpeak(peak) / 127.0f;
    if (stored) scale = f16_to_f32(f32_to_f16(scale));
    const F inverse = fset(scale > 0.0f ? 1.0f / scale : 0.0f);
    for (int c = 0; c < dim_pad; c += kLanes) {
        F y = fmul(fload_first(x + c, dim - c), inverse);
        y = fsub(fzero(), fmax2(fsub(fzero(), fmax2(y, fset(-127.0f))), fset(-127.0f)));
        istore_i8(q + c, y);
        sum = fadd(sum, fround(y));
    }
    if (total) *total = int(fsum(sum));
    return scale;
}

static void prepare_query(TileState& t, const float* q, int dim, int dim_pad, int r) {
    int8_t* bytes = t.q_bytes[r];
    int total;
    t.q_scale[r] = quantize_head(q, dim, dim_pad, false, bytes, &total);
    const int whole = (dim_pad + 63) / 64 * 64;
    if (whole > dim_pad) std::memset(bytes + dim_pad, 0, size_t(whole - dim_pad));
    const I start = iset(-128 * total);
    std::memcpy(t.start[r], &start, sizeof start);
}

// Key scales are times `factor`.
static void load_scales(TileState& t, const HeadPages& pages, SplitRange range, int base, int dim_pad, float factor) {
    for (int page = range.page0; page < range.page1; page++) {
        const uint8_t* at = t.page[page - base / kPage] = pages.at(page);
        fstore(t.key_scale[page - base / kPage], fmul(fload_f16(key_scales(at, dim_pad)), fset(factor)));
        fstore(t.value_scale[page - base / kPage], fload_f16(value_scales(at, dim_pad)));
    }
}

// What key scales are multiplied with, and what a row's scores are: in log2 units, or in those divided by its query's scale.
PM_INLINE float key_factor(float scale, float softcap) { return softcap > 0.0f ? 1.0f : scale * kLog2e; }
PM_INLINE float score_unit(const TileState& t, int r, float softcap) { return softcap > 0.0f ? 1.0f : t.q_scale[r]; }

// A page's scores of rows r0.. from their integer sums.
PM_INLINE F score_of(const TileState& t, int r, I sum, F key_scale, float scale, float softcap) {
    const F score = fmul(itof(sum), key_scale);
    return softcap > 0.0f ? scaled_score(fmul(score, fset(t.q_scale[r])), scale, softcap) : score;
}
PM_INLINE F seen(const TileState& t, int r, int first_position, F x, F otherwise) {
    return fselect(t.from[r] - first_position, t.to[r] - first_position, x, otherwise);
}

static bool sees_all(const TileState& t, int r, SplitRange range) { return t.from[r] <= range.page0 * kPage && t.to[r] >= range.page1 * kPage; }

// EDGES: some row does not see all of the pages. BESIDE: as in Ahead.
template <int R, int P, bool EDGES, bool BESIDE>
static void score_pages_int8(TileState& t, SplitBatch& b, int r0, int page, int base, int dim_pad, float scale, float softcap, F (&peak)[R]) {
    const uint8_t *k[P], *ask[P];
    for (int p = 0; p < P; p++) ask[p] = k[p] = t.page[page + p - base / kPage];
    t.ahead.keys(page, P, ask);
    I acc[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) std::memcpy(&acc[r][p], t.start[r0 + r], sizeof(I));
    for (int d = 0; d < dim_pad / 4; d++) {
        U key[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            key[p] = uload(k[p] + 64 * d);
            if constexpr (BESIDE) Ahead::line(ask[p] + 64 * d);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const int x = quad_at(t.q_bytes[r0 + r] + 4 * d);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) acc[r][p] = idot(acc[r][p], key[p], x);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
        const int first_position = (page + p) * kPage, slot = page + p - base / kPage;
        const F ks = fload(t.key_scale[slot]);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            F y = score_of(t, r0 + r, acc[r][p], ks, scale, softcap);
            if constexpr (EDGES) y = seen(t, r0 + r, first_position, y, fset(kMasked));
            peak[r] = fmax2(peak[r], y);
            fstore(b.scores[slot][r], y);
        }
    }
}

template <int R, bool EDGES, bool BESIDE>
static void score_range_int8(TileState& t, SplitBatch& b, int r0, SplitRange range, int base, int dim_pad, float scale, float softcap, F (&peak)[R]) {
    constexpr int together = R <= 3 ? kScorePages : (kScorePages + 1) / 2;
    int page = range.page0;
    for (; page + together <= range.page1; page += together)
        score_pages_int8<R, together, EDGES, BESIDE>(t, b, r0, page, base, dim_pad, scale, softcap, peak);
    if constexpr (together > 1) {
        for (; page < range.page1; page++) score_pages_int8<R, 1, EDGES, BESIDE>(t, b, r0, page, base, dim_pad, scale, softcap, peak);
    }
}

constexpr float kMostWeight = 65535.0f;
constexpr float kRoundWeight = 8388608.0f;  // 2^23: in a sum with it no bit is left for a fraction

// The value scales of a split as a row sees them, in units of the largest / 65535; zero where the row sees nothing.
struct RowScales {
    alignas(64) float scale[kSplitPages][kLanes];
    float most;
    int from = 0, to = 0;  // of the row that they are of

    void see(const TileState& t, int r, SplitRange range, int base) {
        const int first = range.page0 * kPage, last = range.page1 * kPage;
        const int row_from = t.from[r] > first ? t.from[r] : first, row_to = t.to[r] < last ? t.to[r] : last;
        if (row_from == from && row_to == to) return;
        from = row_from;
        to = row_to;
        F peak = fzero();
        for (int page = range.page0; page < range.page1; page++) {
            const int slot = page - base / kPage;
            const F x = fselect(from - page * kPage, to - page * kPage, fload(t.value_scale[slot]), fzero());
            peak = fmax2(peak, x);
            fstore(scale[slot], x);
        }
        most = fpeak(peak);
        const F inverse = fset(most > 0.0f ? kMostWeight / most : 0.0f);
        for (int slot = range.page0 - base / kPage; slot < range.page1 - base / kPage; slot++) fstore(scale[slot], fmul(fload(scale[slot]), inverse));
    }
};

PM_INLINE void end_row(SplitBatch& b, int r, float top, float unit, float most, const F (&sums)[4]) {
    b.weight[r] = most / kMostWeight;
    b.max[r] = top <= kMasked ? kMasked : top * unit;
    b.sum[r] = fsum(fadd(fadd(sums[0], sums[1]), fadd(sums[2], sums[3])));
}

// The scores of one row, whose largest is `top`, become probabilities times value scales: whole numbers of 16 bits.
template <bool EDGES>
static void weigh_row(const TileState& t, SplitBatch& b, int r0, int r, SplitRange range, int base, float top, float unit, const RowScales& scales) {
    const int slot0 = range.page0 - base / kPage, slot1 = range.page1 - base / kPage;
    F sums[4] = {fzero(), fzero(), fzero(), fzero()};
    for (int slot = slot0 / 4 * 4; slot < slot1; slot += 4) {
        F weights[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int at = slot + i;
            weights[i] = fzero();
            if (at < slot0 || at >= slot1) continue;
            F p = fexp2_near(fmul(fsub(fload(b.scores[at][r]), fset(top)), fset(unit)));
            if constexpr (EDGES) p = seen(t, r0 + r, base + at * kPage, p, fzero());
            sums[i] = fadd(sums[i], p);
            weights[i] = fmla(p, fload(scales.scale[at]), fset(kRoundWeight));
        }
        store_halves(b.high[r] + slot * kPage, b.low[r] + slot * kPage, weights[0], weights[1], weights[2], weights[3]);
    }
    end_row(b, r, top, unit, scales.most, sums);
}

static void weigh_any_row(const TileState& t, SplitBatch& b, int r0, int r, SplitRange range, int base, float top, float unit, RowScales& scales) {
    scales.see(t, r0 + r, range, base);
    if (sees_all(t, r0 + r, range)) weigh_row<false>(t, b, r0, r, range, base, top, unit, scales);
    else weigh_row<true>(t, b, r0, r, range, base, top, unit, scales);
}

// Weights times values: integer sums of both bytes, joined. asked: with BESIDE, for each page of the
// split, the values to ask for beside its own.
template <int R, int V, bool BESIDE>
static void weigh_values_int8(TileState& t, SplitBatch& b, const uint8_t* const* asked, SplitRange range, int base, int dim_pad, int column) {
    I high[R][V], low[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) high[r][v] = low[r][v] = iset(0);
    for (int page = range.page0; page < range.page1; page++) {
        const int slot = page - base / kPage;
        const uint8_t *values = page_values(t.page[slot], dim_pad) + size_t(column) * 4, *ask = nullptr;
        if constexpr (BESIDE) {
            ask = asked[slot] + size_t(column) * 4;
            if (column == 0) Ahead::line(ask + size_t(dim_pad) * kPage);  // scales
        } else t.ahead.values(page, nullptr);
#pragma GCC unroll 4
        for (int quad = 0; quad < 4; quad++) {
            U value[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                const size_t at = size_t(quad) * size_t(dim_pad) * 4 + size_t(64 * v);
                value[v] = uload(values + at);
                if constexpr (BESIDE) Ahead::line(ask + at);
            }
            const int at = page * kPage - base + 4 * quad;
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const int h = quad_at(reinterpret_cast<const int8_t*>(b.high[r] + at)), l = quad_at(reinterpret_cast<const int8_t*>(b.low[r] + at));
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) {
                    high[r][v] = idot_signed(high[r][v], h, value[v]);
                    low[r][v] = idot_signed(low[r][v], l, value[v]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            fstore(b.out + r * dim_pad + column + v * kLanes, fmul(itof(ijoin(high[r][v], low[r][v])), fset(b.weight[r])));
}

template <int R, bool BESIDE>
static __attribute__((noinline)) void attend_split_int8(TileState& t, SplitBatch& b, int r0, SplitRange range, int base, int dim_pad, float scale, float softcap) {
    F peak[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) peak[r] = fset(kMasked);
    bool whole = true;
    for (int r = 0; r < R; r++) whole = whole && sees_all(t, r0 + r, range);
    if (whole) score_range_int8<R, false, BESIDE>(t, b, r0, range, base, dim_pad, scale, softcap, peak);
    else score_range_int8<R, true, BESIDE>(t, b, r0, range, base, dim_pad, scale, softcap, peak);
    RowScales scales;
    for (int r = 0; r < R; r++) weigh_any_row(t, b, r0, r, range, base, fpeak(peak[r]), score_unit(t, r0 + r, softcap), scales);
    constexpr int vectors = R <= 3 || kValueVectors < 2 ? kValueVectors : kValueVectors / 2;  // sums of two bytes stay in registers
    const uint8_t* asked[kSplitPages] = {};
    for (int page = range.page0; BESIDE && page < range.page1; page++) {
        const int slot = page - base / kPage;
        asked[slot] = page_values(t.page[slot], dim_pad);
        t.ahead.values(page, asked + slot);
    }
    int column = 0;
    for (; column + vectors * kLanes <= dim_pad; column += vectors * kLanes)
        weigh_values_int8<R, vectors, BESIDE>(t, b, asked, range, base, dim_pad, column);
    if constexpr (vectors > 1) {
        for (; column < dim_pad; column += kLanes) weigh_values_int8<R, 1, BESIDE>(t, b, asked, range, base, dim_pad, column);
    }
}

// One split of `rows` rows from r0 on, at most R.
template <int R>
static void attend_from_int8(int rows, TileState& t, SplitBatch& b, int r0, SplitRange range, int base, int dim_pad, float scale, float softcap) {
    if constexpr (R > 1) {
        if (rows < R) return attend_from_int8<R - 1>(rows, t, b, r0, range, base, dim_pad, scale, softcap);
    }
    if (t.ahead.beside) attend_split_int8<R, true>(t, b, r0, range, base, dim_pad, scale, softcap);
    else attend_split_int8<R, false>(t, b, r0, range, base, dim_pad, scale, softcap);
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
