// Least frequently used, of equals the one whose last use is longest ago.
#include "order.h"
#include "ranks.h"

namespace pagemill {

class LFU final : public Order {
public:
    explicit LFU(const Nodes& nodes) : Order(nodes) {}
    const char* name() const override { return "lfu"; }
    void reserve(size_t num_nodes, size_t) override { ranks_.reserve(num_nodes); }
    void insert(Node node, const BlockInfo&) override { ranks_.put(node, 1); }
    void touch(Node node) override { ranks_.put(node, ranks_.rank(node) + 1); }
    void unlocked(Node node) override { ranks_.unlocked(node); }
    Node first() override { return ranks_.first(*nodes_); }
    void remove(Node node, bool) override { ranks_.discard(node); }
    void resize(int64_t) override {}
    std::unique_ptr<Order> clone(const Nodes& nodes) const override { return copy_of(*this, nodes); }

private:
    Ranks ranks_;  // rank: uses
};

std::unique_ptr<Order> make_lfu(const Nodes& nodes, int64_t) { return std::make_unique<LFU>(nodes); }

}  // namespace pagemill
