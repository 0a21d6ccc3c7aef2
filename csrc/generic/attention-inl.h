// Attention over pages. A row is one query head of one position; a tile is up to kTileRows rows of one KV head, whose keys
// and values are read once for all of them. Each row's arithmetic depends on the row and on absolute positions alone:
// splits of 256 positions with their own maximum, merged in order. Here: the state of a tile, floating-point pages.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

struct HeadPages {  // pages of one sequence, layer and KV head
    const uint8_t* base;
    size_t block_bytes, page_bytes;
    const int32_t* table;
    int pages_per_block;
    const uint8_t* at(int page) const {
        return base + size_t(table[page / pages_per_block]) * block_bytes + size_t(page % pages_per_block) * page_bytes;
    }
};

// Pages that are attended to next, some way ahead of those that are: the rest of this task's, then the next one's. They are
// asked for while the present ones are computed, keys with keys and values with values.
struct Ahead {
    static constexpr int kDistance = 16;  // pages
    struct Part {
        HeadPages pages{};
        int first = 0, end = 0, key_page = 0, value_page = 0;
    };
    Part now, next;
    size_t value_offset = 0;
    bool beside = false;  // ask line by line between the lines that are read: where these are read once, for all rows of a task
    const AttentionTask* upcoming = nullptr;  // that `next` is of

    static void line(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }
    static void lines(const uint8_t* from, size_t bytes) {
        for (size_t i = 0; i < bytes; i += 64) line(from + i);
    }
    // A page that is wanted next, while page `at` is read; null where nothing is.
    const uint8_t* take(int Part::* page, int at) {
        const int rest = now.end > at ? now.end - at : 0;
        if (now.*page < now.end) return now.*page < at + kDistance ? now.pages.at((now.*page)++) : nullptr;
        if (next.*page < next.end && next.*page < next.first + kDistance - rest) return next.pages.at((next.*page)++);
        return nullptr;
    }
    // How many pages to ask for while `count` from `at` on are read: twice as many, so that the distance is soon reached, and
    // with a task's last ones all that is missing, since the task may be short.
    int pace(int at, int count) const { return at + count >= now.end ? kDistance : 2 * count; }
    // What is wanted while `count` pages from `at` on are read. With `beside` the first pages, up to `room`, go to `ask`, so that
    // no line that is read waits behind a page of others; the rest is asked for here. `ask` stays where nothing is wanted.
    void want(int Part::*part, int at, int count, const uint8_t** ask, int room, size_t from, size_t bytes) {
        for (int left = pace(at, count); left > 0; left--, room--) {
            const uint8_t* page = take(part, at + count - 1);
            if (!page) return;
            if (beside && room > 0) *ask++ = page + from;
            else lines(page + from, bytes);
        }
    }
    void keys(int at, int count, const uint8_t** ask) { want(&Part::key_page, at, count, ask, count, 0, value_offset); }
    void values(int at, const uint8_t** ask) {
        want(&Part::value_page, at, 1, ask, 1, value_offset, now.pages.page_bytes - value_offset);  // both parts are of one layer
    }
};

constexpr int kSplitPages = kSplit / kPage;
constexpr int kRun = 64;            // positions that a tile multiplies with values at once
constexpr int kSplitRuns = kSplit / kRun;
constexpr int kBatch = 16;          // rows of a tile that are attended at once, at most
constexpr int kMaxDim = 256;

// One split of one batch of rows.
struct SplitBatch {
    alignas(64) float scores[kSplitPages][kBatch][kLanes];   // then probabilities
    alignas(64) uint8_t high[kBatch][kSplit], low[kBatch][kSplit];  // int8: probabilities times value scales, 16 bits
    alignas(64) float weight[kBatch];                        // int8: what one of their units stands for
    alignas(64) float max[kBatch], sum[kBatch];
    alignas(64) float out[kBatch * kMaxDim];                 // [row][dim_pad]
};

struct TileState {
    // The rows of a task.
    alignas(64) float q[kMaxDim][kTileRows];                 // floating-point pages
    alignas(64) int8_t q_bytes[kTileRows][kMaxDim];          // int8 pages, zero padded to whole 64
    alignas(64) int32_t start[kTileRows][kLanes];            // int8: -128 * sum of q_bytes, since keys are stored unsigned
    alignas(64) float out[kTileRows * kMaxDim];              // [row][dim_pad]
    alignas(64) float max[kTileRows + kBatch], sum[kTileRows], q_scale[kTileRows];
    int from[kTileRows], to[kTileRows];                      // positions that the row sees
    SplitBatch batches[2];                                   // tiles score one while the other is weighed
    // One split of all rows.
    const uint8_t* page[kSplitPages];                        // int8
    alignas(64) float key_scale[kSplitPages][kLanes], value_scale[kSplitPages][kLanes];
    alignas(64) int8_t values[kSplitRuns][kMaxDim / kLanes][kBatch][64];  // tiles: [run][16 columns][4 positions][column, position]
    alignas(64) int32_t sums[4][kBatch][kLanes];
    Ahead ahead;
};

