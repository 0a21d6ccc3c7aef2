// Adaptive: follows the policy that would have hit most lately, by sampled shadow caches.
#include <algorithm>
#include <cmath>

#include "order.h"
#include "reuse.h"

namespace pagemill {

constexpr int64_t kShadowBlocks = 1024, kHorizonPerBlock = 8, kLeastHorizon = 2000, kBatches = 16;
constexpr int kMostSampledBits = 8;
constexpr double kDeviationsToLead = 1.5, kMostLost = 0.001;  // the latter of all uses
constexpr size_t kNumCandidates = 2;
using MakeOrder = std::unique_ptr<Order> (*)(const Nodes&, int64_t);
constexpr MakeOrder kCandidates[kNumCandidates] = {make_lru, make_gittins};  // the first is the one to fall back on

struct Sample {
    Key key;
    BlockInfo info;
};

// A cache of sampled keys that one order rules.
class Shadow {
public:
    Shadow(MakeOrder make, int64_t room) : order_(make(nodes_, room)), room_(size_t(room)) {}
    Shadow(const Shadow& other) : nodes_(other.nodes_), order_(other.order_->clone(nodes_)), slots_(other.slots_), room_(other.room_) {}

    // Room for uses of so many keys.
    void reserve(size_t count) {
        const size_t more = std::min(count, room_ - nodes_.size());
        nodes_.reserve(more);
        slots_.reserve(slots_.size() + more);
        order_->reserve(nodes_.capacity(), count);
    }

    // Use the keys of a chain, the last one first. How many hit of those that come behind the last miss.
    int64_t use(const std::vector<Sample>& chain) {
        int64_t run = 0;
        for (const Sample& each : chain) {
            const uint32_t slot = slots_.find(each.key);
            if (slot == kNoIndex) {
                add(each);
                run = 0;
            } else {
                order_->touch(slots_[slot]);
                run++;
            }
        }
        return run;
    }

private:
    void add(const Sample& sample) {
        order_->on_miss(sample.key);
        if (nodes_.size() == room_) {
            const Node gone = order_->first();
            order_->remove(gone, true);
            slots_.erase(uint32_t(nodes_[gone].block));
            nodes_.release(gone);
        }
        const uint32_t slot = slots_.add(sample.key);
        const Node node = nodes_.take(slot, sample.key);
        slots_[slot] = node;
        order_->insert(node, sample.info);
    }

    Nodes nodes_;  // their blocks are indices of slots_
    std::unique_ptr<Order> order_;
    KeyTable<Node> slots_;
    size_t room_;
};

// Everything that is counted for a capacity; see adaptive.py.
struct Watch {
    explicit Watch(int64_t capacity_);
    bool samples(const Key& key) const { return !(key.first_byte() & mask); }

    int64_t capacity, room, decision_every;
    uint8_t mask;
    double decay;
    std::vector<Shadow> shadows;
    int64_t num_sampled = 0, num_decided = 0;
    // By candidate: blocks hit beyond the first one, in this batch and in all, and the sums of their squares.
    int64_t batch[kNumCandidates] = {};
    double gains[kNumCandidates] = {}, batch_squares[kNumCandidates] = {}, chain_squares[kNumCandidates] = {};
    std::vector<Sample> chain;  // that may go on
    int64_t depth = 0;
    int64_t num_hits = 0;       // of it, from the last miss on
    int64_t balance = 0;        // hits of this cache beyond those of the first shadow, where it did not follow that one
    int64_t num_to_settle = 0;  // uses until the first one's order has brought its blocks
};

Watch::Watch(int64_t capacity_) : capacity(capacity_) {
    int bits = 0;
    while (bits < kMostSampledBits && (std::max(int64_t(1), capacity / kShadowBlocks) >> (bits + 1)) > 0) bits++;
    mask = uint8_t((1 << bits) - 1);
    room = std::max(int64_t(1), capacity >> bits);
    for (const MakeOrder make : kCandidates) shadows.emplace_back(make, room);
    const int64_t horizon = std::max(kLeastHorizon, kHorizonPerBlock * room);
    decision_every = std::max(int64_t(1), horizon / kBatches);
    decay = power(0.5, double(decision_every) / double(horizon));
}

class Adaptive final : public Order {
public:
    Adaptive(const Nodes& nodes, int64_t capacity) : Order(nodes), watch_(capacity) {
        for (const MakeOrder make : kCandidates) candidates_.push_back(make(nodes, capacity));
    }
    Adaptive(const Adaptive& other)
        : Order(other), leader_(other.leader_), is_running_(other.is_running_), watch_(other.watch_), sampled_(other.sampled_), run_(other.run_) {
        for (const auto& each : other.candidates_) candidates_.push_back(each->clone(*nodes_));
    }

    const char* name() const override { return "adaptive"; }
    const char* leader() const override { return candidates_[leader_]->name(); }
    unsigned fields() const override;
    void reserve(size_t num_nodes, size_t count) override;
    void insert(Node node, const BlockInfo& info) override;
    void touch(Node node) override;

    void unlocked(Node node) override {
        for (const auto& each : candidates_) each->unlocked(node);
    }

    Node first() override { return candidates_[leader_]->first(); }

    void remove(Node node, bool evicted) override {
        for (const auto& each : candidates_) each->remove(node, evicted);
        sampled_[node].is_in = false;
    }

    void on_miss(const Key& key) override {
        for (const auto& each : candidates_) each->on_miss(key);
    }

