// GreedyDual-Size-Frequency with ghosts: uses x recompute cost / bytes, above a floor that rises with evictions.
#include <algorithm>

#include "ghosts.h"
#include "order.h"
#include "ranks.h"

namespace pagemill {

constexpr int64_t kGhostsPerBlock = 2;

class GDSF final : public Order {
public:
    GDSF(const Nodes& nodes, int64_t capacity) : Order(nodes), ghosts_(kGhostsPerBlock * capacity) {}
    const char* name() const override { return "gdsf"; }
    unsigned fields() const override { return kRecomputeCost | kNumBytes; }

    void reserve(size_t num_nodes, size_t count) override {
        ranks_.reserve(num_nodes);
        ghosts_.reserve(count);
        if (num_nodes > uses_.size()) uses_.resize(num_nodes);
    }

    void insert(Node node, const BlockInfo& info) override {
        int64_t uses = 0;
        ghosts_.take(data(node).key, &uses);
        if (unit_bytes_ == 0) unit_bytes_ = info.num_bytes;
        uses_[node] = {uses + 1, info.recompute_cost * double(unit_bytes_) / double(info.num_bytes)};
        rank(node);
    }

    void touch(Node node) override {
        uses_[node].count++;
        rank(node);
    }

    void unlocked(Node node) override { ranks_.unlocked(node); }
    Node first() override { return ranks_.first(*nodes_); }

    void remove(Node node, bool evicted) override {
        ranks_.discard(node);
        if (!evicted) return;
        floor_ = std::max(floor_, ranks_.rank(node));
        ghosts_.put(data(node).key, uses_[node].count);
    }

    void resize(int64_t capacity) override { ghosts_.resize(kGhostsPerBlock * capacity); }
    std::unique_ptr<Order> clone(const Nodes& nodes) const override { return copy_of(*this, nodes); }

private:
    struct Uses {
        int64_t count = 0;
        double worth = 0;  // of a use: cost by bytes of the first page
    };

    void rank(Node node) { ranks_.put(node, floor_ + double(uses_[node].count) * uses_[node].worth); }

    Ranks ranks_;
    Ghosts<int64_t> ghosts_;  // uses
    std::vector<Uses> uses_;
    double floor_ = 0;
    int64_t unit_bytes_ = 0;
};

std::unique_ptr<Order> make_gdsf(const Nodes& nodes, int64_t capacity) { return std::make_unique<GDSF>(nodes, capacity); }

}  // namespace pagemill
