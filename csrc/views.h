// What the native step works on: plain structs over memory that Python owns. No logic.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pagemill {

// Weight formats. Matrices are [n, k] (y = W x), packed in panels of 32 columns of y; see pack.h for each layout.
enum class Format : int { f32 = 0, f16 = 1, bf16 = 2, q4_0 = 3, q4_1 = 4, q8_0 = 5 };
constexpr int kPanel = 32;      // columns of a packed panel
constexpr int kGroup = 32;      // values that share a scale in quantised formats and in quantised activations
constexpr int kPage = 16;       // positions in a KV page
constexpr int kSplit = 256;     // positions in an attention split; splits begin at absolute multiples
constexpr int kLanes = 16;

struct Matrix {
    Format format = Format::f32;
    int n = 0, k = 0;
    size_t panel_bytes = 0;
    const uint8_t* data = nullptr;
    const float* bias = nullptr;  // [n] or null
    int panels() const { return (n + kPanel - 1) / kPanel; }
};

// Resident KV codec: what one stored value is.
enum class Codec : int { f32 = 0, f16 = 1, bf16 = 2, int8 = 3 };

struct LayerKv {
    size_t offset = 0;      // within a block
    size_t page_bytes = 0;  // one page of one KV head; floats: keys [dim_pad][16], values [16][dim_pad]
    int kv_heads = 0, head_dim = 0, dim_pad = 0;
};

struct KvArena {
    uint8_t* base = nullptr;
    size_t block_bytes = 0;
    int num_blocks = 0, pages_per_block = 1;
    Codec codec = Codec::bf16;
    std::vector<LayerKv> layers;
};

enum class PhaseKind : int { embed, attention_in, attention, attention_out, mlp_in, mlp_out, head };
enum class NormKind : int { none, rms, layer };
enum class ActivationKind : int { none, silu, gelu, gelu_tanh, relu };
enum class RopeStyle : int { none, halves, pairs };

// One record of the lowered plan. Which fields a kind reads is said in kernels/plan.py.
struct Phase {
    PhaseKind kind = PhaseKind::embed;
    std::vector<int> matrices;  // ids; their outputs stand side by side
    NormKind norm = NormKind::none;
    const float* norm_weight = nullptr;
    const float* norm_bias = nullptr;
    float norm_eps = 0;
    int layer = 0, q_heads = 0, kv_heads = 0, head_dim = 0;
    const float* q_norm = nullptr;  // [head_dim] or null
    const float* k_norm = nullptr;
    float qk_eps = 0;
    RopeStyle rope = RopeStyle::none;
    const float* rope_table = nullptr;  // [positions][rotary_dim]: cosines, then sines
    int rotary_dim = 0;
    float scale = 1;    // of scores (attention), embeddings (embed), the residual branch (.._out), logits (head)
    float softcap = 0;  // attention, head; 0 = none
    int window = 0;     // attention; 0 = none
    ActivationKind activation = ActivationKind::none;
    bool gated = false;
    const float* position_table = nullptr;  // embed: [positions][hidden] or null
};

// Rows of activations in the forms that products read.
struct Activations {
    float* f32 = nullptr;       // [rows][ld]
    uint16_t* bf16 = nullptr;   // [rows][ld], zero padded to an even width
    int8_t* i8 = nullptr;       // [rows][ld], groups of 32
    float* scale = nullptr;     // [rows][ld / 32]
    int32_t* sum = nullptr;     // [rows][ld / 32] sum of the group's integers
    float* scaled_sum = nullptr;  // [rows][ld / 32] scale * sum
    int ld = 0;                 // a multiple of 64
    int groups() const { return ld / kGroup; }
};

// One unit of attention: up to kTileRows rows (position, head of the group) of one KV head over a run of splits.
struct AttentionTask {
    int seq, kv_head, first_row, num_rows;  // rows are numbered position * group + head within the sequence's step
    int split_from, split_to;
    int partial;  // index of the first partial, or -1: the task merges its own splits
};
struct AttentionTasks {
    int group = 0, kv_heads = 0, head_dim = 0, window = 0;
    std::vector<AttentionTask> tasks;
    std::vector<AttentionTask> merges;  // tiles whose splits were separate tasks
    int num_partials = 0;
};
constexpr int kTileRows = 6;

struct Step {
    int rows = 0, num_seqs = 0, num_logits = 0;
    const int32_t* tokens = nullptr;     // [rows]
    const int32_t* positions = nullptr;  // [rows]
    const int32_t* starts = nullptr;     // [num_seqs + 1] first row of each sequence
    const int32_t* tables = nullptr;     // [num_seqs][table_stride] block ids
    int table_stride = 0;
    const int32_t* logit_rows = nullptr;  // [num_logits]
    float* logits = nullptr;              // [num_logits][vocab]
    int32_t* best = nullptr;              // [num_logits] index of the largest logit, the first NaN where there is one
    std::vector<int32_t> row_seq;         // [rows]
};

struct Scratch {
    std::vector<uint8_t*> owned;
    float* x = nullptr;       // [rows][hidden_ld] residual stream
    float* wide = nullptr;    // [rows][wide_ld] outputs of attention_in and mlp_in products
    float* attn = nullptr;    // [rows][attn_ld]
    int32_t* peaks = nullptr;  // [threads][rows] each worker's best column of each logit row
    float* partials = nullptr;  // [num_partials][kTileRows][2 + dim_pad]
    Activations act;
    int hidden_ld = 0, wide_ld = 0, attn_ld = 0;
};

struct Barrier;  // threads.h

struct Model {
    int hidden = 0, vocab = 0, max_positions = 0;
    std::vector<Matrix> matrices;
    std::vector<Phase> phases;
    KvArena kv;
};

struct StepContext {
    const Model* model = nullptr;
    const Step* step = nullptr;
    Scratch* scratch = nullptr;
    std::vector<AttentionTasks> task_lists;
    std::vector<int> phase_tasks;  // phase -> task list (attention phases)
    std::atomic<int>* claims = nullptr;  // one counter per phase
    Barrier* barrier = nullptr;
    int threads = 1;
    bool by_rows = false;  // each thread keeps its rows through all products
};

}  // namespace pagemill
