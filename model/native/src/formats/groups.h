// A few bits a weight with scale and offset for each group of inputs, as MLX, GPTQ and AWQ mean it: a weight is
// scale * q + offset, or scale * (q - offset) where offsets are zero points.
//
// An output's numbers q follow each other bit by bit, the first in the lowest bits: of 3, 5 or 6 bits eight of them lie in as many
// bytes as one has bits, and each is cut out of the two bytes in which it lies.
//     3 bits: input 5 has bits 15 to 17: the last of byte 1, and two of byte 2
#pragma once
#include <array>
#include <bit>

#include "spans.h"

namespace dbrx {

// Of 16 weights: the two bytes in which each lies, 255 for none, the first `before` bytes being passed over; and what moves its
// bits to the upper end of these.
template <int BITS>
struct BitPlaces {
    alignas(32) uint8_t bytes[32] = {};
    alignas(32) int16_t shift[16] = {}, factor[16] = {};
    constexpr explicit BitPlaces(int before) {
        for (int i = 0; i < 16; ++i) {
            const int first = before + i * BITS / 8;
            bytes[2 * i] = uint8_t(first), bytes[2 * i + 1] = uint8_t(first + 1 < 16 ? first + 1 : 255);
            shift[i] = int16_t(16 - BITS - i * BITS % 8), factor[i] = int16_t(1 << shift[i]);
        }
    }
};

// 16 weights of 3, 5 or 6 bits. late: bytes before them may be read, else those behind.
template <int BITS>
DBRX_INLINE Shorts sixteen_weights(const uint8_t *at, bool late) {
    constexpr int BYTES = 2 * BITS;
#if defined(__AVX2__) || defined(__ARM_NEON)
    static constexpr BitPlaces<BITS> EARLY{0}, LATE{16 - BYTES};
    const BitPlaces<BITS> &places = late ? LATE : EARLY;
    at -= late ? 16 - BYTES : 0;
#endif
#if defined(__AVX2__)
    const auto load = [](const void *from) { return _mm256_load_si256(static_cast<const __m256i *>(from)); };
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
    const __m256i words = _mm256_shuffle_epi8(twice, load(places.bytes));
    return {_mm256_srli_epi16(_mm256_mullo_epi16(words, load(places.factor)), 16 - BITS)};
#elif defined(__ARM_NEON)
    const uint8x16_t all = vld1q_u8(at);
    const auto half = [&](int i) {
        const uint16x8_t words = vreinterpretq_u16_u8(vqtbl1q_u8(all, vld1q_u8(places.bytes + 2 * i)));
        return vreinterpretq_s16_u16(vshrq_n_u16(vshlq_u16(words, vld1q_s16(places.shift + i)), 16 - BITS));
    };
    return {half(0), half(8)};
#else
    (void)late;
    int16_t found[16];
    for (int i = 0; i < 16; ++i) {
        const int first = i * BITS / 8, next = std::min(first + 1, BYTES - 1);
        found[i] = int16_t((at[first] | at[next] << 8) >> i * BITS % 8 & ((1 << BITS) - 1));
    }
    return Shorts::load(found);
#endif
}

// Products of N times 32 weights up to 15 with activations of 16 bits, x = 256 * upper + lower: of all the upper bytes come first,
// then the lower ones, from -128 to 127. Lane i sums those of bytes 4 i to 4 i + 3 of each 32.
template <int N>
DBRX_INLINE Ints multiply_halves(const Bytes (&w)[N], const int8_t *x) {
#if defined(__AVX2__)
    const auto sums = [&](const int8_t *from, int factor) {
        const auto at = [=](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from) + i); };
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        __m256i words = _mm256_setzero_si256();
        for (int i = 0; i < N; ++i) words = _mm256_dpbusd_epi32(words, w[i].v, at(i));
        return factor == 256 ? _mm256_slli_epi32(words, 8) : words;
#else
        static_assert(N <= 4);  // 16 bits hold 2 N products: 8 * 15 * -128 is -15,360
        __m256i shorts = _mm256_maddubs_epi16(w[0].v, at(0));
        for (int i = 1; i < N; ++i) shorts = _mm256_add_epi16(shorts, _mm256_maddubs_epi16(w[i].v, at(i)));
        return _mm256_madd_epi16(shorts, _mm256_set1_epi16(short(factor)));
#endif
    };
    return {_mm256_add_epi32(sums(x, 256), sums(x + 32 * N, 1))};
