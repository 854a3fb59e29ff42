// 4 bits a weight, scale and zero point for each group of inputs. Activations are 8 bits wide, a scale for each 32.
//
//     sum of (level - zero) * scale * x  =  sum over groups of scale * (sum of level * x - zero * sum of x)
//
// A row is read in blocks of 256 inputs (128 bytes), whose eight sums of 32 products are exact: of 32 levels up to 15
// times activations up to 127, each at most 60,960; 16 products at most 30,480, which 16 bits hold, and so do 8 and 4.
#pragma once
#include <cstddef>

#include "../activations.h"

namespace dbrx {

constexpr int BLOCK = 256, PARTS = 8;  // inputs a block; parts of 32 inputs in it

#if defined(__AVX2__)
// Lanes as packing leaves them: of four vectors, each of two parts, first the lower ones.
constexpr int PART_OF_LANE[PARTS] = {0, 2, 4, 6, 1, 3, 5, 7};

// sums[r] = the block's sums of levels times activations x[r], a part each.
template <int R>
DBRX_INLINE void part_sums(const uint8_t *levels, const int8_t *const (&x)[R], Floats (&sums)[R]) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i found[R][4];  // of 64 inputs each: two parts, four sums of eight products each
    for (int j = 0; j < 4; ++j) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(levels + 32 * j));
        const __m256i even = _mm256_and_si256(bytes, low), odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
        for (int r = 0; r < R; ++r) {
            const __m256i *at = reinterpret_cast<const __m256i *>(x[r] + 64 * j);
            const __m256i of_even = _mm256_load_si256(at), of_odd = _mm256_load_si256(at + 1);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
            found[r][j] = _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), even, of_even), odd, of_odd);
#else
            const __m256i fours = _mm256_add_epi16(_mm256_maddubs_epi16(even, of_even), _mm256_maddubs_epi16(odd, of_odd));
            found[r][j] = _mm256_madd_epi16(fours, ones);
#endif
        }
    }
    const auto pairs = [=](__m256i a, __m256i b) { return _mm256_madd_epi16(_mm256_packs_epi32(a, b), ones); };
    for (int r = 0; r < R; ++r)
        sums[r].v = _mm256_cvtepi32_ps(pairs(pairs(found[r][0], found[r][1]), pairs(found[r][2], found[r][3])));
}
#else
constexpr int PART_OF_LANE[PARTS] = {0, 1, 2, 3, 4, 5, 6, 7};

#if defined(__ARM_FEATURE_DOTPROD)
template <int R>
DBRX_INLINE void part_sums(const uint8_t *levels, const int8_t *const (&x)[R], Floats (&sums)[R]) {
    int32x4_t found[R][PARTS];
    for (int j = 0; j < PARTS; ++j) {
        const uint8x16_t bytes = vld1q_u8(levels + 16 * j);
        const int8x16_t even = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
        const int8x16_t odd = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
        for (int r = 0; r < R; ++r) {
            const int8_t *at = x[r] + j / 2 * 64 + j % 2 * 16;
            found[r][j] = vdotq_s32(vdotq_s32(vdupq_n_s32(0), even, vld1q_s8(at)), odd, vld1q_s8(at + 32));
        }
    }
    for (int r = 0; r < R; ++r) {
        const auto four = [&](const int32x4_t *of) {
            return vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(of[0], of[1]), vpaddq_s32(of[2], of[3])));
        };
        sums[r] = {four(found[r]), four(found[r] + 4)};
    }
}
#else
template <int R>
DBRX_INLINE void part_sums(const uint8_t *levels, const int8_t *const (&x)[R], Floats (&sums)[R]) {
    for (int r = 0; r < R; ++r) {
        float found[PARTS];
        for (int j = 0; j < PARTS; ++j) {
            int32_t total = 0;
            for (int i = 16 * j; i < 16 * j + 16; ++i) {
                const int8_t *even = x[r] + i / 32 * 64 + i % 32;
                total += (levels[i] & 15) * even[0] + (levels[i] >> 4) * even[32];
            }
            found[j] = float(total);
        }
        sums[r] = Floats::load(found);
    }
}
#endif
#endif

// Scales or zero points of a block's parts, of which a group holds one or more, as lanes. AVX2: within 128 bits.
template <int GROUP>
DBRX_INLINE Floats load_of_parts(const uint16_t *at) {
    constexpr int BYTES = BLOCK / GROUP * 2;
#if defined(__AVX2__)
    __m256i stored;
    if constexpr (BYTES == 16) stored = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
    else {
        int64_t bits = 0;
        std::memcpy(&bits, at, BYTES);
        stored = _mm256_set1_epi64x(bits);
    }
    alignas(32) static constexpr auto bytes = [] {  // -1 gives a zero: the lower half of a float
        struct { int8_t v[32]; } out{};
        for (int i = 0; i < 32; ++i) out.v[i] = i % 4 < 2 ? int8_t(-1) : int8_t(PART_OF_LANE[i / 4] * 32 / GROUP * 2 + i % 2);
        return out;
    }();
    return {_mm256_castsi256_ps(_mm256_shuffle_epi8(stored, _mm256_load_si256(reinterpret_cast<const __m256i *>(bytes.v))))};
#else
    if constexpr (BYTES == 16) return Floats::load(at);
    uint16_t each[PARTS];
    for (int j = 0; j < PARTS; ++j) each[j] = at[j * 32 / GROUP];
    return Floats::load(each);
#endif
}

