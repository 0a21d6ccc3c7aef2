#include "queues.h"

#include <utility>

namespace pagemill {

void Places::append(Queue& queue, Node node, uint64_t stamp) {
    all_[node] = {stamp, queue.last, kNoNode, kNoNode, Where::listed};
    (queue.last == kNoNode ? queue.first : all_[queue.last].after) = node;
    queue.last = node;
}

void Places::unlink(Queue& queue, Node node) {
    const Place& place = all_[node];
    (place.before == kNoNode ? queue.first : all_[place.before].after) = place.after;
    (place.after == kNoNode ? queue.last : all_[place.after].before) = place.before;
}

void Places::take(Queue& queue, Node node) {
    const Place place = all_[node];
    if (place.where == Where::listed) unlink(queue, node);
    if (place.where == Where::back) {
        const Node children = meld_children(node);
        if (queue.back == node) {
            queue.back = children;
        } else {
            (all_[place.before].child == node ? all_[place.before].child : all_[place.before].after) = place.after;
            if (place.after != kNoNode) all_[place.after].before = place.before;
            queue.back = meld(queue.back, children);
        }
    }
    all_[node].where = Where::nowhere;
}

void Places::come_back(Queue& queue, Node node) {
    Place& place = all_[node];
    if (place.where != Where::aside) return;
    place = {place.stamp, kNoNode, kNoNode, kNoNode, Where::back};
    queue.back = meld(queue.back, node);
}

Node Places::first(Queue& queue, const Nodes& nodes) {
    while (queue.back != kNoNode && nodes[queue.back].locked) {
        const Node node = queue.back;
        queue.back = meld_children(node);
        all_[node].where = Where::aside;
    }
    while (queue.first != kNoNode && nodes[queue.first].locked) {
        const Node node = queue.first;
        unlink(queue, node);
        all_[node].where = Where::aside;
    }
    if (queue.back == kNoNode) return queue.first;
    if (queue.first == kNoNode) return queue.back;
    return all_[queue.back].stamp < all_[queue.first].stamp ? queue.back : queue.first;
}

void Places::join(Queue& from, Queue& into) {
    if (from.first != kNoNode) {
        all_[from.first].before = into.last;
        (into.last == kNoNode ? into.first : all_[into.last].after) = from.first;
        into.last = from.last;
    }
    into.back = meld(into.back, from.back);
    from = {};
}

Node Places::meld(Node one, Node other) {
    if (one == kNoNode) return other;
    if (other == kNoNode) return one;
    if (all_[other].stamp < all_[one].stamp) std::swap(one, other);
    Place &parent = all_[one], &child = all_[other];
    child.before = one;
    child.after = parent.child;
    if (child.after != kNoNode) all_[child.after].before = other;
    parent.child = other;
    parent.before = parent.after = kNoNode;
    return one;
}

// The usual two passes: neighbours in pairs from the left, then all of these from the right.
Node Places::meld_children(Node parent) {
    Node next = std::exchange(all_[parent].child, kNoNode), pairs = kNoNode, root = kNoNode;
    while (next != kNoNode) {
        const Node one = next, other = all_[one].after;
        next = other == kNoNode ? kNoNode : all_[other].after;
        all_[one].before = all_[one].after = kNoNode;
        const Node pair = meld(one, other);
        all_[pair].before = pairs;
        pairs = pair;
    }
    while (pairs != kNoNode) {
        const Node pair = pairs;
        pairs = all_[pair].before;
        all_[pair].before = kNoNode;
        root = meld(root, pair);
    }
    return root;
}

}  // namespace pagemill
