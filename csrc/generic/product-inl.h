// Products y = W x of packed weights. Every output element is one chain of additions along k in a fixed order, whatever
// the tile, the number of rows or the thread (quantised formats: exact integer sums per group, groups in order).
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

// A stretch of memory.
struct Stretch {
    const uint8_t* at = nullptr;
    size_t bytes = 0;
};

struct Output {
    float* y;         // [rows][ld]
    int ld;
    bool accumulate;  // y += scale * (W x + bias) instead of y = scale * (W x + bias)
    float scale;
    Stretch then{};   // weights that are read next, behind the last panel
};

// Panels [next, end).
struct PanelRange {
    int at, end;
    int next() { return at < end ? at++ : -1; }
};

// A worker's own panels from the first on; then what is left of the others', from the last on.
struct PanelClaims {
    PanelShare* shares;  // [threads]
    int panels, threads, id, own = 0, of = id;

    int begin_of(int worker) const { return int(int64_t(panels) * worker / threads); }
    int next() {
        for (;;) {
            const int begin = begin_of(of), end = begin_of(of + 1);
            PanelShare& share = shares[of];
            if (share.taken.load(std::memory_order_relaxed) < end - begin && share.taken.fetch_add(1, std::memory_order_relaxed) < end - begin)
                return of == id ? begin + own++ : end - 1 - share.by_others.fetch_add(1, std::memory_order_relaxed);
            of = (of + 1) % threads;
            if (of == id) {
                panels = 0;  // nothing is left
                return -1;
            }
        }
    }
};

constexpr int kIntoFirst = 3, kIntoSecond = 2;  // caches, as __builtin_prefetch has them
constexpr int kStreamRows = 2;  // up to so many rows weights are one stream, fetched a little ahead; for more, panel by panel

// The panel that is read next, on its way into the cache: its lines are asked for evenly, with the steps along k of all rows.
template <int CACHE> struct Fetch {
    const uint8_t *at, *end;
    int lines, steps, due = 0;
    // panel: -1 for none; what is read behind the last one is asked for instead. steps: calls of `some` that there will be.
    Fetch(const Matrix& w, int panel, int num_steps, const Stretch& then = {}) : steps(num_steps) {
        const bool any = panel >= 0 && panel < w.panels();
        at = any ? w.data + size_t(panel) * w.panel_bytes : then.at;
        end = at + (any ? w.panel_bytes : then.bytes);
        lines = int(size_t(end - at) / 64) + 1;
    }
    inline __attribute__((always_inline)) void some() {
        if (at >= end) return;
        for (due += lines; due >= steps; due -= steps, at += 64) __builtin_prefetch(at, 0, CACHE);
    }
};

// What a tile of MR rows asks for while it reads `bytes` of weights from p on.
template <int MR> PM_INLINE void fetch_on(const uint8_t* p, int bytes, Fetch<kIntoSecond>& next) {
    if constexpr (MR <= kStreamRows) {
        for (int line = 0; line < bytes; line += 64) __builtin_prefetch(p + 4096 + line);
    } else next.some();
}

// Panels one by one, each with the one behind it, which can be fetched meanwhile; of few rows without, since what a thread has
// claimed nobody else takes.
template <class Panels> struct Following {
    Panels& panels;
    const bool ahead;
    int known = -1;  // what comes behind the present panel; -1: nothing, or not known

    Following(Panels& p, int rows) : panels(p), ahead(rows > kStreamRows) {}
    int first() {
        const int panel = panels.next();
        if (ahead && panel >= 0) known = panels.next();
        return panel;
    }
    int next() {
        const int panel = ahead ? known : panels.next();
        known = ahead && panel >= 0 ? panels.next() : -1;
        return panel;
    }
};

PM_INLINE F scaled(F value, float scale) { return scale != 1.0f ? fmul(value, fset(scale)) : value; }

PM_INLINE void store_columns(const Output& out, const Matrix& w, int row, int column, F value) {
    const int n = w.n - column;
    if (n <= 0) return;
    if (w.bias) value = fadd(value, fload_first(w.bias + column, n));
    float* y = out.y + size_t(row) * out.ld + column;
    if (out.accumulate) value = fmla(fset(out.scale), value, fload_first(y, n));
    else value = scaled(value, out.scale);
    if (n >= kLanes) fstore(y, value);
    else fstore_first(y, value, n);
}

// Both halves of a row's panel to where `Output` says.
struct StoreColumns {
    const Output* out;
    const Matrix* w;
    inline __attribute__((always_inline)) void operator()(int row, int panel, F first, F second) const {
        store_columns(*out, *w, row, panel * kPanel, first);
        store_columns(*out, *w, row, panel * kPanel + 16, second);
    }
};

PM_INLINE int quad_at(const int8_t* p) { int q; std::memcpy(&q, p, 4); return q; }

