// The vector type of the scalar target: 16 lanes in plain arrays, baseline instructions only.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../half.h"

namespace pagemill {
namespace PAGEMILL_TARGET {

#define PM_INLINE static inline  // inlining 16 lanes everywhere would take minutes to compile

constexpr int kRows = 1;
constexpr int kFineRows = 1;  // the same with activations of two bytes
constexpr int kRotatedRows = 1;  // rows of a tile without groups
constexpr int kFloatRows = 1;
constexpr int kRankRows = 2;  // from so many rows on the head ranks
constexpr int kAttendRows = 1;  // rows of a tile that attention computes at once
constexpr int kScorePages = 1;
constexpr int kValueVectors = 1;

struct F { float v[16]; };
struct I { int v[16]; };
struct U { uint8_t v[64]; };

#define PM_LANES for (int i = 0; i < 16; i++)
PM_INLINE F fset(float x) { F r; PM_LANES r.v[i] = x; return r; }
PM_INLINE F fzero() { return fset(0.0f); }
PM_INLINE F fload(const float* p) { F r; std::memcpy(r.v, p, 64); return r; }
PM_INLINE void fstore(float* p, F x) { std::memcpy(p, x.v, 64); }
PM_INLINE F fload_first(const float* p, int n) { F r = fzero(); for (int i = 0; i < n && i < 16; i++) r.v[i] = p[i]; return r; }
PM_INLINE void fstore_first(float* p, F x, int n) { for (int i = 0; i < n && i < 16; i++) p[i] = x.v[i]; }
PM_INLINE F fadd(F a, F b) { PM_LANES a.v[i] += b.v[i]; return a; }
PM_INLINE F fsub(F a, F b) { PM_LANES a.v[i] -= b.v[i]; return a; }
PM_INLINE F fmul(F a, F b) { PM_LANES a.v[i] *= b.v[i]; return a; }
PM_INLINE F fdiv(F a, F b) { PM_LANES a.v[i] /= b.v[i]; return a; }
PM_INLINE F fmla(F a, F b, F c) { PM_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
PM_INLINE F fmax2(F a, F b) { PM_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
PM_INLINE F fabs1(F a) { PM_LANES a.v[i] = std::fabs(a.v[i]); return a; }
template <int H> PM_INLINE F fswap(F a) { F r; PM_LANES r.v[i] = a.v[i ^ H]; return r; }
PM_INLINE float ffirst(F a) { return a.v[0]; }
PM_INLINE F fscale2(F a, F n) { PM_LANES a.v[i] = float_of(bits_of(a.v[i]) + (uint32_t(int(n.v[i])) << 23)); return a; }
// a * 2^n for a shifted n + 1.5 * 2^23, result a normal number.
PM_INLINE F fscale2_shifted(F a, F shifted) { PM_LANES a.v[i] = float_of(bits_of(a.v[i]) + (bits_of(shifted.v[i]) << 23)); return a; }
PM_INLINE F fselect(int from, int to, F a, F b) { PM_LANES if (i >= from && i < to) b.v[i] = a.v[i]; return b; }
PM_INLINE F fload_f16(const uint16_t* p) { F r; PM_LANES r.v[i] = f16_to_f32(p[i]); return r; }
PM_INLINE F fload_bf16(const uint16_t* p) { F r; PM_LANES r.v[i] = bf16_to_f32(p[i]); return r; }

PM_INLINE U uload(const void* p) { U r; std::memcpy(r.v, p, 64); return r; }
PM_INLINE U ulow(U w) { for (int i = 0; i < 64; i++) w.v[i] &= 15; return w; }
PM_INLINE U uhigh(U w) { for (int i = 0; i < 64; i++) w.v[i] = uint8_t(w.v[i] >> 4); return w; }

PM_INLINE I iset(int x) { I r; PM_LANES r.v[i] = x; return r; }
PM_INLINE I idot(I acc, U u, int quad) {
    int8_t s[4];
    std::memcpy(s, &quad, 4);
    PM_LANES acc.v[i] += int(u.v[4 * i]) * s[0] + int(u.v[4 * i + 1]) * s[1] + int(u.v[4 * i + 2]) * s[2] + int(u.v[4 * i + 3]) * s[3];
    return acc;
}
PM_INLINE I idot_small(I acc, U u, int quad) { return idot(acc, u, quad); }
PM_INLINE I idot_signed(I acc, int quad, U s) {
    uint8_t u[4];
    std::memcpy(u, &quad, 4);
    PM_LANES for (int j = 0; j < 4; j++) acc.v[i] += int(u[j]) * int(int8_t(s.v[4 * i + j]));
    return acc;
}
PM_INLINE F itof(I x) { F r; PM_LANES r.v[i] = float(x.v[i]); return r; }
PM_INLINE void istore_i8(int8_t* p, F x) {
    PM_LANES {
        const float r = std::nearbyintf(x.v[i]);
        p[i] = int8_t(r > 127.0f ? 127 : r < -128.0f ? -128 : int(r));
    }
}
PM_INLINE void istore_u8(uint8_t* p, F x) {
    PM_LANES {
        const float r = std::nearbyintf(x.v[i]);
        p[i] = uint8_t(r > 255.0f ? 255 : r < 0.0f ? 0 : int(r));
    }
}
PM_INLINE void istore_u8(uint8_t* p, F a, F b, F c, F d) {
    istore_u8(p, a);
    istore_u8(p + 16, b);
    istore_u8(p + 32, c);
    istore_u8(p + 48, d);
}
// The low 16 bits of 16 lanes, as two bytes each.
PM_INLINE void store_halves(uint8_t* high, uint8_t* low, F x) {
    PM_LANES {
        low[i] = uint8_t(bits_of(x.v[i]));
        high[i] = uint8_t(bits_of(x.v[i]) >> 8);
    }
}
PM_INLINE void store_halves(uint8_t* high, uint8_t* low, F a, F b, F c, F d) {
    store_halves(high, low, a);
    store_halves(high + 16, low + 16, b);
    store_halves(high + 32, low + 32, c);
    store_halves(high + 48, low + 48, d);
}
PM_INLINE I ijoin(I high, I low) { PM_LANES low.v[i] = int(uint32_t(low.v[i]) + (uint32_t(high.v[i]) << 8)); return low; }
PM_INLINE void store_apart(uint8_t* p, const int8_t* q) {
    for (int i = 0; i < 16; i++) p[4 * i] = uint8_t(q[i]);
}
PM_INLINE void fstore_bf16(uint16_t* p, F x) {
    PM_LANES {
        const uint32_t u = bits_of(x.v[i]);
        p[i] = uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
    }
}
PM_INLINE F fdot_bf16(F acc, U w, int pair) {
    const float even = float_of(uint32_t(pair) << 16), odd = float_of(uint32_t(pair) & 0xffff0000u);
    PM_LANES {
        uint32_t bits;
        std::memcpy(&bits, w.v + 4 * i, 4);
        acc.v[i] += float_of(bits << 16) * even;
        acc.v[i] += float_of(bits & 0xffff0000u) * odd;
    }
    return acc;
}

}  // namespace PAGEMILL_TARGET
}  // namespace pagemill
