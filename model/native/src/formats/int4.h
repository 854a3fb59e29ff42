// 4 bits a weight, scale and zero point for each group of inputs. Activations are 8 bits wide, a scale for each 32.
//
//     sum of (level - zero) * scale * x  =  sum over groups of scale * (sum of level * x - zero * sum of x)
//
// A row is read in blocks of 256 inputs (128 bytes), whose eight sums of 32 products are exact: of 32 levels up to 15
// times activations up to 127, each at most 60,960; 16 products at most 30,480, which 16 bits hold, and 4 of them 7,620.
#pragma once
#include <cstddef>

#include "../activations.h"

namespace dbrx {

constexpr int BLOCK = 256, PARTS = 8;  // inputs a block; parts of 32 inputs in it

// Where an activation of a block is kept: of each 64 the even ones stand before the odd ones, as a byte's halves come apart.
// Inputs 0, 1, 2, 3, 64, 65 are at 0, 32, 1, 33, 64, 96.
inline int place(int input) { return input / 64 * 64 + input % 2 * 32 + input % 64 / 2; }

#if defined(__AVX2__)
// Lanes as horizontal additions leave them: of four vectors, each of two parts, first the lower ones.
constexpr int PART_OF_LANE[PARTS] = {0, 2, 4, 6, 1, 3, 5, 7};

struct Levels {  // of one block: `even[j]` those of even inputs of the 64 behind 64 j
    __m256i even[4], odd[4];
    static Levels load(const uint8_t *at) {
        Levels out;
        const __m256i low = _mm256_set1_epi8(15);
        for (int j = 0; j < 4; ++j) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at + 32 * j));
            out.even[j] = _mm256_and_si256(bytes, low);
            out.odd[j] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
        }
        return out;
    }
};
DBRX_INLINE Floats part_sums(const Levels &levels, const int8_t *x) {
    __m256i sums[4];
    for (int j = 0; j < 4; ++j) {
        const __m256i *at = reinterpret_cast<const __m256i *>(x + 64 * j);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        sums[j] = _mm256_dpbusd_epi32(_mm256_setzero_si256(), levels.even[j], _mm256_loadu_si256(at));
        sums[j] = _mm256_dpbusd_epi32(sums[j], levels.odd[j], _mm256_loadu_si256(at + 1));
    }
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
#else
        sums[j] = _mm256_add_epi16(_mm256_maddubs_epi16(levels.even[j], _mm256_loadu_si256(at)),
                                   _mm256_maddubs_epi16(levels.odd[j], _mm256_loadu_si256(at + 1)));
    }
    const __m256i pairs = _mm256_hadd_epi16(_mm256_hadd_epi16(sums[0], sums[1]), _mm256_hadd_epi16(sums[2], sums[3]));
    const __m256i all = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
    return {_mm256_cvtepi32_ps(all)};
}
#else
constexpr int PART_OF_LANE[PARTS] = {0, 1, 2, 3, 4, 5, 6, 7};

#if defined(__ARM_FEATURE_DOTPROD)
struct Levels {
    int8x16_t even[PARTS], odd[PARTS];
    static Levels load(const uint8_t *at) {
        Levels out;
        for (int j = 0; j < PARTS; ++j) {
            const uint8x16_t bytes = vld1q_u8(at + 16 * j);
            out.even[j] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
            out.odd[j] = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
        }
        return out;
    }
};
DBRX_INLINE Floats part_sums(const Levels &levels, const int8_t *x) {
    int32x4_t sums[PARTS];
    for (int j = 0; j < PARTS; ++j) {
        const int8_t *at = x + j / 2 * 64 + j % 2 * 16;
        sums[j] = vdotq_s32(vdotq_s32(vdupq_n_s32(0), levels.even[j], vld1q_s8(at)), levels.odd[j], vld1q_s8(at + 32));
    }
    const auto four = [&](int j) {
        return vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(sums[j], sums[j + 1]), vpaddq_s32(sums[j + 2], sums[j + 3])));
    };
    return {four(0), four(4)};
}
#else
struct Levels {
    const uint8_t *at;
    static Levels load(const uint8_t *at) { return {at}; }
};
DBRX_INLINE Floats part_sums(const Levels &levels, const int8_t *x) {
    float sums[PARTS];
    for (int j = 0; j < PARTS; ++j) {
        int32_t total = 0;
        for (int i = 16 * j; i < 16 * j + 16; ++i) {
            const int8_t *even = x + i / 32 * 64 + i % 32;
            total += (levels.at[i] & 15) * even[0] + (levels.at[i] >> 4) * even[32];
        }
        sums[j] = float(total);
    }
    return Floats::load(sums);
}
#endif
#endif