template <Format FMT> constexpr int chunk_size() { return FMT == Format::q4_0 ? 576 : FMT == Format::q4_1 ? 640 : 1088; }

// Where the sums of a group begin: what the weights' offset takes away. total: of the activations.
template <Format FMT> PM_INLINE int group_start(int total) { return FMT == Format::q4_0 ? -8 * total : FMT == Format::q8_0 ? -128 * total : 0; }

// Integer sums of one group for MR rows x 32 columns, added to s. a: each byte of the activations, [BYTES][rows][ld].
template <Format FMT, int MR, int BYTES>
PM_INLINE void group_sums(const int8_t* const (&a)[BYTES], int ld, const uint8_t* chunk, I (&s)[BYTES][MR][2]) {
    constexpr int steps = FMT == Format::q8_0 ? 8 : 4;
#pragma GCC unroll 8
    for (int j = 0; j < steps; j++) {
        if constexpr (FMT == Format::q8_0) {
            const U w0 = uload(chunk + 128 * j), w1 = uload(chunk + 128 * j + 64);
#pragma GCC unroll 2
            for (int i = 0; i < BYTES; i++)
#pragma GCC unroll 16
                for (int m = 0; m < MR; m++) {
                    const int x = quad_at(a[i] + size_t(m) * ld + 4 * j);
                    s[i][m][0] = idot(s[i][m][0], w0, x);
                    s[i][m][1] = idot(s[i][m][1], w1, x);
                }
        } else {
            const U v0 = uload(chunk + 128 * j), v1 = uload(chunk + 128 * j + 64);
            const U l0 = ulow(v0), l1 = ulow(v1), h0 = uhigh(v0), h1 = uhigh(v1);
#pragma GCC unroll 2
            for (int i = 0; i < BYTES; i++)
#pragma GCC unroll 16
                for (int m = 0; m < MR; m++) {
                    const int x = quad_at(a[i] + size_t(m) * ld + 4 * j), y = quad_at(a[i] + size_t(m) * ld + 16 + 4 * j);
                    s[i][m][0] = idot_small(s[i][m][0], l0, x);
                    s[i][m][1] = idot_small(s[i][m][1], l1, x);
                    s[i][m][0] = idot_small(s[i][m][0], h0, y);
                    s[i][m][1] = idot_small(s[i][m][1], h1, y);
                }
        }
    }
}

// W4A8 and W8A8 on groups of 32, activations of one byte or two: y = sum over groups of (isum * a_scale) * w_scale
// (+ minimum * a_scaled_sum). finish(row, panel, values of 16 columns, of the next 16).
template <Format FMT, int MR, int BYTES, class Finish>
static __attribute__((noinline)) void quant_tile(const Activations& act, int row, const Matrix& w, int panel, Fetch<kIntoSecond>& next, const Finish& finish) {
    const int8_t* a[BYTES];
    a[0] = act.i8 + size_t(row) * act.ld;
    if constexpr (BYTES == 2) a[1] = act.low + size_t(row) * act.ld;
    const int groups = w.k / kGroup, stride = act.groups();
    const float* a_scale = act.scale + size_t(row) * stride;
    const float* a_min = act.scaled_sum + size_t(row) * stride;
    const int32_t* a_sum = act.sum + size_t(row) * stride;
    const uint8_t* chunk = w.data + size_t(panel) * w.panel_bytes;
    F f[MR][2];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) f[m][0] = f[m][1] = fzero();
    for (int g = 0; g < groups; g++, chunk += chunk_size<FMT>()) {
        I s[BYTES][MR][2];  // the last byte's begin at what is taken away
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) {
            if constexpr (BYTES == 2) s[0][m][0] = s[0][m][1] = iset(0);
            s[BYTES - 1][m][0] = s[BYTES - 1][m][1] = iset(group_start<FMT>(a_sum[m * stride + g]));
        }
        fetch_on<MR>(chunk, chunk_size<FMT>(), next);
        group_sums<FMT, MR, BYTES>(a, act.ld, chunk, s);
        for (int i = 0; i < BYTES; i++) a[i] += kGroup;
        constexpr int tail = FMT == Format::q8_0 ? 1024 : 512;
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(chunk + tail);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const F d = fload_f16(scales + 16 * h);
            F low = fzero();
            if constexpr (FMT == Format::q4_1) low = fload_f16(scales + 32 + 16 * h);
#pragma GCC unroll 16
            for (int m = 0; m < MR; m++) {
                I sum = s[0][m][h];
                if constexpr (BYTES == 2) sum = ijoin(sum, s[1][m][h]);
                f[m][h] = fmla(fmul(itof(sum), fset(a_scale[m * stride + g])), d, f[m][h]);
                if constexpr (FMT == Format::q4_1) f[m][h] = fmla(low, fset(a_min[m * stride + g]), f[m][h]);
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) finish(row + m, panel, f[m][0], f[m][1]);
}

