// The few vector operations that kernels need, for AVX2, AVX-512 (VL, VNNI), NEON with dot product, and plain C++.
//
// All have the same widths, 8 floats and 16 short integers, so a kernel is written once. (Zen 4 computes 512 bits in two
// halves, and one token waits for memory anyway.) `Floats` never contract or reorder: a sum is what is written here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define DBRX_INLINE inline __attribute__((always_inline))

namespace dbrx {

inline float widen(uint16_t bf16) {
    const uint32_t bits = uint32_t(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float widen(float value) { return value; }

// To the nearest bfloat16, ties to even, as PyTorch rounds.
inline uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr int LANES = 8;

#if defined(__AVX2__)

struct Floats {
    __m256 v;
    static Floats all(float x) { return {_mm256_set1_ps(x)}; }
    static Floats load(const float *at) { return {_mm256_loadu_ps(at)}; }
    static Floats load(const uint16_t *bf16) {
        const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bf16)));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
    }
    void store(float *at) const { _mm256_storeu_ps(at, v); }
};
DBRX_INLINE Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
DBRX_INLINE Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
DBRX_INLINE Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
DBRX_INLINE Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
DBRX_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
DBRX_INLINE Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where one is NaN
DBRX_INLINE Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
DBRX_INLINE Floats abs(Floats a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
DBRX_INLINE Floats round(Floats a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a where x < y, else b.
DBRX_INLINE Floats where_less(Floats x, Floats y, Floats a, Floats b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))};
}
// 2^n for whole n from -126 to 127.
DBRX_INLINE Floats power_of_2(Floats n) {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_castsi256_ps(bits)};
}
DBRX_INLINE float largest_lane(Floats a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
DBRX_INLINE float sum(Floats a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The sum of each vector, as lanes.
DBRX_INLINE Floats each_sum(const Floats (&a)[8]) {
    const auto four = [&](int i) {
        return _mm256_hadd_ps(_mm256_hadd_ps(a[i].v, a[i + 1].v), _mm256_hadd_ps(a[i + 2].v, a[i + 3].v));
    };
    const __m256 low = four(0), high = four(4);
    return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))};
}

struct Shorts {  // 16 of 16 bits
    __m256i v;
    static Shorts widen(const int8_t *at) {
        return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)))};
    }
    static Shorts load(const int16_t *at) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at))}; }
};
// 16 weights, or 32, for products: where it is fewer instructions, the even ones before the odd ones. What they are
// multiplied with is kept in that order (EVEN_FIRST).
constexpr bool EVEN_FIRST = true;
DBRX_INLINE void load_weights(const uint16_t *bf16, Floats (&out)[2]) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bf16));
    out[0].v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    out[1].v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}
DBRX_INLINE void load_weights(const int8_t *at, Shorts (&out)[2]) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at));
    out[0].v = _mm256_srai_epi16(_mm256_slli_epi16(pairs, 8), 8);
    out[1].v = _mm256_srai_epi16(pairs, 8);
}
struct Ints {  // sums of products of Shorts, spread over lanes
    __m256i v;
    static Ints zero() { return {_mm256_setzero_si256()}; }
};
DBRX_INLINE Ints multiply_add(Shorts a, Shorts b, Ints c) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return {_mm256_dpwssd_epi32(c.v, a.v, b.v)};
#else
    return {_mm256_add_epi32(c.v, _mm256_madd_epi16(a.v, b.v))};
#endif
}
DBRX_INLINE int32_t sum(Ints a) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
// To whole numbers, of which none may need more than 16 bits.
DBRX_INLINE void store_rounded(Floats a, int16_t *to) {
    const __m256i ints = _mm256_cvtps_epi32(a.v);
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), shorts);
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

