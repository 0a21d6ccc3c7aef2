// Gittins: the block leaves whose place earns least, by what was learned of how soon blocks like it are used again.
#include "gittins.h"

#include <algorithm>
#include <numeric>

#include "ghosts.h"
#include "order.h"
#include "queues.h"

namespace pagemill {

constexpr int64_t kGhostsPerBlock = 4, kEpochsPerRefresh = 4, kSoonestRefresh = 500;
constexpr int64_t kUses[] = {2, 3, 4, 5, 8, 16};
constexpr size_t kNumUses = sizeof(kUses) / sizeof(kUses[0]);
constexpr int kPartFilled = 0, kContinued = 1, kOnce = 2;  // classes; those of texts' lengths from kOnce on, then those of uses

// A block's class and the epoch of its last use name its queue; those of the last bucket of age share one. A row is what one class
// has in one bucket: queues that lie side by side, so that blocks grow older without being moved. The first block of the row with
// the lowest index leaves.
class Gittins final : public Order {
public:
    Gittins(const Nodes& nodes, int64_t capacity, const GittinsSetting& setting);
    const char* name() const override { return "gittins"; }
    unsigned fields() const override { return kNumTokens | kTextTokens | kNumKnownBlocks; }

    void reserve(size_t num_nodes, size_t count) override {
        places_.reserve(num_nodes);
        ghosts_.reserve(count);
        learner_.reserve(count);
        if (num_nodes > uses_.size()) uses_.resize(num_nodes);
    }

    void insert(Node node, const BlockInfo& info) override {
        int64_t uses = 0;
        const int kind = first_kind(info);
        ghosts_.take(data(node).key, &uses);
        use(node, uses + 1, kind);
    }

    void touch(Node node) override {
        places_.take(queue_of(node), node);
        use(node, uses_[node].count + 1, 0);
    }

    void unlocked(Node node) override {
        places_.come_back(queue_of(node), node);
        if (places_.in_queue(node)) mark(uses_[node].kind, epoch_of(node));
    }

    Node first() override;

    void remove(Node node, bool evicted) override {
        places_.take(queue_of(node), node);
        if (evicted) ghosts_.put(data(node).key, uses_[node].count);
    }

    void resize(int64_t capacity) override;
    std::unique_ptr<Order> clone(const Nodes& nodes) const override { return copy_of(*this, nodes); }

private:
    struct Uses {
        int64_t count = 0;
        int kind = 0;
    };

    size_t slot_of(int64_t epoch) const { return size_t(((epoch % num_epochs_) + num_epochs_) % num_epochs_); }
    // -1: of the last bucket.
    int64_t epoch_of(Node node) const {
        const int64_t epoch = int64_t(places_.stamp(node)) / learner_.epoch_uses();
        return epoch_ - epoch < num_epochs_ ? epoch : -1;
    }
    Queue& queue(int kind, int64_t epoch) { return queues_[size_t(kind * (num_epochs_ + 1)) + (epoch < 0 ? size_t(num_epochs_) : slot_of(epoch))]; }
    Queue& queue_of(Node node) { return queue(uses_[node].kind, epoch_of(node)); }
    int bucket_of(int64_t age) const {
        return int(std::upper_bound(learner_.edges().begin(), learner_.edges().end(), age) - learner_.edges().begin());
    }
    int first_kind(const BlockInfo& info);
    void use(Node node, int64_t uses, int kind);
    void enter(Node node, uint64_t stamp, int64_t epoch);
    void mark(int kind, int64_t epoch);
    Node first_of(int kind, int bucket);
    Node first_of_epochs(int kind, int64_t begin, int64_t end);
    void next_epoch();
    void refresh();

