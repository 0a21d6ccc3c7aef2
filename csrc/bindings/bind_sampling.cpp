// The Python face of sampling.h.
#include "../sampling.h"

#include "native_model.h"

namespace pagemill {

using Words = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstFloatRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MutableInts2 = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MutableDoubles = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableDoubles2 = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

static void set_forbidden(SamplingJob& job, const Ints& starts, const Ints& ids) {
    require(int(starts.size()) == job.rows + 1 && starts.data()[0] == 0, "forbidden tokens need one start for each row and the end");
    for (int i = 0; i < job.rows; i++) require(starts.data()[i] <= starts.data()[i + 1], "starts of forbidden tokens go down");
    require(size_t(starts.data()[job.rows]) == ids.size(), "starts of forbidden tokens do not fit");
    job.forbid_starts = starts.data();
    job.forbid = ids.data();
}

static void set_reports(SamplingJob& job, const MutableInts& ranks, const MutableDoubles& logprobs, const MutableInts2& top_ids, const MutableDoubles2& top_logprobs) {
    job.most_logprobs = int(top_ids.shape(1));
    require(int(ranks.size()) == job.rows && int(logprobs.size()) == job.rows, "one rank and one logprob for each row");
    require(int(top_ids.shape(0)) == job.rows && int(top_logprobs.shape(0)) == job.rows && top_logprobs.shape(1) == top_ids.shape(1),
            "top tokens have the wrong shape");
    job.ranks = ranks.data();
    job.logprobs = logprobs.data();
    job.top_ids = top_ids.data();
    job.top_logprobs = top_logprobs.data();
}

// Samples the logits of a model on the model's threads.
class NativeSampler {
public:
    explicit NativeSampler(NativeModel& model) : model_(model), sampler_(model.kernels(), model.pool(), model.vocab()) {}

    // logits, best, requests: of the rows. forbidden: None, or (starts, ids). reports: None, or (ranks, logprobs, top_ids, top_logprobs).
    void sample(ConstFloatRows logits, Ints best, Words requests, MutableInts tokens, MutableInts status, nb::object forbidden, nb::object reports) {
        SamplingJob job;
        job.rows = int(logits.shape(0));
        job.vocab = model_.vocab();
        require(int(logits.shape(1)) == job.vocab, "logits have the wrong shape");
        require(requests.size() == size_t(job.rows) * sizeof(SamplingRow), "one request for each row");
        require(reinterpret_cast<uintptr_t>(requests.data()) % alignof(SamplingRow) == 0, "requests are not aligned");
        require(int(best.size()) == job.rows && int(tokens.size()) == job.rows && int(status.size()) == job.rows, "one place for each row");
        for (int i = 0; i < job.rows; i++) require(best.data()[i] >= 0 && best.data()[i] < job.vocab, "best token out of range");
        job.logits = logits.data();
        job.best = best.data();
        job.requests = reinterpret_cast<const SamplingRow*>(requests.data());
        job.tokens = tokens.data();
        job.status = status.data();
        if (!forbidden.is_none()) {
            const auto& [starts, ids] = nb::cast<std::tuple<Ints, Ints>>(forbidden);
            set_forbidden(job, starts, ids);
        }
        if (!reports.is_none()) {
            const auto& [ranks, logprobs, top_ids, top_logprobs] = nb::cast<std::tuple<MutableInts, MutableDoubles, MutableInts2, MutableDoubles2>>(reports);
            set_reports(job, ranks, logprobs, top_ids, top_logprobs);
        }
        check_requests(job);
        if (job.rows == 0) return;
        nb::gil_scoped_release released;
        sampler_.run(job);
    }

private:
    static void check_requests(const SamplingJob& job) {
        for (int i = 0; i < job.rows; i++) {
            const SamplingRow& r = job.requests[i];
            require(r.temperature >= 0 && r.top_p > 0 && r.top_p <= 1 && r.min_p >= 0 && r.min_p <= 1, "a request is out of range");
            require(r.logprobs >= -1 && (r.logprobs < 0 || (job.ranks != nullptr && r.logprobs <= job.most_logprobs)), "a request wants more logprobs than there is room for");
        }
    }

    NativeModel& model_;
    Sampler sampler_;
};

void bind_sampling(nb::module_& m) {
    nb::class_<NativeSampler>(m, "NativeSampler")
        .def(nb::init<NativeModel&>(), "model"_a, nb::keep_alive<1, 2>())
        .def("sample", &NativeSampler::sample, "logits"_a, "best"_a, "requests"_a, "tokens"_a, "status"_a, "forbidden"_a.none(), "reports"_a.none());
    m.def("random_bits", &random_bits, "seed"_a, "choice"_a, "position"_a);
}

}  // namespace pagemill
