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

// A float of 16 bits.
inline float half(const uint8_t *at) {
    uint16_t bits;
    std::memcpy(&bits, at, 2);
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    // Its digits are those of the float that is 2^112 times smaller; infinity and NaN keep the largest exponent.
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
    const uint32_t wide = sign | (rest < 0x0f800000 ? rest : rest | 0x7f800000);
    float value;
    std::memcpy(&value, &wide, 4);
    return rest < 0x0f800000 ? value * 5.192296858534828e33f : value;
#endif
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
    static Shorts load(const void *at) { return {_mm256_loadu_si256(static_cast<const __m256i *>(at))}; }
    static Shorts all(int x) { return {_mm256_set1_epi16(int16_t(x))}; }
    void store(int16_t *at) const { _mm256_storeu_si256(reinterpret_cast<__m256i *>(at), v); }
};
DBRX_INLINE Shorts operator*(Shorts a, Shorts b) { return {_mm256_mullo_epi16(a.v, b.v)}; }
constexpr int ROWS_AT_ONCE = 4;  // activation rows that meet a weight in registers
// 16 weights, for products: where it is fewer instructions, the even ones before the odd ones. What they are multiplied
// with is kept in that order (EVEN_FIRST), as it is for bytes that are `split`.
constexpr bool EVEN_FIRST = true;
DBRX_INLINE void load_weights(const uint16_t *bf16, Floats (&out)[2]) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bf16));
    out[0].v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    out[1].v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
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

DBRX_INLINE Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
DBRX_INLINE Floats eight_bytes(uint64_t bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))))};
}
DBRX_INLINE Floats eight_signed(const uint8_t *at) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(at))))};
}
// Eight numbers of so many bits each, the first in the lowest.
DBRX_INLINE Floats eight_of(uint32_t numbers, int bits) {
    const __m256i places = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
    const __m256i each = _mm256_srlv_epi32(_mm256_set1_epi32(int(numbers)), places);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(each, _mm256_set1_epi32((1 << bits) - 1)))};
}
// Scales of eight chunks of 32 weights, one for all or one for each 16, lane by lane of what `multiply_32` gives.
//     each two of them make one vector of four chunks: of 32 weights 0 1 2 3 0 1 2 3, of 16 weights 0 2 4 6 1 3 5 7
struct LaneScales {
    __m256 four[2];
    static LaneScales of(const Floats (&scales)[1]) {
        const __m256 all = scales[0].v;
        return {{_mm256_permute2f128_ps(all, all, 0x00), _mm256_permute2f128_ps(all, all, 0x11)}};
    }
    static LaneScales of(const Floats (&scales)[2]) {
        const __m256i places = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
        return {{_mm256_permutevar8x32_ps(scales[0].v, places), _mm256_permutevar8x32_ps(scales[1].v, places)}};
    }
    DBRX_INLINE Floats at(int chunk) const {
        const __m256 of = four[chunk / 4];
        switch (chunk % 4) {
            case 0: return {_mm256_permute_ps(of, 0x00)};
            case 1: return {_mm256_permute_ps(of, 0x55)};
            case 2: return {_mm256_permute_ps(of, 0xaa)};
            default: return {_mm256_permute_ps(of, 0xff)};
        }
    }
};
DBRX_INLINE Floats halves(float low, float high) {
    return {_mm256_blend_ps(_mm256_set1_ps(low), _mm256_set1_ps(high), 0xf0)};
}

