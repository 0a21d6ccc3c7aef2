// Attention over int8 pages on AMX tiles (Intel SDM, TMUL): 16 rows at once. The integer sums are those of
// attention-int8-inl.h, so the bits are too. A page's keys are a tile as they lie: [16 quads of dims][16 positions][4]; the
// values of a run of 64 positions are gathered into tiles of 16 columns. While the vector unit weighs one batch of rows, tiles
// score the next. Targets without AMX compile nothing of it.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

#ifdef PAGEMILL_AMX

constexpr int kFewRows = 7;  // up to here a tile's idle rows cost more than the vector unit does
static_assert(kAttendRows <= kFewRows, "tiles do not ask for pages beside their own");

// Tiles read 64 dims of keys at a time; what lies behind the last is values of the same page, times zero.
static bool tiles_read(int dim_pad) { return dim_pad >= 32; }

static void gather_values(TileState& t, const HeadPages& pages, SplitRange range, int base, int dim_pad) {
    for (int page = range.page0; page < range.page1; page++) {
        t.ahead.values(page, nullptr);
        const int slot = page - base / kPage, run = slot / (kRun / kPage), first = slot % (kRun / kPage) * 4;
        const uint8_t* values = page_values(pages.at(page), dim_pad);
        for (int quad = 0; quad < 4; quad++)
            for (int c = 0; c < dim_pad / kLanes; c++)
                _mm512_store_si512(t.values[run][c][first + quad], uload(values + size_t(quad) * size_t(dim_pad) * 4 + size_t(c) * 64));
    }
}

// Into the nearest cache: a tile's loads wait for each other.
PM_INLINE void near_lines(const uint8_t* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 3);
}

// Integer sums of a batch's queries against the pages of a split, a page at a time. C: times 64 dims. Tiles 0..3 hold the
// queries, 4 keys, 6 sums; value_tiles takes all of them, so each batch's queries are loaded anew.
template <int C> struct ScoreTiles {
    TileState& t;
    const HeadPages& pages;
    const int base;
    SplitBatch* batch = nullptr;
    int r0 = 0, page = 0, end = 0;

    void begin(SplitBatch& b, int first_row, SplitRange range) {
        batch = &b;
        r0 = first_row;
        page = range.page0;
        end = range.page1;
    }
    void load_queries() const {
        const int8_t* q = t.q_bytes[r0];
        PM_TILE_LOAD(0, q, kMaxDim);
        if constexpr (C > 1) PM_TILE_LOAD(1, q + 64, kMaxDim);
        if constexpr (C > 2) PM_TILE_LOAD(2, q + 128, kMaxDim);
        if constexpr (C > 3) PM_TILE_LOAD(3, q + 192, kMaxDim);
    }
    inline __attribute__((always_inline)) void one() {
        if (page >= end) return;
        t.ahead.keys(page, 1, nullptr);
        if (page + 2 < end) near_lines(pages.at(page + 2), size_t(C) * 1024);
        const uint8_t* keys = pages.at(page);
        PM_TILE_LOAD(6, t.start[r0], 64);
        PM_TILE_LOAD(4, keys, 64);
        _tile_dpbsud(6, 0, 4);
        if constexpr (C > 1) {
            PM_TILE_LOAD(4, keys + 1024, 64);
            _tile_dpbsud(6, 1, 4);
        }
        if constexpr (C > 2) {
            PM_TILE_LOAD(4, keys + 2048, 64);
            _tile_dpbsud(6, 2, 4);
        }
        if constexpr (C > 3) {
            PM_TILE_LOAD(4, keys + 3072, 64);
            _tile_dpbsud(6, 3, 4);
        }
        _tile_stored(6, batch->scores[page - base / kPage], 64);
        page++;
    }
    void rest() {
        while (page < end) one();
    }
};