struct Floats {
    float32x4_t lo, hi;
    static Floats all(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
    static Floats load(const float *at) { return {vld1q_f32(at), vld1q_f32(at + 4)}; }
    static Floats load(const uint16_t *bf16) {
        const uint16x8_t words = vld1q_u16(bf16);
        return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)),
                vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(words), 16))};
    }
    void store(float *at) const { vst1q_f32(at, lo), vst1q_f32(at + 4, hi); }
};
DBRX_INLINE Floats operator+(Floats a, Floats b) { return {vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)}; }
DBRX_INLINE Floats operator-(Floats a, Floats b) { return {vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)}; }
DBRX_INLINE Floats operator*(Floats a, Floats b) { return {vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
DBRX_INLINE Floats operator/(Floats a, Floats b) { return {vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)}; }
DBRX_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return {vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)};
}
DBRX_INLINE Floats max(Floats a, Floats b) {
    return {vbslq_f32(vcgtq_f32(a.lo, b.lo), a.lo, b.lo), vbslq_f32(vcgtq_f32(a.hi, b.hi), a.hi, b.hi)};
}
DBRX_INLINE Floats min(Floats a, Floats b) {
    return {vbslq_f32(vcltq_f32(a.lo, b.lo), a.lo, b.lo), vbslq_f32(vcltq_f32(a.hi, b.hi), a.hi, b.hi)};
}
DBRX_INLINE Floats abs(Floats a) { return {vabsq_f32(a.lo), vabsq_f32(a.hi)}; }
DBRX_INLINE Floats round(Floats a) { return {vrndnq_f32(a.lo), vrndnq_f32(a.hi)}; }
DBRX_INLINE Floats where_less(Floats x, Floats y, Floats a, Floats b) {
    return {vbslq_f32(vcltq_f32(x.lo, y.lo), a.lo, b.lo), vbslq_f32(vcltq_f32(x.hi, y.hi), a.hi, b.hi)};
}
DBRX_INLINE float32x4_t power_of_2(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
DBRX_INLINE Floats power_of_2(Floats n) { return {power_of_2(n.lo), power_of_2(n.hi)}; }
DBRX_INLINE float largest_lane(Floats a) { return std::fmax(vmaxvq_f32(a.lo), vmaxvq_f32(a.hi)); }
DBRX_INLINE float sum(Floats a) { return vaddvq_f32(vaddq_f32(a.lo, a.hi)); }
DBRX_INLINE Floats each_sum(const Floats (&a)[8]) {
    const auto four = [&](int i) {
        const auto half = [&](int k) { return vaddq_f32(a[k].lo, a[k].hi); };
        return vpaddq_f32(vpaddq_f32(half(i), half(i + 1)), vpaddq_f32(half(i + 2), half(i + 3)));
    };
    return {four(0), four(4)};
}

struct Shorts {
    int16x8_t lo, hi;
    static Shorts widen(const int8_t *at) {
        const int8x16_t bytes = vld1q_s8(at);
        return {vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes))};
    }
    static Shorts load(const int16_t *at) { return {vld1q_s16(at), vld1q_s16(at + 8)}; }
};
constexpr bool EVEN_FIRST = false;
struct Ints {
    int32x4_t lo, hi;
    static Ints zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
};
DBRX_INLINE Ints multiply_add(Shorts a, Shorts b, Ints c) {
    c.lo = vmlal_s16(vmlal_s16(c.lo, vget_low_s16(a.lo), vget_low_s16(b.lo)), vget_low_s16(a.hi), vget_low_s16(b.hi));
    c.hi = vmlal_high_s16(vmlal_high_s16(c.hi, a.lo, b.lo), a.hi, b.hi);
    return c;
}
DBRX_INLINE int32_t sum(Ints a) { return vaddvq_s32(vaddq_s32(a.lo, a.hi)); }
DBRX_INLINE void store_rounded(Floats a, int16_t *to) {
    vst1q_s16(to, vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a.lo)), vqmovn_s32(vcvtnq_s32_f32(a.hi))));
}

#else

