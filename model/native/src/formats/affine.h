// A few bits a weight, scale and zero point for each group of inputs. Activations are 8 bits wide, a scale for each 32.
//
//     sum of (q - zero) * scale * x  =  sum over groups of scale * (sum of q * x - zero * sum of x)
//
// The bits of an output's numbers q lie in one plane or two, the first input in the lowest bits of a byte: four bits of all
// inputs, or two bits of all and then the third one of all. Of 3 bits and 16 inputs, number 9 being 6 = 4 + 2:
//     bytes 0 to 3, two bits each: inputs 0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13 14 15, and 2 << 2 in byte 2
//     bytes 4 and 5, a bit each:   inputs 0 to 7 | 8 to 15, and 1 << 1 in byte 5
// A row is read in blocks of 256 inputs, whose eight sums of 32 products are exact: 16 bits hold 16 products of numbers up
// to 15 with activations up to 127, which are at most 30,480, and all sums of fewer.
#pragma once
#include <cstddef>

#include "../activations.h"

namespace dbrx {

constexpr int BLOCK = 256, PARTS = 8;  // inputs a block; parts of 32 inputs in it

// The quantized weights of an output, from some block on.
template <int BITS>
struct Quantized {
    static constexpr int LOW = BITS == 3 ? 2 : BITS, HIGH = BITS - LOW;  // bits in the first plane, and in the second
    static constexpr int EACH = 8 / LOW, MASK = (1 << LOW) - 1;          // inputs in a byte of the first plane
    static constexpr int CHUNK = 32 * EACH;                              // inputs in 32 of its bytes
    const uint8_t *low, *high;

    static Quantized of_row(const uint8_t *row, int64_t inputs) { return {row, row + inputs * LOW / 8}; }
    static Quantized of(const dbrx_matrix &m, int64_t output) {
        return of_row(static_cast<const uint8_t *>(m.values) + output * (m.inputs * BITS / 8), m.inputs);
    }
    Quantized block(int64_t b) const { return {low + b * (BLOCK * LOW / 8), high + b * (BLOCK * HIGH / 8)}; }

    // Which of a byte's inputs come k-th where even ones come first, then of these and of those the even ones:
    // 0 1, or 0 2 1 3.
    static constexpr int place(int k) { return EACH == 2 ? k : k % 2 * 2 + k / 2; }
    int at(int input) const {
        const int q = low[input / EACH] >> input % EACH * LOW & MASK;
        return HIGH ? q | (high[input / 8] >> input % 8 & 1) << LOW : q;
    }
};

// A byte a weight -> an output's row.
template <int BITS>
inline void pack_quantized(const uint8_t *quantized, int64_t inputs, uint8_t *row) {
    using L = Quantized<BITS>;
    for (int64_t i = 0; i < inputs; i += L::EACH) {
        int byte = 0;
        for (int k = 0; k < L::EACH; ++k) byte |= (quantized[i + k] & L::MASK) << k * L::LOW;
        row[i / L::EACH] = uint8_t(byte);
    }
    if constexpr (L::HIGH > 0)
        for (int64_t i = 0; i < inputs; i += 8) {
            int byte = 0;
            for (int k = 0; k < 8; ++k) byte |= quantized[i + k] >> L::LOW << k;
            row[(inputs * L::LOW + i) / 8] = uint8_t(byte);
        }
}

#if defined(__AVX2__)
// Lanes as packing leaves them. 4 bits: of four vectors of two parts each, first the lower ones. 3 bits: of two vectors of
// four parts each the lower two, then the upper two.
template <int BITS>
constexpr int PART_OF_LANE[PARTS] = {0, 2, 4, 6, 1, 3, 5, 7};
template <>
constexpr int PART_OF_LANE<3>[PARTS] = {0, 1, 4, 5, 2, 3, 6, 7};

// The weights of a chunk, each vector one of the places in a byte.
DBRX_INLINE void unpack(const Quantized<4> &from, int chunk, __m256i (&out)[2]) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from.low + 32 * chunk)), low = _mm256_set1_epi8(15);
    out[0] = _mm256_and_si256(bytes, low), out[1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
}
DBRX_INLINE void unpack(const Quantized<3> &from, int chunk, __m256i (&out)[4]) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from.low + 32 * chunk));
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from.high + 16 * chunk)));
    const __m256i bits = _mm256_or_si256(words, _mm256_slli_epi16(words, 4));  // the lower four of each byte are its inputs'
    const auto joined = [&](__m256i two_bits, __m256i third) {
        return _mm256_or_si256(_mm256_and_si256(two_bits, _mm256_set1_epi8(3)), _mm256_and_si256(third, _mm256_set1_epi8(4)));
    };
    out[0] = joined(bytes, _mm256_slli_epi16(bits, 2));
    out[1] = joined(_mm256_srli_epi16(bytes, 4), bits);
    out[2] = joined(_mm256_srli_epi16(bytes, 2), _mm256_slli_epi16(bits, 1));
    out[3] = joined(_mm256_srli_epi16(bytes, 6), _mm256_srli_epi16(bits, 1));
}

