// A row of logits to a token. Weights are whole numbers, so that every sum is exact and its order cannot matter.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "../sampling.h"

namespace pagemill {
namespace PAGEMILL_TARGET {

constexpr double kWhole = 1099511627776.0;         // 2^40: the weight of the largest logit
constexpr double kToWhole = 6144.0;                // 1.5 * 2^(52 - 40): adding it rounds to multiples of 2^-40
constexpr float kLeastExponent = -64.0f;           // below 2^-41 a weight is zero anyway
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A row of logits, read by chunks of kChunk; the last one is padded with -inf.
struct ChunkedRow {
    const float* x;
    int vocab;
    float last[kChunk];
    ChunkedRow(const float* row, int columns) : x(row), vocab(columns) {
        const int from = vocab / kChunk * kChunk;
        for (int i = 0; i < kChunk; i++) last[i] = from + i < vocab ? x[from + i] : -kInfinity;
    }
    int chunks() const { return (vocab + kChunk - 1) / kChunk; }
    const float* chunk(int c) const { return (c + 1) * kChunk <= vocab ? x + size_t(c) * kChunk : last; }
    int columns(int c) const { return std::min(kChunk, vocab - c * kChunk); }
};

// Weights 2^((x - largest) * rate) in f32, no fused operation: the same bits in numpy.
struct Weigher {
    float largest, rate;
    F top, factor;
    Weigher(float peak, double temperature)
        : largest(peak), rate(float(std::min(1.4426950408889634 / temperature, double(FLT_MAX)))), top(fset(largest)), factor(fset(rate)) {}
    bool certain() const { return largest == kInfinity; }  // then +inf weighs 1 and the rest nothing
    F finite(F x) const {
        const F t = fmax2(fmul(fsub(x, top), factor), fset(kLeastExponent)), n = fround(t), r = fsub(t, n);
        F p = fset(0.00132647087f);
        p = fadd(fmul(p, r), fset(0.00967151113f));
        p = fadd(fmul(p, r), fset(0.0555073395f));
        p = fadd(fmul(p, r), fset(0.240222424f));
        p = fadd(fmul(p, r), fset(0.693147004f));
        p = fadd(fmul(p, r), fset(1.0f));
        return fscale2(p, n);
    }
    void operator()(const float* x, float* w) const {  // kChunk of them
        if (certain())
            for (int i = 0; i < kChunk; i++) w[i] = x[i] == kInfinity ? 1.0f : 0.0f;
        else
            for (int i = 0; i < kChunk; i += kLanes) fstore(w + i, finite(fload(x + i)));
    }
};

static inline uint64_t whole_bits(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    return bits;
}
static inline int64_t whole(float w) { return int64_t(whole_bits(double(w) + kToWhole) - whole_bits(kToWhole)); }

// Sum of the weights of kChunk columns.
static int64_t mass_of(const float* x, const Weigher& weigh) {
#ifdef __AVX512F__
    if (!weigh.certain()) {
        const __m512d zero = _mm512_set1_pd(kToWhole);
        __m512i low = _mm512_setzero_si512(), high = low;
        for (int i = 0; i < kChunk; i += 16) {
            const __m512 w = weigh.finite(_mm512_loadu_ps(x + i));
            low = _mm512_add_epi64(low, _mm512_castpd_si512(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(w)), zero)));
            high = _mm512_add_epi64(high, _mm512_castpd_si512(_mm512_add_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(w, 1)), zero)));
        }
        return int64_t(uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high))) - kChunk * whole_bits(kToWhole));
    }
#endif
    float w[kChunk];
    weigh(x, w);
    int64_t sum = 0;
    for (int i = 0; i < kChunk; i++) sum += whole(w[i]);
    return sum;
}

static float peak_of(const float* x) {
    F peak = fload(x);
    for (int i = kLanes; i < kChunk; i += kLanes) peak = fmax2(fload(x + i), peak);
    return fpeak(peak);
}

// Largest logit of each chunk, and its mass where there is a weigher.
static void scan_row(const ChunkedRow& row, const Weigher* weigh, Scan& out) {
    int64_t total = 0;
    for (int c = 0; c < row.chunks(); c++) {
        const float* x = row.chunk(c);
        out.peaks[size_t(c)] = peak_of(x);
        if (weigh) total += out.masses[size_t(c)] = mass_of(x, *weigh);
    }
    out.total = total;
}

