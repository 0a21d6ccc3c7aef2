#include "ranks.h"

#include <algorithm>
#include <utility>

namespace pagemill {

constexpr size_t kBranches = 4;

void Ranks::reserve(size_t num_nodes) {
    if (num_nodes <= places_.size()) return;
    heap_.reserve(num_nodes);
    places_.resize(num_nodes);
}

void Ranks::put(Node node, double rank) {
    Place& place = places_[node];
    place.rank = rank;
    place.stamp = ++stamp_;
    if (place.at == kNoIndex) {
        push(node);
        return;
    }
    const Entry entry{place.rank, place.stamp, node};
    if (heap_[place.at] < entry) sink(place.at, entry);
    else rise(place.at, entry);
}

void Ranks::discard(Node node) {
    if (places_[node].at != kNoIndex) drop(node);
}

void Ranks::unlocked(Node node) {
    if (places_[node].at == kNoIndex) push(node);
}

Node Ranks::first(const Nodes& nodes) {
    while (!heap_.empty() && nodes[heap_[0].node].locked) drop(heap_[0].node);
    return heap_.empty() ? kNoNode : heap_[0].node;
}

void Ranks::push(Node node) {
    const Entry entry{places_[node].rank, places_[node].stamp, node};
    heap_.push_back(entry);
    rise(heap_.size() - 1, entry);
}

void Ranks::drop(Node node) {
    const size_t at = std::exchange(places_[node].at, kNoIndex);
    const Entry gone = heap_[at], last = heap_.back();
    heap_.pop_back();
    if (last.node == node) return;
    if (gone < last) sink(at, last);
    else rise(at, last);
}

void Ranks::rise(size_t at, const Entry& entry) {
    while (at > 0) {
        const size_t parent = (at - 1) / kBranches;
        if (!(entry < heap_[parent])) break;
        set(at, heap_[parent]);
        at = parent;
    }
    set(at, entry);
}

void Ranks::sink(size_t at, const Entry& entry) {
    for (;;) {
        const size_t begin = kBranches * at + 1, end = std::min(begin + kBranches, heap_.size());
        if (begin >= end) break;
        size_t least = begin;
        for (size_t child = begin + 1; child < end; child++) {
            if (heap_[child] < heap_[least]) least = child;
        }
        if (!(heap_[least] < entry)) break;
        set(at, heap_[least]);
        at = least;
    }
    set(at, entry);
}

}  // namespace pagemill
