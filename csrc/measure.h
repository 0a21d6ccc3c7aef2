// What the machine can do at most, for the roofline: arithmetic on registers and reading of memory, with each target's own
// vector type and the pool that steps run on. Owns the timing; the loops are in generic/measure-inl.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace pagemill {

// Arithmetic by what it multiplies; the tiles are AMX's.
enum class Arithmetic : int { f32, bf16, int8, tile_bf16, tile_int8 };

struct Peaks {
    // Multiply-adds of one round, 0 where the target has no such arithmetic.
    int64_t (*round_size)(Arithmetic arithmetic);
    // Runs rounds that depend on nothing but registers; the result depends on all of them.
    float (*compute)(Arithmetic arithmetic, int64_t rounds);
    // Reads every byte once; the result depends on all of them. data: 64-byte aligned, bytes: a multiple of 512.
    uint64_t (*read)(const uint8_t* data, size_t bytes);
};

// Most multiply-adds per second seen in `samples` samples of some 2 ms on all of `threads` threads; 0 where the target has
// no such arithmetic. Throws std::invalid_argument for a target that is not available.
double multiply_add_rate(const std::string& target, Arithmetic arithmetic, int threads, int samples);

// Most bytes per second read by `threads` threads, each its own slice of the data, in `samples` samples of as many passes
// as take some 2 ms.
double read_rate(const std::string& target, const uint8_t* data, size_t bytes, int threads, int samples);

// The same in pieces that are `stride` bytes apart, as attention reads a layer's pages: the first piece of each row of the
// data, then the second one of each. piece: a multiple of 512, stride: of 64, not less than the piece.
double piece_rate(const std::string& target, const uint8_t* data, size_t bytes, size_t piece, size_t stride, int threads, int samples);

}  // namespace pagemill