// sums[r] = the block's sums of quantized weights times activations x[r], a part each.
template <int BITS, int R>
DBRX_INLINE void part_sums(const Quantized<BITS> &from, const int8_t *const (&x)[R], Floats (&sums)[R]) {
    using L = Quantized<BITS>;
    constexpr int CHUNKS = BLOCK / L::CHUNK;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i found[R][CHUNKS];  // eight sums each
    for (int j = 0; j < CHUNKS; ++j) {
        __m256i quantized[L::EACH];
        unpack(from, j, quantized);
        for (int r = 0; r < R; ++r) {
            const __m256i *at = reinterpret_cast<const __m256i *>(x[r] + L::CHUNK * j);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
            found[r][j] = _mm256_setzero_si256();
            for (int k = 0; k < L::EACH; ++k) found[r][j] = _mm256_dpbusd_epi32(found[r][j], quantized[k], _mm256_load_si256(at + k));
#else
            __m256i words[L::EACH];
            for (int k = 0; k < L::EACH; ++k) words[k] = _mm256_maddubs_epi16(quantized[k], _mm256_load_si256(at + k));
            for (int apart = L::EACH / 2; apart; apart /= 2)
                for (int k = 0; k < apart; ++k) words[k] = _mm256_add_epi16(words[k], words[k + apart]);
            found[r][j] = _mm256_madd_epi16(words[0], ones);
#endif
        }
    }
    const auto pairs = [=](__m256i a, __m256i b) { return _mm256_madd_epi16(_mm256_packs_epi32(a, b), ones); };
    for (int r = 0; r < R; ++r) {
        __m256i all = pairs(found[r][0], found[r][1]);
        if constexpr (CHUNKS == 4) all = pairs(all, pairs(found[r][2], found[r][3]));
        sums[r].v = _mm256_cvtepi32_ps(all);
    }
}
#else
template <int BITS>
constexpr int PART_OF_LANE[PARTS] = {0, 1, 2, 3, 4, 5, 6, 7};

#if defined(__ARM_FEATURE_DOTPROD)
// The weights of 16 bytes, half a chunk.
DBRX_INLINE void unpack(const Quantized<4> &from, int j, int8x16_t (&out)[2]) {
    const uint8x16_t bytes = vld1q_u8(from.low + 16 * j);
    out[0] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), out[1] = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
}
DBRX_INLINE void unpack(const Quantized<3> &from, int j, int8x16_t (&out)[4]) {
    const uint8x16_t bytes = vld1q_u8(from.low + 16 * j);
    const uint8x8_t high = vld1_u8(from.high + 8 * j), upper = vshr_n_u8(high, 4);
    const uint8x16_t bits = vcombine_u8(vzip1_u8(high, upper), vzip2_u8(high, upper));  // the lower four are its inputs'
    const auto joined = [](uint8x16_t two_bits, uint8x16_t third) {
        return vreinterpretq_s8_u8(vorrq_u8(vandq_u8(two_bits, vdupq_n_u8(3)), vandq_u8(third, vdupq_n_u8(4))));
    };
    out[0] = joined(bytes, vshlq_n_u8(bits, 2));
    out[1] = joined(vshrq_n_u8(bytes, 4), bits);
    out[2] = joined(vshrq_n_u8(bytes, 2), vshlq_n_u8(bits, 1));
    out[3] = joined(vshrq_n_u8(bytes, 6), vshrq_n_u8(bits, 1));
}

