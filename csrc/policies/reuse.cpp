#include "reuse.h"

#include <algorithm>
#include <cmath>

namespace pagemill {

constexpr int64_t kEpochsPerCapacity = 16, kSampled = 4096, kLeastEpoch = 8;
constexpr int kMostSampledBits = 8;

__attribute__((noinline)) double power(double base, double exponent) { return std::pow(base, exponent); }

static uint8_t mask_of(int64_t capacity) {
    int bits = 0;
    while (bits < kMostSampledBits && (std::max(int64_t(1), capacity / kSampled) >> (bits + 1)) > 0) bits++;
    return uint8_t((1 << bits) - 1);
}

ReuseLearner::ReuseLearner(int64_t capacity, const std::vector<double>& levels, const std::vector<int>& groups, const LearnerSetting& setting)
    : setting_(setting), levels_(levels), groups_(groups), epoch_uses_(std::max(kLeastEpoch, capacity / kEpochsPerCapacity)), mask_(mask_of(capacity)) {
    for (int step = 0; step < setting.num_edges; step++) {
        const int64_t edge = int64_t(double(kEpochsPerCapacity) * setting.first_edge * power(2.0, step / 2.0));
        edges_.push_back(std::max(edge, edges_.empty() ? int64_t(1) : edges_.back() + 1));
    }
    const double prior_age = setting.prior_age * double(kEpochsPerCapacity);
    for (int bucket = 0; bucket < num_buckets(); bucket++) {
        const bool is_last = bucket + 1 == num_buckets();
        const int64_t begin = bucket == 0 ? 0 : edges_[size_t(bucket) - 1], end = is_last ? 2 * edges_.back() : edges_[size_t(bucket)];
        widths_.push_back(double((end - begin) * epoch_uses_));
        prior_.push_back(std::min(0.5, setting.prior_hazard * widths_.back() / double(epoch_uses_) / (double(end) + prior_age)));
    }
    decay_ = power(0.5, 1 / (setting.half_life * double(kEpochsPerCapacity)));
    const size_t num_kinds = levels.size(), num_groups = size_t(*std::max_element(groups.begin(), groups.end())) + 1;
    hits_.resize(num_kinds * size_t(num_buckets()));
    reached_ = hits_;
    shape_.resize(size_t(num_buckets()));
    hazards_ = shape_;
    observed_.resize(num_kinds);
    expected_ = observed_;
    group_seen_.resize(num_groups);
    group_wanted_ = group_seen_;
    used_.resize(size_t(num_epochs()));
    alive_.resize(size_t(num_epochs()) * num_kinds);
}

void ReuseLearner::reserve(size_t count) {
    latest_.reserve(latest_.size() + count);
    // Uses beyond this epoch's end go to those that follow.
    const size_t in_epoch = std::min(count, size_t(epoch_uses_)), num_slots = std::min(size_t(num_epochs()), count / size_t(epoch_uses_) + 2);
    size_t slot = slot_of(epoch_);
    for (size_t i = 0; i < num_slots; i++, slot = slot + 1 == used_.size() ? 0 : slot + 1) make_room(used_[slot], in_epoch);
}

void ReuseLearner::record(const Key& key, int kind) {
    const size_t num_kinds = levels_.size(), buckets = size_t(num_buckets());
    uint32_t entry = latest_.find(key);
    if (entry == kNoIndex) {
        entry = latest_.add(key);
    } else {
        const Use last = latest_[entry];
        const size_t bucket = size_t(std::upper_bound(edges_.begin(), edges_.end(), epoch_ - last.epoch) - edges_.begin());
        hits_[size_t(last.kind) * buckets + bucket] += 1.0;
        alive_[slot_of(last.epoch) * num_kinds + size_t(last.kind)]--;
    }
    reached_[size_t(kind) * buckets] += 1.0;
    alive_[slot_of(epoch_) * num_kinds + size_t(kind)]++;
    latest_[entry] = {epoch_, kind};
    used_[slot_of(epoch_)].push_back(entry);
}

void ReuseLearner::advance(int64_t epoch) {
    const size_t num_kinds = levels_.size(), buckets = size_t(num_buckets());
    epoch_ = epoch;
    for (size_t bucket = 0; bucket < edges_.size(); bucket++) {
        const int64_t* alive = &alive_[slot_of(epoch - edges_[bucket]) * num_kinds];
        for (size_t kind = 0; kind < num_kinds; kind++) reached_[kind * buckets + bucket + 1] += double(alive[kind]);
    }
    // What was used in the epoch that is now too old is forgotten; its slot is the new epoch's.
    const int64_t oldest = epoch - num_epochs();
    const size_t slot = slot_of(oldest);
    std::fill_n(alive_.begin() + int64_t(slot * num_kinds), num_kinds, 0);
    for (const uint32_t entry : used_[slot]) {
        if (latest_[entry].epoch != oldest) continue;
        latest_[entry].epoch = -1;
        latest_.erase(entry);
    }
    used_[slot].clear();
}

void ReuseLearner::take_over(const ReuseLearner& other, int64_t epoch) {
    hits_ = other.hits_;
    reached_ = other.reached_;
    epoch_ = decayed_at_ = epoch;
}

void ReuseLearner::refresh(int64_t epoch, std::vector<double>& index) {
    const size_t num_kinds = levels_.size(), buckets = size_t(num_buckets());
    expect();
    std::fill(group_seen_.begin(), group_seen_.end(), 0.0);
    std::fill(group_wanted_.begin(), group_wanted_.end(), 0.0);
    for (size_t kind = 0; kind < num_kinds; kind++) {
        group_seen_[size_t(groups_[kind])] += observed_[kind];
        group_wanted_[size_t(groups_[kind])] += expected_[kind];
    }
    for (size_t kind = 0; kind < num_kinds; kind++) {
        const double seen = group_seen_[size_t(groups_[kind])], wanted = group_wanted_[size_t(groups_[kind])];
        double level = (seen + setting_.group_weight * levels_[kind]) / (wanted + setting_.group_weight);
        level = (observed_[kind] + setting_.level_weight * level) / (expected_[kind] + setting_.level_weight);
        for (size_t bucket = 0; bucket < buckets; bucket++) hazards_[bucket] = std::min(1.0, level * shape_[bucket]);
        index_of(hazards_.data(), &index[kind * buckets]);
    }
    const double decay = power(decay_, double(epoch - decayed_at_));
    decayed_at_ = epoch;
    for (double& each : hits_) each *= decay;
    for (double& each : reached_) each *= decay;
}

// The hazard of each bucket of age, all classes together; by class the reuses seen, and those that this shape would give.
void ReuseLearner::expect() {
    const size_t num_kinds = levels_.size(), buckets = size_t(num_buckets());
    for (size_t bucket = 0; bucket < buckets; bucket++) {
        double hits = 0, reached = 0;
        for (size_t kind = 0; kind < num_kinds; kind++) {
            hits += hits_[kind * buckets + bucket];
            reached += reached_[kind * buckets + bucket];
        }
        shape_[bucket] = (hits + setting_.shape_weight * prior_[bucket]) / (reached + setting_.shape_weight);
    }
    for (size_t kind = 0; kind < num_kinds; kind++) {
        double observed = 0, expected = 0;
        for (size_t bucket = 0; bucket < buckets; bucket++) {
            observed += hits_[kind * buckets + bucket];
            expected += reached_[kind * buckets + bucket] * shape_[bucket];
        }
        observed_[kind] = observed;
        expected_[kind] = expected;
    }
}

// For each bucket to start from: max over last buckets of expected hits / expected time.
void ReuseLearner::index_of(const double* hazards, double* index) const {
    const size_t buckets = size_t(num_buckets());
    for (size_t start = 0; start < buckets; start++) {
        double alive = 1, hits = 0, time = 0, best = 0;
        for (size_t bucket = start; bucket < buckets; bucket++) {
            const double hit = alive * hazards[bucket];
            hits += hit;
            time += (alive - hit / 2) * widths_[bucket];
            alive -= hit;
            if (hits > best * time) best = hits / time;
        }
        index[start] = best;
    }
}

}  // namespace pagemill
