// Which rows attend over which splits together: tiles of rows, tasks, shared prefixes. Target-independent, no arithmetic.
#pragma once
#include "views.h"

namespace pagemill {

// Fills `out` for the attention phases of this geometry and KV group. Rows of one KV head stand in tiles of at most
// kTileRows. Sequences of few rows whose block tables begin with the same ids stack their rows for the splits that those
// blocks hold whole.
void build_attention_tasks(const Step& step, const Phase& phase, int kv_group, int block_size, int threads, AttentionTasks& out);

}  // namespace pagemill