    GittinsSetting setting_;
    std::vector<double> levels_;  // by class
    std::vector<int> groups_;
    ReuseLearner learner_;
    int num_kinds_, num_buckets_;
    int64_t num_epochs_;
    int64_t now_ = 0, epoch_ = 0, epoch_end_ = 0, refresh_every_ = 1, most_tokens_ = 0;
    Ghosts<int64_t> ghosts_;  // uses
    Places places_;           // stamp: the last use
    std::vector<Uses> uses_;
    std::vector<Queue> queues_;      // by class and slot of the epoch; the last one is of the last bucket
    std::vector<uint64_t> filled_;   // by class, bits of slots whose queue may have blocks
    std::vector<int> order_;         // rows by index, class x buckets + bucket
    std::vector<int> place_of_row_;  // in order_
    std::vector<double> index_;      // by row
    int lowest_ = 0;                 // place before which no row has a block that is not locked
};

static std::vector<double> levels_of(const GittinsSetting& setting) {
    std::vector<double> levels = {setting.part_filled, setting.continued};
    levels.insert(levels.end(), setting.once.begin(), setting.once.end());
    levels.insert(levels.end(), setting.again.begin(), setting.again.end());
    return levels;
}

static std::vector<int> groups_of(const GittinsSetting& setting) {
    std::vector<int> groups = {kPartFilled, kContinued};
    groups.insert(groups.end(), setting.once.size(), kOnce);
    for (size_t i = 0; i < setting.again.size(); i++) groups.push_back(kOnce + 1 + int(i));
    return groups;
}

Gittins::Gittins(const Nodes& nodes, int64_t capacity, const GittinsSetting& setting)
    : Order(nodes), setting_(setting), levels_(levels_of(setting)), groups_(groups_of(setting)), learner_(capacity, levels_, groups_, setting.learner),
      num_kinds_(int(levels_.size())), num_buckets_(learner_.num_buckets()), num_epochs_(learner_.num_epochs()), ghosts_(kGhostsPerBlock * capacity) {
    queues_.resize(size_t(num_kinds_) * size_t(num_epochs_ + 1));
    filled_.resize(size_t(num_kinds_) * size_t(num_epochs_ / 64 + 1));
    index_.resize(size_t(num_kinds_ * num_buckets_));
    order_.resize(index_.size());
    place_of_row_.resize(index_.size());
    epoch_end_ = learner_.epoch_uses();
    refresh_every_ = std::max(kEpochsPerRefresh, kSoonestRefresh / learner_.epoch_uses());
    refresh();
}

// The class of a block that is used for the first time; learns how long full blocks are.
int Gittins::first_kind(const BlockInfo& info) {
    if (info.num_tokens < most_tokens_) return kPartFilled;
    most_tokens_ = info.num_tokens;
    if (info.num_known_blocks >= setting_.known_blocks) return kContinued;
    return kOnce + int(std::upper_bound(setting_.lengths.begin(), setting_.lengths.end(), info.text_tokens) - setting_.lengths.begin());
}

// uses: with this one; kind: the class if it is the first.
void Gittins::use(Node node, int64_t uses, int kind) {
    now_++;
    if (now_ >= epoch_end_) next_epoch();
    if (uses > 1) {
        const size_t level = size_t(std::upper_bound(kUses, kUses + kNumUses, uses) - kUses) - 1;
        kind = kOnce + int(setting_.once.size() + level);
    }
    uses_[node] = {uses, kind};
    const Key& key = data(node).key;
    if (learner_.samples(key)) learner_.record(key, kind);
    enter(node, uint64_t(now_), epoch_);
}

void Gittins::enter(Node node, uint64_t stamp, int64_t epoch) {
    places_.append(queue(uses_[node].kind, epoch), node, stamp);
    mark(uses_[node].kind, epoch);
}

// The queue may have blocks.
void Gittins::mark(int kind, int64_t epoch) {
    int bucket = num_buckets_ - 1;
    if (epoch >= 0) {
        const size_t slot = slot_of(epoch);
        filled_[size_t(kind) * size_t(num_epochs_ / 64 + 1) + slot / 64] |= uint64_t(1) << slot % 64;
        bucket = bucket_of(epoch_ - epoch);
    }
    lowest_ = std::min(lowest_, place_of_row_[size_t(kind * num_buckets_ + bucket)]);
}

Node Gittins::first() {
    for (; lowest_ < int(order_.size()); lowest_++) {
        const int row = order_[size_t(lowest_)];
        const Node node = first_of(row / num_buckets_, row % num_buckets_);
        if (node != kNoNode) return node;
    }
    return kNoNode;
}

Node Gittins::first_of(int kind, int bucket) {
    if (bucket + 1 == num_buckets_) return places_.first(queue(kind, -1), *nodes_);
    const int64_t youngest = bucket == 0 ? 0 : learner_.edges()[size_t(bucket) - 1], end = learner_.edges()[size_t(bucket)];
    // Epochs epoch_ - end + 1 to epoch_ - youngest, whose slots may run over the end to the first ones.
    const int64_t begin = int64_t(slot_of(epoch_ - end + 1)), count = end - youngest, over = std::max(int64_t(0), begin + count - num_epochs_);
    const Node node = first_of_epochs(kind, begin, begin + count - over);
    return node == kNoNode && over > 0 ? first_of_epochs(kind, 0, over) : node;
}

// begin, end: slots.
Node Gittins::first_of_epochs(int kind, int64_t begin, int64_t end) {
    uint64_t* filled = &filled_[size_t(kind) * size_t(num_epochs_ / 64 + 1)];
    for (int64_t at = begin; at < end;) {
        const uint64_t bits = filled[at / 64] >> at % 64;
        if (bits == 0) {
            at = (at / 64 + 1) * 64;
            continue;
        }
        at += __builtin_ctzll(bits);
        if (at >= end) break;
        const Node node = places_.first(queues_[size_t(kind * (num_epochs_ + 1) + at)], *nodes_);
        if (node != kNoNode) return node;
        filled[at / 64] &= ~(uint64_t(1) << at % 64);
    }
    return kNoNode;
}

void Gittins::next_epoch() {
    epoch_++;
    epoch_end_ += learner_.epoch_uses();
    learner_.advance(epoch_);
    const size_t slot = slot_of(epoch_);  // so far of the epoch that reaches the last bucket
    for (int kind = 0; kind < num_kinds_; kind++) {
        places_.join(queues_[size_t(kind * (num_epochs_ + 1)) + slot], queue(kind, -1));
        filled_[size_t(kind) * size_t(num_epochs_ / 64 + 1) + slot / 64] &= ~(uint64_t(1) << slot % 64);
    }
    lowest_ = 0;
    if (epoch_ % refresh_every_ == 0) refresh();
}

// Order the rows by the index learned; of equals the older bucket first.
void Gittins::refresh() {
    learner_.refresh(epoch_, index_);
    std::iota(order_.begin(), order_.end(), 0);
    std::sort(order_.begin(), order_.end(), [this](int one, int other) {
        const double first = index_[size_t(one)], second = index_[size_t(other)];
        if (first != second) return first < second;
        if (one % num_buckets_ != other % num_buckets_) return one % num_buckets_ > other % num_buckets_;
        return one < other;
    });
    for (size_t place = 0; place < order_.size(); place++) place_of_row_[size_t(order_[place])] = int(place);
    lowest_ = 0;
}

void Gittins::resize(int64_t capacity) {
    std::vector<Node> nodes;
    for (Node node = 0; node < uses_.size(); node++) {
        if (places_.in_queue(node)) nodes.push_back(node);
    }
    std::sort(nodes.begin(), nodes.end(), [this](Node one, Node other) { return places_.stamp(one) < places_.stamp(other); });
    ReuseLearner learner(capacity, levels_, groups_, setting_.learner);
    const int64_t epoch = now_ / learner.epoch_uses();
    learner.take_over(learner_, epoch);
    ghosts_.resize(kGhostsPerBlock * capacity);
    learner_ = std::move(learner);
    epoch_ = epoch;
    epoch_end_ = (epoch + 1) * learner_.epoch_uses();
    refresh_every_ = std::max(kEpochsPerRefresh, kSoonestRefresh / learner_.epoch_uses());
    std::fill(queues_.begin(), queues_.end(), Queue{});
    std::fill(filled_.begin(), filled_.end(), 0);
    for (const Node node : nodes) enter(node, places_.stamp(node), epoch_of(node));
    refresh();
}

std::unique_ptr<Order> make_gittins(const Nodes& nodes, int64_t capacity) { return std::make_unique<Gittins>(nodes, capacity, GittinsSetting{}); }

}  // namespace pagemill