// Both bytes of a batch's weights times values, TWO runs of 16 columns at a time. Tiles 0..3 hold sums, 4 and 5 weights, 6 and
// 7 values.
template <bool TWO> static void value_tiles(TileState& t, SplitBatch& b, int rows, int run0, int run1, int dim_pad, int column) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int run = run0; run < run1; run++) {
        PM_TILE_LOAD(4, b.high[0] + run * kRun, kSplit);
        PM_TILE_LOAD(6, t.values[run][column], 64);
        _tile_dpbusd(0, 4, 6);
        PM_TILE_LOAD(5, b.low[0] + run * kRun, kSplit);
        _tile_dpbusd(1, 5, 6);
        if constexpr (TWO) {
            PM_TILE_LOAD(7, t.values[run][column + 1], 64);
            _tile_dpbusd(2, 4, 7);
            _tile_dpbusd(3, 5, 7);
        }
    }
    _tile_stored(0, t.sums[0], 64);
    _tile_stored(1, t.sums[1], 64);
    if constexpr (TWO) {
        _tile_stored(2, t.sums[2], 64);
        _tile_stored(3, t.sums[3], 64);
    }
    for (int i = 0; i < (TWO ? 2 : 1); i++)
        for (int r = 0; r < rows; r++) {
            I high, low;
            std::memcpy(&high, t.sums[2 * i][r], sizeof high);
            std::memcpy(&low, t.sums[2 * i + 1][r], sizeof low);
            fstore(b.out + r * dim_pad + (column + i) * kLanes, fmul(itof(ijoin(high, low)), fset(b.weight[r])));
        }
}

// The largest of all lanes, in each.
PM_INLINE F peak_everywhere(F x) {
    x = fmax2(x, fswap<8>(x));
    x = fmax2(x, fswap<4>(x));
    x = fmax2(x, fswap<2>(x));
    return fmax2(x, fswap<1>(x));
}

// Scores of slots [FROM, TO) of a row that sees a whole split take the place of their integer sums; peaks: their largest.
template <int FROM, int TO> PM_INLINE void score_slots(const TileState& t, SplitBatch& b, int r, F (&peaks)[2]) {
#pragma GCC unroll 16
    for (int slot = FROM; slot < TO; slot++) {
        I sum;
        std::memcpy(&sum, b.scores[slot][r], sizeof sum);
        const F score = fmul(itof(sum), fload(t.key_scale[slot]));
        fstore(b.scores[slot][r], score);
        peaks[slot % 2] = slot < 2 ? score : fmax2(peaks[slot % 2], score);
    }
}

// A run of such a row becomes weights.
PM_INLINE void weigh_run(SplitBatch& b, int r, int run, F top, F unit, const RowScales& scales, F (&sums)[4]) {
    F weights[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const F p = fexp2_near(fmul(fsub(fload(b.scores[run * 4 + i][r]), top), unit));
        sums[i] = fadd(sums[i], p);
        weights[i] = fmla(p, fload(scales.scale[run * 4 + i]), fset(kRoundWeight));
    }
    store_halves(b.high[r] + run * kRun, b.low[r] + run * kRun, weights[0], weights[1], weights[2], weights[3]);
}

// weigh_row for rows that all see a whole split, from their integer sums on: a row's largest score is found while the row before
// is weighed.
template <int C>
static void weigh_whole_rows(const TileState& t, SplitBatch& b, int r0, int rows, RowScales& scales, ScoreTiles<C>& next) {
    F peaks[2];
    score_slots<0, kSplitPages>(t, b, 0, peaks);
    F top = peak_everywhere(fmax2(peaks[0], peaks[1]));
    for (int r = 0; r < rows; r++) {
        const int after = r + 1;
        const F unit = fset(t.q_scale[r0 + r]);
        F sums[4] = {fzero(), fzero(), fzero(), fzero()};
        weigh_run(b, r, 0, top, unit, scales, sums);
        if (after < rows) score_slots<0, 6>(t, b, after, peaks);
        weigh_run(b, r, 1, top, unit, scales, sums);
        if (after < rows) score_slots<6, 11>(t, b, after, peaks);
        weigh_run(b, r, 2, top, unit, scales, sums);
        if (after < rows) score_slots<11, kSplitPages>(t, b, after, peaks);
        const F upcoming = peak_everywhere(fmax2(peaks[0], peaks[1]));
        weigh_run(b, r, 3, top, unit, scales, sums);
        end_row(b, r, ffirst(top), t.q_scale[r0 + r], scales.most, sums);
        top = upcoming;
        next.one();
    }
}

