// Least recently used.
#include "order.h"
#include "queues.h"

namespace pagemill {

class LRU final : public Order {
public:
    explicit LRU(const Nodes& nodes) : Order(nodes) {}
    const char* name() const override { return "lru"; }
    void reserve(size_t num_nodes, size_t) override { places_.reserve(num_nodes); }
    void insert(Node node, const BlockInfo&) override { places_.append(queue_, node, ++now_); }
    void touch(Node node) override {
        places_.take(queue_, node);
        places_.append(queue_, node, ++now_);
    }
    void unlocked(Node node) override { places_.come_back(queue_, node); }
    Node first() override { return places_.first(queue_, *nodes_); }
    void remove(Node node, bool) override { places_.take(queue_, node); }
    void resize(int64_t) override {}
    std::unique_ptr<Order> clone(const Nodes& nodes) const override { return copy_of(*this, nodes); }

private:
    Places places_;
    Queue queue_;
    uint64_t now_ = 0;
};

std::unique_ptr<Order> make_lru(const Nodes& nodes, int64_t) { return std::make_unique<LRU>(nodes); }

}  // namespace pagemill
