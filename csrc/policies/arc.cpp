// ARC: one list of blocks used once, one of blocks used again, and ghosts of both that shift the room between them.
#include <algorithm>

#include "ghosts.h"
#include "order.h"
#include "queues.h"

namespace pagemill {

class ARC final : public Order {
public:
    ARC(const Nodes& nodes, int64_t capacity) : Order(nodes), capacity_(capacity), ghosts_once_(capacity), ghosts_again_(2 * capacity) {}
    const char* name() const override { return "arc"; }

    void reserve(size_t num_nodes, size_t count) override {
        places_.reserve(num_nodes);
        ghosts_once_.reserve(count);
        ghosts_again_.reserve(count);
        if (num_nodes > is_once_.size()) is_once_.resize(num_nodes);
    }

    void insert(Node node, const BlockInfo&) override {
        Nothing nothing;
        const bool left_once = ghosts_once_.take(data(node).key, &nothing), left_again = ghosts_again_.take(data(node).key, &nothing);
        append(node, !left_once && !left_again);
        missed_again_ = false;
    }

    void touch(Node node) override {
        take(node);
        append(node, false);
    }

    void unlocked(Node node) override { places_.come_back(queue_of(node), node); }

    Node first() override {
        const double num_once = double(num_once_);
        const bool from_once = num_once > target_ || (missed_again_ && num_once == target_);
        const bool once_first = num_once_ > 0 && from_once;
        const Node node = places_.first(once_first ? once_ : again_, *nodes_);
        return node == kNoNode ? places_.first(once_first ? again_ : once_, *nodes_) : node;
    }

    void remove(Node node, bool evicted) override {
        take(node);
        if (!evicted) return;
        (is_once_[node] ? ghosts_once_ : ghosts_again_).put(data(node).key, {});
        if (num_once_ + int64_t(ghosts_once_.size()) >= capacity_) ghosts_once_.drop_oldest();
        const size_t num_ghosts = ghosts_once_.size() + ghosts_again_.size();
        if (num_once_ + num_again_ + int64_t(num_ghosts) >= 2 * capacity_) ghosts_again_.drop_oldest();
    }

    // A miss on a ghost shifts the target towards the list that it left.
    void on_miss(const Key& key) override {
        const double once = double(ghosts_once_.size()), again = double(ghosts_again_.size());
        missed_again_ = ghosts_again_.contains(key);
        if (ghosts_once_.contains(key)) target_ = std::min(double(capacity_), target_ + std::max(1.0, again / once));
        else if (missed_again_) target_ = std::max(0.0, target_ - std::max(1.0, once / again));
    }

    void resize(int64_t capacity) override {
        Ghosts<Nothing> once = ghosts_once_;
        once.resize(capacity);
        ghosts_again_.resize(2 * capacity);
        ghosts_once_ = std::move(once);
        capacity_ = capacity;
        target_ = std::min(target_, double(capacity));
    }

    std::unique_ptr<Order> clone(const Nodes& nodes) const override { return copy_of(*this, nodes); }

private:
    Queue& queue_of(Node node) { return is_once_[node] ? once_ : again_; }

    void append(Node node, bool is_once) {
        is_once_[node] = is_once;
        (is_once ? num_once_ : num_again_)++;
        places_.append(queue_of(node), node, ++now_);
    }

    void take(Node node) {
        places_.take(queue_of(node), node);
        (is_once_[node] ? num_once_ : num_again_)--;
    }

    int64_t capacity_, num_once_ = 0, num_again_ = 0;
    double target_ = 0;
    bool missed_again_ = false;
    Places places_;
    Queue once_, again_;
    Ghosts<Nothing> ghosts_once_, ghosts_again_;
    std::vector<uint8_t> is_once_;
    uint64_t now_ = 0;
};

std::unique_ptr<Order> make_arc(const Nodes& nodes, int64_t capacity) { return std::make_unique<ARC>(nodes, capacity); }

}  // namespace pagemill
