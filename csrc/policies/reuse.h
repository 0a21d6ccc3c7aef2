// How soon blocks of a class are used again, and the index made of it: src/pagemill/cache/policies/reuse.py says what is computed,
// and is followed to the last bit.
#pragma once
#include "keys.h"

namespace pagemill {

// Constants of the estimate, as in reuse.LearnerSetting.
struct LearnerSetting {
    double first_edge = 0.5;
    int num_edges = 9;
    double half_life = 24.0;
    double shape_weight = 5000.0, level_weight = 6400.0, group_weight = 640.0;
    double prior_hazard = 0.1, prior_age = 0.5;
};

// C's, as Python's `**`, of numbers that the compiler does not know: it rounds otherwise than the library now and then.
double power(double base, double exponent);

class ReuseLearner {
public:
    ReuseLearner(int64_t capacity, const std::vector<double>& levels, const std::vector<int>& groups, const LearnerSetting& setting);
    int64_t epoch_uses() const { return epoch_uses_; }
    const std::vector<int64_t>& edges() const { return edges_; }  // in epochs
    int num_buckets() const { return int(edges_.size()) + 1; }
    bool samples(const Key& key) const { return !(key.first_byte() & mask_); }
    // Ages of epochs that are followed, and so how many epochs are told apart.
    int64_t num_epochs() const { return edges_.back(); }

    // Room for so many uses, so that `record` does not throw.
    void reserve(size_t count);
    // A block of class `kind` is used in this epoch; its key is in the sample.
    void record(const Key& key, int kind);
    // An epoch begins. Called for each.
    void advance(int64_t epoch);
    // Begin in an epoch, with another learner's counts of the same classes.
    void take_over(const ReuseLearner& other, int64_t epoch);
    // index: by class and bucket. Older counts weigh less from now on.
    void refresh(int64_t epoch, std::vector<double>& index);

private:
    struct Use {
        int64_t epoch = -1;
        int kind = 0;
    };

    size_t slot_of(int64_t epoch) const { return size_t(((epoch % num_epochs()) + num_epochs()) % num_epochs()); }
    void expect();
    void index_of(const double* hazards, double* index) const;

    LearnerSetting setting_;
    std::vector<double> levels_;
    std::vector<int> groups_;
    int64_t epoch_uses_, epoch_ = 0, decayed_at_ = 0;
    uint8_t mask_;
    double decay_;
    std::vector<int64_t> edges_;
    std::vector<double> widths_, prior_;             // by bucket
    std::vector<double> hits_, reached_;             // by class and bucket
    std::vector<double> shape_, hazards_;            // by bucket, of `refresh`
    std::vector<double> observed_, expected_;        // by class, of `refresh`
    std::vector<double> group_seen_, group_wanted_;  // by group, of `refresh`
    KeyTable<Use> latest_;
    std::vector<std::vector<uint32_t>> used_;  // by epoch, entries of latest_
    std::vector<int64_t> alive_;               // by epoch and class: blocks used then and not since
};

}  // namespace pagemill
