// Keys of blocks that were evicted, with what is remembered of each: the last `limit` of them.
#pragma once
#include <utility>

#include "keys.h"

namespace pagemill {

template <class Memory> class Ghosts {
public:
    explicit Ghosts(int64_t limit) : limit_(size_t(limit)) {}
    size_t size() const { return table_.size(); }
    bool contains(const Key& key) const { return table_.find(key) != kNoIndex; }

    // Room for `count` more keys, as far as they are kept.
    void reserve(size_t count) {
        const size_t needed = table_.size() + count;
        table_.reserve(needed < limit_ + 1 ? needed : limit_ + 1);
    }

    // Remember a key as the latest; the oldest beyond the limit is forgotten.
    void put(const Key& key, Memory memory) {
        uint32_t index = table_.find(key);
        if (index == kNoIndex) index = table_.add(key);
        else unlink(index);
        table_[index] = {memory, latest_, kNoIndex};
        (latest_ == kNoIndex ? oldest_ : table_[latest_].later) = index;
        latest_ = index;
        if (table_.size() > limit_) drop_oldest();
    }

    // Forget a key. False where it is not here; what was remembered of it otherwise.
    bool take(const Key& key, Memory* memory) {
        const uint32_t index = table_.find(key);
        if (index == kNoIndex) return false;
        *memory = table_[index].memory;
        forget(index);
        return true;
    }

    void drop_oldest() {
        if (oldest_ != kNoIndex) forget(oldest_);
    }

    // Remember so many from now on, in no more memory than these take.
    void resize(int64_t limit) {
        Ghosts resized(limit);
        size_t surplus = size() > resized.limit_ ? size() - resized.limit_ : 0;
        resized.reserve(size() - surplus);
        for (uint32_t index = oldest_; index != kNoIndex; index = table_[index].later) {
            if (surplus > 0) surplus--;
            else resized.put(table_.key(index), table_[index].memory);
        }
        *this = std::move(resized);
    }

private:
    struct Ghost {
        Memory memory{};
        uint32_t earlier = kNoIndex, later = kNoIndex;
    };

    void unlink(uint32_t index) {
        const Ghost ghost = table_[index];
        (ghost.earlier == kNoIndex ? oldest_ : table_[ghost.earlier].later) = ghost.later;
        (ghost.later == kNoIndex ? latest_ : table_[ghost.later].earlier) = ghost.earlier;
    }

    void forget(uint32_t index) {
        unlink(index);
        table_.erase(index);
    }

    KeyTable<Ghost> table_;
    size_t limit_;
    uint32_t oldest_ = kNoIndex, latest_ = kNoIndex;
};

struct Nothing {};

}  // namespace pagemill
