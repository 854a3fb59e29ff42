// Register tiles: a few rows of activations times a panel of weights, for each kind of number that is multiplied.
//
// All kinds have the same shape, so that one loop serves them: a word of 32 bits holds as many neighbouring inputs as fit
// (`TOGETHER`: one float, two of 16 bits, four bytes), and a vector has a word of each of several outputs. A step takes a
// row's word, spreads it over all lanes, and adds products of the lanes' words:
//
//     panel of two outputs p, q in shorts:  p0 p1 | q0 q1,  p2 p3 | q2 q3, ...   step 0: x0 x1 | x0 x1
//     sums:                                 x0 p0 + x1 p1 | x0 q0 + x1 q1
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

#define DBRX_UNROLL _Pragma("GCC unroll 16")

namespace dbrx {

#if defined(__AVX512F__)
constexpr int TILE_LANES = 16, TILE_VECTORS = 2, TILE_ROWS = 12;  // 24 sums, 2 vectors of weights: of 32 registers
#elif defined(__AVX2__)
constexpr int TILE_LANES = 8, TILE_VECTORS = 2, TILE_ROWS = 6;  // 12 sums, 2 of weights, a spread word: of 16 registers
#elif defined(__ARM_NEON)
constexpr int TILE_LANES = 4, TILE_VECTORS = 4, TILE_ROWS = 6;  // 24 sums, 4 of weights: of 32
#else
constexpr int TILE_LANES = 4, TILE_VECTORS = 2, TILE_ROWS = 4;
#endif
constexpr int PANEL = TILE_LANES * TILE_VECTORS;  // outputs of a panel

// Products of bytes and of bfloat16 where the processor has them; DBRX_EMULATE: the same in plain C++, for tests.
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD) || defined(DBRX_EMULATE)
#define DBRX_DOT_INT8
#endif
#if defined(__AVX512BF16__) || defined(DBRX_EMULATE)
#define DBRX_DOT_BF16
#endif

typedef float FloatLanes __attribute__((vector_size(4 * TILE_LANES)));
typedef int32_t WordLanes __attribute__((vector_size(4 * TILE_LANES)));