template <Codec C> PM_INLINE F load_kv(const uint8_t* p, int index) {
    if constexpr (C == Codec::f32) return fload(reinterpret_cast<const float*>(p) + index);
    else if constexpr (C == Codec::f16) return fload_f16(reinterpret_cast<const uint16_t*>(p) + index);
    else return fload_bf16(reinterpret_cast<const uint16_t*>(p) + index);
}
template <Codec C> constexpr int value_bytes() { return C == Codec::f32 ? 4 : 2; }
template <Codec C> constexpr bool begins_line(int index) { return index * value_bytes<C>() % 64 == 0; }

PM_INLINE F scaled_score(F dot, float scale, float softcap) {
    if (softcap > 0.0f) return fmul(fset(softcap * kLog2e), ftanh(fmul(dot, fset(scale / softcap))));
    return fmul(dot, fset(scale * kLog2e));
}

// Scores of R rows against P pages, in log2 units; the row maxima of this split. BESIDE: as in Ahead.
template <Codec C, int R, int P, bool BESIDE>
static void score_pages(TileState& t, SplitBatch& b, int r0, const HeadPages& pages, int page, int base, int head_dim, float scale, float softcap, F (&peak)[R]) {
    const uint8_t *k[P], *ask[P];
    for (int p = 0; p < P; p++) ask[p] = k[p] = pages.at(page + p);
    t.ahead.keys(page, P, ask);
    F acc[R][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) acc[r][p] = fzero();
    for (int d = 0; d < head_dim; d++) {
        F key[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            key[p] = load_kv<C>(k[p], d * kPage);
            if (BESIDE && begins_line<C>(d * kPage)) Ahead::line(ask[p] + d * kPage * value_bytes<C>());
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const F x = fset(t.q[d][r0 + r]);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) acc[r][p] = fmla(x, key[p], acc[r][p]);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
        const int first_position = (page + p) * kPage;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            F s = scaled_score(acc[r][p], scale, softcap);
            s = fselect(t.from[r0 + r] - first_position, t.to[r0 + r] - first_position, s, fset(kMasked));
            peak[r] = fmax2(peak[r], s);
            fstore(b.scores[page + p - base / kPage][r], s);
        }
    }
}