// Activations, the same for all sizes of groups.
struct Int4Rows {
    struct Activations {  // of one block, zeros behind the last input
        alignas(32) int8_t x[BLOCK];  // of each 64 the even ones first, as a byte's halves come apart
        float scale[PARTS], less[PARTS];  // in the order of lanes; less: what a zero point takes away, minus the sum of x
    };
    static int64_t prepared_bytes(int64_t inputs) { return (inputs + BLOCK - 1) / BLOCK * int64_t(sizeof(Activations)); }
    static void prepare(const float *x, int64_t inputs, std::byte *to) {
        Activations *blocks = reinterpret_cast<Activations *>(to);
        for (int64_t start = 0; start < inputs; start += BLOCK) {
            Activations &block = blocks[start / BLOCK];
            int16_t rounded[BLOCK];
            for (int lane = 0; lane < PARTS; ++lane) {
                const int64_t first = PART_OF_LANE[lane] * 32, there = inputs - start - first;
                Floats part[4], most = Floats::all(0), poison = Floats::all(0);
                for (int v = 0; v < 4; ++v) {
                    part[v] = there > v * LANES ? load_up_to(x + start + first + v * LANES, there - v * LANES) : Floats::all(0);
                    most = max(most, abs(part[v]));
                    poison = fma(part[v], Floats::all(0), poison);  // NaN where one is not finite
                }
                const float bound = std::max(largest_lane(most), 1e-30f) + sum(poison);
                const Floats inverse = Floats::all(127 / bound);
                int total = 0;
                for (int v = 0; v < 4; ++v) store_rounded(part[v] * inverse, rounded + first + v * LANES);
                for (int64_t i = first; i < first + 32; ++i) total += rounded[i];
                block.scale[lane] = bound / 127;
                block.less[lane] = float(-total);
            }
            even_first(rounded, BLOCK, 64);
            for (int i = 0; i < BLOCK; ++i) block.x[i] = int8_t(rounded[i]);
        }
    }
};

template <int GROUP>
struct Int4 : Int4Rows {
    static constexpr int AT_ONCE = 4;             // outputs whose products share a loop
    static constexpr int GROUPS = BLOCK / GROUP;  // in a block
    static int64_t groups(int64_t inputs) { return (inputs + GROUP - 1) / GROUP; }
    static int64_t row_bytes(const dbrx_matrix &m) { return m.inputs / 2 + 4 * groups(m.inputs); }

    template <int W, int R>
    static void dot(const dbrx_matrix &m, const int64_t (&outputs)[W], const std::byte *const *x, float (&y)[W][R]) {
        const uint8_t *levels[W];
        const uint16_t *scale[W], *zero[W];
        Floats sums[W][R];
        for (int w = 0; w < W; ++w) {
            levels[w] = static_cast<const uint8_t *>(m.values) + outputs[w] * (m.inputs / 2);
            scale[w] = static_cast<const uint16_t *>(m.scale) + outputs[w] * groups(m.inputs);
            zero[w] = static_cast<const uint16_t *>(m.zero) + outputs[w] * groups(m.inputs);
            for (Floats &one : sums[w]) one = Floats::all(0);
        }
        const int64_t whole = m.inputs / BLOCK, rest = m.inputs % BLOCK;
        if (rest) {  // through memory of its own, since nothing may be read behind a matrix
            for (int w = 0; w < W; ++w) {
                uint8_t values[BLOCK / 2] = {};
                uint16_t scales[GROUPS] = {}, zeros[GROUPS] = {};
                std::memcpy(values, levels[w] + whole * (BLOCK / 2), size_t(rest / 2));
                std::memcpy(scales, scale[w] + whole * GROUPS, size_t(groups(rest)) * 2);
                std::memcpy(zeros, zero[w] + whole * GROUPS, size_t(groups(rest)) * 2);
                add<R>(values, scales, zeros, x, whole, sums[w]);
            }
        }
        for (int64_t b = 0; b < whole; ++b)
            for (int w = 0; w < W; ++w)
                add<R>(levels[w] + b * (BLOCK / 2), scale[w] + b * GROUPS, zero[w] + b * GROUPS, x, b, sums[w]);
        for (int w = 0; w < W; ++w)
            for (int r = 0; r < R; ++r) y[w][r] = sum(sums[w][r]);
    }

  private:
    template <int R>
    static DBRX_INLINE void add(const uint8_t *values, const uint16_t *scales, const uint16_t *zeros, const std::byte *const *x,
                                int64_t block, Floats (&sums)[R]) {
        const Activations *of[R];
        const int8_t *numbers[R];
        Floats found[R];
        for (int r = 0; r < R; ++r) {
            of[r] = reinterpret_cast<const Activations *>(x[r]) + block;
            numbers[r] = of[r]->x;
        }
        read_ahead(values);
        read_ahead(values + BLOCK / 4);
        part_sums(values, numbers, found);
        const Floats s = load_of_parts<GROUP>(scales), z = load_of_parts<GROUP>(zeros);
        for (int r = 0; r < R; ++r) {
            const Floats product = fma(z, Floats::load(of[r]->less), found[r]) * s;
            sums[r] = fma(product, Floats::load(of[r]->scale), sums[r]);
        }
    }
};

}  // namespace dbrx
