// ggml's types in blocks of 32 weights, as llama.cpp writes them: a scale of 16 bits, maybe a minimum, then the quantized weights.
//
// A type tells of a span of 256 inputs, here eight blocks, the scales of its groups. A weight is scale * (q - OFFSET); where that
// is 0, it is scale * q - minimum, and the type tells minima, too. `quantized` gives the 32 q of a chunk, without a sign, in the
// order of the inputs. Where q has one, there is neither offset nor minimum, and `signed_bytes` is where they lie. 4 bits a weight
// lie as nibbles: those of inputs 0 and 16 in the first byte.
#pragma once
#include "../dbrx.h"
#include "../simd.h"

namespace dbrx {

struct Q4_0 {
    static constexpr int FORMAT = DBRX_Q4_0, INPUTS = 32, BYTES = 18, GROUP = 32, OFFSET = 8;
    static DBRX_INLINE void scales(const uint8_t *span, Floats *scale, Floats *) { *scale = eight_halves(span, BYTES); }
    static DBRX_INLINE Bytes quantized(const uint8_t *span, int chunk) { return Bytes::nibbles(span + chunk * BYTES + 2); }
};

struct Q4_1 {
    static constexpr int FORMAT = DBRX_Q4_1, INPUTS = 32, BYTES = 20, GROUP = 32, OFFSET = 0;
    static DBRX_INLINE void scales(const uint8_t *span, Floats *scale, Floats *min) {
        *scale = eight_halves(span, BYTES), *min = eight_halves(span + 2, BYTES) * Floats::all(-1);
    }
    static DBRX_INLINE Bytes quantized(const uint8_t *span, int chunk) { return Bytes::nibbles(span + chunk * BYTES + 4); }
};

struct Q5_0 {  // the fifth bits lie apart, before the nibbles
    static constexpr int FORMAT = DBRX_Q5_0, INPUTS = 32, BYTES = 22, GROUP = 32, OFFSET = 16;
    static DBRX_INLINE void scales(const uint8_t *span, Floats *scale, Floats *) { *scale = eight_halves(span, BYTES); }
    static DBRX_INLINE Bytes quantized(const uint8_t *span, int chunk) {
        return Bytes::nibbles(span + chunk * BYTES + 6) | bits(Bytes::each_bit(span + chunk * BYTES + 2), -4, 16);
    }
};

struct Q5_1 {
    static constexpr int FORMAT = DBRX_Q5_1, INPUTS = 32, BYTES = 24, GROUP = 32, OFFSET = 0;
    static DBRX_INLINE void scales(const uint8_t *span, Floats *scale, Floats *min) {
        *scale = eight_halves(span, BYTES), *min = eight_halves(span + 2, BYTES) * Floats::all(-1);
    }
    static DBRX_INLINE Bytes quantized(const uint8_t *span, int chunk) { return Bytes::nibbles(span + chunk * BYTES + 8) | bits(Bytes::each_bit(span + chunk * BYTES + 4), -4, 16); }
};

struct Q8_0 {
    static constexpr int FORMAT = DBRX_Q8_0, INPUTS = 32, BYTES = 34, GROUP = 32, OFFSET = 0;
    static DBRX_INLINE void scales(const uint8_t *span, Floats *scale, Floats *) { *scale = eight_halves(span, BYTES); }
    static DBRX_INLINE const int8_t *signed_bytes(const uint8_t *span, int chunk) {
        return reinterpret_cast<const int8_t *>(span + chunk * BYTES + 2);
    }
};

// 4 bits that choose one of 16 levels, closer together near 128, which stands for zero.
constexpr uint8_t IQ4_VALUES[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

struct IQ4_NL {
    static constexpr int FORMAT = DBRX_IQ4_NL, INPUTS = 32, BYTES = 18, GROUP = 32, OFFSET = 128;
    static DBRX_INLINE void scales(const uint8_t *span, Floats *scale, Floats *) { *scale = eight_halves(span, BYTES); }
    static DBRX_INLINE Bytes quantized(const uint8_t *span, int chunk) { return look_up(IQ4_VALUES, Bytes::nibbles(span + chunk * BYTES + 2)); }
};

}  // namespace dbrx