// Candidates: the columns of at least `least`, ascending, into scratch ids and values. Returns their number.
static int collect(const ChunkedRow& row, const Scan& scan, float least, SamplingScratch& s) {
    int count = 0;
    for (int c = 0; c < row.chunks(); c++) {
        if (!(scan.peaks[size_t(c)] >= least)) continue;
        const float* x = row.chunk(c);
        const int columns = row.columns(c);
#ifdef __AVX512F__
        const __m512 bound = _mm512_set1_ps(least);
        for (int i = 0; i < columns; i += 16) {
            const __m512 v = _mm512_loadu_ps(x + i);
            const __mmask16 mask = __mmask16(_mm512_cmp_ps_mask(v, bound, _CMP_GE_OQ) & first(columns - i));
            if (!mask) continue;
            const __m512i id = _mm512_add_epi32(_mm512_set1_epi32(c * kChunk + i), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
            _mm512_storeu_si512(s.ids.get() + count, _mm512_maskz_compress_epi32(mask, id));
            _mm512_storeu_ps(s.values.get() + count, _mm512_maskz_compress_ps(mask, v));
            count += __builtin_popcount(mask);
        }
#else
        for (int i = 0; i < columns; i++) {
            s.ids[size_t(count)] = c * kChunk + i;
            s.values[size_t(count)] = x[i];
            count += x[i] >= least;
        }
#endif
    }
    return count;
}

// A lower bound of the k-th largest logit: the k-th largest peak of the chunks, for each of them stands for one column.
static float bound_of_kth(const ChunkedRow& row, const Scan& scan, int k, SamplingScratch& s) {
    const int chunks = row.chunks();
    if (k > chunks) return -kInfinity;
    std::copy(scan.peaks.get(), scan.peaks.get() + chunks, s.peaks.get());
    std::nth_element(s.peaks.get(), s.peaks.get() + (k - 1), s.peaks.get() + chunks, std::greater<float>());
    return s.peaks[size_t(k - 1)];
}

// Orders floats as whole numbers do, both zeros alike.
static inline int32_t order_of(float x) {
    const float positive_zero = x + 0.0f;
    int32_t bits;
    std::memcpy(&bits, &positive_zero, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

struct Cut {
    float value;  // the smallest logit that is kept
    int64_t ties;  // how many of its columns, the lowest ids first
};

// Where the candidates, largest first and ties by id, reach the mass `wanted`; weights null: each counts as one.
// Radix selection: a histogram of masses over the order of the values, then the same within one of its classes.
static Cut select(const float* values, const int64_t* weights, int count, int64_t wanted, SamplingScratch& s) {
    int32_t most = order_of(values[0]), least = most;
    for (int i = 1; i < count; i++) {
        const int32_t order = order_of(values[i]);
        most = std::max(most, order);
        least = std::min(least, order);
    }
    uint32_t range = uint32_t(most) - uint32_t(least), base = 0;
    for (int i = 0; i < count; i++) {
        s.keys[size_t(i)] = uint32_t(most) - uint32_t(order_of(values[i]));
        s.masses[size_t(i)] = weights ? weights[i] : 1;
    }
    int64_t above = 0;
    for (;;) {
        const int shift = std::max(0, 32 - (range ? __builtin_clz(range) : 32) - 8);
        int64_t classes[256] = {};
        for (int i = 0; i < count; i++) classes[s.keys[size_t(i)] >> shift] += s.masses[size_t(i)];
        uint32_t reached = 0;
        while (above + classes[reached] < wanted) above += classes[reached++];
        int left = 0;
        for (int i = 0; i < count; i++) {
            const uint32_t key = s.keys[size_t(i)];
            const int64_t mass = s.masses[size_t(i)];
            s.keys[size_t(left)] = key - (reached << shift);
            s.masses[size_t(left)] = mass;
            left += key >> shift == reached;
        }
        count = left;
        base += reached << shift;
        range = (uint32_t(1) << shift) - 1;
        if (shift == 0) break;
    }
    const int32_t order = int32_t(uint32_t(most) - base), bits = order ^ ((order >> 31) & 0x7fffffff);
    Cut cut;
    std::memcpy(&cut.value, &bits, 4);
    const int64_t each = std::max<int64_t>(s.masses[0], 1);  // ties weigh the same
    cut.ties = (wanted - above + each - 1) / each;
    return cut;
}

static void weigh_candidates(const Weigher& weigh, int count, SamplingScratch& s) {
    float w[kChunk];
    for (int from = 0; from < count; from += kChunk) {
        const int end = std::min(kChunk, count - from);
        for (int i = end; i < kChunk; i++) s.values[size_t(from + i)] = -kInfinity;
        weigh(s.values.get() + from, w);
        for (int i = 0; i < end; i++) s.weights[size_t(from + i)] = whole(w[i]);
    }
}

static int64_t sum_of(const int64_t* weights, int count) {
    int64_t sum = 0;
    for (int i = 0; i < count; i++) sum += weights[i];
    return sum;
}

static int64_t share_of(int64_t total, double p) {
    const double wanted = std::ceil(p * double(total));
    return std::min(total, std::max<int64_t>(1, wanted < 9e18 ? int64_t(wanted) : total));
}

// Drops the weights of candidates beyond the nucleus of p of `total`, which the candidates reach.
static void keep_nucleus(int64_t total, double p, int count, SamplingScratch& s) {
    Cut cut = select(s.values.get(), s.weights.get(), count, share_of(total, p), s);
    for (int i = 0; i < count; i++) {
        if (s.values[size_t(i)] > cut.value) continue;
        if (s.values[size_t(i)] < cut.value || cut.ties-- <= 0) s.weights[size_t(i)] = 0;
    }
}

// Candidates that hold at least the nucleus, from the fewest on; their number.
static int collect_nucleus(const ChunkedRow& row, const Scan& scan, const Weigher& weigh, double p, SamplingScratch& s) {
    const int64_t wanted = share_of(scan.total, p);
    for (const double rest : {128.0, 8192.0, 0.0}) {
        const double exponent = rest > 0 ? std::log2((1.0 - p) / rest * double(scan.total) / kWhole) : -42.0;
        const float least = weigh.certain() ? kInfinity : float(double(weigh.largest) + std::min(exponent, 0.0) / double(weigh.rate));
        const int count = collect(row, scan, least, s);
        weigh_candidates(weigh, count, s);
        if (rest == 0 || sum_of(s.weights.get(), count) >= wanted) return count;
    }
    return 0;
}

static int64_t drawn_part(const SamplingRow& request, int64_t total) {
    const uint64_t number = random_bits(request.seed, request.choice, request.position);
    return int64_t((unsigned __int128)number * uint64_t(total) >> 53);
}

// The token whose stretch of the cumulated weights, in the order of ids, holds the random number's part of the whole.
static int draw_candidate(const SamplingRow& request, int count, const SamplingScratch& s) {
    int64_t rest = drawn_part(request, sum_of(s.weights.get(), count));
    for (int i = 0; i < count; i++)
        if ((rest -= s.weights[size_t(i)]) < 0) return s.ids[size_t(i)];
    return -1;
}

static int draw_any(const SamplingRow& request, const ChunkedRow& row, const Scan& scan, const Weigher& weigh) {
    int64_t rest = drawn_part(request, scan.total);
    int c = 0;
    while (rest >= scan.masses[size_t(c)]) rest -= scan.masses[size_t(c++)];
    float w[kChunk];
    weigh(row.chunk(c), w);
    int i = 0;
    while ((rest -= whole(w[i])) >= 0) i++;
    return c * kChunk + i;
}

// scanned: `scan` holds the masses for this row and temperature already.
static int draw(const SamplingRow& request, const ChunkedRow& row, const Weigher& weigh, Scan& scan, bool scanned, SamplingScratch& s) {
    const bool limited = request.top_k > 0 && request.top_k < row.vocab;
    const bool masses = !limited && (request.top_p < 1.0 || request.min_p <= 0.0);
    if (!scanned) scan_row(row, masses ? &weigh : nullptr, scan);
    int count;
    if (limited) {
        count = collect(row, scan, bound_of_kth(row, scan, request.top_k, s), s);
        const float least = select(s.values.get(), nullptr, count, request.top_k, s).value;
        count = collect(row, scan, least, s);
        weigh_candidates(weigh, count, s);
        if (request.top_p < 1.0) keep_nucleus(sum_of(s.weights.get(), count), request.top_p, count, s);
    } else if (request.top_p < 1.0) {
        count = collect_nucleus(row, scan, weigh, request.top_p, s);
        keep_nucleus(scan.total, request.top_p, count, s);
    } else if (request.min_p > 0.0) {
        const double exponent = std::max(std::log2(request.min_p) - 0.01, -42.0);  // a little below, for exp2 is not exact
        const float least = weigh.certain() ? kInfinity : float(double(weigh.largest) + exponent / double(weigh.rate));
        count = collect(row, scan, least, s);
        weigh_candidates(weigh, count, s);
    } else {
        return draw_any(request, row, scan, weigh);
    }
    const int64_t floor = int64_t(std::ceil(request.min_p * kWhole));
    for (int i = 0; i < count; i++)
        if (s.weights[size_t(i)] < floor) s.weights[size_t(i)] = 0;
    return draw_candidate(request, count, s);
}

static int rank_of(const ChunkedRow& row, const Scan& scan, int token) {
    const float value = row.x[token];
    int rank = 1;
    for (int c = 0; c < row.chunks(); c++) {
        if (scan.peaks[size_t(c)] < value) continue;
        const float* x = row.chunk(c);
        const int before = std::min(row.columns(c), std::max(0, token - c * kChunk));
        for (int i = 0; i < kChunk; i++) rank += x[i] > value;
        for (int i = 0; i < before; i++) rank += x[i] == value;
    }
    return rank;
}

// The chosen token and the most likely ones, from the logits as given; scan: at temperature 1.
static void report(const SamplingJob& job, int index, const ChunkedRow& row, const Scan& scan, float largest, SamplingScratch& s) {
    const double log_total = std::log(double(scan.total) / kWhole);
    auto logprob = [&](float x) {
        if (largest == kInfinity) return x == kInfinity ? -log_total : -double(kInfinity);
        return double(x) - double(largest) - log_total;
    };
    const int token = job.tokens[index], count = std::min(job.requests[index].logprobs, row.vocab);
    job.logprobs[index] = logprob(row.x[token]);
    job.ranks[index] = rank_of(row, scan, token);
    if (count == 0) return;
    const int found = collect(row, scan, bound_of_kth(row, scan, count, s), s);
    auto before = [&](int32_t a, int32_t b) { return row.x[a] != row.x[b] ? row.x[a] > row.x[b] : a < b; };
    std::partial_sort(s.ids.get(), s.ids.get() + count, s.ids.get() + found, before);
    for (int i = 0; i < count; i++) {
        job.top_ids[size_t(index) * size_t(job.most_logprobs) + size_t(i)] = s.ids[size_t(i)];
        job.top_logprobs[size_t(index) * size_t(job.most_logprobs) + size_t(i)] = logprob(row.x[s.ids[size_t(i)]]);
    }
}

static void sample_row(const SamplingJob& job, int index, SamplingScratch& s) {
    const SamplingRow& request = job.requests[index];
    const float* raw = job.logits + size_t(index) * size_t(job.vocab);
    const float* allowed = raw;
    int best = job.best[index];
    const float largest = raw[best];
    job.tokens[index] = best;
    job.status[index] = int32_t(SampleStatus::not_a_number);
    if (largest != largest) return;
    const int from = job.forbid_starts ? job.forbid_starts[index] : 0, to = job.forbid_starts ? job.forbid_starts[index + 1] : 0;
    if (from < to) {
        std::copy(raw, raw + job.vocab, s.row.get());
        for (int i = from; i < to; i++)
            if (job.forbid[i] >= 0 && job.forbid[i] < job.vocab) s.row[size_t(job.forbid[i])] = -kInfinity;
        allowed = s.row.get();
        best = first_peak(allowed, 0, job.vocab);
    }
    job.status[index] = int32_t(SampleStatus::nothing_left);
    if (allowed[best] == -kInfinity) return;
    job.status[index] = int32_t(SampleStatus::chosen);
    const bool reported = request.logprobs >= 0, drawn = request.temperature > 0.0;
    const bool alike = reported && drawn && allowed == raw && request.temperature == 1.0;
    job.tokens[index] = best;
    if (!reported && !drawn) return;
    const ChunkedRow given(raw, job.vocab);
    if (reported) {
        const Weigher weigh(largest, 1.0);
        scan_row(given, &weigh, s.raw);
    }
    if (drawn) {
        const Weigher weigh(allowed[best], request.temperature);
        job.tokens[index] = draw(request, ChunkedRow(allowed, job.vocab), weigh, alike ? s.raw : s.own, alike, s);
    }
    if (reported) report(job, index, given, s.raw, largest, s);
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
