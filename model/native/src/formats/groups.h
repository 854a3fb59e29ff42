// A few bits a weight with scale and offset for each group of inputs, as MLX, GPTQ and AWQ mean it: a weight is
// scale * q + offset, or scale * (q - offset) where offsets are zero points.
//
// An output's numbers q follow each other bit by bit, the first in the lowest bits. Of 2, 4 or 8 bits a chunk is 16 words of 16
// bits: shifted and cut they give 16 of them at a time, one of each word, and activations are kept in that order. Of 3, 5 or
// 6 bits eight of them lie in as many bytes as one has bits; each is cut out of the two bytes in which it lies.
//     4 bits: word 0 has inputs 0 to 3, word 15 inputs 60 to 63; so x is 0 4 8 .. 60, 1 5 9 .. 61, 2 6 10 .. 62, 3 7 11 .. 63
//     3 bits: input 5 has bits 15 to 17: the last of byte 1, and two of byte 2
#pragma once
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

template <int BITS>
struct GroupSpan {
    static constexpr bool IN_WORDS = 16 % BITS == 0;
    static constexpr int CHUNK = IN_WORDS ? 256 / BITS : 32, VECTORS = CHUNK / 16;
    static constexpr int64_t BYTES = SPAN * BITS / 8;
    static constexpr int PARTS = SPAN / 32, MINIMA = PARTS;  // of 32 inputs, the smallest group

    static int64_t groups(const dbrx_matrix &m) { return (m.inputs + m.group - 1) / m.group; }
    static int range_bytes(const dbrx_matrix &m) { return (m.ranges & DBRX_RANGES_F32) ? 4 : 2; }
    static int64_t row_bytes(const dbrx_matrix &m) { return m.inputs * BITS / 8 + 2 * groups(m) * range_bytes(m); }

    const uint8_t *row, *scales_of_row, *offsets_of_row, *at;
    int64_t inputs, groups_of_row;
    int each, times, nbytes;  // groups of a span; parts of a group; bytes of a scale
    bool from_zero, is_half;
    alignas(32) float scale[PARTS];
    Floats offset;
    uint8_t padded[BYTES];

    void begin(const dbrx_matrix &m, int64_t output) {
        inputs = m.inputs, groups_of_row = groups(m), each = SPAN / m.group, times = m.group / 32, nbytes = range_bytes(m);
        from_zero = m.ranges & DBRX_ZERO_POINTS, is_half = m.ranges & DBRX_RANGES_F16;
        row = static_cast<const uint8_t *>(m.values) + output * (inputs * BITS / 8);
        scales_of_row = static_cast<const uint8_t *>(m.scale) + output * groups_of_row * nbytes;
        offsets_of_row = static_cast<const uint8_t *>(m.zero) + output * groups_of_row * nbytes;
    }
    DBRX_INLINE void open(int64_t index) {
        at = row + index * BYTES;
        if (const int64_t left = inputs - index * SPAN; left < SPAN) {  // nothing may be read behind a matrix
            std::memset(padded, 0, sizeof padded);
            at = static_cast<const uint8_t *>(std::memcpy(padded, at, size_t(left * BITS / 8)));
        }
        ranges(scales_of_row, index).store(scale);
        offset = ranges(offsets_of_row, index);
    }
    DBRX_INLINE Floats minima() const { return offset * (from_zero ? Floats::load(scale) : Floats::all(-1)); }
    DBRX_INLINE Floats less(const SpanActivations &of) const { return minima() * Floats::load(of.less_of_32); }
    DBRX_INLINE void weights(int chunk, Shorts (&out)[VECTORS]) const {
        const uint8_t *from = at + chunk * (CHUNK * BITS / 8);
        for (int v = 0; v < VECTORS; ++v) {
            if constexpr (IN_WORDS) out[v] = cut(Shorts::load(from), v * BITS, BITS);
            else out[v] = sixteen_weights<BITS>(from + v * 2 * BITS, chunk >= PARTS / 2);
        }
    }
    // Of 4 bits a lane has two words, 8 inputs; so four lanes have a group of 32.
    DBRX_INLINE Floats scales(int chunk) const { return repeated<IN_WORDS ? BITS : LANES>(scale + chunk * CHUNK / 32); }
    static DBRX_INLINE Ints multiply(const Shorts (&weights)[VECTORS], const int16_t *x) { return multiply_pairs(weights, x); }
    static void order(int16_t *x) {
        for (int16_t *chunk = x; IN_WORDS && chunk < x + SPAN; chunk += CHUNK) {
            int16_t before[CHUNK];
            std::memcpy(before, chunk, sizeof before);
            for (int i = 0; i < CHUNK; ++i) chunk[i] = before[i % 16 * VECTORS + i / 16];
        }
    }

    void unpack(float *out) const {
        alignas(32) int16_t quantized[SPAN];
        float offsets[PARTS];
        in_order(quantized);
        offset.store(offsets);
        for (int part = 0; part < PARTS; ++part) {
            const float zero = from_zero ? offsets[part] : 0, more = from_zero ? 0 : offsets[part];
            for (int i = part * 32; i < (part + 1) * 32; ++i) out[i] = (float(quantized[i]) - zero) * scale[part] + more;
        }
    }
    void integers(int16_t *out, float *scales, float *to_minima) const {
        in_order(out);
        std::copy_n(scale, PARTS, scales);
        minima().store(to_minima);
    }

  private:
    void in_order(int16_t *out) const {
        if constexpr (IN_WORDS) {
            for (int byte = 0; byte < BYTES; ++byte)
                for (int k = 0; k < 8 / BITS; ++k) out[byte * (8 / BITS) + k] = int16_t(at[byte] >> k * BITS & ((1 << BITS) - 1));
        } else {
            for (int i = 0; i < SPAN; i += 16) sixteen_weights<BITS>(at + i * BITS / 8, i >= SPAN / 2).store(out + i);
        }
    }
    // Scales or offsets of a span, one for each 32 inputs.
    DBRX_INLINE Floats ranges(const uint8_t *from, int64_t index) const {
        from += index * each * nbytes;
        uint8_t last[4 * PARTS];
        if (const int64_t there = groups_of_row - index * each; there < each) {
            std::memset(last, 0, sizeof last);
            from = static_cast<const uint8_t *>(std::memcpy(last, from, size_t(there * nbytes)));
        }
        return spread(nbytes == 4 ? first_floats(from, each) : first_halves(from, each, is_half), times);
    }
};

// f(format) with the `Spans` of a matrix's bits.
template <class F>
auto with_groups(const dbrx_matrix &m, F f) {
    switch (m.format) {
        case DBRX_GROUPS_2: return f(Spans<GroupSpan<2>>{});
        case DBRX_GROUPS_3: return f(Spans<GroupSpan<3>>{});
        case DBRX_GROUPS_4: return f(Spans<GroupSpan<4>>{});
        case DBRX_GROUPS_5: return f(Spans<GroupSpan<5>>{});
        case DBRX_GROUPS_6: return f(Spans<GroupSpan<6>>{});
        default: return f(Spans<GroupSpan<8>>{});
    }
}

}  // namespace dbrx