// 32 numbers of 8 bits, in their order. nibbles: of 16 bytes the lower halves, then the upper ones; each_bit: of 4 bytes.
// bits(a, right, mask): each byte so many places to the right, or to the left, and of it what `mask` lets through; no bit of
// a neighbour may come there.
struct Bytes {
    __m256i v;
    static Bytes all(int x) { return {_mm256_set1_epi8(char(x))}; }
    static Bytes load(const uint8_t *at) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at))}; }
    static Bytes nibbles(const uint8_t *at) {
        const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
        return {_mm256_and_si256(_mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)), _mm256_set1_epi8(15))};
    }
    static Bytes each_bit(const uint8_t *at) {
        int32_t four;
        std::memcpy(&four, at, 4);
        const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit_of = _mm256_set1_epi64x(int64_t(0x8040201008040201));
        const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(four), byte_of), bit_of);
        return {_mm256_and_si256(_mm256_cmpeq_epi8(spread, bit_of), _mm256_set1_epi8(1))};
    }
    void store(uint8_t *at) const { _mm256_storeu_si256(reinterpret_cast<__m256i *>(at), v); }
};
DBRX_INLINE Bytes operator&(Bytes a, Bytes b) { return {_mm256_and_si256(a.v, b.v)}; }
DBRX_INLINE Bytes operator|(Bytes a, Bytes b) { return {_mm256_or_si256(a.v, b.v)}; }
DBRX_INLINE Bytes operator-(Bytes a, Bytes b) { return {_mm256_sub_epi8(a.v, b.v)}; }
DBRX_INLINE Bytes bits(Bytes a, int right, int mask) {
    return Bytes{right < 0 ? _mm256_slli_epi16(a.v, -right) : _mm256_srli_epi16(a.v, right)} & Bytes::all(mask);
}
DBRX_INLINE Bytes look_up(const uint8_t (&table)[16], Bytes at) {
    const __m128i once = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
    return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(once), at.v)};
}
DBRX_INLINE void split(Bytes a, Shorts (&out)[2]) {  // the even ones, the odd ones
    out[0].v = _mm256_and_si256(a.v, _mm256_set1_epi16(255));
    out[1].v = _mm256_srli_epi16(a.v, 8);
}
// 32 products, of split bytes and of numbers in that order: lanes 0 to 3 sum those of the first 16, lanes 4 to 7 the others'.
DBRX_INLINE Ints multiply_32(const Shorts (&w)[2], const int16_t *x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return multiply_add(w[1], Shorts::load(x + 16), multiply_add(w[0], Shorts::load(x), Ints::zero()));
#else
    return multiply_add(w[1], Shorts::load(x + 16), {_mm256_madd_epi16(w[0].v, Shorts::load(x).v)});
#endif
}

// Eight floats of 16 bits behind each other, or bfloat16.
DBRX_INLINE Floats eight_of_16_bits(const uint8_t *at, bool is_half) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i *>(at));
    if (is_half) return {_mm256_cvtph_ps(words)};
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16))};
}
// Lanes 0 0 1 1 2 2 3 3 for 2 times, and so on.
DBRX_INLINE Floats spread(Floats a, int times) {
    const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_permutevar8x32_ps(a.v, _mm256_srli_epi32(place, times / 2))};
}
// The same of numbers at a place, 8 / TIMES of them.
template <int TIMES>
DBRX_INLINE Floats repeated(const float *at) {
    if constexpr (TIMES == 8) return Floats::all(*at);
    if constexpr (TIMES == 4) return halves(at[0], at[1]);
    return spread({_mm256_castps128_ps256(_mm_loadu_ps(at))}, TIMES);
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
    static Shorts load(const void *at) {
        const uint8_t *bytes = static_cast<const uint8_t *>(at);
        return {vreinterpretq_s16_u8(vld1q_u8(bytes)), vreinterpretq_s16_u8(vld1q_u8(bytes + 16))};
    }
    static Shorts all(int x) { return {vdupq_n_s16(int16_t(x)), vdupq_n_s16(int16_t(x))}; }
    void store(int16_t *at) const { vst1q_s16(at, lo), vst1q_s16(at + 8, hi); }
};
DBRX_INLINE Shorts operator*(Shorts a, Shorts b) { return {vmulq_s16(a.lo, b.lo), vmulq_s16(a.hi, b.hi)}; }
constexpr int ROWS_AT_ONCE = 3;
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

DBRX_INLINE Floats to_floats(Ints a) { return {vcvtq_f32_s32(a.lo), vcvtq_f32_s32(a.hi)}; }
DBRX_INLINE Floats halves(float low, float high) { return {vdupq_n_f32(low), vdupq_n_f32(high)}; }

