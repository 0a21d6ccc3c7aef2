// The largest logit of each row, where no other is wanted: most of the vocabulary is ruled out by half of the arithmetic.
//
// A row of activations is x = 256 * high + low in each group of 32, with one scale (prepare-inl.h). Its high bytes alone make
// a coarse logit, which differs from the exact one by the product of the low part with the column: at most |low| * |column|
// (Cauchy and Schwarz), and rounding, which slack * |x| * |column| covers. So coarse + reach * |column| is above the exact
// logit, where reach = |low| + slack * |x|. A panel is ruled out when that is, for all of its columns, below what some column
// reaches at least. The others are multiplied exactly, by the same tile as without all this, so that the largest logit is
// the same one with the same bits, the first of equals. Where many are left, all logits are computed as ever.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

constexpr int kMostLeft = 16;  // one panel of so many may be left: alone with a row each takes several times as long
constexpr float kInfinite = std::numeric_limits<float>::infinity();

// |column| of a panel's columns, at least, to norms [32]; the largest of them.
template <Format FMT>
static float measure_columns(const Matrix& w, int panel, float* norms) {
    const uint8_t* chunk = w.data + size_t(panel) * w.panel_bytes;
    float squares[kPanel] = {};
    for (int g = 0; g < w.k / kGroup; g++, chunk += chunk_size<FMT>()) {
        constexpr int steps = FMT == Format::q8_0 ? 8 : 4;
        alignas(64) int32_t sums[128] = {};  // [16-column half][column][k % 4]
        for (int j = 0; j < steps; j++)
            for (int i = 0; i < 128; i++) {
                const int byte = chunk[128 * j + i];
                if constexpr (FMT == Format::q8_0) sums[i] += (byte - 128) * (byte - 128);
                else sums[i] += ((byte & 15) - 8) * ((byte & 15) - 8) + ((byte >> 4) - 8) * ((byte >> 4) - 8);
            }
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(chunk + 128 * steps);
        for (int c = 0; c < kPanel; c++) {
            const float d = f16_to_f32(scales[c]);
            squares[c] += d * d * float(sums[4 * c] + sums[4 * c + 1] + sums[4 * c + 2] + sums[4 * c + 3]);
        }
    }
    float most = 0.0f;
    for (int c = 0; c < kPanel; c++) {
        norms[c] = std::sqrt(squares[c]) * 1.001f;
        if (!(norms[c] <= most) && most == most) most = norms[c];  // NaN stays
    }
    return most;
}

// Whether a head is one that ranks: weights without minima, whose logits are sums and a factor.
static bool can_rank(const Model& model, const Phase& p, const Scratch& s) {
    if (&p != &model.phases.back() || p.matrices.size() != 1 || p.softcap > 0.0f || !(p.scale > 0.0f && p.scale < kInfinite)) return false;
    const Matrix& w = model.matrices[size_t(p.matrices[0])];
    return (w.format == Format::q4_0 || w.format == Format::q8_0) && !w.bias && s.norms && w.panels() >= 4 * kMostLeft && w.panels() <= s.wide_ld && 2 * s.act.groups() + 1 < s.attn_ld;
}

// What ranking adds to a step's scratch memory, in memory that the head leaves idle: rows of `attn` and `wide`.
struct Ranking {
    const Phase* phase;
    const Matrix* w;
    Activations fine, coarse;
    float* reach;  // [rows]; infinite where nothing may be ruled out
    float* least;  // [rows] the largest logit is not below
    float* tops;   // [rows][panels] what no logit of the panel exceeds
    float* norms;  // [panels][32] of columns; below zero where they are not known yet
    float* most;   // [panels] the largest of them

    Ranking(const Model& model, const Phase& p, const Scratch& s, const Activations& act, int rows)
        : phase(&p), w(&model.matrices[size_t(p.matrices[0])]), fine(act), coarse(act), tops(s.wide), norms(s.norms), most(norms ? norms + size_t(w->panels()) * kPanel : nullptr) {
        const size_t groups = size_t(rows) * size_t(act.groups());
        coarse.two_bytes = false;
        coarse.scale = s.attn;
        coarse.sum = reinterpret_cast<int32_t*>(s.attn + groups);
        reach = s.attn + 2 * groups;
        least = reach + rows;
    }

