// Attention over int8 pages, on the integer unit. A page: keys u8 (value + 128) [dim_pad/4][16][4], values s8
// [4][dim_pad][4], then 16 f16 key scales and 16 f16 value scales. Queries become signed bytes per row; probabilities times
// value scales become unsigned bytes per row and run of 64 positions. Integer sums are exact.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

PM_INLINE const uint16_t* key_scales(const uint8_t* page, int dim_pad) {
    return reinterpret_cast<const uint16_t*>(page + size_t(2 * kPage) * size_t(dim_pad));
}
PM_INLINE const uint16_t* value_scales(const uint8_t* page, int dim_pad) { return key_scales(page, dim_pad) + kPage; }
PM_INLINE const uint8_t* page_values(const uint8_t* page, int dim_pad) { return page + size_t(kPage) * size_t(dim_pad); }

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

static void prepare_query(TileState& t, const float* q, int dim, int dim_pad, int r) {
    int8_t* bytes = t.q_bytes[r];
    t.q_scale[r] = quantize_head(q, dim, dim_pad, false, bytes);
    const int whole = (dim_pad + 63) / 64 * 64;
    if (whole > dim_pad) std::memset(bytes + dim_pad, 0, size_t(whole - dim_pad));
    I total = iset(0);
    for (int d = 0; d < whole; d += 64) total = idot_signed(total, 0x01010101, uload(bytes + d));
    const I start = iset(-128 * int(fsum(itof(total))));
    std::memcpy(t.start[r], &start, sizeof start);
}

static void load_scales(TileState& t, const HeadPages& pages, SplitRange range, int base, int dim_pad) {
    for (int page = range.page0; page < range.page1; page++) {
        const uint8_t* at = pages.at(page);
        fstore(t.key_scale[page - base / kPage], fload_f16(key_scales(at, dim_pad)));
        fstore(t.value_scale[page - base / kPage], fload_f16(value_scales(at, dim_pad)));
    }
}

// A page's scores of rows r0.. from their integer sums.
PM_INLINE F score_of(const TileState& t, int r, I sum, F key_scale, float scale, float softcap) {
    return scaled_score(fmul(fmul(itof(sum), key_scale), fset(t.q_scale[r])), scale, softcap);
}
PM_INLINE F seen(const TileState& t, int r, int first_position, F x, F otherwise) {
    return fselect(t.from[r] - first_position, t.to[r] - first_position, x, otherwise);
}

template <int R, int P>
static void score_pages_int8(const TileState& t, SplitBatch& b, int r0, const HeadPages& pages, int page, int base, int dim_pad, float scale, float softcap, F (&peak)[R]) {
    const uint8_t* k[P];
    for (int p = 0; p < P; p++) k[p] = pages.at(page + p);
    I acc[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) std::memcpy(&acc[r][p], t.start[r0 + r], sizeof(I));
    for (int d = 0; d < dim_pad / 4; d++) {
        U key[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) key[p] = uload(k[p] + 64 * d);
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
            y = seen(t, r0 + r, first_position, y, fset(kMasked));
            peak[r] = fmax2(peak[r], y);
            fstore(b.scores[slot][r], y);
        }
    }
}

// exp2(score - maximum) of one row in place, times the value scales; by lane, the peaks of its runs and, returned, the sum.
template <bool EDGES> static F exponentiate_row(const TileState& t, SplitBatch& b, int r0, int r, SplitRange range, int base, F* run_peaks) {
    const F top = fset(b.max[r]);
    F sum = fzero();
    const int slot0 = range.page0 - base / kPage, slot1 = range.page1 - base / kPage;
    for (int run = 0; run < kSplitRuns; run++) run_peaks[run] = fzero();
    for (int slot = slot0; slot < slot1;) {
        const int run = slot / (kRun / kPage), end = (run + 1) * (kRun / kPage) < slot1 ? (run + 1) * (kRun / kPage) : slot1;
        F peak = fzero();
        for (; slot < end; slot++) {
            F p = fexp2_below(fsub(fload(b.scores[slot][r]), top));
            const int first_position = base + slot * kPage;
            if constexpr (EDGES) p = seen(t, r0 + r, first_position, p, fzero());
            sum = fadd(sum, p);
            F weighted = fmul(p, fload(t.value_scale[slot]));
            if constexpr (EDGES) weighted = seen(t, r0 + r, first_position, weighted, fzero());
            peak = fmax2(peak, weighted);
            fstore(b.scores[slot][r], weighted);
        }
        run_peaks[run] = peak;
    }
    return sum;
}

// A row's scores become probabilities times value scales; `peaks`: of its runs.
static void exponentiate(const TileState& t, SplitBatch& b, int r0, int r, SplitRange range, int base, float* peaks) {
    const bool whole = t.from[r0 + r] <= range.page0 * kPage && t.to[r0 + r] >= range.page1 * kPage;
    F runs[kSplitRuns];
    b.sum[r] = fsum(whole ? exponentiate_row<false>(t, b, r0, r, range, base, runs) : exponentiate_row<true>(t, b, r0, r, range, base, runs));
    for (int run = 0; run < kSplitRuns; run++) peaks[run] = fpeak(runs[run]);
}

