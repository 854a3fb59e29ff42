// Weights of a few outputs, made into what tiles multiply with: a panel that stays in the first-level cache.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "formats/affine.h"
#include "tiles.h"

namespace dbrx {

typedef uint16_t HalfLanes __attribute__((vector_size(2 * TILE_LANES)));

constexpr float NORM = 32000.0f;               // of a row of integers of 16 bits: see `ShortDot`
constexpr float ROUNDING = 12582912.0f;        // 1.5 * 2^23: added, it leaves the nearest integer in a float's low bits
constexpr float TINY = 1e-30f;                 // for what is divided by
constexpr int64_t PANEL_INPUT_BYTES = 1024;    // of an output in a panel: a panel has 16 KiB, or 32 of AVX-512's 48
constexpr int64_t GEMM_ROWS = 512;             // that meet a panel before it is unpacked again: their sums stay in cache

using GemmWrite = std::function<void(int64_t row, int64_t output, int count, const float *values)>;

inline FloatLanes lanes_of(const float *x) { return load<FloatLanes>(x); }
inline FloatLanes lanes_of(const uint16_t *x) { return (FloatLanes)(__builtin_convertvector(load<HalfLanes>(x), WordLanes) << 16); }

inline float sum_of(FloatLanes v) {
    float sum = 0;
    for (int i = 0; i < TILE_LANES; ++i) sum += v[i];
    return sum;
}

// The nearest integers.
inline WordLanes nearest(FloatLanes v) { return (WordLanes)(v + ROUNDING) - std::bit_cast<int32_t>(ROUNDING); }

template <class T>
float squares(const T *x, int64_t count) {
    FloatLanes sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * TILE_LANES <= count; i += 4 * TILE_LANES)
        for (int j = 0; j < 4; ++j) {
            const FloatLanes v = lanes_of(x + i + j * TILE_LANES);
            sums[j] = multiply_add(v, v, sums[j]);
        }
    float rest = 0;
    for (; i < count; ++i) rest += widen(x[i]) * widen(x[i]);
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

// What a format's weights become before they are multiplied; `Dot` of each is the choice of this processor.
template <int format>
struct Unpack;

template <>
struct Unpack<DBRX_F32> {
    using Stored = float;
    using Dot = FloatDot;
    static float step(const dbrx_matrix &, int64_t) { return 1; }
    static void row(const dbrx_matrix &m, int64_t output, int64_t first, int64_t count, float, float *out) {
        std::memcpy(out, (const float *)m.values + output * m.inputs + first, size_t(count) * sizeof(float));
    }
};

template <>
struct Unpack<DBRX_BF16> {
    using Stored = uint16_t;
#if defined(DBRX_DOT_BF16)
    using Dot = HalfDot;
#elif defined(__AVX2__)
    using Dot = ShortDot;
#else
    using Dot = FloatDot;
#endif
    static constexpr bool ROUNDS = std::is_same_v<Dot, ShortDot>;