// Any other row.
static void weigh_part_row(const TileState& t, SplitBatch& b, int r0, int r, SplitRange range, int base, float scale, float softcap, RowScales& scales) {
    F peak = fset(kMasked);
    for (int page = range.page0; page < range.page1; page++) {
        const int slot = page - base / kPage;
        I sum;
        std::memcpy(&sum, b.scores[slot][r], sizeof sum);
        F y = score_of(t, r0 + r, sum, fload(t.key_scale[slot]), scale, softcap);
        y = seen(t, r0 + r, page * kPage, y, fset(kMasked));
        peak = fmax2(peak, y);
        fstore(b.scores[slot][r], y);
    }
    weigh_any_row(t, b, r0, r, range, base, fpeak(peak), score_unit(t, r0 + r, softcap), scales);
}

// The integer sums of a batch become weights, while tiles score the next one.
template <int C>
static void weigh_batch(const TileState& t, SplitBatch& b, int r0, int rows, SplitRange range, int base, float scale, float softcap, ScoreTiles<C>& next) {
    bool whole = softcap <= 0.0f && range.page1 - range.page0 == kSplitPages;
    for (int r = 0; r < rows; r++) whole = whole && sees_all(t, r0 + r, range);
    RowScales scales;
    if (whole) {
        scales.see(t, r0, range, base);
        return weigh_whole_rows(t, b, r0, rows, scales, next);
    }
    for (int r = 0; r < rows; r++) {
        weigh_part_row(t, b, r0, r, range, base, scale, softcap, scales);
        next.one();
    }
}

// One split of all rows of a task in batches of 16; scales and values are gathered. done(batch, r0, rows) takes a batch's
// maxima, sums and output.
template <int C, class Done>
static void attend_tiles(TileState& t, int num_rows, const HeadPages& pages, int split, int dim_pad, float scale, float softcap, const Done& done) {
    const int base = split * kSplit, columns = dim_pad / kLanes;
    const auto rows_from = [&](int r0) { return num_rows - r0 < kBatch ? num_rows - r0 : kBatch; };
    ScoreTiles<C> scores{t, pages, base};
    SplitRange range = split_range(t, 0, rows_from(0), split);
    scores.begin(t.batches[0], 0, range);
    scores.load_queries();
    scores.rest();
    for (int r0 = 0, turn = 0; r0 < num_rows; r0 += kBatch, turn ^= 1) {
        SplitBatch& b = t.batches[turn];
        const int rows = rows_from(r0), after = r0 + kBatch;
        SplitRange next{};
        if (after < num_rows) {
            next = split_range(t, after, rows_from(after), split);
            scores.begin(t.batches[turn ^ 1], after, next);
            scores.load_queries();
        }
        if (range.page0 < range.page1) {
            weigh_batch(t, b, r0, rows, range, base, scale, softcap, scores);
            scores.rest();
            const int run0 = (range.page0 * kPage - base) / kRun, run1 = (range.page1 * kPage - base + kRun - 1) / kRun;
            for (int column = 0; column + 2 <= columns; column += 2) value_tiles<true>(t, b, rows, run0, run1, dim_pad, column);
            if (columns % 2) value_tiles<false>(t, b, rows, run0, run1, dim_pad, columns - 1);
        } else {
            for (int r = 0; r < rows; r++) b.max[r] = kMasked;
            scores.rest();
        }
        done(b, r0, rows);
        range = next;
    }
}

template <class Done>
static __attribute__((noinline)) void attend_split_tiles(TileState& t, int num_rows, const HeadPages& pages, int split, int dim_pad, float scale, float softcap, const Done& done) {
    switch ((dim_pad + 63) / 64) {
        case 1: return attend_tiles<1>(t, num_rows, pages, split, dim_pad, scale, softcap, done);
        case 2: return attend_tiles<2>(t, num_rows, pages, split, dim_pad, scale, softcap, done);
        case 3: return attend_tiles<3>(t, num_rows, pages, split, dim_pad, scale, softcap, done);
        default: return attend_tiles<4>(t, num_rows, pages, split, dim_pad, scale, softcap, done);
    }
}

#endif

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