// f32 and f16 weights with f32 activations; bf16 weights with bf16 activations; f32 sums.
template <Format FMT, int MR, class Finish>
static __attribute__((noinline)) void float_tile(const Activations& act, int row, const Matrix& w, int panel, Fetch<kIntoSecond>& next, const Finish& finish) {
    const uint8_t* p = w.data + size_t(panel) * w.panel_bytes;
    F f[MR][2];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) f[m][0] = f[m][1] = fzero();
    if constexpr (FMT == Format::bf16) {
        const uint16_t* a = act.bf16 + size_t(row) * act.ld;
        for (int k = 0; k < w.k; k += 2, p += 128) {
            fetch_on<MR>(p, 128, next);
            const U w0 = uload(p), w1 = uload(p + 64);
#pragma GCC unroll 16
            for (int m = 0; m < MR; m++) {
                int pair;
                std::memcpy(&pair, a + size_t(m) * act.ld + k, 4);
                f[m][0] = fdot_bf16(f[m][0], w0, pair);
                f[m][1] = fdot_bf16(f[m][1], w1, pair);
            }
        }
    } else {
        const float* a = act.f32 + size_t(row) * act.ld;
        constexpr int step = FMT == Format::f32 ? 128 : 64;
        for (int k = 0; k < w.k; k++, p += step) {
            fetch_on<MR>(p, step, next);
            F w0, w1;
            if constexpr (FMT == Format::f32) {
                w0 = fload(reinterpret_cast<const float*>(p));
                w1 = fload(reinterpret_cast<const float*>(p) + 16);
            } else {
                w0 = fload_f16(reinterpret_cast<const uint16_t*>(p));
                w1 = fload_f16(reinterpret_cast<const uint16_t*>(p) + 16);
            }
#pragma GCC unroll 16
            for (int m = 0; m < MR; m++) {
                const F x = fset(a[size_t(m) * act.ld + k]);
                f[m][0] = fmla(w0, x, f[m][0]);
                f[m][1] = fmla(w1, x, f[m][1]);
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) finish(row + m, panel, f[m][0], f[m][1]);
}

template <Format FMT> constexpr bool is_float() { return FMT == Format::f32 || FMT == Format::f16 || FMT == Format::bf16; }

template <Format FMT, int MR, int BYTES, class Finish>
static void tile(int rows, const Activations& act, int row, const Matrix& w, int panel, Fetch<kIntoSecond>& next, const Finish& finish) {
    if constexpr (MR > 1) {
        if (rows < MR) return tile<FMT, MR - 1, BYTES>(rows, act, row, w, panel, next, finish);
    }
    if constexpr (is_float<FMT>()) float_tile<FMT, MR>(act, row, w, panel, next, finish);
    else quant_tile<FMT, MR, BYTES>(act, row, w, panel, next, finish);
}

// Rows [r0, r1) x panels: a panel stays in cache while the row tiles pass over it; rows are dealt evenly to tiles.
// then: what is read behind the last panel.
template <Format FMT, int BYTES, class Panels, class Finish>
static void product_to(const Activations& act, int r0, int r1, const Matrix& w, Panels panels, const Stretch& then, const Finish& finish) {
    constexpr int most = is_float<FMT>() ? kFloatRows : BYTES == 1 ? kRows : kFineRows;
    const int rows = r1 - r0;
    if (rows <= 0) return;
    const int tiles = (rows + most - 1) / most, steps = FMT == Format::bf16 ? (w.k + 1) / 2 : is_float<FMT>() ? w.k : w.k / kGroup;
    Following<Panels> following(panels, rows);
    for (int panel = following.first(); panel >= 0; panel = following.next()) {
        Fetch<kIntoSecond> next(w, following.known, tiles * steps, then);
        for (int t = 0; t < tiles; t++) {
            const int begin = int(int64_t(rows) * t / tiles), end = int(int64_t(rows) * (t + 1) / tiles);
            tile<FMT, most, BYTES>(end - begin, act, r0 + begin, w, panel, next, finish);
        }
    }
}

template <Format FMT, int BYTES = 1, class Panels>
static void product(const Activations& act, int r0, int r1, const Matrix& w, Panels panels, const Output& out) {
    product_to<FMT, BYTES>(act, r0, r1, w, panels, out.then, StoreColumns{&out, &w});
}

// Quantised weights, by the activations' bytes.
template <Format FMT, class Panels>
static void product_groups(const Activations& act, int r0, int r1, const Matrix& w, Panels panels, const Output& out) {
    if (act.two_bytes) product<FMT, 2>(act, r0, r1, w, panels, out);
    else product<FMT, 1>(act, r0, r1, w, panels, out);
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