    // A prepared row's coarse form.
    void prepare(int row) const {
        const int groups = w->k / kGroup;
        float low = 0.0f, all = 0.0f;
        for (int g = 0; g < groups; g++) {
            const size_t at = size_t(row) * size_t(fine.ld) + size_t(g) * kGroup, to = size_t(row) * size_t(fine.groups()) + size_t(g);
            const int8_t *h = fine.i8 + at, *l = fine.low + at;
            int32_t total = 0, lows = 0, highs = 0;
            for (int i = 0; i < kGroup; i++) {
                total += h[i];
                lows += l[i] * l[i];
                highs += h[i] * h[i];
            }
            const float scale = fine.scale[to], wide = 256.0f * scale;
            coarse.scale[to] = wide;
            coarse.sum[to] = total;
            low += scale * scale * float(lows);
            all += wide * wide * float(highs);
        }
        // |x| ≤ |256 high| + |low|. Roundings of both products: two a group each, and one each for the factor and for the bound.
        const float slack = float(4 * groups + 16) * 0x1p-24f;
        const float x = std::sqrt(all) + std::sqrt(low);
        // Lengths of 1e-9 and below could have squares, or logits, that floats do not hold with all their bits.
        reach[row] = all > 0x1p-60f ? (std::sqrt(low) + slack * x) * 1.001f * phase->scale : kInfinite;
    }
};

struct TopOfPanel {
    const Ranking* ranking;
    inline __attribute__((always_inline)) void operator()(int row, int panel, F first, F second) const {
        const float* norms = ranking->norms + size_t(panel) * kPanel;
        const F reach = fset(ranking->reach[row]);
        F a = fmla(reach, fload(norms), scaled(first, ranking->phase->scale)), b = fmla(reach, fload(norms + 16), scaled(second, ranking->phase->scale));
        const int columns = ranking->w->n - panel * kPanel;
        if (columns < kPanel) {
            a = fselect(0, columns, a, fset(-kInfinite));
            b = fselect(0, columns - 16, b, fset(-kInfinite));
        }
        ranking->tops[size_t(row) * size_t(ranking->w->panels()) + size_t(panel)] = fpeak(fmax2(a, b));
    }
};

// Logits of one row and panel, as `StoreColumns` would make them.
struct PanelLogits {
    float* y;  // [32]
    float scale;
    inline __attribute__((always_inline)) void operator()(int, int, F first, F second) const {
        fstore(y, scaled(first, scale));
        fstore(y + 16, scaled(second, scale));
    }
};

// Panels whose columns are measured.
template <Format FMT, class Panels> struct MeasuredPanels {
    Panels panels;
    const Ranking* ranking;
    int next() {
        const int panel = panels.next();
        if (panel >= 0 && ranking->norms[size_t(panel) * kPanel] < 0.0f)
            ranking->most[panel] = measure_columns<FMT>(*ranking->w, panel, ranking->norms + size_t(panel) * kPanel);
        return panel;
    }
};

// Whether a panel of a row is left.
PM_INLINE bool is_left(const Ranking& ranking, const float* tops, float least, int panel) {
    return !(tops[panel] < least && ranking.most[panel] < kInfinite);
}

// How many panels of a row are left; nothing is ruled out where `least` stays at -inf, as where the row's reach is not finite.
static int count_left(const Ranking& ranking, int row) {
    const int panels = ranking.w->panels();
    const float reach = ranking.reach[row];
    const float* tops = ranking.tops + size_t(row) * size_t(panels);
    float least = -kInfinite;
    for (int p = 0; p < panels; p++) {
        const float at_least = tops[p] - 2.0f * reach * ranking.most[p];
        least = at_least > least ? at_least : least;
    }
    if (!(least < kInfinite)) least = -kInfinite;
    ranking.least[row] = least;
    int count = 0;
    for (int p = 0; p < panels; p++) count += is_left(ranking, tops, least, p);
    return count;
}

// The largest of a row's logits, or its first NaN, to best and value, from the panels that are left.
template <Format FMT>
static void rank_row(const Ranking& ranking, int row, int32_t& best, float& value) {
    const Matrix& w = *ranking.w;
    const int panels = w.panels();
    const float* tops = ranking.tops + size_t(row) * size_t(panels);
    best = -1;
    for (int p = 0; p < panels; p++) {
        if (!is_left(ranking, tops, ranking.least[row], p)) continue;
        alignas(64) float y[kPanel];
        const PanelLogits finish{y, ranking.phase->scale};
        Fetch<kIntoSecond> none(w, -1, 1);
        quant_tile<FMT, 1, 2>(ranking.fine, row, w, p, none, finish);
        const int found = first_peak(y, 0, std::min(kPanel, w.n - p * kPanel));
        if (best < 0 || y[found] > value || y[found] != y[found]) {
            best = p * kPanel + found;
            value = y[found];
        }
        if (value != value) break;
    }
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
