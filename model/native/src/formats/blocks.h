// Weights in ggml's blocks, as a GGUF file has them: of each group of 16 or 32 inputs scale * q - minimum.
//
// What a type is, ggml_32.h and ggml_256.h say; here is how a span of any of them is read, which is one block or eight.
#pragma once
#include "ggml_256.h"
#include "spans.h"

namespace dbrx {

// f(type) with the struct of a matrix's type of blocks; the last is taken for all that is none of the others.
template <class F, class Type, class... Others>
auto with_one_of(const dbrx_matrix &m, F f) {
    if constexpr (sizeof...(Others) > 0)
        if (m.format != Type::FORMAT) return with_one_of<F, Others...>(m, f);
    return f(Type{});
}
template <class F>
auto with_blocks(const dbrx_matrix &m, F f) {
    return with_one_of<F, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS>(m, f);
}

template <class Type>
struct BlockSpan {
    static constexpr bool SIGNED = requires { Type::signed_bytes; };
    static constexpr int CHUNK = 32, GROUPS = SPAN / Type::GROUP, MINIMA = Type::OFFSET || SIGNED ? 0 : GROUPS;
    static constexpr bool WHOLE = Type::INPUTS == SPAN;  // see `integers`, of which none is larger than MOST
    static constexpr int MOST = [] {
        if constexpr (WHOLE) return Type::MOST;
        else return 128;
    }();
    static constexpr int64_t BYTES = SPAN / Type::INPUTS * Type::BYTES;
    static int64_t row_bytes(const dbrx_matrix &m) { return m.inputs / Type::INPUTS * Type::BYTES; }

    const uint8_t *row, *at;
    int64_t inputs;
    Floats scale[GROUPS / LANES];
    LaneScales lanes;
    Floats min[GROUPS / LANES];  // or scale * OFFSET
    uint8_t padded[BYTES];

    void begin(const dbrx_matrix &m, int64_t output) {
        row = static_cast<const uint8_t *>(m.values) + output * row_bytes(m);
        inputs = m.inputs;
    }
    // One that ends inside a span goes through memory of its own, with blocks of zeros behind its last: nothing may be read
    // behind a matrix.
    DBRX_INLINE void open(int64_t index) {
        at = row + index * BYTES;
        if (const int64_t left = inputs - index * SPAN; left < SPAN) {
            std::memset(padded, 0, sizeof padded);
            at = static_cast<const uint8_t *>(std::memcpy(padded, at, size_t(left / Type::INPUTS * Type::BYTES)));
        }
        Type::scales(at, scale, min);
        if (Type::OFFSET)
            for (int g = 0; g < GROUPS / LANES; ++g) min[g] = scale[g] * Floats::all(Type::OFFSET);
        lanes = LaneScales::of(scale);
    }
    DBRX_INLINE Floats less(const SpanActivations &of) const {
        Floats found = Floats::all(0);
        for (int g = 0; g < GROUPS && !SIGNED; g += LANES)
            found = fma(min[g / LANES], Floats::load((Type::GROUP == 32 ? of.less_of_32 : of.less_of_16) + g), found);
        return found;
    }
    DBRX_INLINE void weights(int chunk, Shorts (&out)[2]) const {
        if constexpr (SIGNED) load_weights(Type::signed_bytes(at, chunk), out);
        else split(Type::quantized(at, chunk), out);
    }
    DBRX_INLINE Floats scales(int chunk) const { return lanes.at(chunk); }
    static DBRX_INLINE Ints multiply(const Shorts (&weights)[2], const int16_t *x) { return multiply_32(weights, x); }
    static void order(int16_t *x) {
        if (EVEN_FIRST && !SIGNED) even_first(x, SPAN, CHUNK);
    }

    void unpack(float *out) const {
        alignas(32) int8_t bytes[SPAN];
        float scales[GROUPS], minima[GROUPS];
        quantized(bytes);
        for (int g = 0; g < GROUPS; g += LANES) scale[g / LANES].store(scales + g);
        for (int g = 0; g < GROUPS; g += LANES) min[g / LANES].store(minima + g);
        for (int g = 0; g < GROUPS; ++g)
            for (int i = g * Type::GROUP; i < (g + 1) * Type::GROUP; ++i) {
                const float weight = scales[g] * float(bytes[i]);
                out[i] = MINIMA ? weight - minima[g] : weight;
            }
    }
    // Weights as whole numbers, a scale for each 32 of them, and what is taken off each group. Groups' scales that are whole numbers
    // times one of the block go into the weights.
    void integers(int16_t *out, float *scales, float *minima) const {
        alignas(32) int8_t bytes[SPAN];
        quantized(bytes);
        if constexpr (WHOLE) {
            Floats whole[GROUPS / LANES];
            alignas(32) int16_t factors[GROUPS];
            Type::whole_scales(at, whole);
            for (int g = 0; g < GROUPS; g += LANES) store_rounded(whole[g / LANES], factors + g);
            for (int i = 0; i < SPAN; i += 16) (Shorts::widen(bytes + i) * Shorts::all(factors[i / Type::GROUP])).store(out + i);
            std::fill_n(scales, SPAN / 32, Type::block_scale(at));
        } else {
            for (int i = 0; i < SPAN; i += 16) Shorts::widen(bytes + i).store(out + i);
            scale[0].store(scales);
        }
        for (int g = 0; g < MINIMA; g += LANES) min[g / LANES].store(minima + g);
    }
    static int parts() { return WHOLE ? 1 : GROUPS; }  // of a span, that have one of these scales each

  private:
    void quantized(int8_t *out) const {
        for (int chunk = 0; chunk < SPAN / CHUNK; ++chunk)
            if constexpr (SIGNED) std::memcpy(out + chunk * CHUNK, Type::signed_bytes(at, chunk), CHUNK);
            else (Type::quantized(at, chunk) - Bytes::all(Type::OFFSET)).store(reinterpret_cast<uint8_t *>(out) + chunk * CHUNK);
    }
};

}  // namespace dbrx