#elif defined(__ARM_FEATURE_DOTPROD)
    const auto half = [&](const uint8x16_t Bytes::*part, const int8_t *from) {
        int32x4_t upper = vdupq_n_s32(0), lower = upper;
        for (int i = 0; i < N; ++i) {
            const int8x16_t weights = vreinterpretq_s8_u8(w[i].*part);
            upper = vdotq_s32(upper, weights, vld1q_s8(from + 32 * i));
            lower = vdotq_s32(lower, weights, vld1q_s8(from + 32 * (N + i)));
        }
        return vaddq_s32(vshlq_n_s32(upper, 8), lower);
    };
    return {half(&Bytes::lo, x), half(&Bytes::hi, x + 16)};
#else
    std::array<int32_t, LANES> sums{};
    for (int i = 0; i < N; ++i) {
        uint8_t bytes[32];
        w[i].store(bytes);
        for (int j = 0; j < 32; ++j) sums[j / 4] += bytes[j] * (256 * x[32 * i + j] + x[32 * (N + i) + j]);
    }
    return std::bit_cast<Ints>(sums);
#endif
}

// Scales or offsets of a matrix.
struct Ranges {
    const uint8_t *values;
    int64_t groups, all;  // of an output, of the matrix
    int64_t bytes;        // of one
    bool is_half;

    static int64_t groups_of(const dbrx_matrix &m) { return (m.inputs + m.group - 1) >> std::countr_zero(uint32_t(m.group)); }
    static int bytes_of(const dbrx_matrix &m) { return (m.ranges & DBRX_RANGES_F32) ? 4 : 2; }

    Ranges(const dbrx_matrix &m, const void *from)
        : values(static_cast<const uint8_t *>(from)), groups(groups_of(m)), all(m.outputs * groups), bytes(bytes_of(m)),
          is_half(m.ranges & DBRX_RANGES_F16) {}

    // Of eight groups of an output from `first` on; zeros behind its last one.
    DBRX_INLINE Floats eight(int64_t output, int64_t first) const {
        const int64_t place = output * groups + first;
        read_ahead(values + place * bytes);
        return groups - first >= LANES ? load(values + place * bytes) : last(place, groups - first);
    }

  private:
    DBRX_INLINE Floats load(const uint8_t *at) const {
        return bytes == 4 ? Floats::load(reinterpret_cast<const float *>(at)) : eight_of_16_bits(at, is_half);
    }
    __attribute__((noinline)) Floats last(int64_t place, int64_t count) const {
        const uint8_t *at = values + place * bytes;
        uint8_t padded[4 * LANES];
        if (all - place < LANES) {  // nothing may be read behind a matrix
            std::memset(padded, 0, sizeof padded);
            at = static_cast<const uint8_t *>(std::memcpy(padded, at, size_t((all - place) * bytes)));
        }
        static constexpr float lanes[LANES] = {0, 1, 2, 3, 4, 5, 6, 7};
        return where_less(Floats::load(lanes), Floats::all(float(count)), load(at), Floats::all(0));
    }
};

// The 256 weights of a span of an output, behind its last input zeros.
template <int BITS>
struct GroupSpan {
    static constexpr int64_t BYTES = SPAN * BITS / 8;
    static constexpr int PARTS = SPAN / 32, MINIMA = PARTS;  // of 32 inputs, the smallest group
    static constexpr int MOST = (1 << BITS) - 1;