// asked: with BESIDE, for each page of the split, the values to ask for beside its own.
template <Codec C, int R, int V, bool BESIDE>
static void weigh_values(TileState& t, SplitBatch& b, const HeadPages& pages, const uint8_t* const* asked, int base, int from, int to, int dim_pad, int column) {
    F acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[r][v] = fzero();
    for (int position = from; position < to;) {
        const uint8_t* values = pages.at(position / kPage) + size_t(dim_pad) * kPage * value_bytes<C>();
        const uint8_t* ask = asked[position / kPage - base / kPage];
        if constexpr (!BESIDE) t.ahead.values(position / kPage, nullptr);
        const int end = to < (position / kPage + 1) * kPage ? to : (position / kPage + 1) * kPage;
        for (; position < end; position++) {
            F value[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                const int index = (position % kPage) * dim_pad + column + v * kLanes;
                value[v] = load_kv<C>(values, index);
                if (BESIDE && begins_line<C>(index)) Ahead::line(ask + index * value_bytes<C>());
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const F p = fset(b.scores[(position - base) / kPage][r][position % kPage]);
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) acc[r][v] = fmla(p, value[v], acc[r][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) fstore(&b.out[r * dim_pad + column + v * kLanes], acc[r][v]);
}

// Positions [from, to) and pages [page0, page1) of a split that any row of the tile sees.
struct SplitRange {
    int from, to, page0, page1;
};
PM_INLINE SplitRange split_range(const TileState& t, int r0, int rows, int split) {
    const int base = split * kSplit;
    int from = base + kSplit, to = base;
    for (int r = 0; r < rows; r++) {
        from = t.from[r0 + r] < from ? t.from[r0 + r] : from;
        to = t.to[r0 + r] > to ? t.to[r0 + r] : to;
    }
    from = from < base ? base : from;
    to = to > base + kSplit ? base + kSplit : to;
    return {from, to, from / kPage, (to + kPage - 1) / kPage};
}

// One split: fills maximum, sum and output of R rows.
template <Codec C, int R, bool BESIDE>
static __attribute__((noinline)) void attend_split(TileState& t, SplitBatch& b, int r0, const HeadPages& pages, SplitRange range, int base, const LayerKv& kv, float scale, float softcap) {
    const auto [from, to, page0, page1] = range;
    F peak[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) peak[r] = fset(kMasked);
    constexpr int pair = R <= 3 ? 2 : 1;
    int page = page0;
    for (; page + pair <= page1; page += pair) score_pages<C, R, pair, BESIDE>(t, b, r0, pages, page, base, kv.head_dim, scale, softcap, peak);
    if constexpr (pair > 1) {
        if (page < page1) score_pages<C, R, 1, BESIDE>(t, b, r0, pages, page, base, kv.head_dim, scale, softcap, peak);
    }
    for (int r = 0; r < R; r++) {
        const float top = fpeak(peak[r]);
        F sum = fzero();
        for (int position = page0 * kPage; position < page1 * kPage; position += kPage) {
            float* s = b.scores[(position - base) / kPage][r];
            F p = fexp2_below(fsub(fload(s), fset(top)));
            if (t.from[r0 + r] > position || t.to[r0 + r] < position + kPage)
                p = fselect(t.from[r0 + r] - position, t.to[r0 + r] - position, p, fzero());
            sum = fadd(sum, p);
            fstore(s, p);
        }
        b.max[r] = top;
        b.sum[r] = fsum(sum);
    }
    const uint8_t* asked[kSplitPages] = {};
    for (int at = page0; BESIDE && at < page1; at++) {
        asked[at - base / kPage] = pages.at(at) + size_t(kv.dim_pad) * kPage * value_bytes<C>();
        t.ahead.values(at, asked + (at - base / kPage));
    }
    int column = 0;
    for (; column + kValueVectors * kLanes <= kv.dim_pad; column += kValueVectors * kLanes)
        weigh_values<C, R, kValueVectors, BESIDE>(t, b, pages, asked, base, from, to, kv.dim_pad, column);
    if constexpr (kValueVectors > 1) {
        for (; column < kv.dim_pad; column += kLanes) weigh_values<C, R, 1, BESIDE>(t, b, pages, asked, base, from, to, kv.dim_pad, column);
    }
}

// state (max, sum, out) takes in one split's result.
PM_INLINE void merge_split(float* max, float* sum, float* out, float split_max, float split_sum, const float* split_out, int dim_pad) {
    if (split_max <= kMasked) return;  // the row sees nothing of this split
    const float top = *max > split_max ? *max : split_max;
    const float keep = exp2_scalar(*max - top), add = exp2_scalar(split_max - top);
    *sum = *sum * keep + split_sum * add;
    *max = top;
    const F k = fset(keep), a = fset(add);
    for (int c = 0; c < dim_pad; c += kLanes) fstore(out + c, fmla(fload(split_out + c), a, fmul(fload(out + c), k)));
}

// The same for a batch: rows from r0 on of the task take in theirs.
static void merge_batch(TileState& t, const SplitBatch& b, int r0, int rows, int dim_pad) {
    const F before = fload(t.max + r0), after = fload(b.max), top = fmax2(before, after);
    alignas(64) float tops[kBatch], keeps[kBatch], adds[kBatch];
    fstore(tops, top);
    fstore(keeps, fexp2(fsub(before, top)));
    fstore(adds, fexp2(fsub(after, top)));
    for (int r = 0; r < rows; r++) {
        if (b.max[r] <= kMasked) continue;
        t.sum[r0 + r] = t.sum[r0 + r] * keeps[r] + b.sum[r] * adds[r];
        t.max[r0 + r] = tops[r];
        float* out = t.out + (r0 + r) * dim_pad;
        const float* added = b.out + r * dim_pad;
        const F keep = fset(keeps[r]), add = fset(adds[r]);
        for (int c = 0; c < dim_pad; c += kLanes) fstore(out + c, fmla(fload(added + c), add, fmul(fload(out + c), keep)));
    }
}

// One split of `rows` rows from r0 on, at most R.
template <Codec C, int R>
static void attend_from(int rows, TileState& t, SplitBatch& b, int r0, const HeadPages& pages, SplitRange range, int base, const LayerKv& kv, float scale, float softcap) {
    if constexpr (R > 1) {
        if (rows < R) return attend_from<C, R - 1>(rows, t, b, r0, pages, range, base, kv, scale, softcap);
    }
    if (t.ahead.beside) attend_split<C, R, true>(t, b, r0, pages, range, base, kv, scale, softcap);
    else attend_split<C, R, false>(t, b, r0, pages, range, base, kv, scale, softcap);
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