    size_t begin_run(const Key* keys, const BlockInfo* infos, size_t count) override;
    void end_run() override;
    void resize(int64_t capacity) override;
    std::unique_ptr<Order> clone(const Nodes& nodes) const override { return copy_of(*this, nodes); }

    void rebind(const Nodes& nodes) override {
        Order::rebind(nodes);
        for (const auto& each : candidates_) each->rebind(nodes);
    }

private:
    struct Sampled {
        bool is_in = false;  // of the sample
        BlockInfo info;
    };

    void sample(const Key& key, const BlockInfo& info, bool hit);
    void end_chain();
    void decide();

    std::vector<std::unique_ptr<Order>> candidates_;  // each keeps an order of the blocks that are really there
    size_t leader_ = 0;
    bool is_running_ = false;
    Watch watch_;
    std::vector<Sampled> sampled_;  // by node
    std::vector<Sample> run_;       // what is to be sampled when the run ends
};

unsigned Adaptive::fields() const {
    unsigned all = kDepth;
    for (const auto& each : candidates_) all |= each->fields();
    return all;
}

void Adaptive::reserve(size_t num_nodes, size_t count) {
    for (const auto& each : candidates_) each->reserve(num_nodes, count);
    if (num_nodes > sampled_.size()) sampled_.resize(num_nodes);
    make_room(run_, count);
    make_room(watch_.chain, count);
    for (Shadow& each : watch_.shadows) each.reserve(watch_.chain.size() + count);
}

void Adaptive::insert(Node node, const BlockInfo& info) {
    for (const auto& each : candidates_) each->insert(node, info);
    sampled_[node] = {watch_.samples(data(node).key), info};
    if (!sampled_[node].is_in) return;
    if (is_running_) run_.push_back({data(node).key, info});
    else sample(data(node).key, info, false);
}

void Adaptive::touch(Node node) {
    for (const auto& each : candidates_) each->touch(node);
    if (sampled_[node].is_in) sample(data(node).key, sampled_[node].info, true);
}

// The leader may change where a chain ends.
size_t Adaptive::begin_run(const Key* keys, const BlockInfo* infos, size_t count) {
    is_running_ = true;
    for (size_t i = 0; i < count; i++) {
        if (infos[i].depth >= watch_.depth && watch_.samples(keys[i])) return i + 1;
    }
    return count;
}

void Adaptive::end_run() {
    is_running_ = false;
    for (const Sample& each : run_) sample(each.key, each.info, false);
    run_.clear();
}

// The shadows begin anew where the capacity has changed much.
void Adaptive::resize(int64_t capacity) {
    const double ratio = double(capacity) / double(watch_.capacity);
    if (0.8 < ratio && ratio < 1.25) {
        for (const auto& each : candidates_) each->resize(capacity);
        return;
    }
    Watch fresh(capacity);
    for (const auto& each : candidates_) each->resize(capacity);
    watch_ = std::move(fresh);
    for (Node node = 0; node < sampled_.size(); node++) sampled_[node].is_in = sampled_[node].is_in && watch_.samples(data(node).key);
}

void Adaptive::sample(const Key& key, const BlockInfo& info, bool hit) {
    if (info.depth >= watch_.depth) end_chain();
    watch_.depth = info.depth;
    watch_.chain.push_back({key, info});
    watch_.num_hits = hit ? watch_.num_hits + 1 : 0;
}

// What each candidate would have hit of a chain beyond the first one, and what was hit.
void Adaptive::end_chain() {
    Watch& w = watch_;
    const int64_t num_keys = int64_t(w.chain.size());
    int64_t hits[kNumCandidates];
    for (size_t at = 0; at < kNumCandidates; at++) hits[at] = w.shadows[at].use(w.chain);
    for (size_t at = 0; at < kNumCandidates; at++) {
        const int64_t gain = hits[at] - hits[0];
        w.batch[at] += gain;
        w.chain_squares[at] += double(gain * gain);
    }
    if (leader_ > 0) w.num_to_settle = w.room;
    if (w.num_to_settle > 0) {
        w.balance += w.num_hits - hits[0];
        w.num_to_settle -= num_keys;
    }
    w.chain.clear();
    w.num_hits = 0;
    w.num_sampled += num_keys;
    if (w.num_sampled - w.num_decided >= w.decision_every) {
        w.num_decided = w.num_sampled;
        decide();
    }
}

void Adaptive::decide() {
    Watch& w = watch_;
    size_t best = 0;
    for (size_t at = 0; at < kNumCandidates; at++) {
        const double gain = double(w.batch[at]);
        w.gains[at] = w.gains[at] * w.decay + gain;
        w.batch_squares[at] = w.batch_squares[at] * w.decay + gain * gain;
        w.chain_squares[at] *= w.decay;
        w.batch[at] = 0;
        if (w.gains[at] > w.gains[best]) best = at;
    }
    const double allowed = kMostLost * double(w.num_sampled), balance = double(w.balance);
    if (w.gains[leader_] <= 0 || balance < -allowed) leader_ = 0;
    const double deviation = std::sqrt(std::max(w.batch_squares[best], w.chain_squares[best]));
    if (w.gains[best] - w.gains[leader_] > kDeviationsToLead * deviation && balance >= -allowed / 2) leader_ = best;
}

std::unique_ptr<Order> make_adaptive(const Nodes& nodes, int64_t capacity) { return std::make_unique<Adaptive>(nodes, capacity); }

}  // namespace pagemill