    static int64_t row_bytes(const dbrx_matrix &m) {
        return m.inputs * BITS / 8 + 2 * Ranges::groups_of(m) * Ranges::bytes_of(m);
    }
    static const uint8_t *row(const dbrx_matrix &m, int64_t output) {
        return static_cast<const uint8_t *>(m.values) + output * (m.inputs * BITS / 8);
    }
    // The weights at a place where so many inputs are left; in memory of their own if it is no whole span, since nothing may be
    // read behind a matrix.
    static DBRX_INLINE const uint8_t *whole(const uint8_t *at, int64_t inputs, uint8_t (&padded)[BYTES]) {
        if (inputs >= SPAN) return at;
        std::memset(padded, 0, sizeof padded);
        return static_cast<const uint8_t *>(std::memcpy(padded, at, size_t(inputs * BITS / 8)));
    }

    const dbrx_matrix *matrix;
    int64_t output;
    const uint8_t *at;
    Floats scale, offset;  // of each 32 inputs
    uint8_t padded[BYTES];

    void begin(const dbrx_matrix &m, int64_t of) { matrix = &m, output = of; }
    void open(int64_t index) {
        at = whole(row(*matrix, output) + index * BYTES, matrix->inputs - index * SPAN, padded);
        const auto of_parts = [&](const void *from) {
            return spread(Ranges(*matrix, from).eight(output, index * SPAN / matrix->group), matrix->group / 32);
        };
        scale = of_parts(matrix->scale), offset = of_parts(matrix->zero);
    }
    void unpack(float *out) const {
        alignas(32) int16_t quantized[SPAN];
        float scales[PARTS], offsets[PARTS];
        in_order(quantized);
        scale.store(scales), offset.store(offsets);
        const bool from_zero = matrix->ranges & DBRX_ZERO_POINTS;
        for (int part = 0; part < PARTS; ++part) {
            const float zero = from_zero ? offsets[part] : 0, more = from_zero ? 0 : offsets[part];
            for (int i = part * 32; i < (part + 1) * 32; ++i) out[i] = (float(quantized[i]) - zero) * scales[part] + more;
        }
    }
    void integers(int16_t *out, float *scales, float *minima) const {
        in_order(out);
        scale.store(scales);
        (offset * (matrix->ranges & DBRX_ZERO_POINTS ? scale : Floats::all(-1))).store(minima);
    }
    int parts() const { return SPAN / int(std::min<int64_t>(SPAN, matrix->group)); }  // of a span, that have one scale each

  private:
    void in_order(int16_t *out) const {
        if constexpr (8 % BITS == 0) {
            for (int byte = 0; byte < BYTES; ++byte)
                for (int k = 0; k < 8 / BITS; ++k) out[byte * (8 / BITS) + k] = int16_t(at[byte] >> k * BITS & ((1 << BITS) - 1));
        } else {
            for (int i = 0; i < SPAN; i += 16) sixteen_weights<BITS>(at + i * BITS / 8, i >= SPAN / 2).store(out + i);
        }
    }
};

// How weights come apart for products, a chunk at a time, and in which order activations wait for them.
template <int BITS>
struct Words {
    static constexpr int CHUNK = 32, QMAX = 32766;  // inputs; the largest activation
    Shorts weights[2];

    DBRX_INLINE Words(const uint8_t *span, int chunk) {
        const uint8_t *at = span + chunk * CHUNK * BITS / 8;
        if constexpr (BITS == 8) split(Bytes::load(at), weights);
        else for (int i = 0; i < 2; ++i) weights[i] = sixteen_weights<BITS>(at + i * 2 * BITS, chunk * CHUNK >= SPAN / 2);
    }
    DBRX_INLINE Ints times(const int16_t *x) const { return multiply_32(weights, x); }
    static void order(int16_t *x) {
        if (BITS == 8 && EVEN_FIRST) even_first(x, SPAN, CHUNK);
    }
};

