// Queues of nodes by stamp, in which nothing that is locked is walked past twice.
#pragma once
#include "nodes.h"

namespace pagemill {

// first, last: of the list, in which stamps ascend. back: root of a pairing heap (Fredman et al., 1986) of nodes that came back to
// an earlier place; it takes no memory but the nodes' own, and two of them are joined in O(1).
struct Queue {
    Node first = kNoNode, last = kNoNode, back = kNoNode;
    bool empty() const { return first == kNoNode && back == kNoNode; }
};

// Where nodes stand in queues. A locked node that stands first is set aside, in no queue, until it comes back or is taken.
class Places {
public:
    void reserve(size_t num_nodes) {
        if (num_nodes > all_.size()) all_.resize(num_nodes);
    }
    uint64_t stamp(Node node) const { return all_[node].stamp; }
    bool in_queue(Node node) const { return all_[node].where == Where::listed || all_[node].where == Where::back; }
    // A node that is in no queue, with a stamp later than any in the list.
    void append(Queue& queue, Node node, uint64_t stamp);
    // Take a node out of its queue, or from where it was set aside.
    void take(Queue& queue, Node node);
    // A node was unlocked: if it was set aside, it stands in its queue again.
    void come_back(Queue& queue, Node node);
    // The earliest node that is not locked, or kNoNode.
    Node first(Queue& queue, const Nodes& nodes);
    // All of a queue whose stamps are later than those in the other's list goes to that.
    void join(Queue& from, Queue& into);

private:
    enum class Where : uint8_t { nowhere, listed, back, aside };
    // before, after: neighbours in the list; in the heap the next child of the same parent, and the one before or the parent.
    struct Place {
        uint64_t stamp = 0;
        Node before = kNoNode, after = kNoNode, child = kNoNode;
        Where where = Where::nowhere;
    };

    void unlink(Queue& queue, Node node);
    Node meld(Node one, Node other);
    Node meld_children(Node parent);

    std::vector<Place> all_;
};

}  // namespace pagemill
