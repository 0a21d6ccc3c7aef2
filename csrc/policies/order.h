// What a policy is: an order of nodes. Follows the policy of its name in src/pagemill/cache/policies call by call, which is the
// specification; checks of what callers may ask for are policy.h's, once for all orders.
#pragma once
#include <memory>
#include <string>

#include "nodes.h"

namespace pagemill {

// What is known of a block when it is published, as far as an order asks for it.
struct BlockInfo {
    int64_t num_tokens = 1, depth = 0, num_bytes = 1, text_tokens = 0, num_known_blocks = 0;
    double recompute_cost = 1;
};

enum Field : unsigned {
    kNumTokens = 1,
    kDepth = 2,
    kNumBytes = 4,
    kTextTokens = 8,
    kNumKnownBlocks = 16,
    kRecomputeCost = 32,
};

// Mutated by every call that is not const. After `reserve` no call throws but `resize` and `clone`, which change nothing then.
class Order {
public:
    virtual ~Order() = default;
    virtual const char* name() const = 0;
    virtual const char* leader() const { return name(); }  // the order that is followed
    virtual unsigned fields() const { return 0; }          // of BlockInfo that are read
    // Room for nodes below `num_nodes`, and for `count` uses, insertions or evictions.
    virtual void reserve(size_t num_nodes, size_t count) = 0;
    virtual void insert(Node node, const BlockInfo& info) = 0;
    virtual void touch(Node node) = 0;
    virtual void unlocked(Node node) = 0;
    virtual Node first() = 0;  // the unlocked node to leave next, or kNoNode
    virtual void remove(Node node, bool evicted) = 0;
    virtual void on_miss(const Key&) {}
    virtual void resize(int64_t capacity) = 0;
    // A run of blocks replaces others: how many of them before `end_run`, which comes after these.
    virtual size_t begin_run(const Key*, const BlockInfo*, size_t count) { return count; }
    virtual void end_run() {}
    virtual std::unique_ptr<Order> clone(const Nodes& nodes) const = 0;
    virtual void rebind(const Nodes& nodes) { nodes_ = &nodes; }

protected:
    explicit Order(const Nodes& nodes) : nodes_(&nodes) {}
    Order(const Order&) = default;
    const NodeData& data(Node node) const { return (*nodes_)[node]; }

    const Nodes* nodes_;
};

template <class T> std::unique_ptr<Order> copy_of(const T& order, const Nodes& nodes) {
    auto copy = std::make_unique<T>(order);
    copy->rebind(nodes);
    return copy;
}

// One for each policy, in the file of its name.
std::unique_ptr<Order> make_lru(const Nodes& nodes, int64_t capacity);
std::unique_ptr<Order> make_lfu(const Nodes& nodes, int64_t capacity);
std::unique_ptr<Order> make_s3fifo(const Nodes& nodes, int64_t capacity);
std::unique_ptr<Order> make_arc(const Nodes& nodes, int64_t capacity);
std::unique_ptr<Order> make_gdsf(const Nodes& nodes, int64_t capacity);
std::unique_ptr<Order> make_gittins(const Nodes& nodes, int64_t capacity);
std::unique_ptr<Order> make_adaptive(const Nodes& nodes, int64_t capacity);

}  // namespace pagemill