    static float step(const dbrx_matrix &m, int64_t output) {
        if (!ROUNDS) return 1;
        return std::max(std::sqrt(squares((const uint16_t *)m.values + output * m.inputs, m.inputs)), TINY) / NORM;
    }
    static void row(const dbrx_matrix &m, int64_t output, int64_t first, int64_t count, float inverse, Dot::Element *out) {
        convert((const uint16_t *)m.values + output * m.inputs + first, count, inverse, out);
    }
    static void convert(const uint16_t *from, int64_t count, float, uint16_t *out) { std::memcpy(out, from, size_t(count) * 2); }
    static void convert(const uint16_t *from, int64_t count, float, float *out) {
        for (int64_t i = 0; i < count; ++i) out[i] = widen(from[i]);
    }
    static void convert(const uint16_t *from, int64_t count, float inverse, int16_t *out) {
        for (int64_t i = 0; i < count; ++i) out[i] = int16_t(std::bit_cast<int32_t>(widen(from[i]) * inverse + ROUNDING));
    }
};

template <>
struct Unpack<DBRX_INT8> {
    using Stored = int8_t;
#if defined(DBRX_DOT_INT8)
    using Dot = ByteDot;
#else
    using Dot = ShortDot;
#endif
    static float step(const dbrx_matrix &m, int64_t output) { return ((const float *)m.scale)[output]; }
    static void row(const dbrx_matrix &m, int64_t output, int64_t first, int64_t count, float, Dot::Element *out) {
        const int8_t *from = (const int8_t *)m.values + output * m.inputs + first;
        for (int64_t i = 0; i < count; ++i) out[i] = from[i];
    }
};

#if defined(__AVX2__)
// The quantized weights of inputs first .. first + 31, in their order.
inline __m256i unpack_32(const Quantized<4> &quantized, int first) {
    const __m128i both = _mm_loadu_si128((const __m128i *)(quantized.low + first / 2)), mask = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(both, mask), odd = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
    return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}
// A word for each four inputs: their bits, once more for each byte and shifted so that the byte's own come lowest.
//     two bits each: b | b << 6 | b << 12 | b << 18; third bits: b | b << 7 | b << 14 | b << 21, two places higher
inline __m256i unpack_32(const Quantized<3> &quantized, int first) {
    int32_t third_bits;
    std::memcpy(&third_bits, quantized.high + first / 8, 4);
    const auto for_each_byte = [](__m256i once, int shift) {
        const __m256i twice = _mm256_or_si256(once, _mm256_slli_epi32(once, 2 * shift));
        return _mm256_or_si256(twice, _mm256_slli_epi32(twice, shift));
    };
    const __m256i two = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(quantized.low + first / 4)));
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i third = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(third_bits), shifts), _mm256_set1_epi32(15));
    return _mm256_or_si256(_mm256_and_si256(for_each_byte(two, 6), _mm256_set1_epi8(3)),
                           _mm256_and_si256(for_each_byte(_mm256_slli_epi32(third, 2), 7), _mm256_set1_epi8(4)));
}
#endif

// Of a few bits, with scale and zero point for each group.
template <int BITS>
struct UnpackAffine {
    using Stored = uint8_t;
#if defined(__AVX2__) || defined(DBRX_EMULATE)
    using Dot = ShortDot;
#else
    using Dot = FloatDot;
#endif
    static constexpr bool ROUNDS = std::is_same_v<Dot, ShortDot>;
    static constexpr int QMAX = (1 << BITS) - 1;

    static int64_t groups(const dbrx_matrix &m) { return (m.inputs + m.group - 1) / m.group; }

    // The norm is bounded rather than computed: by what the farthest of all numbers would give in each place.
    static float step(const dbrx_matrix &m, int64_t output) {
        if (!ROUNDS) return 1;
        const int64_t count = groups(m);
        const uint16_t *scale = (const uint16_t *)m.scale + output * count, *zero = (const uint16_t *)m.zero + output * count;
        float sums[8] = {};
        int64_t g = 0;
        for (; g + 8 <= count; g += 8)
            for (int j = 0; j < 8; ++j) sums[j] += farthest(scale[g + j], zero[g + j]);
        for (; g < count; ++g) sums[0] += farthest(scale[g], zero[g]);
        const float most = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
        return std::max(std::sqrt(most * float(m.group)), TINY) / NORM;
    }
    static float farthest(uint16_t scale, uint16_t zero) {
        const float z = widen(zero), most = std::max(std::fabs(z), std::fabs(QMAX - z)) * widen(scale);
        return most * most;
    }

