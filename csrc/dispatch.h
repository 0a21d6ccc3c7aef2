// One table of kernels per instruction-set target, in order of preference; the machine is asked at run time.
#pragma once
#include <string>
#include <vector>

#include "views.h"

namespace pagemill {

struct Peaks;        // measure.h
struct SamplingJob;  // sampling.h
struct SamplingScratch;

struct Kernels {
    const char* name;
    bool tiles;  // reads weights in tiles (pack.h, the .._tiles layouts)
    size_t worker_bytes;  // what each worker of a step keeps attention's rows in: Scratch::workers
    void (*run_step)(const StepContext& ctx, int worker);
    void (*sample_row)(const SamplingJob& job, int row, SamplingScratch& scratch);
    // Entry points of the contract tests: the same code that the step runs.
    void (*quantize_rows)(const float* x, int rows, int width, bool rotated, Activations& act);
    void (*multiply)(const Activations& act, int rows, const Matrix& w, float* y);
    void (*integer_sums)(const Activations& act, int rows, const Matrix& w, int32_t* out);
    const Peaks* peaks;  // how fast the machine is at the target's arithmetic
};

std::vector<std::string> built_targets();      // best first
std::vector<std::string> available_targets();  // those that this machine can run
const Kernels* find_target(const std::string& name);  // null where not available here

}  // namespace pagemill
