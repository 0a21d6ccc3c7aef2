// S3-FIFO: a small queue filters what is used once, a main queue keeps the rest, ghosts tell who came back too late.
#include <algorithm>

#include "ghosts.h"
#include "order.h"
#include "queues.h"

namespace pagemill {

constexpr double kSmallShare = 0.1;
constexpr uint8_t kMostUses = 3;

class S3FIFO final : public Order {
public:
    S3FIFO(const Nodes& nodes, int64_t capacity) : Order(nodes), room_small_(small_of(capacity)), ghosts_(ghosts_of(capacity)) {}
    const char* name() const override { return "s3fifo"; }

    void reserve(size_t num_nodes, size_t count) override {
        places_.reserve(num_nodes);
        ghosts_.reserve(count);
        if (num_nodes > blocks_.size()) blocks_.resize(num_nodes);
    }

    void insert(Node node, const BlockInfo&) override {
        Nothing nothing;
        blocks_[node] = {0, !ghosts_.take(data(node).key, &nothing)};
        append(node);
    }

    void touch(Node node) override {
        if (blocks_[node].uses < kMostUses) blocks_[node].uses++;
    }

    void unlocked(Node node) override { places_.come_back(queue_of(node), node); }

    // Moves blocks that have earned it to the main queue's end on the way: at most four moves for each hit.
    Node first() override {
        for (;;) {
            bool from_small = num_small_ >= room_small_;
            Node node = places_.first(from_small ? small_ : main_, *nodes_);
            if (node == kNoNode) {
                from_small = !from_small;
                node = places_.first(from_small ? small_ : main_, *nodes_);
                if (node == kNoNode) return kNoNode;
            }
            Block& block = blocks_[node];
            if (block.uses <= (from_small ? 1 : 0)) return node;
            take(node);
            block = {from_small ? uint8_t(0) : uint8_t(block.uses - 1), false};
            append(node);
        }
    }

    void remove(Node node, bool evicted) override {
        take(node);
        if (evicted && blocks_[node].is_small) ghosts_.put(data(node).key, {});
    }

    void resize(int64_t capacity) override {
        ghosts_.resize(ghosts_of(capacity));
        room_small_ = small_of(capacity);
    }

    std::unique_ptr<Order> clone(const Nodes& nodes) const override { return copy_of(*this, nodes); }

private:
    struct Block {
        uint8_t uses = 0;
        bool is_small = false;
    };

    static int64_t small_of(int64_t capacity) { return std::max(int64_t(1), int64_t(double(capacity) * kSmallShare)); }
    static int64_t ghosts_of(int64_t capacity) { return std::max(int64_t(1), capacity - small_of(capacity)); }
    Queue& queue_of(Node node) { return blocks_[node].is_small ? small_ : main_; }

    void append(Node node) {
        places_.append(queue_of(node), node, ++now_);
        num_small_ += blocks_[node].is_small;
    }

    void take(Node node) {
        places_.take(queue_of(node), node);
        num_small_ -= blocks_[node].is_small;
    }

    Places places_;
    Queue small_, main_;
    int64_t num_small_ = 0, room_small_;
    Ghosts<Nothing> ghosts_;
    std::vector<Block> blocks_;
    uint64_t now_ = 0;
};

std::unique_ptr<Order> make_s3fifo(const Nodes& nodes, int64_t capacity) { return std::make_unique<S3FIFO>(nodes, capacity); }

}  // namespace pagemill
