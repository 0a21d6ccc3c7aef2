// Heads between the QKV product and attention: normalised, rotated by position, rotated for int8, written into their page.
#pragma once

namespace pagemill {
namespace PAGEMILL_TARGET {

static void normalize_head(float* x, const float* weight, float eps, int dim) {
    F squares = fzero();
    for (int c = 0; c < dim; c += kLanes) {
        const F v = fload_first(x + c, dim - c);
        squares = fmla(v, v, squares);
    }
    const F factor = fset(1.0f / std::sqrt(fsum(squares) / float(dim) + eps));
    for (int c = 0; c < dim; c += kLanes)
        fstore_first(x + c, fmul(fmul(fload_first(x + c, dim - c), factor), fload_first(weight + c, dim - c)), dim - c);
}

// Angles of one position, for all heads of a row. table: cosines, then sines, of rotary_dim / 2 pairs.
struct Angles {
    const float* table;
    int rotary_dim;
    alignas(64) float cosines[kMaxDim], sines[kMaxDim];  // where pairs are neighbours: for each value, a sine below zero for the first of two

    Angles(const Phase& p, int position) : table(p.rope_table + size_t(position) * size_t(p.rotary_dim)), rotary_dim(p.rotary_dim) {
        if (p.rope != RopeStyle::pairs) return;
        for (int i = 0; i < rotary_dim / 2; i++) {
            const float sine = table[rotary_dim / 2 + i];
            cosines[2 * i] = cosines[2 * i + 1] = table[i];
            sines[2 * i] = -sine;
            sines[2 * i + 1] = sine;
        }
    }
    void rotate_halves(float* x) const {
        const int half = rotary_dim / 2;
        for (int i = 0; i < half; i += kLanes) {
            const int n = half - i;
            const F a = fload_first(x + i, n), b = fload_first(x + half + i, n);
            const F cosine = fload_first(table + i, n), sine = fload_first(table + half + i, n);
            fstore_first(x + i, fsub(fmul(a, cosine), fmul(b, sine)), n);
            fstore_first(x + half + i, fadd(fmul(b, cosine), fmul(a, sine)), n);
        }
    }
    void rotate_pairs(float* x) const {
        for (int i = 0; i < rotary_dim; i += kLanes) {
            const int n = rotary_dim - i;
            const F v = fload_first(x + i, n);
            fstore_first(x + i, fadd(fmul(v, fload(cosines + i)), fmul(fswap<1>(v), fload(sines + i))), n);
        }
    }
};

// Hadamard rotation in place (orthonormal, blocks of the largest power of two that divides dim): spreads outlier channels.
// Applied to queries and keys alike, it leaves their products as they are.
static void hadamard(float* x, int dim) {
    const int block = dim & -dim;
    const F scale = fset(1.0f / std::sqrt(float(block)));
    for (int c = 0; c < dim; c += kLanes) {
        F v = fload_first(x + c, dim - c);
        if (block > 1) v = butterfly<1>(v);
        if (block > 2) v = butterfly<2>(v);
        if (block > 4) v = butterfly<4>(v);
        if (block > 8) v = butterfly<8>(v);
        if (block <= kLanes) v = fmul(v, scale);
        fstore_first(x + c, v, dim - c);
    }
    for (int half = kLanes; half < block; half *= 2) {
        const F factor = 2 * half == block ? scale : fset(1.0f);
        for (int i = 0; i < dim; i += 2 * half)
            for (int j = i; j < i + half; j += kLanes) {
                const F a = fload(x + j), b = fload(x + j + half);
                fstore(x + j, fmul(fadd(a, b), factor));
                fstore(x + j + half, fmul(fsub(a, b), factor));
            }
    }
}

template <Codec C> static void put_value(uint8_t* page, size_t index, float x) {
    if constexpr (C == Codec::f32) reinterpret_cast<float*>(page)[index] = x;
    else if constexpr (C == Codec::f16) reinterpret_cast<uint16_t*>(page)[index] = f32_to_f16(x);
    else reinterpret_cast<uint16_t*>(page)[index] = f32_to_bf16(x);
}

template <Codec C> static void write_head(uint8_t* page, const LayerKv& kv, int slot, const float* k, const float* v) {
    for (int d = 0; d < kv.dim_pad; d++) put_value<C>(page, size_t(d) * kPage + size_t(slot), d < kv.head_dim ? k[d] : 0.0f);
    const size_t values = size_t(kv.dim_pad) * kPage + size_t(slot) * size_t(kv.dim_pad);
    for (int d = 0; d < kv.dim_pad; d++) put_value<C>(page, values + size_t(d), d < kv.head_dim ? v[d] : 0.0f);
}

// Layout: attention-int8-inl.h. Only the bytes of this position are written: its neighbours may belong to another thread.
static void write_head_int8(uint8_t* page, const LayerKv& kv, int slot, const float* k, const float* v) {
    alignas(64) int8_t q[kMaxDim];
    uint16_t* scales = const_cast<uint16_t*>(key_scales(page, kv.dim_pad));
    scales[slot] = f32_to_f16(quantize_head(k, kv.head_dim, kv.dim_pad, true, q));
    for (int d = 0; d < kv.dim_pad; d += 4) {
        const uint32_t quad = uint32_t(quad_at(q + d)) ^ 0x80808080u;  // + 128
        std::memcpy(page + d * kPage + slot * 4, &quad, 4);
    }
    scales[kPage + slot] = f32_to_f16(quantize_head(v, kv.head_dim, kv.dim_pad, true, q));
    uint8_t* values = page + size_t(kPage) * size_t(kv.dim_pad) + size_t(slot / 4) * size_t(kv.dim_pad) * 4 + size_t(slot % 4);
    for (int d = 0; d < kv.dim_pad; d += kLanes) store_apart(values + size_t(d) * 4, q + d);
}

static void write_kv_row(const KvArena& arena, const Step& step, int layer, int row, const float* k, const float* v) {
    const LayerKv& kv = arena.layers[size_t(layer)];
    const int position = step.positions[row], page = position / kPage;
    const KvGroup& group = arena.groups[size_t(kv.group)];
    const int block = step.table(kv.group, step.row_seq[size_t(row)])[page / arena.pages_per_block];
    uint8_t* at = group.base + size_t(block) * group.block_bytes + kv.offset + size_t(page % arena.pages_per_block) * kv.page_bytes;
    for (int h = 0; h < kv.kv_heads; h++, at += size_t(arena.pages_per_block) * kv.page_bytes) {
        const float *kh = k + size_t(h) * size_t(kv.head_dim), *vh = v + size_t(h) * size_t(kv.head_dim);
        if (arena.codec == Codec::int8) write_head_int8(at, kv, position % kPage, kh, vh);
        else if (arena.codec == Codec::f32) write_head<Codec::f32>(at, kv, position % kPage, kh, vh);
        else if (arena.codec == Codec::f16) write_head<Codec::f16>(at, kv, position % kPage, kh, vh);
        else write_head<Codec::bf16>(at, kv, position % kPage, kh, vh);
    }
}

// Queries and keys of one row [q_heads + kv_heads][head_dim], as the product left them, the way attention reads them.
template <RopeStyle STYLE> static void rotate_heads(const Model& model, const Phase& p, const Angles* angles, float* q) {
    for (int h = 0; h < p.q_heads + p.kv_heads; h++) {
        float* head = q + size_t(h) * size_t(p.head_dim);
        const float* norm = h < p.q_heads ? p.q_norm : p.k_norm;
        if (norm) normalize_head(head, norm, p.qk_eps, p.head_dim);
        if constexpr (STYLE == RopeStyle::halves) angles->rotate_halves(head);
        if constexpr (STYLE == RopeStyle::pairs) angles->rotate_pairs(head);
        if (model.kv.codec == Codec::int8) hadamard(head, p.head_dim);
    }
}

// q: [q_heads + 2 kv_heads][head_dim] of one row, as the product left it.
static void finish_heads(const Model& model, const Step& step, const Phase& p, int row, float* q) {
    if (p.rope == RopeStyle::none) rotate_heads<RopeStyle::none>(model, p, nullptr, q);
    else {
        const Angles angles(p, step.positions[row]);
        if (p.rope == RopeStyle::halves) rotate_heads<RopeStyle::halves>(model, p, &angles, q);
        else rotate_heads<RopeStyle::pairs>(model, p, &angles, q);
    }
    const float* k = q + size_t(p.q_heads) * size_t(p.head_dim);
    write_kv_row(model.kv, step, p.layer, row, k, k + size_t(p.kv_heads) * size_t(p.head_dim));
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
