// Nodes by rank, those of one rank in the order in which they came to it.
#pragma once
#include "nodes.h"

namespace pagemill {

// A heap of four branches that knows where each node stands. A locked node that stands first is set aside until it is unlocked or
// moved, so that it is walked past once. Every call costs O(log n).
class Ranks {
public:
    void reserve(size_t num_nodes);
    // Give a node a rank, behind all others that have it by now.
    void put(Node node, double rank);
    void discard(Node node);
    // A node may be first again.
    void unlocked(Node node);
    Node first(const Nodes& nodes);
    double rank(Node node) const { return places_[node].rank; }

private:
    struct Place {
        double rank = 0;
        uint64_t stamp = 0;
        uint32_t at = kNoIndex;  // in the heap
    };
    struct Entry {
        double rank;
        uint64_t stamp;
        Node node;
        bool operator<(const Entry& other) const { return rank < other.rank || (rank == other.rank && stamp < other.stamp); }
    };

    void set(size_t at, const Entry& entry) {
        heap_[at] = entry;
        places_[entry.node].at = uint32_t(at);
    }
    void rise(size_t at, const Entry& entry);
    void sink(size_t at, const Entry& entry);
    void push(Node node);
    void drop(Node node);

    std::vector<Place> places_;
    std::vector<Entry> heap_;
    uint64_t stamp_ = 0;
};

}  // namespace pagemill
