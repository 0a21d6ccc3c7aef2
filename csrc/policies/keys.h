// Keys of blocks, and a table of them: open addressing over entries that keep their index until they are erased.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace pagemill {

constexpr size_t kMostKeyBytes = 32;
constexpr uint32_t kNoIndex = UINT32_MAX;

// Room for `extra` more elements; grows by half at least, so that many small requests cost O(1) each, amortised.
template <class T> void make_room(std::vector<T>& all, size_t extra) {
    const size_t needed = all.size() + extra;
    if (needed > all.capacity()) all.reserve(needed > all.capacity() + all.capacity() / 2 ? needed : all.capacity() + all.capacity() / 2);
}

// 1 to 32 bytes, padded with zeros.
struct Key {
    uint64_t words[kMostKeyBytes / 8] = {};
    uint64_t length = 0;

    Key() = default;
    Key(const void* bytes, size_t count) : length(count) { std::memcpy(words, bytes, count); }
    // The policies sample keys by the bits of their first byte.
    uint8_t first_byte() const { return *reinterpret_cast<const uint8_t*>(words); }
    bool operator==(const Key& other) const { return std::memcmp(this, &other, sizeof(Key)) == 0; }
    uint32_t hash() const {
        uint64_t mixed = length;
        for (const uint64_t word : words) {
            mixed = (mixed ^ word) * 0x9E3779B97F4A7C15u;
            mixed ^= mixed >> 32;
        }
        return uint32_t(mixed);
    }
};
static_assert(sizeof(Key) == kMostKeyBytes + 8, "keys are compared as bytes");

// Values by key. An index is valid until its key is erased. `add` and `erase` do not throw where room was reserved.
template <class Value> class KeyTable {
public:
    size_t size() const { return size_; }
    const Key& key(uint32_t index) const { return entries_[index].key; }
    Value& operator[](uint32_t index) { return entries_[index].value; }
    const Value& operator[](uint32_t index) const { return entries_[index].value; }

    // Room for so many keys in all.
    void reserve(size_t count) {
        if (count > entries_.size()) make_room(entries_, count - entries_.size());
        if (2 * count > slots_.size()) rehash(count);
    }

    uint32_t find(const Key& key) const {
        if (slots_.empty()) return kNoIndex;
        const uint32_t tag = key.hash();
        for (size_t at = tag & mask();; at = (at + 1) & mask()) {
            const Slot& slot = slots_[at];
            if (slot.index == kNoIndex || (slot.tag == tag && entries_[slot.index].key == key)) return slot.index;
        }
    }

    // The index of a key that is not there; its value is a fresh one.
    uint32_t add(const Key& key) {
        reserve(size_ + 1);
        uint32_t index = free_;
        if (index == kNoIndex) {
            index = uint32_t(entries_.size());
            entries_.push_back({});
        } else {
            free_ = uint32_t(entries_[index].key.words[0]);
        }
        entries_[index] = {key, Value{}};
        size_++;
        put({key.hash(), index});
        return index;
    }

    void erase(uint32_t index) {
        size_t hole = entries_[index].key.hash() & mask();
        while (slots_[hole].index != index) hole = (hole + 1) & mask();
        // What was pushed on by the slot that is now free moves back.
        for (size_t at = (hole + 1) & mask(); slots_[at].index != kNoIndex; at = (at + 1) & mask()) {
            if (((at - slots_[at].tag) & mask()) < ((at - hole) & mask())) continue;
            slots_[hole] = slots_[at];
            hole = at;
        }
        slots_[hole].index = kNoIndex;
        entries_[index].key.words[0] = free_;  // of an erased entry: the one that was erased before it
        free_ = index;
        size_--;
    }

private:
    struct Slot {
        uint32_t tag = 0, index = kNoIndex;  // tag: hash of the key
    };
    struct Entry {
        Key key;
        Value value;
    };

    size_t mask() const { return slots_.size() - 1; }

    void put(Slot slot) {
        size_t at = slot.tag & mask();
        while (slots_[at].index != kNoIndex) at = (at + 1) & mask();
        slots_[at] = slot;
    }

    void rehash(size_t count) {
        size_t num_slots = 16;
        while (num_slots < 2 * count) num_slots *= 2;
        std::vector<Slot> old(num_slots);
        old.swap(slots_);
        for (const Slot& slot : old) {
            if (slot.index != kNoIndex) put(slot);
        }
    }

    std::vector<Slot> slots_;
    std::vector<Entry> entries_;
    uint32_t free_ = kNoIndex;
    size_t size_ = 0;
};

}  // namespace pagemill
