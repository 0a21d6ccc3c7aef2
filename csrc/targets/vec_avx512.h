// The vector type of the AVX-512 targets (F, BW, DQ, VL, VNNI; BF16 where PAGEMILL_BF16 is defined): 16 lanes in one register.
#pragma once
#include <immintrin.h>

#include "../half.h"

namespace pagemill {
namespace PAGEMILL_TARGET {

#define PM_INLINE static inline __attribute__((always_inline))

constexpr int kRows = 6;        // rows of a product tile: 12 integer and 12 float accumulators
constexpr int kFineRows = 4;  // the same with activations of two bytes
constexpr int kRotatedRows = 12;  // rows of a tile without groups
constexpr int kFloatRows = 10;  // rows of a float product tile
constexpr int kRankRows = 4;  // from so many rows on the head ranks; fewer wait for its weights, whatever is computed
constexpr int kAttendRows = 6;  // rows of a tile that attention computes at once
constexpr int kScorePages = 4;    // pages whose int8 scores a tile computes at once
constexpr int kValueVectors = 4;  // vectors of a value row that attention accumulates at once

using F = __m512;
// gcc 12 keeps accumulators in registers when they are 16 x 32 bit, and spills them as __m512i.
typedef int I __attribute__((vector_size(64)));
using U = __m512i;  // 64 bytes

PM_INLINE F fset(float x) { return _mm512_set1_ps(x); }
PM_INLINE F fzero() { return _mm512_setzero_ps(); }
PM_INLINE F fload(const float* p) { return _mm512_loadu_ps(p); }
PM_INLINE void fstore(float* p, F x) { _mm512_storeu_ps(p, x); }
PM_INLINE __mmask16 first(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1); }
PM_INLINE F fload_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
PM_INLINE void fstore_first(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
PM_INLINE F fadd(F a, F b) { return _mm512_add_ps(a, b); }
PM_INLINE F fsub(F a, F b) { return _mm512_sub_ps(a, b); }
PM_INLINE F fmul(F a, F b) { return _mm512_mul_ps(a, b); }
PM_INLINE F fdiv(F a, F b) { return _mm512_div_ps(a, b); }
PM_INLINE F fmla(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
PM_INLINE F fmax2(F a, F b) { return _mm512_max_ps(a, b); }
PM_INLINE F fabs1(F a) { return _mm512_abs_ps(a); }
// Lane i of the result is lane i ^ H.
template <int H> PM_INLINE F fswap(F a) {
    if constexpr (H == 1) return _mm512_permute_ps(a, 0xb1);
    else if constexpr (H == 2) return _mm512_permute_ps(a, 0x4e);
    else if constexpr (H == 4) return _mm512_shuffle_f32x4(a, a, 0xb1);
    else return _mm512_shuffle_f32x4(a, a, 0x4e);
}
PM_INLINE float ffirst(F a) { return _mm512_cvtss_f32(a); }
PM_INLINE F fscale2(F a, F n) { return _mm512_scalef_ps(a, n); }
// a * 2^n for a shifted n + 1.5 * 2^23, result a normal number.
PM_INLINE F fscale2_shifted(F a, F shifted) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}
// Lanes from..to-1 of a, the others of b.
PM_INLINE F fselect(int from, int to, F a, F b) { return _mm512_mask_blend_ps(__mmask16(first(to) & ~first(from)), b, a); }
PM_INLINE F fload_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
PM_INLINE F fload_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
PM_INLINE F bf16_even(U w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
PM_INLINE F bf16_odd(U w) { return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000u)))); }

