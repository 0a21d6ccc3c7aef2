// The vector type of the AVX2 target (AVX2, FMA, F16C): 16 lanes in two registers.
#pragma once
#include <immintrin.h>

#include "../half.h"

namespace pagemill {
namespace PAGEMILL_TARGET {

#define PM_INLINE static inline __attribute__((always_inline))

constexpr int kRows = 2;
constexpr int kFineRows = 2;  // the same with activations of two bytes
constexpr int kRotatedRows = 2;  // rows of a tile without groups
constexpr int kFloatRows = 3;
constexpr int kRankRows = 2;  // from so many rows on the head ranks
constexpr int kAttendRows = 3;  // rows of a tile that attention computes at once
constexpr int kScorePages = 1;
constexpr int kValueVectors = 1;

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct U { __m256i a, b; };

PM_INLINE F fset(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
PM_INLINE F fzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
PM_INLINE F fload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PM_INLINE void fstore(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
PM_INLINE __m256i first8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PM_INLINE F fload_first(const float* p, int n) { return {_mm256_maskload_ps(p, first8(n)), _mm256_maskload_ps(p + 8, first8(n - 8))}; }
PM_INLINE void fstore_first(float* p, F x, int n) {
    _mm256_maskstore_ps(p, first8(n), x.a);
    _mm256_maskstore_ps(p + 8, first8(n - 8), x.b);
}
PM_INLINE F fadd(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
PM_INLINE F fsub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
PM_INLINE F fmul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
PM_INLINE F fdiv(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
PM_INLINE F fmla(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
PM_INLINE F fmax2(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
PM_INLINE F fabs1(F x) {
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
template <int H> PM_INLINE F fswap(F x) {  // lane i of the result is lane i ^ H
    if constexpr (H == 1) return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)};
    else if constexpr (H == 2) return {_mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e)};
    else if constexpr (H == 4) return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
    else return {x.b, x.a};
}
PM_INLINE float ffirst(F x) { return _mm256_cvtss_f32(x.a); }
PM_INLINE __m256 scale2(__m256 x, __m256 n) {  // x * 2^n for whole n, result a normal number
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
PM_INLINE F fscale2(F x, F n) { return {scale2(x.a, n.a), scale2(x.b, n.b)}; }
PM_INLINE __m256 scale2_shifted(__m256 x, __m256 shifted) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}
// x * 2^n for a shifted n + 1.5 * 2^23, result a normal number.
PM_INLINE F fscale2_shifted(F x, F shifted) { return {scale2_shifted(x.a, shifted.a), scale2_shifted(x.b, shifted.b)}; }
PM_INLINE F fselect(int from, int to, F x, F y) {
    const __m256i ma = _mm256_andnot_si256(first8(from), first8(to)), mb = _mm256_andnot_si256(first8(from - 8), first8(to - 8));
    return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(ma)), _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(mb))};
}
PM_INLINE F fload_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
PM_INLINE __m256 wide_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
PM_INLINE F fload_bf16(const uint16_t* p) { return {wide_bf16(p), wide_bf16(p + 8)}; }
PM_INLINE F bf16_even(U w) { return {_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16))}; }
PM_INLINE F bf16_odd(U w) {
    const __m256i m = _mm256_set1_epi32(int(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(w.a, m)), _mm256_castsi256_ps(_mm256_and_si256(w.b, m))};
}

PM_INLINE U uload(const void* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}; }
PM_INLINE U ulow(U w) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(w.a, m), _mm256_and_si256(w.b, m)};
}
PM_INLINE U uhigh(U w) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(w.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(w.b, 4), m)};
}

PM_INLINE I iset(int x) { const __m256i v = _mm256_set1_epi32(x); return {v, v}; }
PM_INLINE __m256i dot_small(__m256i acc, __m256i u, __m256i s) {  // u < 128: the 16-bit pair sums cannot saturate
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
PM_INLINE I idot_small(I acc, U u, int quad) {
    const __m256i s = _mm256_set1_epi32(quad);
    return {dot_small(acc.a, u.a, s), dot_small(acc.b, u.b, s)};
}
// vpmaddubsw saturates for bytes above 127, so the top bit is multiplied apart: 128 * -128 * 2 just fits 16 bits.
PM_INLINE __m256i dot_wide(__m256i acc, __m256i u, __m256i s) {
    const __m256i top = _mm256_set1_epi8(char(0x80));
    const __m256i one = _mm256_set1_epi16(1);
    const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_andnot_si256(top, u), s), one);
    const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(top, u), s), one);
    return _mm256_add_epi32(acc, _mm256_add_epi32(low, high));
}
PM_INLINE I idot(I acc, U u, int quad) {
    const __m256i s = _mm256_set1_epi32(quad);
    return {dot_wide(acc.a, u.a, s), dot_wide(acc.b, u.b, s)};
}
PM_INLINE I idot_signed(I acc, int quad, U s) {
    const __m256i u = _mm256_set1_epi32(quad);
    return {dot_wide(acc.a, u, s.a), dot_wide(acc.b, u, s.b)};
}
PM_INLINE F itof(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
PM_INLINE void istore_i8(int8_t* p, F x) {
    const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
PM_INLINE void istore_u8(uint8_t* p, F x) {
    const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
PM_INLINE void istore_u8(uint8_t* p, F a, F b, F c, F d) {
    istore_u8(p, a);
    istore_u8(p + 16, b);
    istore_u8(p + 32, c);
    istore_u8(p + 48, d);
}
PM_INLINE void store_bytes(uint8_t* p, __m256i a, __m256i b) {  // 16 lanes, each 0..255
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
// The low 16 bits of 16 lanes, as two bytes each.
PM_INLINE void store_halves(uint8_t* high, uint8_t* low, F x) {
    const __m256i a = _mm256_castps_si256(x.a), b = _mm256_castps_si256(x.b), byte = _mm256_set1_epi32(255);
    store_bytes(low, _mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
    store_bytes(high, _mm256_and_si256(_mm256_srli_epi32(a, 8), byte), _mm256_and_si256(_mm256_srli_epi32(b, 8), byte));
}
PM_INLINE void store_halves(uint8_t* high, uint8_t* low, F a, F b, F c, F d) {
    store_halves(high, low, a);
    store_halves(high + 16, low + 16, b);
    store_halves(high + 32, low + 32, c);
    store_halves(high + 48, low + 48, d);
}
PM_INLINE I ijoin(I high, I low) {
    return {_mm256_add_epi32(_mm256_slli_epi32(high.a, 8), low.a), _mm256_add_epi32(_mm256_slli_epi32(high.b, 8), low.b)};
}
PM_INLINE void store_apart(uint8_t* p, const int8_t* q) {
    for (int i = 0; i < 16; i++) p[4 * i] = uint8_t(q[i]);
}
PM_INLINE void fstore_bf16(uint16_t* p, F x) {
    float v[16];
    fstore(v, x);
    for (int i = 0; i < 16; i++) {
        const uint32_t u = bits_of(v[i]);
        p[i] = uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
    }
}
PM_INLINE F fdot_bf16(F acc, U w, int pair) {
    acc = fmla(bf16_even(w), fset(float_of(uint32_t(pair) << 16)), acc);
    return fmla(bf16_odd(w), fset(float_of(uint32_t(pair) & 0xffff0000u)), acc);
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