template <int BITS, int R>
DBRX_INLINE void part_sums(const Quantized<BITS> &from, const int8_t *const (&x)[R], Floats (&sums)[R]) {
    using L = Quantized<BITS>;
    constexpr int HALVES = 2 * BLOCK / L::CHUNK;
    int32x4_t found[R][HALVES];
    for (int j = 0; j < HALVES; ++j) {
        int8x16_t quantized[L::EACH];
        unpack(from, j, quantized);
        for (int r = 0; r < R; ++r) {
            const int8_t *at = x[r] + j / 2 * L::CHUNK + j % 2 * 16;
            found[r][j] = vdupq_n_s32(0);
            for (int k = 0; k < L::EACH; ++k) found[r][j] = vdotq_s32(found[r][j], quantized[k], vld1q_s8(at + 32 * k));
        }
    }
    for (int r = 0; r < R; ++r) {
        int32x4_t pairs[HALVES / 2];
        for (int j = 0; j < HALVES / 2; ++j) pairs[j] = vpaddq_s32(found[r][2 * j], found[r][2 * j + 1]);
        if constexpr (HALVES == 8)
            for (int j = 0; j < 2; ++j) pairs[j] = vpaddq_s32(pairs[2 * j], pairs[2 * j + 1]);
        sums[r] = {vcvtq_f32_s32(pairs[0]), vcvtq_f32_s32(pairs[1])};
    }
}
#else
template <int BITS, int R>
DBRX_INLINE void part_sums(const Quantized<BITS> &from, const int8_t *const (&x)[R], Floats (&sums)[R]) {
    using L = Quantized<BITS>;
    for (int r = 0; r < R; ++r) {
        float found[PARTS];
        for (int j = 0; j < PARTS; ++j) {
            int32_t total = 0;
            for (int byte = 32 / L::EACH * j; byte < 32 / L::EACH * (j + 1); ++byte)
                for (int k = 0; k < L::EACH; ++k)
                    total += from.at(L::EACH * byte + L::place(k)) * x[r][byte / 32 * L::CHUNK + 32 * k + byte % 32];
            found[j] = float(total);
        }
        sums[r] = Floats::load(found);
    }
}
#endif
#endif

// Scales or zero points of a block's parts, of which a group holds one or more, as lanes. AVX2: within 128 bits.
template <int BITS, int GROUP>
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
        for (int i = 0; i < 32; ++i)
            out.v[i] = i % 4 < 2 ? int8_t(-1) : int8_t(PART_OF_LANE<BITS>[i / 4] * 32 / GROUP * 2 + i % 2);
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
template <int BITS>
struct AffineRows {
    struct Activations {  // of one block, zeros behind the last input
        alignas(32) int8_t x[BLOCK];  // of each chunk in the order of places, as a byte's weights come apart
        float scale[PARTS], less[PARTS];  // in the order of lanes; less: what a zero point takes away, minus the sum of x
    };
    static int64_t prepared_bytes(int64_t inputs) { return (inputs + BLOCK - 1) / BLOCK * int64_t(sizeof(Activations)); }
    static void prepare(const float *x, int64_t inputs, std::byte *to) {
        Activations *blocks = reinterpret_cast<Activations *>(to);
        for (int64_t start = 0; start < inputs; start += BLOCK) {
            Activations &block = blocks[start / BLOCK];
            int16_t rounded[BLOCK];
            for (int lane = 0; lane < PARTS; ++lane) {
                const int64_t first = PART_OF_LANE<BITS>[lane] * 32, there = inputs - start - first;
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
            for (int size = Quantized<BITS>::CHUNK; size > 32; size /= 2) even_first(rounded, BLOCK, size);
            for (int i = 0; i < BLOCK; ++i) block.x[i] = int8_t(rounded[i]);
        }
    }
};

template <int BITS, int GROUP>
struct Affine : AffineRows<BITS> {
    using typename AffineRows<BITS>::Activations;
    static constexpr int AT_ONCE = 4;             // outputs whose products with several rows share a loop
    static constexpr int GROUPS = BLOCK / GROUP;  // in a block
    static int64_t groups(int64_t inputs) { return (inputs + GROUP - 1) / GROUP; }
    static int64_t row_bytes(const dbrx_matrix &m) { return m.inputs * BITS / 8 + 4 * groups(m.inputs); }