PM_INLINE U uload(const void* p) { return _mm512_loadu_si512(p); }
PM_INLINE U ulow(U w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
PM_INLINE U uhigh(U w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }

PM_INLINE I iset(int x) { return (I)_mm512_set1_epi32(x); }
// acc[c] += sum of u[4c+i] * s[i], i = 0..3; u unsigned, s the four signed bytes of `quad`.
PM_INLINE I idot(I acc, U u, int quad) { return (I)_mm512_dpbusd_epi32((__m512i)acc, u, _mm512_set1_epi32(quad)); }
PM_INLINE I idot_small(I acc, U u, int quad) { return idot(acc, u, quad); }  // u < 128
// The same with four unsigned bytes of `quad` against signed bytes s.
PM_INLINE I idot_signed(I acc, int quad, U s) { return (I)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(quad), s); }
PM_INLINE F itof(I x) { return _mm512_cvtepi32_ps((__m512i)x); }
// Rounds to nearest even and stores 16 signed bytes.
PM_INLINE void istore_i8(int8_t* p, F x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x))); }
PM_INLINE void istore_u8(uint8_t* p, F x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x))); }
// The same for 64 lanes in order, each 0..255.
PM_INLINE void istore_u8(uint8_t* p, F a, F b, F c, F d) {
    const __m512i ab = _mm512_packus_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    const __m512i cd = _mm512_packus_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd)));
}
// The low 16 bits of 16 lanes, as two bytes each.
PM_INLINE void store_halves(uint8_t* high, uint8_t* low, F x) {
    const __m512i bits = _mm512_castps_si512(x);
    _mm_storeu_si128((__m128i*)low, _mm512_cvtepi32_epi8(bits));
    _mm_storeu_si128((__m128i*)high, _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8)));
}
// The same for 64 lanes in order.
PM_INLINE void store_halves(uint8_t* high, uint8_t* low, F a, F b, F c, F d) {
#ifdef __AVX512VBMI__
    const auto pairs = [](F even, F odd) {
        return _mm512_mask_mov_epi16(_mm512_slli_epi32(_mm512_castps_si512(odd), 16), 0x55555555u, _mm512_castps_si512(even));
    };
    const __m512i ab = pairs(a, b), cd = pairs(c, d);
    const __m512i lows = _mm512_mask_mov_epi8(_mm512_slli_epi16(cd, 8), 0x5555555555555555u, ab);
    const __m512i highs = _mm512_mask_mov_epi8(cd, 0x5555555555555555u, _mm512_srli_epi16(ab, 8));
    // Byte 4 i + j of these is lane i of a, c, b, d.
    const __m512i order = _mm512_set_epi8(63, 59, 55, 51, 47, 43, 39, 35, 31, 27, 23, 19, 15, 11, 7, 3, 61, 57, 53, 49, 45, 41, 37, 33, 29, 25, 21, 17,
                                          13, 9, 5, 1, 62, 58, 54, 50, 46, 42, 38, 34, 30, 26, 22, 18, 14, 10, 6, 2, 60, 56, 52, 48, 44, 40, 36, 32, 28,
                                          24, 20, 16, 12, 8, 4, 0);
    _mm512_storeu_si512(low, _mm512_permutexvar_epi8(order, lows));
    _mm512_storeu_si512(high, _mm512_permutexvar_epi8(order, highs));
#else
    store_halves(high, low, a);
    store_halves(high + 16, low + 16, b);
    store_halves(high + 32, low + 32, c);
    store_halves(high + 48, low + 48, d);
#endif
}
// low + 256 * high.
PM_INLINE I ijoin(I high, I low) { return (high << 8) + low; }
// Byte i of q to p[4 * i]; the bytes between stay untouched.
PM_INLINE void store_apart(uint8_t* p, const int8_t* q) {
    _mm512_mask_storeu_epi8(p, 0x1111111111111111u, _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)q)));
}
PM_INLINE void fstore_bf16(uint16_t* p, F x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
#ifdef PAGEMILL_BF16
PM_INLINE F fdot_bf16(F acc, U w, int pair) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair)); }
#else
PM_INLINE F fdot_bf16(F acc, U w, int pair) {
    acc = fmla(bf16_even(w), fset(float_of(uint32_t(pair) << 16)), acc);
    return fmla(bf16_odd(w), fset(float_of(uint32_t(pair) & 0xffff0000u)), acc);
}
#endif

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