// Those of `rows` rows become bytes and their scales per run; pages outside the range count as zero.
static void weigh_rows(SplitBatch& b, int rows, SplitRange range, int base, const float* peaks) {
    alignas(64) float inverse[kBatch * kSplitRuns];
    const int run0 = (range.page0 * kPage - base) / kRun, run1 = (range.page1 * kPage - base + kRun - 1) / kRun;
    for (int i = 0; i < rows * kSplitRuns; i += kLanes) {
        const F most = fload(peaks + i);
        fstore(b.p_scale + i, fdiv(most, fset(255.0f)));
        fstore(inverse + i, fdiv(fset(255.0f), most));
    }
    for (int run = run0; run < run1; run++) {
        constexpr int pages = kRun / kPage;
        const int slot = run * pages, page = base / kPage + slot;
        const bool in[pages] = {page >= range.page0, page + 1 >= range.page0 && page + 1 < range.page1,
                                page + 2 >= range.page0 && page + 2 < range.page1, page + 3 < range.page1};
        for (int r = 0; r < rows; r++) {
            const float factor = peaks[r * kSplitRuns + run] > 0.0f ? inverse[r * kSplitRuns + run] : 0.0f;
            F w[pages];
#pragma GCC unroll 4
            for (int j = 0; j < pages; j++) w[j] = in[j] ? fmul(fload(b.scores[slot + j][r]), fset(factor)) : fzero();
            istore_u8(b.p[r] + run * kRun, w[0], w[1], w[2], w[3]);
        }
    }
}

template <int R, int V>
static void weigh_values_int8(TileState& t, SplitBatch& b, const HeadPages& pages, SplitRange range, int base, int dim_pad, int column) {
    F out[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) out[r][v] = fzero();
    for (int page = range.page0; page < range.page1;) {
        const int run = (page * kPage - base) / kRun, last = (base + (run + 1) * kRun) / kPage, end = last < range.page1 ? last : range.page1;
        I acc[R][V];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[r][v] = iset(0);
        for (; page < end; page++) {
            t.ahead.values(1);
            const uint8_t* values = page_values(pages.at(page), dim_pad) + size_t(column) * 4;
#pragma GCC unroll 4
            for (int quad = 0; quad < 4; quad++) {
                U value[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) value[v] = uload(values + size_t(quad) * size_t(dim_pad) * 4 + 64 * v);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const int p = quad_at(reinterpret_cast<const int8_t*>(b.p[r] + page * kPage - base + 4 * quad));
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) acc[r][v] = idot_signed(acc[r][v], p, value[v]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) out[r][v] = fmla(itof(acc[r][v]), fset(b.p_scale[r * kSplitRuns + run]), out[r][v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) fstore(b.out + r * dim_pad + column + v * kLanes, out[r][v]);
}

template <int R>
static __attribute__((noinline)) void attend_split_int8(TileState& t, SplitBatch& b, int r0, const HeadPages& pages, SplitRange range, int base, int dim_pad, float scale, float softcap) {
    F peak[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) peak[r] = fset(kMasked);
    constexpr int pair = kScorePages;
    int page = range.page0;
    for (; page + pair <= range.page1; page += pair) {
        t.ahead.keys(pair);
        score_pages_int8<R, pair>(t, b, r0, pages, page, base, dim_pad, scale, softcap, peak);
    }
    if constexpr (pair > 1) {
        for (; page < range.page1; page++) {
            t.ahead.keys(1);
            score_pages_int8<R, 1>(t, b, r0, pages, page, base, dim_pad, scale, softcap, peak);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) b.max[r] = fpeak(peak[r]);
    alignas(64) float peaks[kBatch * kSplitRuns] = {};
    for (int r = 0; r < R; r++) exponentiate(t, b, r0, r, range, base, peaks + r * kSplitRuns);
    weigh_rows(b, R, range, base, peaks);
    int column = 0;
    for (; column + kValueVectors * kLanes <= dim_pad; column += kValueVectors * kLanes)
        weigh_values_int8<R, kValueVectors>(t, b, pages, range, base, dim_pad, column);
    if constexpr (kValueVectors > 1) {
        for (; column < dim_pad; column += kLanes) weigh_values_int8<R, 1>(t, b, pages, range, base, dim_pad, column);
    }
}

// One split of `rows` rows from r0 on, at most R.
template <int R>
static void attend_from_int8(int rows, TileState& t, SplitBatch& b, int r0, const HeadPages& pages, SplitRange range, int base, int dim_pad, float scale, float softcap) {
    if constexpr (R > 1) {
        if (rows < R) return attend_from_int8<R - 1>(rows, t, b, r0, pages, range, base, dim_pad, scale, softcap);
    }
    attend_split_int8<R>(t, b, r0, pages, range, base, dim_pad, scale, softcap);
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