struct Bytes {
    uint8x16_t lo, hi;
    static Bytes all(int x) { return {vdupq_n_u8(uint8_t(x)), vdupq_n_u8(uint8_t(x))}; }
    static Bytes load(const uint8_t *at) { return {vld1q_u8(at), vld1q_u8(at + 16)}; }
    static Bytes nibbles(const uint8_t *at) {
        const uint8x16_t both = vld1q_u8(at);
        return {vandq_u8(both, vdupq_n_u8(15)), vshrq_n_u8(both, 4)};
    }
    static Bytes each_bit(const uint8_t *at) {
        static constexpr uint8_t bit_of[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
        const auto half = [&](const uint8_t *two) {
            const uint8x16_t spread = vcombine_u8(vdup_n_u8(two[0]), vdup_n_u8(two[1]));
            return vandq_u8(vtstq_u8(spread, vld1q_u8(bit_of)), vdupq_n_u8(1));
        };
        return {half(at), half(at + 2)};
    }
    void store(uint8_t *at) const { vst1q_u8(at, lo), vst1q_u8(at + 16, hi); }
};
DBRX_INLINE Bytes operator&(Bytes a, Bytes b) { return {vandq_u8(a.lo, b.lo), vandq_u8(a.hi, b.hi)}; }
DBRX_INLINE Bytes operator|(Bytes a, Bytes b) { return {vorrq_u8(a.lo, b.lo), vorrq_u8(a.hi, b.hi)}; }
DBRX_INLINE Bytes operator-(Bytes a, Bytes b) { return {vsubq_u8(a.lo, b.lo), vsubq_u8(a.hi, b.hi)}; }
DBRX_INLINE Bytes bits(Bytes a, int right, int mask) {
    const int8x16_t left = vdupq_n_s8(int8_t(-right));
    return Bytes{vshlq_u8(a.lo, left), vshlq_u8(a.hi, left)} & Bytes::all(mask);
}
DBRX_INLINE Bytes look_up(const uint8_t (&table)[16], Bytes at) {
    const uint8x16_t once = vld1q_u8(table);
    return {vqtbl1q_u8(once, at.lo), vqtbl1q_u8(once, at.hi)};
}
DBRX_INLINE void split(Bytes a, Shorts (&out)[2]) {
    const auto wide = [](uint8x16_t of) -> Shorts {
        return {vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(of))), vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(of)))};
    };
    out[0] = wide(a.lo), out[1] = wide(a.hi);
}
DBRX_INLINE Ints multiply_32(const Shorts (&w)[2], const int16_t *x) {
    const auto sixteen = [](Shorts a, Shorts b) {
        const int32x4_t first = vmlal_s16(vmull_s16(vget_low_s16(a.lo), vget_low_s16(b.lo)), vget_low_s16(a.hi), vget_low_s16(b.hi));
        return vmlal_high_s16(vmlal_high_s16(first, a.lo, b.lo), a.hi, b.hi);
    };
    return {sixteen(w[0], Shorts::load(x)), sixteen(w[1], Shorts::load(x + 16))};
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
    static Shorts load(const void *at) {
        Shorts out;
        std::memcpy(out.v, at, sizeof out.v);
        return out;
    }
    static Shorts all(int x) {
        Shorts out;
        for (int16_t &one : out.v) one = int16_t(x);
        return out;
    }
    void store(int16_t *at) const { std::memcpy(at, v, sizeof v); }
};
DBRX_INLINE Shorts operator*(Shorts a, Shorts b) {
    for (int i = 0; i < 16; ++i) a.v[i] = int16_t(a.v[i] * b.v[i]);
    return a;
}
constexpr int ROWS_AT_ONCE = 1;  // no vectors, so nothing is saved by more
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

DBRX_INLINE Floats to_floats(Ints a) { return Floats::each([&](int i) { return float(a.v[i]); }); }
DBRX_INLINE Floats halves(float low, float high) { return Floats::each([=](int i) { return i < LANES / 2 ? low : high; }); }

struct Bytes {
    uint8_t v[32];
    template <class F>
    static Bytes each(F f) {
        Bytes out;
        for (int i = 0; i < 32; ++i) out.v[i] = uint8_t(f(i));
        return out;
    }
    static Bytes all(int x) { return each([=](int) { return x; }); }
    static Bytes load(const uint8_t *at) { return each([=](int i) { return at[i]; }); }
    static Bytes nibbles(const uint8_t *at) { return each([=](int i) { return i < 16 ? at[i] & 15 : at[i - 16] >> 4; }); }
    static Bytes each_bit(const uint8_t *at) { return each([=](int i) { return at[i / 8] >> i % 8 & 1; }); }
    void store(uint8_t *at) const { std::memcpy(at, v, sizeof v); }
};
DBRX_INLINE Bytes operator&(Bytes a, Bytes b) { return Bytes::each([&](int i) { return a.v[i] & b.v[i]; }); }
DBRX_INLINE Bytes operator|(Bytes a, Bytes b) { return Bytes::each([&](int i) { return a.v[i] | b.v[i]; }); }
DBRX_INLINE Bytes operator-(Bytes a, Bytes b) { return Bytes::each([&](int i) { return a.v[i] - b.v[i]; }); }
DBRX_INLINE Bytes bits(Bytes a, int right, int mask) {
    return Bytes::each([=](int i) { return (right < 0 ? a.v[i] << -right : a.v[i] >> right) & mask; });
}
DBRX_INLINE Bytes look_up(const uint8_t (&table)[16], Bytes at) {
    return Bytes::each([&](int i) { return table[at.v[i]]; });
}
DBRX_INLINE void split(Bytes a, Shorts (&out)[2]) {
    for (int i = 0; i < 32; ++i) out[i / 16].v[i % 16] = a.v[i];
}
DBRX_INLINE Ints multiply_32(const Shorts (&w)[2], const int16_t *x) {
    Ints sums = Ints::zero();
    for (int i = 0; i < 32; ++i) sums.v[i / 16 * 4 + i % 4] += w[i / 16].v[i % 16] * x[i];
    return sums;
}

