// Attention over int8 pages on AMX tiles (Intel SDM, TMUL): 16 rows at once. The integer sums are those of
// attention-int8-inl.h, so the bits are too. A page's keys are a tile as they lie: [16 quads of dims][16 positions][4]; the
// values of a run of 64 positions are gathered into tiles of 16 columns. Targets without AMX compile nothing of it.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

#ifdef PAGEMILL_AMX

constexpr int kFewRows = 7;  // up to here a tile's idle rows cost more than the vector unit does

// Tiles read 64 dims of keys at a time; what lies behind the last is values of the same page, times zero.
static bool tiles_read(int dim_pad) { return dim_pad >= 32; }

static void gather_values(TileState& t, const HeadPages& pages, SplitRange range, int base, int dim_pad) {
    for (int page = range.page0; page < range.page1; page++) {
        t.ahead.values(1);
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

// Integer sums of 16 rows against the pages of the range, C times 64 dims, into t.scores. Two pages at a time, so that the
// second product covers the first one's way into memory.
template <int C, bool TWO> static void score_page_tiles(TileState& t, int r0, const HeadPages& pages, int page, int base) {
    const uint8_t *keys = pages.at(page), *more = pages.at(TWO ? page + 1 : page);
    PM_TILE_LOAD(6, t.start[r0], 64);
    PM_TILE_LOAD(4, keys, 64);
    _tile_dpbsud(6, 0, 4);
    if constexpr (TWO) {
        PM_TILE_LOAD(7, t.start[r0], 64);
        PM_TILE_LOAD(5, more, 64);
        _tile_dpbsud(7, 0, 5);
    }
    if constexpr (C > 1) {
        PM_TILE_LOAD(4, keys + 1024, 64);
        _tile_dpbsud(6, 1, 4);
        if constexpr (TWO) {
            PM_TILE_LOAD(5, more + 1024, 64);
            _tile_dpbsud(7, 1, 5);
        }
    }
    if constexpr (C > 2) {
        PM_TILE_LOAD(4, keys + 2048, 64);
        _tile_dpbsud(6, 2, 4);
        if constexpr (TWO) {
            PM_TILE_LOAD(5, more + 2048, 64);
            _tile_dpbsud(7, 2, 5);
        }
    }
    if constexpr (C > 3) {
        PM_TILE_LOAD(4, keys + 3072, 64);
        _tile_dpbsud(6, 3, 4);
        if constexpr (TWO) {
            PM_TILE_LOAD(5, more + 3072, 64);
            _tile_dpbsud(7, 3, 5);
        }
    }
    _tile_stored(6, t.scores[page - base / kPage], 64);
    if constexpr (TWO) _tile_stored(7, t.scores[page + 1 - base / kPage], 64);
}

template <int C> static void score_tiles(TileState& t, int r0, const HeadPages& pages, SplitRange range, int base) {
    const int8_t* q = t.q_bytes[r0];
    PM_TILE_LOAD(0, q, kMaxDim);
    if constexpr (C > 1) PM_TILE_LOAD(1, q + 64, kMaxDim);
    if constexpr (C > 2) PM_TILE_LOAD(2, q + 128, kMaxDim);
    if constexpr (C > 3) PM_TILE_LOAD(3, q + 192, kMaxDim);
    int page = range.page0;
    for (; page + 2 <= range.page1; page += 2) {
        t.ahead.keys(2);
        for (int next = page + 4; next < page + 6 && next < range.page1; next++) near_lines(pages.at(next), size_t(C) * 1024);
        score_page_tiles<C, true>(t, r0, pages, page, base);
    }
    if (page < range.page1) score_page_tiles<C, false>(t, r0, pages, page, base);
}

// Sums of one row become scores in log2 units; their maximum.
template <bool EDGES, bool CAP> static float scale_row(TileState& t, int r0, int r, SplitRange range, int base, float scale, float softcap) {
    const F row_scale = fset(t.q_scale[r0 + r]), factor = fset(scale * kLog2e);
    F peak = fset(kMasked);
    const int slot1 = range.page1 - base / kPage;
    for (int slot = range.page0 - base / kPage; slot < slot1; slot++) {
        I sum;
        std::memcpy(&sum, t.scores[slot][r], sizeof sum);
        F y = fmul(fmul(itof(sum), fload(t.key_scale[slot])), row_scale);
        if constexpr (CAP) y = scaled_score(y, scale, softcap);
        else y = fmul(y, factor);
        if constexpr (EDGES) y = seen(t, r0 + r, base + slot * kPage, y, fset(kMasked));
        peak = fmax2(peak, y);
        fstore(t.scores[slot][r], y);
    }
    return fpeak(peak);
}

// The rows' scores and maxima; rows that see all of the range need no masks.
static void scale_scores(TileState& t, int r0, int rows, SplitRange range, int base, float scale, float softcap) {
    for (int r = 0; r < rows; r++) {
        const bool whole = t.from[r0 + r] <= range.page0 * kPage && t.to[r0 + r] >= range.page1 * kPage;
        if (softcap > 0.0f) t.split_max[r] = scale_row<true, true>(t, r0, r, range, base, scale, softcap);
        else if (whole) t.split_max[r] = scale_row<false, false>(t, r0, r, range, base, scale, softcap);
        else t.split_max[r] = scale_row<true, false>(t, r0, r, range, base, scale, softcap);
    }
}

// Probabilities of 16 rows times 16 columns of values, a tile for each run. Runs outside the range are skipped.
static void value_tiles(TileState& t, int column, int run0, int run1) {
    if (run0 <= 0) {
        _tile_zero(6);
        PM_TILE_LOAD(4, t.values[0][column], 64);
        _tile_dpbusd(6, 0, 4);
    }
    if (run0 <= 1 && run1 > 1) {
        _tile_zero(7);
        PM_TILE_LOAD(5, t.values[1][column], 64);
        _tile_dpbusd(7, 1, 5);
    }
    if (run0 <= 0) _tile_stored(6, t.sums[0], 64);
    if (run0 <= 2 && run1 > 2) {
        _tile_zero(6);
        PM_TILE_LOAD(4, t.values[2][column], 64);
        _tile_dpbusd(6, 2, 4);
    }
    if (run0 <= 1 && run1 > 1) _tile_stored(7, t.sums[1], 64);
    if (run1 > 3) {
        _tile_zero(7);
        PM_TILE_LOAD(5, t.values[3][column], 64);
        _tile_dpbusd(7, 3, 5);
    }
    if (run0 <= 2 && run1 > 2) _tile_stored(6, t.sums[2], 64);
    if (run1 > 3) _tile_stored(7, t.sums[3], 64);
}

template <int RUNS> static void add_runs(TileState& t, int rows, int run0, int dim_pad, int column) {
    for (int r = 0; r < rows; r++) {
        F out = fzero();
#pragma GCC unroll 4
        for (int i = 0; i < RUNS; i++) {
            I sum;
            std::memcpy(&sum, t.sums[run0 + i][r], sizeof sum);
            out = fmla(itof(sum), fset(t.p_scale[r * kSplitRuns + run0 + i]), out);
        }
        fstore(t.split_out + r * dim_pad + column * kLanes, out);
    }
}

// The runs' sums, scaled and added up in their order.
static void weigh_values_tiles(TileState& t, int rows, SplitRange range, int base, int dim_pad) {
    const int run0 = (range.page0 * kPage - base) / kRun, run1 = (range.page1 * kPage - base + kRun - 1) / kRun;
    const uint8_t* p = t.p[0];
    PM_TILE_LOAD(0, p, kSplit);
    PM_TILE_LOAD(1, p + kRun, kSplit);
    PM_TILE_LOAD(2, p + 2 * kRun, kSplit);
    PM_TILE_LOAD(3, p + 3 * kRun, kSplit);
    for (int column = 0; column < dim_pad / kLanes; column++) {
        value_tiles(t, column, run0, run1);
        switch (run1 - run0) {
            case 4: add_runs<4>(t, rows, run0, dim_pad, column); break;
            case 3: add_runs<3>(t, rows, run0, dim_pad, column); break;
            case 2: add_runs<2>(t, rows, run0, dim_pad, column); break;
            default: add_runs<1>(t, rows, run0, dim_pad, column); break;
        }
    }
}

// One split of up to 16 rows from r0 on; scales and values are gathered.
static __attribute__((noinline)) void attend_split_tiles(TileState& t, int r0, int rows, const HeadPages& pages, SplitRange range, int base, int dim_pad, float scale, float softcap) {
    switch ((dim_pad + 63) / 64) {
        case 1: score_tiles<1>(t, r0, pages, range, base); break;
        case 2: score_tiles<2>(t, r0, pages, range, base); break;
        case 3: score_tiles<3>(t, r0, pages, range, base); break;
        default: score_tiles<4>(t, r0, pages, range, base); break;
    }
    scale_scores(t, r0, rows, range, base, scale, softcap);
    weigh_rows(t, r0, rows, range, base);
    weigh_values_tiles(t, rows, range, base, dim_pad);
}

#endif

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