// Scales or zero points of a block's parts, of which a group holds one or more, as lanes.
template <int GROUP>
DBRX_INLINE Floats load_of_parts(const uint16_t *at) {
    constexpr int BYTES = BLOCK / GROUP * 2;
#if defined(__AVX2__)
    __m128i stored;
    if constexpr (BYTES == 16) stored = _mm_loadu_si128(reinterpret_cast<const __m128i *>(at));
    else {
        int64_t bits = 0;
        std::memcpy(&bits, at, BYTES);
        stored = _mm_cvtsi64_si128(bits);
    }
    alignas(16) constexpr auto bytes = [] {
        struct { int8_t v[16]; } out{};
        for (int i = 0; i < 16; ++i) out.v[i] = int8_t(PART_OF_LANE[i / 2] * 32 / GROUP * 2 + i % 2);
        return out;
    }();
    const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i *>(bytes.v));
    const __m256i words = _mm256_cvtepu16_epi32(_mm_shuffle_epi8(stored, order));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
#else
    if constexpr (BYTES == 16) return Floats::load(at);
    uint16_t each[PARTS];
    for (int j = 0; j < PARTS; ++j) each[j] = at[j * 32 / GROUP];
    return Floats::load(each);
#endif
}

template <int GROUP>
struct Int4 {
    static constexpr int GROUPS = BLOCK / GROUP;  // in a block
    static int64_t groups(int64_t inputs) { return (inputs + GROUP - 1) / GROUP; }
    static int64_t row_bytes(const dbrx_matrix &m) { return m.inputs / 2 + 4 * groups(m.inputs); }

    struct Activations {  // of one block, zeros behind the last input
        int8_t x[BLOCK];
        float scale[PARTS], sums[PARTS];  // in the order of lanes; sums: of the rounded numbers, times scale
    };
    static int64_t prepared_bytes(int64_t inputs) { return (inputs + BLOCK - 1) / BLOCK * int64_t(sizeof(Activations)); }
    static void prepare(const float *x, int64_t inputs, std::byte *to) {
        Activations *blocks = reinterpret_cast<Activations *>(to);
        for (int64_t start = 0; start < inputs; start += BLOCK) {
            Activations &block = blocks[start / BLOCK];
            for (int lane = 0; lane < PARTS; ++lane) {
                const int first = PART_OF_LANE[lane] * 32;
                const int64_t count = std::clamp<int64_t>(inputs - start - first, 0, 32);
                const float most = std::max(largest(x + start + first, count), 1e-30f);
                const Floats inverse = Floats::all(127 / most);
                int16_t rounded[32] = {};
                for (int64_t i = 0; i < count; i += LANES)
                    store_rounded(load_up_to(x + start + first + i, count - i) * inverse, rounded + i);
                int total = 0;
                for (int i = 0; i < 32; ++i) {
                    total += rounded[i];
                    block.x[place(first + i)] = int8_t(rounded[i]);
                }
                block.scale[lane] = most / 127;
                block.sums[lane] = float(total) * block.scale[lane];
            }
        }
    }

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
        const auto add = [&](int w, int64_t block, const uint8_t *values, const uint16_t *scales, const uint16_t *zeros) {
            const Levels unpacked = Levels::load(values);
            const Floats s = load_of_parts<GROUP>(scales), z = load_of_parts<GROUP>(zeros);
            for (int r = 0; r < R; ++r) {
                const Activations &a = reinterpret_cast<const Activations *>(x[r])[block];
                const Floats of_zeros = Floats::all(0) - z * Floats::load(a.sums);
                const Floats products = fma(part_sums(unpacked, a.x), Floats::load(a.scale), of_zeros);
                sums[w][r] = fma(products, s, sums[w][r]);
            }
        };
        const int64_t whole = m.inputs / BLOCK, rest = m.inputs % BLOCK;
        for (int64_t b = 0; b < whole; ++b)
            for (int w = 0; w < W; ++w)
                add(w, b, levels[w] + b * (BLOCK / 2), scale[w] + b * GROUPS, zero[w] + b * GROUPS);
        if (rest) {  // through memory of its own, since nothing may be read behind a matrix
            for (int w = 0; w < W; ++w) {
                uint8_t values[BLOCK / 2] = {};
                uint16_t scales[GROUPS] = {}, zeros[GROUPS] = {};
                std::memcpy(values, levels[w] + whole * (BLOCK / 2), size_t(rest / 2));
                std::memcpy(scales, scale[w] + whole * GROUPS, size_t(groups(rest)) * 2);
                std::memcpy(zeros, zero[w] + whole * GROUPS, size_t(groups(rest)) * 2);
                add(w, whole, values, scales, zeros);
            }
        }
        for (int w = 0; w < W; ++w)
            for (int r = 0; r < R; ++r) y[w][r] = sum(sums[w][r]);
    }
};

}  // namespace dbrx
