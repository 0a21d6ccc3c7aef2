#include "policy.h"

#include <utility>

namespace pagemill {

using MakeOrder = std::unique_ptr<Order> (*)(const Nodes&, int64_t);
constexpr std::pair<const char*, MakeOrder> kOrders[] = {
    {"lru", make_lru}, {"lfu", make_lfu}, {"s3fifo", make_s3fifo}, {"arc", make_arc},
    {"gdsf", make_gdsf}, {"gittins", make_gittins}, {"adaptive", make_adaptive},
};
constexpr uint32_t kLeaving = UINT32_MAX;  // a mark; the others are places in a run, from 1

std::vector<std::string> policy_names() {
    std::vector<std::string> names;
    for (const auto& [name, make] : kOrders) names.push_back(name);
    return names;
}

static void refuse(const std::string& message) { throw Refused(message); }
static void refuse_block(int64_t block, const char* what) { refuse("block " + std::to_string(block) + what); }

static void check_capacity(int64_t capacity) {
    if (capacity < 1) refuse("a cache of " + std::to_string(capacity) + " blocks holds nothing");
    if (capacity > kMostCapacity) throw std::invalid_argument("a cache of " + std::to_string(capacity) + " blocks is out of range");
}

Policy::Policy(const std::string& name, int64_t capacity) {
    check_capacity(capacity);
    for (const auto& [known_name, make] : kOrders) {
        if (name == known_name) order_ = make(nodes_, capacity);
    }
    if (!order_) throw std::invalid_argument("there is no native policy " + name);
}

Policy::Policy(const Policy& other) : nodes_(other.nodes_), table_(other.table_), order_(other.order_->clone(nodes_)) {}

Node Policy::known(int64_t block) const {
    const Node node = table_.find(block);
    if (node == kNoNode) refuse_block(block, " is not known");
    return node;
}

void Policy::reserve(size_t count) {
    nodes_.reserve(count);
    table_.reserve(nodes_.size() + count);
    order_->reserve(nodes_.capacity(), count);
    run_.clear();
    make_room(run_, count);
}

void Policy::check_infos(const BlockInfo* infos, size_t count) const {
    if (!(order_->fields() & kNumBytes)) return;
    for (size_t i = 0; i < count; i++) {
        if (infos[i].num_bytes <= 0) refuse("a page has bytes");
    }
}

void Policy::forget(Node node) {
    table_.erase(nodes_[node].block);
    nodes_.release(node);
}

// Gives each of these blocks a node, in run_, which no order knows yet.
void Policy::claim(const std::vector<int64_t>& blocks, const std::vector<Key>& keys) {
    reserve(blocks.size());
    for (size_t i = 0; i < blocks.size(); i++) {
        if (table_.find(blocks[i]) != kNoNode) {
            give_up_claims();
            refuse_block(blocks[i], " is known already");
        }
        const Node node = nodes_.take(blocks[i], keys[i]);
        table_.add(blocks[i], node);
        run_.push_back(node);
    }
}

void Policy::give_up_claims() {
    for (; !run_.empty(); run_.pop_back()) forget(run_.back());
}

void Policy::insert(int64_t block, const Key& key, const BlockInfo& info) {
    if (contains(block)) refuse_block(block, " is known already");
    check_infos(&info, 1);
    reserve(1);
    const Node node = nodes_.take(block, key);
    table_.add(block, node);
    order_->insert(node, info);
}

void Policy::touch(int64_t block) {
    const Node node = known(block);
    reserve(1);
    order_->touch(node);
}

void Policy::lock(int64_t block) {
    const Node node = known(block);
    if (nodes_[node].locked) refuse_block(block, " is locked already");
    nodes_[node].locked = true;
}

void Policy::unlock(int64_t block) {
    const Node node = table_.find(block);
    if (node == kNoNode || !nodes_[node].locked) refuse_block(block, " is not locked");
    nodes_[node].locked = false;
    order_->unlocked(node);
}

int64_t Policy::victim() {
    const Node node = order_->first();
    return node == kNoNode ? -1 : nodes_[node].block;
}

void Policy::remove(int64_t block, bool evicted) {
    const Node node = known(block);
    reserve(1);
    order_->remove(node, evicted);
    forget(node);
}

void Policy::on_miss(const Key& key) {
    reserve(1);
    order_->on_miss(key);
}

void Policy::touch_all(const std::vector<int64_t>& blocks) {
    reserve(blocks.size());
    for (const int64_t block : blocks) run_.push_back(known(block));
    for (const Node node : run_) order_->touch(node);
}

std::vector<int64_t> Policy::replace(const std::vector<int64_t>& blocks, const std::vector<Key>& keys, const std::vector<BlockInfo>& infos) {
    const size_t count = blocks.size();
    check_infos(infos.data(), count);
    std::vector<int64_t> victims;
    victims.reserve(count);
    claim(blocks, keys);
    if (count > 0 && order_->first() == kNoNode) {
        give_up_claims();
        refuse("every block is locked");
    }
    for (size_t begin = 0, end; begin < count; begin = end) {
        end = begin + order_->begin_run(&keys[begin], &infos[begin], count - begin);
        for (size_t i = begin; i < end; i++) {
            order_->on_miss(keys[i]);
            const Node victim = order_->first();
            victims.push_back(nodes_[victim].block);
            order_->remove(victim, true);
            forget(victim);
            order_->insert(run_[i], infos[i]);
        }
        order_->end_run();
    }
    return victims;
}

// Each of the victims is known when its turn comes: before the call, or as a block of the run whose turn was before.
void Policy::check_victims(const std::vector<int64_t>& victims, size_t count) {
    int64_t wrong = -1;
    for (size_t i = 0; i < count; i++) nodes_[run_[i]].mark = uint32_t(i + 1);
    for (size_t i = 0; i < count && wrong < 0; i++) {
        const Node node = table_.find(victims[i]);
        if (node == kNoNode || nodes_[node].mark > i) {
            wrong = victims[i];
            break;
        }
        nodes_[node].mark = kLeaving;
        marks_.push_back(node);
    }
    for (const Node node : marks_) nodes_[node].mark = 0;
    for (size_t i = 0; i < count; i++) nodes_[run_[i]].mark = 0;
    marks_.clear();
    if (wrong < 0) return;
    give_up_claims();
    refuse_block(wrong, ", a victim, is not known");
}

void Policy::exchange(const std::vector<int64_t>& victims, const std::vector<int64_t>& blocks, const std::vector<Key>& keys,
                      const std::vector<BlockInfo>& infos) {
    const size_t count = blocks.size();
    if (victims.size() != count) throw std::invalid_argument("a victim for each block");
    check_infos(infos.data(), count);
    make_room(marks_, count);
    claim(blocks, keys);
    check_victims(victims, count);
    for (size_t i = 0; i < count; i++) {
        const Node victim = table_.find(victims[i]);
        order_->on_miss(keys[i]);
        order_->remove(victim, true);
        forget(victim);
        order_->insert(run_[i], infos[i]);
    }
}

void Policy::admit(const std::vector<int64_t>& blocks, const std::vector<Key>& keys, const std::vector<BlockInfo>& infos) {
    check_infos(infos.data(), blocks.size());
    claim(blocks, keys);
    for (size_t i = blocks.size(); i-- > 0;) {
        order_->insert(run_[i], infos[i]);
        nodes_[run_[i]].locked = true;
    }
}

size_t Policy::evict_run(const std::vector<int64_t>& blocks) {
    if (blocks.empty()) refuse("a run has a block");
    reserve(blocks.size());
    int64_t wrong = -1;
    for (const int64_t block : blocks) {
        const Node node = table_.find(block);
        if (node == kNoNode || nodes_[node].mark || (!run_.empty() && !nodes_[node].locked)) {
            wrong = block;
            break;
        }
        nodes_[node].mark = 1;
        run_.push_back(node);
    }
    for (const Node node : run_) nodes_[node].mark = 0;
    const Node first = order_->first();
    if (run_.empty() || first != run_[0]) refuse_block(blocks[0], " is not the victim");
    if (wrong >= 0) refuse_block(wrong, " is not one that is locked, once in the run");
    order_->remove(first, true);
    forget(first);
    for (size_t i = 1; i < run_.size(); i++) {
        nodes_[run_[i]].locked = false;
        order_->unlocked(run_[i]);
        if (order_->first() != run_[i]) return i;
        order_->remove(run_[i], true);
        forget(run_[i]);
    }
    return run_.size();
}

void Policy::resize(int64_t capacity) {
    check_capacity(capacity);
    order_->resize(capacity);
}

}  // namespace pagemill
