// The blocks that a policy knows: each has a node, a small number by which orders keep what they know of it.
#pragma once
#include "keys.h"

namespace pagemill {

using Node = uint32_t;
constexpr Node kNoNode = UINT32_MAX;

struct NodeData {
    Key key;
    int64_t block = 0;  // of a free node: the next free one
    uint32_t mark = 0;  // of a call that is being checked
    bool locked = false;
};

class Nodes {
public:
    size_t capacity() const { return all_.size(); }
    size_t size() const { return size_; }
    NodeData& operator[](Node node) { return all_[node]; }
    const NodeData& operator[](Node node) const { return all_[node]; }

    // Room for `count` more, so that `take` does not throw.
    void reserve(size_t count) {
        const size_t old = all_.size(), needed = size_ + count;
        if (needed <= old) return;
        all_.resize(needed > old + old / 2 ? needed : old + old / 2);
        for (size_t node = all_.size(); node-- > old;) release(Node(node));
        size_ += all_.size() - old;
    }

    Node take(int64_t block, const Key& key) {
        const Node node = Node(free_);
        free_ = all_[node].block;
        all_[node] = {key, block, 0, false};
        size_++;
        return node;
    }

    void release(Node node) {
        all_[node].block = free_;
        free_ = node;
        size_--;
    }

private:
    std::vector<NodeData> all_;
    int64_t free_ = kNoNode;
    size_t size_ = 0;
};

// Nodes by block: open addressing, with nothing left behind by what is erased.
class BlockTable {
public:
    void reserve(size_t count) {
        if (2 * count <= slots_.size()) return;
        int bits = 4;
        while ((size_t(1) << bits) < 2 * count) bits++;
        std::vector<Slot> old(size_t(1) << bits);
        old.swap(slots_);
        shift_ = 64 - bits;
        for (const Slot& slot : old) {
            if (slot.node != kNoNode) put(slot);
        }
    }

    Node find(int64_t block) const {
        if (slots_.empty()) return kNoNode;
        size_t at = home(block);
        while (slots_[at].node != kNoNode && slots_[at].block != block) at = (at + 1) & mask();
        return slots_[at].node;
    }

    // The block is not there, and room for it is.
    void add(int64_t block, Node node) { put({block, node}); }

    // The block is there.
    void erase(int64_t block) {
        size_t hole = home(block);
        while (slots_[hole].block != block || slots_[hole].node == kNoNode) hole = (hole + 1) & mask();
        for (size_t at = (hole + 1) & mask(); slots_[at].node != kNoNode; at = (at + 1) & mask()) {
            if (((at - home(slots_[at].block)) & mask()) < ((at - hole) & mask())) continue;
            slots_[hole] = slots_[at];
            hole = at;
        }
        slots_[hole].node = kNoNode;
    }

private:
    struct Slot {
        int64_t block = 0;
        Node node = kNoNode;
    };

    size_t mask() const { return slots_.size() - 1; }
    size_t home(int64_t block) const { return size_t((uint64_t(block) * 0x9E3779B97F4A7C15u) >> shift_); }

    void put(Slot slot) {
        size_t at = home(slot.block);
        while (slots_[at].node != kNoNode) at = (at + 1) & mask();
        slots_[at] = slot;
    }

    std::vector<Slot> slots_;
    int shift_ = 60;
};

}  // namespace pagemill