// 2 or 4 bits: 32 bytes, shifted and cut, give 32 weights at a time, one of each byte.
//     4 bits: byte 0 has inputs 0 and 1, byte 31 inputs 62 and 63; so x is 0 2 4 .. 62, then 1 3 5 .. 63
template <int BITS>
struct Parts {
    static constexpr int EACH = 8 / BITS, CHUNK = 32 * EACH, QMAX = 127 * 256 + 127;
    Bytes weights[EACH];

    DBRX_INLINE Parts(const uint8_t *span, int chunk) {
        const Bytes bytes = Bytes::load(span + 32 * chunk);
        for (int k = 0; k < EACH; ++k) weights[k] = bits(bytes, k * BITS, (1 << BITS) - 1);
    }
    DBRX_INLINE Ints times(const int16_t *x) const { return multiply_halves(weights, reinterpret_cast<const int8_t *>(x)); }
    static void order(int16_t *x) {
        for (int16_t *chunk = x; chunk < x + SPAN; chunk += CHUNK) {
            int8_t halves[2][EACH][32];
            for (int k = 0; k < EACH; ++k)
                for (int j = 0; j < 32; ++j) {
                    const int whole = chunk[EACH * j + k], upper = (whole + 128) >> 8;
                    halves[0][k][j] = int8_t(upper), halves[1][k][j] = int8_t(whole - 256 * upper);
                }
            std::memcpy(chunk, halves, sizeof halves);
        }
    }
};

// Products of few rows. Of eight groups of an output at a time scales become floats, and offsets meet what the activations of
// these groups add up to.
template <int BITS>
struct Groups : Spans<GroupSpan<BITS>> {
    static constexpr int AT_ONCE = 4;  // outputs whose products with several rows share a loop

    // A row: its spans, then the sums of groups of 32, 64 and 128 inputs: eight, four and two a span, and zeros up to four
    // whole spans, so that sums of eight can be read everywhere.
    static int64_t prepared_bytes(int64_t inputs) {
        return SpanRows::prepared_bytes(inputs) + 14 * in_fours(inputs) * int64_t(sizeof(float));
    }
    static void prepare(const float *x, int64_t inputs, std::byte *to) {
        SpanActivations *of = reinterpret_cast<SpanActivations *>(to);
        float *sums = reinterpret_cast<float *>(of + spans(inputs));
        std::fill(sums, sums + 14 * in_fours(inputs), 0.0f);
        for (int64_t s = 0; s < spans(inputs); ++s) {
            SpanRows::prepare_span(x + s * SPAN, std::min<int64_t>(SPAN, inputs - s * SPAN), Chunk::QMAX, of[s]);
            Chunk::order(of[s].x);
            for (int part = 0; part < 8; ++part) sums[8 * s + part] = -of[s].less_of_32[part] * of[s].scale;
        }
        for (int64_t count = 8 * in_fours(inputs), turn = 0; turn < 2; ++turn, sums += count, count /= 2)
            for (int64_t i = 0; i < count; i += 2) sums[count + i / 2] = sums[i] + sums[i + 1];
    }

    template <int W, int R>
    static void dot(const dbrx_matrix &m, const int64_t (&outputs)[W], const std::byte *const *x, float (&y)[W][R]) {
        if constexpr (Chunk::CHUNK > 64)
            if (m.group == 64) return multiply<Chunk::CHUNK / 64>(m, outputs, x, y);
        if constexpr (Chunk::CHUNK > 32)
            if (m.group == 32) return multiply<Chunk::CHUNK / 32>(m, outputs, x, y);
        multiply<1>(m, outputs, x, y);
    }

  private:
    using Chunk = std::conditional_t<BITS == 2 || BITS == 4, Parts<BITS>, Words<BITS>>;
    using Span = GroupSpan<BITS>;

    static int64_t in_fours(int64_t inputs) { return (spans(inputs) + 3) / 4 * 4; }