    static void row(const dbrx_matrix &m, int64_t output, int64_t first, int64_t count, float inverse, Dot::Element *out) {
        const int64_t offset = output * groups(m) + first / m.group;  // `first` begins a group
        const uint16_t *scale = (const uint16_t *)m.scale + offset, *zero = (const uint16_t *)m.zero + offset;
        const Quantized<BITS> quantized = Quantized<BITS>::of(m, output).block(first / BLOCK);
        for (int64_t i = 0; i < count; i += m.group, ++scale, ++zero)
            group(quantized, int(i), int(std::min(i + m.group, count)), widen(*scale) * inverse, widen(*zero), out);
    }
    static void group(const Quantized<BITS> &quantized, int first, int last, float scale, float zero, float *out) {
        for (int i = first; i < last; ++i) out[i] = (float(quantized.at(i)) - zero) * scale;
    }
    static void group(const Quantized<BITS> &quantized, int first, int last, float scale, float zero, int16_t *out) {
        alignas(32) int16_t table[16] = {};
        for (int q = 0; q <= QMAX; ++q)
            table[q] = int16_t(std::bit_cast<int32_t>((float(q) - zero) * scale + ROUNDING));
        int i = first;
#if defined(__AVX2__)
        // Bytes of the table apart, since `vpshufb` looks up bytes: low ones and high ones of 16 entries, in both lanes.
        const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                               0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        const __m256i apart = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(_mm256_load_si256((const __m256i *)table), split), 0xD8);
        const __m256i low = _mm256_permute2x128_si256(apart, apart, 0x00), high = _mm256_permute2x128_si256(apart, apart, 0x11);
        for (; i + 32 <= last; i += 32) {
            const __m256i in_order = unpack_32(quantized, i);
            const __m256i lows = _mm256_shuffle_epi8(low, in_order), highs = _mm256_shuffle_epi8(high, in_order);
            const __m256i a = _mm256_unpacklo_epi8(lows, highs), b = _mm256_unpackhi_epi8(lows, highs);
            _mm256_storeu_si256((__m256i *)(out + i), _mm256_permute2x128_si256(a, b, 0x20));
            _mm256_storeu_si256((__m256i *)(out + i + 16), _mm256_permute2x128_si256(a, b, 0x31));
        }
#endif
        for (; i < last; ++i) out[i] = table[quantized.at(i)];
    }
};

template <>
struct Unpack<DBRX_INT4> : UnpackAffine<4> {};
template <>
struct Unpack<DBRX_INT3> : UnpackAffine<3> {};

// Eight rows of eight words of 32 bits -> their columns; strides in words.
inline void transpose_8(const float *from, int64_t stride, float *to, int64_t to_stride) {
#if defined(__AVX2__)
    __m256 r[8], t[8];
    DBRX_UNROLL for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * stride);
    DBRX_UNROLL for (int i = 0; i < 8; i += 2) {  // words 0 1 4 5 of a pair of rows, in turn; and 2 3 6 7
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    DBRX_UNROLL for (int i = 0; i < 8; i += 4) {  // word j of four rows, and word j + 4
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    DBRX_UNROLL for (int j = 0; j < 4; ++j) {
        _mm256_storeu_ps(to + j * to_stride, _mm256_permute2f128_ps(r[j], r[j + 4], 0x20));
        _mm256_storeu_ps(to + (j + 4) * to_stride, _mm256_permute2f128_ps(r[j], r[j + 4], 0x31));
    }
#else
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) std::memcpy(to + j * to_stride + i, from + i * stride + j, 4);
#endif
}

// Rows [PANEL][words], `stride` words from one to the next -> [words][PANEL]; words is a multiple of 8.
inline void interleave(const float *rows, int64_t stride, int64_t words, float *panel) {
    for (int o = 0; o < PANEL; o += 8)
        for (int64_t k = 0; k < words; k += 8) transpose_8(rows + o * stride + k, stride, panel + k * PANEL + o, PANEL);
}

// A panel of `count` outputs from `output` on: their steps, then their inputs piece by piece.
template <int format>
class Panel {
  public:
    using Format = Unpack<format>;
    using Dot = typename Format::Dot;
    using Element = typename Dot::Element;
    using Stored = typename Format::Stored;
    static constexpr int64_t INPUTS = PANEL_INPUT_BYTES / int64_t(sizeof(Element));  // of a piece: whole groups

    void open(const dbrx_matrix &matrix, int64_t output, int count) {
        matrix_ = &matrix, output_ = output, count_ = count;
        std::fill_n(step, PANEL, 0.0f);
        std::fill_n(inverse_, PANEL, 0.0f);
        std::fill_n(total, PANEL, 0);
        for (int o = 0; o < count; ++o) step[o] = is_transposed() ? 1 : Format::step(matrix, output + o);
        if constexpr (FLOATS && std::is_same_v<Dot, ShortDot>)
            if (is_transposed()) transposed_steps();
        for (int o = 0; o < count; ++o) inverse_[o] = 1 / step[o];
        std::memset(rows_, 0, sizeof rows_);  // outputs that are not there are zeros
    }

