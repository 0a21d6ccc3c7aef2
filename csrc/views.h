// What the native step works on: plain structs over memory that Python owns. No logic.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pagemill {

// Weight formats. Matrices are [n, k] (y = W x), packed in panels of 32 columns of y; see pack.h for each layout.
enum class Format : int { f32 = 0, f16 = 1, bf16 = 2, q4_0 = 3, q4_1 = 4, q8_0 = 5, q4_0_tiles = 6, q4_1_tiles = 7, q8_0_tiles = 8, i8_rotated = 9 };
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
    int group = 0;
};

// Layers that share blocks and a block table for each sequence. The first holds all that no window group does.
struct KvGroup {
    uint8_t* base = nullptr;
    size_t block_bytes = 0;
    int num_blocks = 0;
    int window = 0;  // positions that its layers read, in blocks of a pool of their own; 0 = all
};

struct KvArena {
    std::vector<KvGroup> groups = std::vector<KvGroup>(1);
    int pages_per_block = 1;
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
    uint16_t* tiles = nullptr;  // the same in tiles of 16 rows: [rows / 16][ld / 2][16][2]
    int8_t* i8 = nullptr;       // [rows][ld], groups of 32, or whole rows for i8_rotated
    int8_t* low = nullptr;      // [rows][ld] where two_bytes: a value is 256 * i8 + low
    bool two_bytes = false;     // groups of 32 in 16 bits, which the head reads
    float* scale = nullptr;     // [rows][ld / 32], a whole row's in its first
    int32_t* sum = nullptr;     // [rows][ld / 32] sum of the group's integers
    float* scaled_sum = nullptr;  // [rows][ld / 32] scale * sum
    int ld = 0;                 // a multiple of 64
    int groups() const { return ld / kGroup; }
};

// Attention works on rows: one query head of one position. They are numbered as AttentionTasks::rows lists them.
struct AttentionRow {
    int32_t row, head;  // row of the step, head within the group
    int32_t partial;    // slot of the first part, or -1: one task does all; KV head h has its parts num_parts * h further on
    int32_t num_parts;  // parts are merged in order; the first may be the merged state of a run of splits
};
constexpr int kTileRows = 48;  // rows of a task

// One unit of attention: up to kTileRows rows of one KV head over a run of splits.
struct AttentionTask {
    int seq;  // whose block table is read
    int kv_head, first_row, num_rows;
    int split_from, split_to;
    int part;       // the part that the first split is, or -1: the task finishes its rows itself
    int num_parts;  // one for each split, or a single one: the merged state (row's first splits only)
};
struct AttentionTasks {
    int group = 0, kv_heads = 0, head_dim = 0, window = 0;
    int kv_group = 0;  // whose tables are read
    std::vector<AttentionRow> rows;
    std::vector<AttentionTask> tasks;
    std::vector<AttentionTask> merges;  // rows whose parts are merged at the end
    int num_partials = 0;
    int bundle = 1;  // tasks that one thread takes together: all KV heads of a sequence, whose pages are neighbours
    int shared_splits = 0;  // (sequence, split) pairs that needed no reading of their own
};

struct Step {
    int rows = 0, num_seqs = 0, num_logits = 0;
    const int32_t* tokens = nullptr;     // [rows]
    const int32_t* positions = nullptr;  // [rows]
    const int32_t* starts = nullptr;     // [num_seqs + 1] first row of each sequence
    const int32_t* tables = nullptr;     // [KV groups][num_seqs][table_stride] block ids; -1 where a window has passed
    int table_stride = 0;
    const int32_t* table(int group, int seq) const { return tables + (size_t(group) * size_t(num_seqs) + size_t(seq)) * size_t(table_stride); }
    const int32_t* logit_rows = nullptr;  // [num_logits]
    float* logits = nullptr;              // [num_logits][vocab]
    bool best_only = false;               // of the logits no more than each row's best one is wanted
    int32_t* best = nullptr;              // [num_logits] index of the largest logit, the first NaN where there is one
    std::vector<int32_t> row_seq;         // [rows]
};

struct Scratch {
    std::vector<uint8_t*> owned;
    float* x = nullptr;       // [rows][hidden_ld] residual stream
    float* wide = nullptr;    // [rows][wide_ld] outputs of attention_in and mlp_in products
    float* attn = nullptr;    // [rows][attn_ld]
    int32_t* peaks = nullptr;  // [threads][rows] each worker's best column of each logit row
    uint16_t* panel = nullptr;  // [threads][panel_stride] a panel of weights widened to bf16
    size_t panel_stride = 0;
    uint8_t* workers = nullptr;  // [threads][worker_stride] rows, scores and values that a worker attends to, 64-byte aligned
    size_t worker_stride = 0;
    float* norms = nullptr;     // [panels][32] lengths of the head's columns, then the largest of each panel; below zero: unknown
    float* partials = nullptr;  // [num_partials][16 + dim_pad]: maximum, sum, 14 unused, output
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

// A worker's panels of a matrix: how many were taken of them, by others among them.
struct alignas(64) PanelShare {
    std::atomic<int> taken{0}, by_others{0};
};
constexpr int kMostMatrices = 4;  // of a phase; the panels of more are dealt out beforehand

struct StepContext {
    const Model* model = nullptr;
    const Step* step = nullptr;
    Scratch* scratch = nullptr;
    std::vector<AttentionTasks> task_lists;
    std::vector<int> phase_tasks;  // phase -> task list (attention phases)
    std::atomic<int>* claims = nullptr;  // one counter per phase
    PanelShare* shares = nullptr;  // [phases][kMostMatrices][threads]; null with one thread
    Barrier* barrier = nullptr;
    int64_t* ranked_panels = nullptr;  // see Runner
    int threads = 1;
    bool by_rows = false;  // each thread keeps its rows through all products
    // What comes after the last attention, for the rows whose logits are wanted; null where that is every row.
    const StepContext* rest = nullptr;
    size_t last_attention = 0;  // a phase
};

}  // namespace pagemill