    // EACH: groups of a chunk, 1 where one has a chunk or several.
    template <int EACH, int W, int R>
    static void multiply(const dbrx_matrix &m, const int64_t (&outputs)[W], const std::byte *const *x, float (&y)[W][R]) {
        const Ranges scales(m, m.scale), offsets(m, m.zero);
        const bool from_zero = m.ranges & DBRX_ZERO_POINTS;
        const int shift = std::countr_zero(uint32_t(m.group));
        const int64_t all = spans(m.inputs), step = m.group / 32;  // spans, of which so many have eight groups
        const SpanActivations *of[R];
        const float *sums_of_x[R];
        for (int r = 0; r < R; ++r) {
            of[r] = reinterpret_cast<const SpanActivations *>(x[r]);
            sums_of_x[r] = reinterpret_cast<const float *>(of[r] + all) + in_fours(m.inputs) * (16 - (512 >> shift));
        }
        const uint8_t *row[W];
        Floats sums[W][R];
        float scale[W][LANES];
        uint8_t padded[W][Span::BYTES];
        for_outputs<W, R>([&](int w) {
            row[w] = Span::row(m, outputs[w]);
            for (Floats &one : sums[w]) one = Floats::all(0);
        });
        for (int64_t first = 0, group = 0; first < all; first += step, group += LANES) {
            for_outputs<W, R>([&](int w) {
                const Floats each = scales.eight(outputs[w], group), stored = offsets.eight(outputs[w], group);
                const Floats offset = from_zero ? stored * each * Floats::all(-1) : stored;
                for (int r = 0; r < R; ++r) sums[w][r] = fma(offset, Floats::load(sums_of_x[r] + group), sums[w][r]);
                each.store(scale[w]);
            });
            for (int64_t s = first; s < std::min(first + step, all); ++s) {
                if (m.inputs - s * SPAN < SPAN)
                    for (int w = 0; w < W; ++w) row[w] = Span::whole(row[w], m.inputs - s * SPAN, padded[w]);
                for_outputs<W, R>([&](int w) {
                    add<EACH, R>(row[w], scale[w] + ((s - first) * SPAN >> shift), shift, of, s, sums[w]);
                    row[w] += Span::BYTES;
                });
            }
        }
        for_outputs<W, R>([&](int w) {
            for (int r = 0; r < R; ++r) y[w][r] = sum(sums[w][r]);
        });
    }

    template <int EACH, int R>
    static DBRX_INLINE void add(const uint8_t *at, const float *scales, int shift, const SpanActivations *const (&of)[R],
                                int64_t index, Floats (&sums)[R]) {
        Floats found[R];
        for (Floats &one : found) one = Floats::all(0);
        for (int64_t line = 0; line < Span::BYTES; line += 64) read_ahead(at + line);
#pragma GCC unroll 8
        for (int chunk = 0; chunk < SPAN / Chunk::CHUNK; ++chunk) {
            const Chunk weights(at, chunk);
            const Floats scale = repeated<LANES / EACH>(scales + (chunk * Chunk::CHUNK >> shift));
            for (int r = 0; r < R; ++r)
                found[r] = fma(to_floats(weights.times(of[r][index].x + chunk * Chunk::CHUNK)), scale, found[r]);
        }
        for (int r = 0; r < R; ++r) sums[r] = fma(found[r], Floats::all(of[r][index].scale), sums[r]);
    }
};

// f(format) with the `Groups` of a matrix's bits.
template <class F>
auto with_groups(const dbrx_matrix &m, F f) {
    switch (m.format) {
        case DBRX_GROUPS_2: return f(Groups<2>{});
        case DBRX_GROUPS_3: return f(Groups<3>{});
        case DBRX_GROUPS_4: return f(Groups<4>{});
        case DBRX_GROUPS_5: return f(Groups<5>{});
        case DBRX_GROUPS_6: return f(Groups<6>{});
        default: return f(Groups<8>{});
    }
}

}  // namespace dbrx