    template <int W, int R>
    static void dot(const dbrx_matrix &m, const int64_t (&outputs)[W], const std::byte *const *x, float (&y)[W][R]) {
        Quantized<BITS> quantized[W];
        const uint16_t *scale[W], *zero[W];
        Floats sums[W][R];
        for (int w = 0; w < W; ++w) {
            quantized[w] = Quantized<BITS>::of(m, outputs[w]);
            scale[w] = static_cast<const uint16_t *>(m.scale) + outputs[w] * groups(m.inputs);
            zero[w] = static_cast<const uint16_t *>(m.zero) + outputs[w] * groups(m.inputs);
            for (Floats &one : sums[w]) one = Floats::all(0);
        }
        const int64_t whole = m.inputs / BLOCK, rest = m.inputs % BLOCK;
        if (rest) {  // through memory of its own, since nothing may be read behind a matrix
            for (int w = 0; w < W; ++w) {
                uint8_t values[BLOCK * BITS / 8] = {};
                uint16_t scales[GROUPS] = {}, zeros[GROUPS] = {};
                const Quantized<BITS> last = quantized[w].block(whole), copy = Quantized<BITS>::of_row(values, BLOCK);
                std::memcpy(values, last.low, size_t(rest * copy.LOW / 8));
                std::memcpy(values + (copy.high - values), last.high, size_t(rest * copy.HIGH / 8));
                std::memcpy(scales, scale[w] + whole * GROUPS, size_t(groups(rest)) * 2);
                std::memcpy(zeros, zero[w] + whole * GROUPS, size_t(groups(rest)) * 2);
                add<R>(copy, scales, zeros, x, whole, sums[w]);
            }
        }
        for (int64_t b = 0; b < whole; ++b)
            for (int w = 0; w < W; ++w) add<R>(quantized[w].block(b), scale[w] + b * GROUPS, zero[w] + b * GROUPS, x, b, sums[w]);
        for (int w = 0; w < W; ++w)
            for (int r = 0; r < R; ++r) y[w][r] = sum(sums[w][r]);
    }

  private:
    template <int R>
    static DBRX_INLINE void add(const Quantized<BITS> &quantized, const uint16_t *scales, const uint16_t *zeros,
                                const std::byte *const *x, int64_t block, Floats (&sums)[R]) {
        const Activations *of[R];
        const int8_t *numbers[R];
        Floats found[R];
        for (int r = 0; r < R; ++r) {
            of[r] = reinterpret_cast<const Activations *>(x[r]) + block;
            numbers[r] = of[r]->x;
        }
        for (int line = 0; line < BLOCK * quantized.LOW / 8; line += 64) read_ahead(quantized.low + line);
        if constexpr (quantized.HIGH > 0) read_ahead(quantized.high);
        part_sums(quantized, numbers, found);
        const Floats s = load_of_parts<BITS, GROUP>(scales), z = load_of_parts<BITS, GROUP>(zeros);
        for (int r = 0; r < R; ++r) {
            const Floats product = fma(z, Floats::load(of[r]->less), found[r]) * s;
            sums[r] = fma(product, Floats::load(of[r]->scale), sums[r]);
        }
    }
};

}  // namespace dbrx
