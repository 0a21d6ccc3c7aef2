// Attention over int8 pages on AMX tiles (Intel SDM, TMUL): 16 rows at once. The integer sums are those of
// attention-int8-inl.h, so the bits are too. A page's keys are a tile as they lie: [16 quads of dims][16 positions][4]; the
// values of a run of 64 positions are gathered into tiles of 16 columns. Tiles and the vector unit work at the same time: while
// one batch of rows is exponentiated, the scores of the next and the output of the one before are multiplied. Targets
// without AMX compile nothing of it.
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

// Integer sums of a batch's queries against the pages of a split, a page at a time. C: times 64 dims. Tiles 0..3 hold the
// queries, 4 keys, 6 sums.
template <int C> struct ScoreTiles {
    TileState& t;
    const HeadPages& pages;
    const int base;
    SplitBatch* batch = nullptr;
    int r0 = 0, page = 0, end = 0;

    int left() const { return end > page ? end - page : 0; }
    void begin(SplitBatch& b, int first_row, SplitRange range) {
        batch = &b;
        r0 = first_row;
        page = range.page0;
        end = range.page1;
        const int8_t* q = t.q_bytes[r0];
        PM_TILE_LOAD(0, q, kMaxDim);
        if constexpr (C > 1) PM_TILE_LOAD(1, q + 64, kMaxDim);
        if constexpr (C > 2) PM_TILE_LOAD(2, q + 128, kMaxDim);
        if constexpr (C > 3) PM_TILE_LOAD(3, q + 192, kMaxDim);
    }
    inline __attribute__((always_inline)) void some(int count) {
        for (; count > 0 && page < end; count--, page++) {
            t.ahead.keys(1);
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
        }
    }
};

// A batch's probabilities times values, a run of 16 columns at a time; the runs' sums, scaled and added up in their order,
// are its output. Tiles 4 and 5 hold values and probabilities, 7 sums.
struct ValueTiles {
    TileState& t;
    const int dim_pad;
    SplitBatch* batch = nullptr;
    int rows = 0, run0 = 0, runs = 0, column = 0, run = 0;

    int left() const { return batch ? runs * (dim_pad / kLanes - column) - run : 0; }
    void begin(SplitBatch& b, int num_rows, SplitRange range, int base) {
        batch = &b;
        rows = num_rows;
        run0 = (range.page0 * kPage - base) / kRun;
        runs = range.page1 > range.page0 ? (range.page1 * kPage - base + kRun - 1) / kRun - run0 : 0;
        column = run = 0;
    }
    inline __attribute__((always_inline)) void some(int count) {
        for (; count > 0 && column * kLanes < dim_pad; count--) {
            const uint8_t* p = batch->p[0] + (run0 + run) * kRun;
            PM_TILE_LOAD(5, p, kSplit);
            PM_TILE_LOAD(4, t.values[run0 + run][column], 64);
            _tile_zero(7);
            _tile_dpbusd(7, 5, 4);
            _tile_stored(7, t.sums[column & 1][run], 64);
            if (++run < runs) continue;
            run = 0;
            if (column++ > 0) add(column - 2);
        }
    }
    void finish() {
        if (runs == 0) return;
        some(left());
        add(column - 1);
    }
    void add(int at) const {
        switch (runs) {
            case 4: return add_runs<4>(at);
            case 3: return add_runs<3>(at);
            case 2: return add_runs<2>(at);
            default: return add_runs<1>(at);
        }
    }
    template <int RUNS> void add_runs(int at) const {
        for (int r = 0; r < rows; r++) {
            F out = fzero();
#pragma GCC unroll 4
            for (int i = 0; i < RUNS; i++) {
                I sum;
                std::memcpy(&sum, t.sums[at & 1][i][r], sizeof sum);
                out = fmla(itof(sum), fset(batch->p_scale[r * kSplitRuns + run0 + i]), out);
            }
            fstore(batch->out + r * dim_pad + at * kLanes, out);
        }
    }
};

// Lane i of the result is what fpeak, fsum would make of x[i], their additions in the same tree.
template <bool SUM> PM_INLINE F reduce_rows(const F* x) {
    const auto join = [](F a, F b) { return SUM ? fadd(a, b) : fmax2(a, b); };
    F half[8], quarter[4], eighth[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)  // 8 lanes of row i, 8 of row i + 8
        half[i] = join(_mm512_shuffle_f32x4(x[i], x[i + 8], 0x44), _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)  // 4 lanes each of rows i, i + 8, i + 4, i + 12
        quarter[i] = join(_mm512_shuffle_f32x4(half[i], half[i + 4], 0x88), _mm512_shuffle_f32x4(half[i], half[i + 4], 0xdd));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        eighth[i] = join(_mm512_shuffle_ps(quarter[i], quarter[i + 2], 0x44), _mm512_shuffle_ps(quarter[i], quarter[i + 2], 0xee));
    const F all = join(_mm512_shuffle_ps(eighth[0], eighth[1], 0x88), _mm512_shuffle_ps(eighth[0], eighth[1], 0xdd));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), all);
}