#endif

#if !defined(__AVX2__)
struct LaneScales {
    float low[8], high[8];
    template <int N>
    static LaneScales of(const Floats (&scales)[N]) {
        float each[N * LANES];
        LaneScales out;
        for (int i = 0; i < N; ++i) scales[i].store(each + i * LANES);
        for (int chunk = 0; chunk < 8; ++chunk) out.low[chunk] = each[chunk * N], out.high[chunk] = each[chunk * N + N - 1];
        return out;
    }
    Floats at(int chunk) const { return halves(low[chunk], high[chunk]); }
};
template <int TIMES>
DBRX_INLINE Floats repeated(const float *at) {
    float each[LANES];
    for (int i = 0; i < LANES; ++i) each[i] = at[i / TIMES];
    return Floats::load(each);
}
DBRX_INLINE Floats spread(Floats a, int times) {
    float before[LANES], each[LANES];
    a.store(before);
    for (int i = 0; i < LANES; ++i) each[i] = before[i / times];
    return Floats::load(each);
}
DBRX_INLINE Floats eight_of_16_bits(const uint8_t *at, bool is_half) {
    float each[LANES];
    for (int i = 0; i < LANES; ++i) {
        uint16_t bits;
        std::memcpy(&bits, at + 2 * i, 2);
        each[i] = is_half ? half(at + 2 * i) : widen(bits);
    }
    return Floats::load(each);
}
DBRX_INLINE Floats eight_bytes(uint64_t bytes) {
    float each[LANES];
    for (int i = 0; i < LANES; ++i) each[i] = float(bytes >> 8 * i & 255);
    return Floats::load(each);
}
DBRX_INLINE Floats eight_of(uint32_t numbers, int bits) {
    float each[LANES];
    for (int i = 0; i < LANES; ++i) each[i] = float(numbers >> bits * i & ((1u << bits) - 1));
    return Floats::load(each);
}
DBRX_INLINE Floats eight_signed(const uint8_t *at) {
    float each[LANES];
    for (int i = 0; i < LANES; ++i) each[i] = float(int8_t(at[i]));
    return Floats::load(each);
}
DBRX_INLINE void load_weights(const uint16_t *bf16, Floats (&out)[2]) {
    out[0] = Floats::load(bf16), out[1] = Floats::load(bf16 + LANES);
}
#endif
// Floats of 16 bits, so many bytes apart; nothing behind the last is read.
DBRX_INLINE Floats eight_halves(const uint8_t *at, int apart) {
#if defined(__F16C__)
    const auto with = [=](int i) {  // the float i at its place among eight
        return _mm_loadu_si128(reinterpret_cast<const __m128i *>(at + i * (apart - 2)));
    };
    const __m128i two[4] = {_mm_blend_epi16(with(0), with(1), 0x02), _mm_blend_epi16(with(2), with(3), 0x08),
                            _mm_blend_epi16(with(4), with(5), 0x20), _mm_blend_epi16(with(6), with(7), 0x80)};
    const __m128i low = _mm_blend_epi16(two[0], two[1], 0x0c), high = _mm_blend_epi16(two[2], two[3], 0xc0);
    return {_mm256_cvtph_ps(_mm_blend_epi16(low, high, 0xf0))};
#else
    float each[LANES];
    for (int i = 0; i < LANES; ++i) each[i] = half(at + i * apart);
    return Floats::load(each);
#endif
}

DBRX_INLINE void load_weights(const float *at, Floats (&out)[2]) {
    out[0] = Floats::load(at), out[1] = Floats::load(at + LANES);
}
DBRX_INLINE void load_weights(const int8_t *at, Shorts (&out)[2]) {  // 32, in their order: widened by the load on AVX2
    out[0] = Shorts::widen(at), out[1] = Shorts::widen(at + 16);
}

// `count` numbers, each `size` of them with the even ones before the odd ones: 0 1 2 3 4 5 6 7 -> 0 2 4 6 1 3 5 7.
template <class T>
inline void even_first(T *x, int64_t count, int size) {
    for (int64_t start = 0; start + size <= count; start += size) {
        T before[128];
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
        T before[128];
        std::memcpy(before, x + start, size_t(size) * sizeof(T));
        for (int i = 0; i < size; ++i) x[start + i] = before[i % 2 * (size / 2) + i / 2];
    }
}

// Weights that a thread comes to soon: where it computes much for each byte, it has too few of them under way otherwise.
DBRX_INLINE void read_ahead(const void *at, int64_t bytes = 512) {  // it may be behind a matrix, where nothing is read
    __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(at) + uintptr_t(bytes)));
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
