#include "attention_tasks.h"

#include <algorithm>
#include <cstring>

namespace pagemill {
namespace {

constexpr int kStackedRows = kTileRows / 2;  // a sequence with more rows a KV head fills tiles of its own
constexpr int kWorthSharing = 2;             // (sequence, split) reads that a shared segment saves at least

class Builder {
public:
    Builder(const Step& step, const Phase& phase, int kv_group, int block_size, int threads, AttentionTasks& out)
        : step_(step), group_(phase.q_heads / phase.kv_heads), block_size_(block_size), threads_(threads), out_(out) {
        out_.group = group_;
        out_.kv_heads = phase.kv_heads;
        out_.head_dim = phase.head_dim;
        out_.window = phase.window;
        out_.kv_group = kv_group;
        out_.rows.reserve(size_t(step.rows) * size_t(group_));
    }

    void build() {
        for (int seq = 0; seq < step_.num_seqs; seq++) {
            if (rows_of(seq) <= kStackedRows && whole_splits(seq) > 0) members_.push_back(seq);
            else add_tail(seq, 0, 0);
        }
        std::sort(members_.begin(), members_.end(), [&](int a, int b) { return table_before(a, b); });
        common_.assign(members_.size(), 0);
        for (size_t i = 1; i < members_.size(); i++) common_[i] = common_splits(members_[i - 1], members_[i]);
        if (!members_.empty()) share(0, members_.size(), 0, 0);
        auto cost = [](const AttentionTask& t) { return (t.split_to - t.split_from) * t.num_rows; };
        std::stable_sort(out_.tasks.begin(), out_.tasks.end(), [&](const AttentionTask& a, const AttentionTask& b) { return cost(a) > cost(b); });
        if (whole_sequences()) out_.bundle = out_.kv_heads;
    }

private:
    // Whether the tasks are all KV heads of a sequence, one after the other, and enough of them to keep every thread busy.
    bool whole_sequences() const {
        const size_t heads = size_t(out_.kv_heads), count = out_.tasks.size();
        if (count % heads || count / heads < size_t(4 * threads_)) return false;
        for (size_t i = 0; i < count; i++) {
            const AttentionTask &task = out_.tasks[i], &first = out_.tasks[i / heads * heads];
            if (task.seq != first.seq || task.split_from != first.split_from || task.split_to != first.split_to || task.kv_head != int(i % heads)) return false;
        }
        return true;
    }

    int rows_of(int seq) const { return (step_.starts[seq + 1] - step_.starts[seq]) * group_; }
    int first_position(int seq) const { return step_.positions[step_.starts[seq]]; }
    int last_position(int seq) const { return step_.positions[step_.starts[seq + 1] - 1]; }
    int blocks_of(int seq) const { return last_position(seq) / block_size_ + 1; }
    int whole_splits(int seq) const { return int(int64_t(blocks_of(seq)) * block_size_ / kSplit); }
    const int32_t* table(int seq) const { return step_.table(out_.kv_group, seq); }
    int first_split(int position) const {
        return out_.window > 0 && position + 1 > out_.window ? (position + 1 - out_.window) / kSplit : 0;
    }

    // Any total order that puts tables with a common beginning side by side.
    bool table_before(int a, int b) const {
        const int order = std::memcmp(table(a), table(b), size_t(std::min(blocks_of(a), blocks_of(b))) * sizeof(int32_t));
        return order != 0 ? order < 0 : blocks_of(a) < blocks_of(b);
    }

    int common_splits(int a, int b) const {
        const int blocks = std::min(blocks_of(a), blocks_of(b));
        const int32_t *ta = table(a), *tb = table(b);
        const int same = int(std::mismatch(ta, ta + blocks, tb).first - ta);
        return int(int64_t(same) * block_size_ / kSplit);
    }

    // Members [from, to) have their splits before `split` behind them, as `part` parts. Their rows are added in this order.
    void share(size_t from, size_t to, int split, int part) {
        if (to - from == 1) return add_tail(members_[from], split, part);
        const int common = *std::min_element(common_.begin() + std::ptrdiff_t(from) + 1, common_.begin() + std::ptrdiff_t(to));
        const int seen = first_split(first_position(members_[from]));
        bool alike = true;  // windows that begin in the same split
        for (size_t i = from; i < to; i++) alike = alike && first_split(first_position(members_[i])) == seen;
        const int begin = std::max(split, seen), saved = (common - begin) * int(to - from - 1);
        if (alike && saved >= kWorthSharing) {
            part += add_segment(from, to, begin, common, part);
            split = common;
            out_.shared_splits += saved;
        }
        size_t start = from;
        for (size_t i = from + 1; i < to; i++)
            if (common_[i] == common) {
                share(start, i, split, part);
                start = i;
            }
        share(start, to, split, part);
    }