struct Floats {
    float v[LANES];
    template <class F>
    static Floats each(F f) {
        Floats out;
        for (int i = 0; i < LANES; ++i) out.v[i] = f(i);
        return out;
    }
    static Floats all(float x) { return each([=](int) { return x; }); }
    template <class T>
    static Floats load(const T *at) { return each([=](int i) { return dbrx::widen(at[i]); }); }
    void store(float *at) const { std::memcpy(at, v, sizeof v); }
};
DBRX_INLINE Floats operator+(Floats a, Floats b) { return Floats::each([&](int i) { return a.v[i] + b.v[i]; }); }
DBRX_INLINE Floats operator-(Floats a, Floats b) { return Floats::each([&](int i) { return a.v[i] - b.v[i]; }); }
DBRX_INLINE Floats operator*(Floats a, Floats b) { return Floats::each([&](int i) { return a.v[i] * b.v[i]; }); }
DBRX_INLINE Floats operator/(Floats a, Floats b) { return Floats::each([&](int i) { return a.v[i] / b.v[i]; }); }
DBRX_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
DBRX_INLINE Floats max(Floats a, Floats b) { return Floats::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
DBRX_INLINE Floats min(Floats a, Floats b) { return Floats::each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
DBRX_INLINE Floats abs(Floats a) { return Floats::each([&](int i) { return std::fabs(a.v[i]); }); }
DBRX_INLINE Floats round(Floats a) { return Floats::each([&](int i) { return std::nearbyint(a.v[i]); }); }
DBRX_INLINE Floats where_less(Floats x, Floats y, Floats a, Floats b) {
    return Floats::each([&](int i) { return x.v[i] < y.v[i] ? a.v[i] : b.v[i]; });
}
DBRX_INLINE Floats power_of_2(Floats n) { return Floats::each([&](int i) { return std::ldexp(1.0f, int(n.v[i])); }); }
DBRX_INLINE float largest_lane(Floats a) {
    float most = a.v[0];
    for (float lane : a.v) most = lane > most ? lane : most;
    return most;
}
DBRX_INLINE float sum(Floats a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
    return a.v[0];
}
DBRX_INLINE Floats each_sum(const Floats (&a)[8]) { return Floats::each([&](int i) { return sum(a[i]); }); }

struct Shorts {
    int16_t v[16];
    static Shorts widen(const int8_t *at) {
        Shorts out;
        for (int i = 0; i < 16; ++i) out.v[i] = at[i];
        return out;
    }
    static Shorts load(const int16_t *at) {
        Shorts out;
        std::memcpy(out.v, at, sizeof out.v);
        return out;
    }
};
constexpr bool EVEN_FIRST = false;
struct Ints {
    int32_t v[8];
    static Ints zero() { return {}; }
};
DBRX_INLINE Ints multiply_add(Shorts a, Shorts b, Ints c) {
    for (int i = 0; i < 8; ++i) c.v[i] += a.v[i] * b.v[i] + a.v[i + 8] * b.v[i + 8];
    return c;
}
DBRX_INLINE int32_t sum(Ints a) {
    int32_t total = 0;
    for (int32_t lane : a.v) total += lane;
    return total;
}
DBRX_INLINE void store_rounded(Floats a, int16_t *to) {
    for (int i = 0; i < LANES; ++i) to[i] = std::fabs(a.v[i]) < 32768 ? int16_t(std::nearbyint(a.v[i])) : int16_t(0);
}

#endif

#if !defined(__AVX2__)
DBRX_INLINE void load_weights(const uint16_t *bf16, Floats (&out)[2]) {
    out[0] = Floats::load(bf16), out[1] = Floats::load(bf16 + LANES);
}
DBRX_INLINE void load_weights(const int8_t *at, Shorts (&out)[2]) {
    out[0] = Shorts::widen(at), out[1] = Shorts::widen(at + 16);
}
#endif
DBRX_INLINE void load_weights(const float *at, Floats (&out)[2]) {
    out[0] = Floats::load(at), out[1] = Floats::load(at + LANES);
}

// `count` numbers, each `size` of them with the even ones before the odd ones: 0 1 2 3 4 5 6 7 -> 0 2 4 6 1 3 5 7.
template <class T>
inline void even_first(T *x, int64_t count, int size) {
    for (int64_t start = 0; start + size <= count; start += size) {
        T before[64];
        std::memcpy(before, x + start, size_t(size) * sizeof(T));
        for (int i = 0; i < size / 2; ++i) {
            x[start + i] = before[2 * i];
            x[start + size / 2 + i] = before[2 * i + 1];
        }
    }
}

// The way back.
template <class T>
inline void even_last(T *x, int64_t count, int size) {
    for (int64_t start = 0; start + size <= count; start += size) {
        T before[64];
        std::memcpy(before, x + start, size_t(size) * sizeof(T));
        for (int i = 0; i < size; ++i) x[start + i] = before[i % 2 * (size / 2) + i / 2];
    }
}

// Weights that a thread comes to soon: where it computes much for each byte, it has too few of them under way otherwise.
DBRX_INLINE void read_ahead(const void *at) {  // it may be behind a matrix, where nothing is read
    __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(at) + 512));
}

// The first `count` numbers at a place behind which nothing may be read, and zeros.
template <class T>
DBRX_INLINE Floats load_part(const T *at, int64_t count) {
    float padded[LANES] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = widen(at[i]);
    return Floats::load(padded);
}
template <class T>
DBRX_INLINE Floats load_up_to(const T *at, int64_t count) {
    return count >= LANES ? Floats::load(at) : load_part(at, count);
}
DBRX_INLINE void store_up_to(Floats a, float *to, int64_t count) {
    if (count >= LANES) return a.store(to);
    float padded[LANES];
    a.store(padded);
    std::memcpy(to, padded, size_t(count) * sizeof(float));
}

}  // namespace dbrx