template <class Vector>
inline Vector load(const void *from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class Vector>
inline void store(void *to, const Vector &v) {
    std::memcpy(to, &v, sizeof v);
}

inline WordLanes spread(const void *word) {
    int32_t w;
    std::memcpy(&w, word, 4);
    return WordLanes{} + w;
}

inline FloatLanes to_float(WordLanes v) { return __builtin_convertvector(v, FloatLanes); }
inline FloatLanes to_float(FloatLanes v) { return v; }

// a * b + c, rounded once where the processor does that.
inline FloatLanes multiply_add(FloatLanes a, FloatLanes b, FloatLanes c) {
#if defined(__AVX512F__)
    return (FloatLanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (FloatLanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (FloatLanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

struct FloatDot {
    using Element = float;
    using Sum = FloatLanes;
    static constexpr int TOGETHER = 1;
    static Sum add(Sum sum, WordLanes x, WordLanes w) { return multiply_add((FloatLanes)x, (FloatLanes)w, sum); }
};

// Integers of 16 bits, summed in 32. Rows of x and weights are scaled to a norm of at most 32,000 each (int8 weights are
// what they are: a norm of 127 sqrt(inputs)). Rounding adds at most sqrt(inputs) / 2 to a norm, and by Cauchy and
// Schwarz no sum of products, of all inputs or of some, exceeds the product of the norms:
// 32,000 + sqrt(10,752) / 2 = 32,052, squared 1.03e9 < 2^31 = 2.15e9; that holds up to 800 million inputs, and for int8
// weights up to 279,000: 127 * 528 * (32,000 + 264) = 2.16e9 is where it ends.
struct ShortDot {
    using Element = int16_t;
    using Sum = WordLanes;
    static constexpr int TOGETHER = 2;
    static Sum add(Sum sum, WordLanes x, WordLanes w) {
#if defined(__AVX512VNNI__)
        return (Sum)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(__AVX2__)
        return (Sum)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)x, (__m256i)w));
#else
        return sum + (x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16);
#endif
    }
};

// ByteDot, summed in 32 bits. x86 wants one factor unsigned: there activations, -127..127, are raised by OFFSET, and
// OFFSET times a panel's sum of weights is taken away beforehand. Additions of 32 bits wrap and so lose nothing of the
// true sum, which fits: 127 * 127 * inputs < 2^31 up to 133,000 inputs.
struct ByteDot {
    using Element = int8_t;
    using Sum = WordLanes;
    static constexpr int TOGETHER = 4;
#if defined(__ARM_NEON)
    static constexpr int OFFSET = 0;
#else
    static constexpr int OFFSET = 128;
#endif
    static Sum add(Sum sum, WordLanes x, WordLanes w) {
#if defined(__AVX512VNNI__)
        return (Sum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(__ARM_FEATURE_DOTPROD)
        return (Sum)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w);
#else
        for (int i = 0; i < 4; ++i) {
            const WordLanes byte = OFFSET ? (x >> 8 * i) & 255 : x << (24 - 8 * i) >> 24;
            sum += byte * (w << (24 - 8 * i) >> 24);
        }
        return sum;
#endif
    }
};

// bfloat16, summed in float32.
struct HalfDot {
    using Element = uint16_t;
    using Sum = FloatLanes;
    static constexpr int TOGETHER = 2;
    static Sum add(Sum sum, WordLanes x, WordLanes w) {
#if defined(__AVX512BF16__)
        return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
        const WordLanes upper = WordLanes{} - 65536;  // 0xFFFF0000
        sum = multiply_add((FloatLanes)(x & upper), (FloatLanes)(w & upper), sum);
        return multiply_add((FloatLanes)(x << 16), (FloatLanes)(w << 16), sum);
#endif
    }
};

// sum [R, TILE_VECTORS vectors] += rows [R][steps] times panel [steps, PANEL], in words of 32 bits each.
template <class Dot, int R>
DBRX_INLINE void multiply_words(const char *const (&row)[R], const char *panel, int64_t steps, typename Dot::Sum (&sum)[R][TILE_VECTORS]) {
    // Two steps at once: fewer instructions of the loop's own beside the 32 of a step, of which six begin in a cycle.
    _Pragma("GCC unroll 2") for (int64_t s = 0; s < steps; ++s, panel += 4 * PANEL) {
        WordLanes w[TILE_VECTORS];
        DBRX_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) w[v] = load<WordLanes>(panel + v * sizeof(WordLanes));
        DBRX_UNROLL for (int r = 0; r < R; ++r) {
            const WordLanes x = spread(row[r] + 4 * s);
            DBRX_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) sum[r][v] = Dot::add(sum[r][v], x, w[v]);
        }
    }
}

// The same with sums in memory.
template <class Dot, int R>
inline void tile(const char *const *rows, int64_t offset, const char *panel, int64_t steps, void *sums) {
    using Sum = typename Dot::Sum;
    Sum sum[R][TILE_VECTORS];
    const char *row[R];
    DBRX_UNROLL for (int r = 0; r < R; ++r) {
        row[r] = rows[r] + offset;
        DBRX_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) sum[r][v] = load<Sum>((char *)sums + (r * TILE_VECTORS + v) * sizeof(Sum));
    }
    multiply_words<Dot>(row, panel, steps, sum);
    DBRX_UNROLL for (int r = 0; r < R; ++r)
        DBRX_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) store((char *)sums + (r * TILE_VECTORS + v) * sizeof(Sum), sum[r][v]);
}

// The same for any number of rows: whole tiles, then one of as many rows as are left. Not inlined: formats share it.
template <class Dot, int R = TILE_ROWS>
__attribute__((noinline)) void tiles(const char *const *rows, int64_t n, int64_t offset, const char *panel, int64_t steps, char *sums) {
    for (; n >= R; n -= R, rows += R, sums += R * PANEL * 4) tile<Dot, R>(rows, offset, panel, steps, sums);
    if constexpr (R > 1)
        if (n) tiles<Dot, R - 1>(rows, n, offset, panel, steps, sums);
}

}  // namespace dbrx