    // Splits [begin, end) for the rows of members [from, to), which will be added next. Returns the number of parts.
    int add_segment(size_t from, size_t to, int begin, int end, int part) {
        int rows = 0;
        for (size_t i = from; i < to; i++) rows += rows_of(members_[i]);
        const int per_tile = kTileRows, tiles = (rows + per_tile - 1) / per_tile, count = tiles * out_.kv_heads;
        // A run that begins with a row's first split may leave its merged state; enough of them keep every thread busy.
        const bool merged = part == 0 && (end - begin == 1 || threads_ == 1 || count >= 8 * threads_ || (count >= 2 * threads_ && count % threads_ == 0));
        const int first = int(out_.rows.size());
        for (int h = 0; h < out_.kv_heads; h++)
            for (int r0 = 0; r0 < rows; r0 += per_tile) {
                AttentionTask task{members_[from], h, first + r0, std::min(per_tile, rows - r0), begin, end, part, merged ? 1 : end - begin};
                if (merged) out_.tasks.push_back(task);
                else add_apart(task);
            }
        return merged ? 1 : end - begin;
    }

    // Each split of a task as a task and a part of its own.
    void add_apart(AttentionTask task) {
        const int from = task.split_from, to = task.split_to, part = task.part;
        task.num_parts = 1;
        for (int split = from; split < to; split++) {
            task.split_from = split;
            task.split_to = split + 1;
            task.part = part + split - from;
            out_.tasks.push_back(task);
        }
    }

    // A sequence's rows and their tasks from `split` on; `part` parts are behind them.
    void add_tail(int seq, int split, int part) {
        const int rows = rows_of(seq), start = first_position(seq), first = int(out_.rows.size());
        const int per_tile = tile_rows(rows), tiles = (rows + per_tile - 1) / per_tile;
        for (int r = 0; r < rows; r++) out_.rows.push_back({step_.starts[seq] + r / group_, r % group_, -1, 0});
        // Few tiles: the splits of each become tasks of their own, merged afterwards in the same order. That takes time too, so
        // of one sequence as many tiles stay whole as every thread gets the same number of.
        const int all = tiles * out_.kv_heads * step_.num_seqs;
        const bool few = threads_ > 1 && all < 8 * threads_;
        int whole = few && step_.num_seqs == 1 && all >= 2 * threads_ ? all / threads_ * threads_ : 0;
        for (int head = 0; head < out_.kv_heads; head++)
            for (int r0 = 0; r0 < rows; r0 += per_tile) {
                const int count = std::min(per_tile, rows - r0);
                const int from = std::max(split, first_split(start + r0 / group_));
                const int to = std::max(from, (start + (r0 + count - 1) / group_) / kSplit + 1);
                const bool apart = few && to - from > 1 && whole-- <= 0;
                const AttentionTask task{seq, head, first + r0, count, from, to, apart || part > 0 ? part : -1, to - from};
                if (apart) add_apart(task);
                else if (to > from) out_.tasks.push_back(task);
                if (task.part < 0) continue;
                out_.merges.push_back(task);
                for (int r = r0; r < r0 + count; r++) add_partials(out_.rows[size_t(first + r)], part + to - from);
            }
    }

    // Room for the parts of a row, of all heads.
    void add_partials(AttentionRow& row, int num_parts) {
        if (row.partial >= 0) return;
        row.partial = out_.num_partials;
        row.num_parts = num_parts;
        out_.num_partials += num_parts * out_.kv_heads;
    }

    // Whole multiples of 16 rows; smaller tiles where there would be too few for the threads.
    int tile_rows(int rows) const {
        int size = kTileRows;
        while (size > 16 && (rows + size - 1) / size * out_.kv_heads * step_.num_seqs < 2 * threads_) size -= 16;
        return size;
    }

    const Step& step_;
    const int group_, block_size_, threads_;
    AttentionTasks& out_;
    std::vector<int> members_;  // sequences that may share, those with a common beginning side by side
    std::vector<int> common_;   // whole splits that member i has in common with the one before
};

}  // namespace

void build_attention_tasks(const Step& step, const Phase& phase, int kv_group, int block_size, int threads, AttentionTasks& out) {
    Builder(step, phase, kv_group, block_size, threads, out).build();
}

}  // namespace pagemill