    // Inputs first .. first + INPUTS, or as many as there are: [words, PANEL]; gives the number of words.
    int64_t fill(int64_t first) {
        const int64_t inputs = std::min(INPUTS, matrix_->inputs - first);
        const int64_t words = (inputs + Dot::TOGETHER - 1) / Dot::TOGETHER;
        if constexpr (FLOATS)
            if (is_transposed()) return fill_transposed(first, inputs, words), words;
        for (int o = 0; o < count_; ++o) {
            Element *row = rows_[o];
            Format::row(*matrix_, output_ + o, first, inputs, inverse_[o], row);
            std::fill(row + inputs, row + std::min(INPUTS, (inputs + 31) / 32 * 32), Element(0));
            if constexpr (std::is_same_v<Dot, ByteDot>)
                for (int64_t i = 0; i < inputs; ++i) total[o] += row[i];
        }
        interleave((const float *)rows_, INPUTS / Dot::TOGETHER, (words + 7) / 8 * 8, (float *)words_);
        return words;
    }

    const char *words() const { return (const char *)words_; }
    float step[PANEL];      // what one of an output's weights, as it is multiplied, stands for
    int32_t total[PANEL];   // sums of an output's weights, of bytes only

  private:
    static constexpr bool FLOATS = format == DBRX_F32 || format == DBRX_BF16;  // which may be transposed
    bool is_transposed() const { return FLOATS && matrix_->transposed; }

    // Weights of one input, zeros behind the last output.
    void lanes_at(int64_t input, FloatLanes *out) const {
        Stored some[PANEL] = {};
        const Stored *from = (const Stored *)matrix_->values + input * matrix_->outputs + output_;
        if (count_ < PANEL) from = (const Stored *)std::memcpy(some, from, size_t(count_) * sizeof(Stored));
        DBRX_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) out[v] = lanes_of(from + v * TILE_LANES);
    }

    void transposed_steps() {
        FloatLanes sums[TILE_VECTORS] = {}, w[TILE_VECTORS];
        for (int64_t i = 0; i < matrix_->inputs; ++i) {
            lanes_at(i, w);
            DBRX_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) sums[v] = multiply_add(w[v], w[v], sums[v]);
        }
        for (int o = 0; o < count_; ++o) step[o] = std::max(std::sqrt(sums[o / TILE_LANES][o % TILE_LANES]), TINY) / NORM;
    }

    void fill_transposed(int64_t first, int64_t inputs, int64_t words) {
        for (int64_t s = 0; s < words; ++s) {
            FloatLanes a[TILE_VECTORS], b[TILE_VECTORS] = {};
            lanes_at(first + s * Dot::TOGETHER, a);
            if (Dot::TOGETHER == 2 && 2 * s + 1 < inputs) lanes_at(first + 2 * s + 1, b);
            DBRX_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) {
                WordLanes word = (WordLanes)a[v];
                if constexpr (std::is_same_v<Dot, ShortDot>) {
                    const FloatLanes inverse = load<FloatLanes>(inverse_ + v * TILE_LANES);
                    word = (nearest(a[v] * inverse) & 0xFFFF) | nearest(b[v] * inverse) << 16;
                } else if constexpr (std::is_same_v<Dot, HalfDot>) {
                    word = (((WordLanes)a[v] >> 16) & 0xFFFF) | (WordLanes)b[v];
                }
                store((int32_t *)words_ + s * PANEL + v * TILE_LANES, word);
            }
        }
    }

    const dbrx_matrix *matrix_;
    int64_t output_;
    int count_;
    float inverse_[PANEL];
    alignas(64) Element rows_[PANEL][INPUTS];
    alignas(64) Element words_[PANEL * INPUTS];
};

}  // namespace dbrx