// Sums of one row become scores in log2 units; their maxima by lane.
template <bool EDGES, bool CAP>
PM_INLINE F scale_row(const TileState& t, SplitBatch& b, int r0, int r, SplitRange range, int base, float scale, float softcap) {
    const F row_scale = fset(t.q_scale[r0 + r]), factor = fset(scale * kLog2e);
    F peak = fset(kMasked);
    const int slot1 = range.page1 - base / kPage;
    for (int slot = range.page0 - base / kPage; slot < slot1; slot++) {
        I sum;
        std::memcpy(&sum, b.scores[slot][r], sizeof sum);
        F y = fmul(fmul(itof(sum), fload(t.key_scale[slot])), row_scale);
        if constexpr (CAP) y = scaled_score(y, scale, softcap);
        else y = fmul(y, factor);
        if constexpr (EDGES) y = seen(t, r0 + r, base + slot * kPage, y, fset(kMasked));
        peak = fmax2(peak, y);
        fstore(b.scores[slot][r], y);
    }
    return peak;
}

// What a batch's rows leave until they are reduced together.
struct RowLanes {
    F peaks[kBatch], sums[kBatch], runs[kBatch * kSplitRuns];
};

// The integer sums of a batch become scores, probabilities and bytes, while `scores` and `values` get on with others.
template <int C>
static void weigh_batch(TileState& t, SplitBatch& b, int r0, int rows, SplitRange range, int base, float scale, float softcap, ScoreTiles<C>& scores, ValueTiles& values) {
    const int pages_a_row = (scores.left() + 2 * rows - 1) / (2 * rows), values_a_row = (values.left() + 2 * rows - 1) / (2 * rows);
    const auto whole = [&](int r) { return t.from[r0 + r] <= range.page0 * kPage && t.to[r0 + r] >= range.page1 * kPage; };
    RowLanes lanes;
    for (int r = rows; r < kBatch; r++) lanes.peaks[r] = lanes.sums[r] = fzero();
    for (int i = rows * kSplitRuns; i < kBatch * kSplitRuns; i++) lanes.runs[i] = fzero();
    for (int r = 0; r < rows; r++) {
        if (softcap > 0.0f) lanes.peaks[r] = scale_row<true, true>(t, b, r0, r, range, base, scale, softcap);
        else if (whole(r)) lanes.peaks[r] = scale_row<false, false>(t, b, r0, r, range, base, scale, softcap);
        else lanes.peaks[r] = scale_row<true, false>(t, b, r0, r, range, base, scale, softcap);
        scores.some(pages_a_row);
        values.some(values_a_row);
    }
    fstore(b.max, reduce_rows<false>(lanes.peaks));
    for (int r = 0; r < rows; r++) {
        F* runs = lanes.runs + r * kSplitRuns;
        lanes.sums[r] = whole(r) ? exponentiate_row<false>(t, b, r0, r, range, base, runs) : exponentiate_row<true>(t, b, r0, r, range, base, runs);
        scores.some(pages_a_row);
        values.some(values_a_row);
    }
    fstore(b.sum, reduce_rows<true>(lanes.sums));
    alignas(64) float peaks[kBatch * kSplitRuns];
    for (int i = 0; i < kBatch * kSplitRuns; i += kBatch) fstore(peaks + i, reduce_rows<false>(lanes.runs + i));
    weigh_rows(b, rows, range, base, peaks);
}

// One split of all rows of a task in batches of 16; scales and values are gathered. done(batch, r0, rows) takes a batch's
// maxima, sums and output.
template <int C, class Done>
static void attend_tiles(TileState& t, int num_rows, const HeadPages& pages, int split, int dim_pad, float scale, float softcap, const Done& done) {
    const int base = split * kSplit;
    ScoreTiles<C> scores{t, pages, base};
    ValueTiles values{t, dim_pad};
    const auto rows_from = [&](int r0) { return num_rows - r0 < kBatch ? num_rows - r0 : kBatch; };
    SplitRange range = split_range(t, 0, rows_from(0), split);
    scores.begin(t.batches[0], 0, range);
    scores.some(kSplitPages);
    for (int r0 = 0, turn = 0; r0 < num_rows; r0 += kBatch, turn ^= 1) {
        SplitBatch& b = t.batches[turn];
        const int rows = rows_from(r0), after = r0 + kBatch;
        SplitRange next{};
        if (after < num_rows) {
            next = split_range(t, after, rows_from(after), split);
            scores.begin(t.batches[turn ^ 1], after, next);
        }
        if (range.page0 < range.page1) {
            weigh_batch(t, b, r0, rows, range, base, scale, softcap, scores, values);
        } else {
            for (int r = 0; r < rows; r++) b.max[r] = kMasked;
        }
        scores.some(kSplitPages);
        if (r0 > 0) {
            values.finish();
            done(*values.batch, r0 - kBatch, kBatch);
        }
        values.begin(b, rows, range, base);
        range = next;
    }
    values.finish();
    done(*values.batch, num_rows - values.rows, values.rows);
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
