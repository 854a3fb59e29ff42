// ggml's types in blocks of 256 weights ("K-quants", IQ4_XS), as llama.cpp writes them: scales of groups in few bits, times
// one of 16 bits. See ggml_32.h for what a type tells; a span is one block. MOST: the largest weight times its group's whole scale.
#pragma once
#include "ggml_32.h"

namespace dbrx {

// Four numbers of a byte each, and eight.
inline uint32_t word(const uint8_t *at) {
    uint32_t value;
    std::memcpy(&value, at, 4);
    return value;
}
inline uint64_t words(uint32_t low, uint32_t high) { return uint64_t(high) << 32 | low; }
inline uint64_t eight(const uint8_t *at) { return words(word(at), word(at + 4)); }
constexpr uint32_t TWO_BITS = 0x03030303, FOUR_BITS = 0x0f0f0f0f, SIX_BITS = 0x3f3f3f3f;

// Scales of groups: whole numbers, times one of the block.
template <class Type>
DBRX_INLINE void group_scales(const uint8_t *block, Floats *out) {
    Type::whole_scales(block, out);
    for (int i = 0; i < Type::INPUTS / Type::GROUP / LANES; ++i) out[i] = Floats::all(Type::block_scale(block)) * out[i];
}

struct Q2_K {  // 16 bytes of scale and minimum in 4 bits each, 64 of weights, two scales of 16 bits
    static constexpr int FORMAT = DBRX_Q2_K, INPUTS = 256, BYTES = 84, GROUP = 16, OFFSET = 0, MOST = 3 * 15;
    static DBRX_INLINE float block_scale(const uint8_t *block) { return half(block + 80); }
    static DBRX_INLINE void whole_scales(const uint8_t *block, Floats *out) {
        for (int i = 0; i < 2; ++i) out[i] = eight_bytes(eight(block + 8 * i) & words(FOUR_BITS, FOUR_BITS));
    }
    static DBRX_INLINE void scales(const uint8_t *block, Floats *scale, Floats *min) {
        group_scales<Q2_K>(block, scale);
        for (int i = 0; i < 2; ++i) min[i] = Floats::all(half(block + 82)) * eight_bytes(eight(block + 8 * i) >> 4 & words(FOUR_BITS, FOUR_BITS));
    }
    static DBRX_INLINE Bytes quantized(const uint8_t *block, int chunk) {
        return bits(Bytes::load(block + 16 + chunk / 4 * 32), chunk % 4 * 2, 3);
    }
};

struct Q3_K {  // 32 bytes of third bits, 64 of two bits, 12 of scales in 6 bits, a scale of 16 bits
    static constexpr int FORMAT = DBRX_Q3_K, INPUTS = 256, BYTES = 110, GROUP = 16, OFFSET = 4, MOST = 4 * 32;
    static DBRX_INLINE float block_scale(const uint8_t *block) { return half(block + 108); }
    static DBRX_INLINE void whole_scales(const uint8_t *block, Floats *out) {
        const Floats middle = Floats::all(32);
        const uint32_t a = word(block + 96), b = word(block + 100), c = word(block + 104);
        const auto six_bits = [](uint32_t low, uint32_t high) { return (low & FOUR_BITS) | (high & TWO_BITS) << 4; };
        out[0] = eight_bytes(words(six_bits(a, c), six_bits(b, c >> 2))) - middle;
        out[1] = eight_bytes(words(six_bits(a >> 4, c >> 4), six_bits(b >> 4, c >> 6))) - middle;
    }
    static DBRX_INLINE void scales(const uint8_t *block, Floats *scale, Floats *) { group_scales<Q3_K>(block, scale); }
    static DBRX_INLINE Bytes quantized(const uint8_t *block, int chunk) {
        return bits(Bytes::load(block + 32 + chunk / 4 * 32), chunk % 4 * 2, 3) | bits(Bytes::load(block), chunk - 2, 4);
    }
};

struct Q4_K {  // two scales of 16 bits, 12 bytes of scales and minima, 128 of nibbles: two chunks in 32 bytes
    static constexpr int FORMAT = DBRX_Q4_K, INPUTS = 256, BYTES = 144, GROUP = 32, OFFSET = 0, MOST = 15 * 63;
    // Of 6 bits each: those of the first four groups are the lower six bits of bytes 0 to 3 and 4 to 7; of the others bytes 8
    // to 11 have four bits each, the upper two lie above the former.
    static DBRX_INLINE uint32_t upper(uint32_t low, uint32_t high) { return (low & FOUR_BITS) | (high >> 6 & TWO_BITS) << 4; }
    static DBRX_INLINE float block_scale(const uint8_t *block) { return half(block); }
    static DBRX_INLINE void whole_scales(const uint8_t *block, Floats *out) {
        const uint32_t a = word(block + 4), c = word(block + 12);
        *out = eight_bytes(words(a & SIX_BITS, upper(c, a)));
    }
    static DBRX_INLINE void scales(const uint8_t *block, Floats *scale, Floats *min) {
        group_scales<Q4_K>(block, scale);
        const uint32_t b = word(block + 8), c = word(block + 12);
        *min = Floats::all(half(block + 2)) * eight_bytes(words(b & SIX_BITS, upper(c >> 4, b)));
    }
    static DBRX_INLINE Bytes quantized(const uint8_t *block, int chunk) {
        return bits(Bytes::load(block + 16 + chunk / 2 * 32), chunk % 2 * 4, 15);
    }
};

struct Q5_K {  // the same, with 32 bytes of fifth bits before the nibbles
    static constexpr int FORMAT = DBRX_Q5_K, INPUTS = 256, BYTES = 176, GROUP = 32, OFFSET = 0, MOST = 31 * 63;
    static DBRX_INLINE float block_scale(const uint8_t *block) { return Q4_K::block_scale(block); }
    static DBRX_INLINE void whole_scales(const uint8_t *block, Floats *out) { Q4_K::whole_scales(block, out); }
    static DBRX_INLINE void scales(const uint8_t *block, Floats *scale, Floats *min) { Q4_K::scales(block, scale, min); }
    static DBRX_INLINE Bytes quantized(const uint8_t *block, int chunk) {
        return bits(Bytes::load(block + 48 + chunk / 2 * 32), chunk % 2 * 4, 15) | bits(Bytes::load(block + 16), chunk - 4, 16);
    }
};

struct Q6_K {  // 128 bytes of nibbles, 64 of upper two bits, 16 scales of 8 bits, a scale of 16 bits
    static constexpr int FORMAT = DBRX_Q6_K, INPUTS = 256, BYTES = 210, GROUP = 16, OFFSET = 32, MOST = 32 * 128;
    static DBRX_INLINE float block_scale(const uint8_t *block) { return half(block + 208); }
    static DBRX_INLINE void whole_scales(const uint8_t *block, Floats *out) {
        for (int i = 0; i < 2; ++i) out[i] = eight_signed(block + 192 + 8 * i);
    }
    static DBRX_INLINE void scales(const uint8_t *block, Floats *scale, Floats *) { group_scales<Q6_K>(block, scale); }
    static DBRX_INLINE Bytes quantized(const uint8_t *block, int chunk) {
        const int part = chunk / 4, at = chunk % 4;
        const Bytes low = bits(Bytes::load(block + part * 64 + at % 2 * 32), at / 2 * 4, 15);
        return low | bits(Bytes::load(block + 128 + part * 32), at * 2 - 4, 48);
    }
};

struct IQ4_XS {  // a scale of 16 bits, 6 bytes of scales in 6 bits: of eight the upper two bits, then the lower four
    static constexpr int FORMAT = DBRX_IQ4_XS, INPUTS = 256, BYTES = 136, GROUP = 32, OFFSET = 128, MOST = 127 * 32;
    static DBRX_INLINE float block_scale(const uint8_t *block) { return half(block); }
    static DBRX_INLINE void whole_scales(const uint8_t *block, Floats *out) {
        const Floats upper = eight_of(word(block) >> 16, 2) - Floats::all(2);
        *out = fma(upper, Floats::all(16), eight_of(word(block + 4), 4));
    }
    static DBRX_INLINE void scales(const uint8_t *block, Floats *scale, Floats *) { group_scales<IQ4_XS>(block, scale); }
    static DBRX_INLINE Bytes quantized(const uint8_t *block, int chunk) {
        return look_up(IQ4_VALUES, Bytes::nibbles(block + 8 + chunk * 16));
    }
};

}  // namespace dbrx
