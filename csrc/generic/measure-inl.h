// Loops that reach a target's peak: as many independent accumulators as its products keep, operands in registers or one
// load away. Included by target-inl.h after the vector type and the AMX tiles.
#pragma once
#include "../measure.h"

namespace pagemill {
namespace PAGEMILL_TARGET {

// The compiler must take the operand for a new one, so that it neither drops a round nor moves a product out of the loop.
template <class T> PM_INLINE void renew(T& operand) { asm volatile("" : "+m"(operand)); }

static float peak_f32(int64_t rounds) {
    constexpr int count = 2 * kFloatRows;
    F sums[count], x = fset(1e-6f), y = fset(1.0f);
#pragma GCC unroll 32
    for (int i = 0; i < count; i++) sums[i] = fset(float(i));
    for (int64_t r = 0; r < rounds; r++) {
        renew(x);
#pragma GCC unroll 32
        for (int i = 0; i < count; i++) sums[i] = fmla(x, y, sums[i]);
    }
    F total = fzero();
#pragma GCC unroll 32
    for (int i = 0; i < count; i++) total = fadd(total, sums[i]);
    return fsum(total);
}

static float peak_bf16(int64_t rounds) {
    constexpr int count = 2 * kFloatRows;
    alignas(64) uint16_t ones[32];
    for (uint16_t& each : ones) each = 0x3f80;
    F sums[count];
    U w = uload(ones);
#pragma GCC unroll 32
    for (int i = 0; i < count; i++) sums[i] = fset(float(i));
    for (int64_t r = 0; r < rounds; r++) {
        renew(w);
#pragma GCC unroll 32
        for (int i = 0; i < count; i++) sums[i] = fdot_bf16(sums[i], w, 0x3a803a80);
    }
    F total = fzero();
#pragma GCC unroll 32
    for (int i = 0; i < count; i++) total = fadd(total, sums[i]);
    return fsum(total);
}

static float peak_int8(int64_t rounds) {
    constexpr int count = 2 * kRows;
    alignas(64) uint8_t bytes[64];
    for (int i = 0; i < 64; i++) bytes[i] = uint8_t(i + 100);
    I sums[count];
    U w = uload(bytes);
#pragma GCC unroll 32
    for (int i = 0; i < count; i++) sums[i] = iset(i);
    for (int64_t r = 0; r < rounds; r++) {
        renew(w);
#pragma GCC unroll 32
        for (int i = 0; i < count; i++) sums[i] = idot(sums[i], w, 0x01ff01ff);
    }
    F total = fzero();
#pragma GCC unroll 32
    for (int i = 0; i < count; i++) total = fadd(total, itof(sums[i]));
    return fsum(total);
}

#ifdef PAGEMILL_AMX

constexpr int64_t kTileProducts = 4;

static void load_tiles() {
    alignas(64) uint16_t values[512];
    for (uint16_t& each : values) each = 0x3a80;
    enter_tiles();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    PM_TILE_LOAD(4, values, 64);
    PM_TILE_LOAD(5, values, 64);
    PM_TILE_LOAD(6, values, 64);
    PM_TILE_LOAD(7, values, 64);
}
static float store_tile() {
    alignas(64) float sums[256];
    _tile_stored(0, sums, 64);
    leave_tiles();
    return sums[0];
}
static float peak_tile_bf16(int64_t rounds) {
    load_tiles();
    for (int64_t r = 0; r < rounds; r++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return store_tile();
}
static float peak_tile_int8(int64_t rounds) {
    load_tiles();
    for (int64_t r = 0; r < rounds; r++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    return store_tile();
}

#endif

static int64_t peak_round_size(Arithmetic arithmetic) {
    switch (arithmetic) {
        case Arithmetic::f32: return 2 * kFloatRows * 16;
        case Arithmetic::bf16: return 2 * kFloatRows * 32;
        case Arithmetic::int8: return 2 * kRows * 64;
#ifdef PAGEMILL_AMX
        case Arithmetic::tile_bf16: return kTileProducts * 16 * 16 * 32;
        case Arithmetic::tile_int8: return kTileProducts * 16 * 16 * 64;
#else
        default: break;
#endif
    }
    return 0;
}

static float peak_compute(Arithmetic arithmetic, int64_t rounds) {
    switch (arithmetic) {
        case Arithmetic::f32: return peak_f32(rounds);
        case Arithmetic::bf16: return peak_bf16(rounds);
        case Arithmetic::int8: return peak_int8(rounds);
#ifdef PAGEMILL_AMX
        case Arithmetic::tile_bf16: return peak_tile_bf16(rounds);
        case Arithmetic::tile_int8: return peak_tile_int8(rounds);
#else
        default: break;
#endif
    }
    return 0;
}

static uint64_t peak_read(const uint8_t* data, size_t bytes) {
    typedef uint64_t Words __attribute__((vector_size(64), aligned(64)));
    Words sums[8] = {};
    for (size_t at = 0; at < bytes; at += 512) {
        const Words* words = reinterpret_cast<const Words*>(data + at);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __builtin_prefetch(data + at + 4096 + 64 * size_t(i));
            sums[i] ^= words[i];
        }
    }
    uint64_t total = 0;
    for (const Words& each : sums)
        for (int i = 0; i < 8; i++) total ^= each[i];
    return total;
}

static const Peaks peaks{peak_round_size, peak_compute, peak_read};

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
