// What is promised of every policy, once for all orders: src/pagemill/cache/policies/base.py is the specification.
#pragma once
#include <stdexcept>

#include "order.h"

namespace pagemill {

constexpr int64_t kMostBlock = int64_t(1) << 62;
constexpr int64_t kMostCapacity = int64_t(1) << 40;

// A caller's mistake; nothing has changed.
struct Refused : std::logic_error {
    using std::logic_error::logic_error;
};

std::vector<std::string> policy_names();

// Blocks by number over an order of their nodes. Every call checks first, then makes room, and acts when nothing can fail any more:
// one that throws has changed nothing.
class Policy {
public:
    // Throws std::invalid_argument for a name that is not there, Refused for a capacity below 1.
    Policy(const std::string& name, int64_t capacity);
    Policy(const Policy& other);

    const char* name() const { return order_->name(); }
    const char* leader() const { return order_->leader(); }
    unsigned fields() const { return order_->fields(); }
    bool contains(int64_t block) const { return table_.find(block) != kNoNode; }
    void insert(int64_t block, const Key& key, const BlockInfo& info);
    void touch(int64_t block);
    void lock(int64_t block);
    void unlock(int64_t block);
    // -1 where there is none.
    int64_t victim();
    void remove(int64_t block, bool evicted);
    void on_miss(const Key& key);
    void touch_all(const std::vector<int64_t>& blocks);
    std::vector<int64_t> replace(const std::vector<int64_t>& blocks, const std::vector<Key>& keys, const std::vector<BlockInfo>& infos);
    void exchange(const std::vector<int64_t>& victims, const std::vector<int64_t>& blocks, const std::vector<Key>& keys,
                  const std::vector<BlockInfo>& infos);
    void admit(const std::vector<int64_t>& blocks, const std::vector<Key>& keys, const std::vector<BlockInfo>& infos);
    size_t evict_run(const std::vector<int64_t>& blocks);
    void resize(int64_t capacity);

private:
    Node known(int64_t block) const;
    void reserve(size_t count);
    void check_infos(const BlockInfo* infos, size_t count) const;
    void claim(const std::vector<int64_t>& blocks, const std::vector<Key>& keys);
    void forget(Node node);
    void give_up_claims();
    void check_victims(const std::vector<int64_t>& victims, size_t count);

    Nodes nodes_;
    BlockTable table_;
    std::unique_ptr<Order> order_;
    std::vector<Node> run_;    // nodes of the call's blocks
    std::vector<Node> marks_;  // nodes that are marked while a call is checked
};

}  // namespace pagemill
