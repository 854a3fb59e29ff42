// Weights in ggml's blocks, as a GGUF file has them: of each group of 16 or 32 inputs scale * level - minimum.
//
// What a type is, ggml_32.h and ggml_256.h say; here is what is done with any of them. Blocks are read in spans of 256
// inputs, which is one block or eight. Activations are 16 bits wide with a scale for each span, so rounding errs by 1 in
// 40,000 (root mean square) of numbers that are alike. A sum of 32 products with levels up to 128 and activations up to
// 32,767 is below 2^27; it becomes a float before it meets its scale.
#pragma once
#include <cstddef>

#include "../activations.h"
#include "ggml_256.h"

namespace dbrx {

constexpr int SPAN = 256, CHUNK = 32, CHUNKS = SPAN / CHUNK;  // inputs

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

inline int64_t spans(int64_t inputs) { return (inputs + SPAN - 1) / SPAN; }

template <class Type>
struct Span {
    static constexpr int GROUPS = SPAN / Type::GROUP;
    static constexpr int64_t BYTES = SPAN / Type::INPUTS * Type::BYTES;

    const uint8_t *at;
    alignas(32) float scale[GROUPS];
    Floats min[GROUPS / LANES];
    uint8_t padded[BYTES];

    // Of a row that begins at `row`. One that ends inside a span goes through memory of its own, with blocks of zeros behind
    // its last: nothing may be read behind a matrix.
    DBRX_INLINE void open(const uint8_t *row, int64_t inputs, int64_t index) {
        at = row + index * BYTES;
        if (const int64_t left = inputs - index * SPAN; left < SPAN) {
            std::memset(padded, 0, sizeof padded);
            at = static_cast<const uint8_t *>(std::memcpy(padded, at, size_t(left / Type::INPUTS * Type::BYTES)));
        }
        Floats scales[GROUPS / LANES];
        Type::scales(at, scales, min);
        for (int g = 0; g < GROUPS; g += LANES) scales[g / LANES].store(scale + g);
    }
    DBRX_INLINE Bytes levels(int chunk) const { return Type::levels(at, chunk); }
    DBRX_INLINE Floats scales(int chunk) const {  // lane by lane of what `multiply_32` gives
        return Type::GROUP == CHUNK ? Floats::all(scale[chunk]) : halves(scale[2 * chunk], scale[2 * chunk + 1]);
    }
    // The weights themselves, as the gguf package and llama.cpp dequantize them, to the bit.
    DBRX_INLINE void unpack(float *out) const {
        alignas(32) uint8_t bytes[SPAN];
        float minima[GROUPS];
        for (int chunk = 0; chunk < CHUNKS; ++chunk) levels(chunk).store(bytes + chunk * CHUNK);
        if constexpr (Type::HAS_MIN)
            for (int g = 0; g < GROUPS; g += LANES) min[g / LANES].store(minima + g);
        for (int g = 0; g < GROUPS; ++g)
            for (int i = g * Type::GROUP; i < (g + 1) * Type::GROUP; ++i) {
                const float weight = scale[g] * float(Type::IS_SIGNED ? int8_t(bytes[i]) : bytes[i]);
                out[i] = Type::HAS_MIN ? weight - minima[g] : weight;
            }
    }
};

struct SpanActivations {  // zeros behind the last input
    int16_t x[SPAN];
    float less_of_32[SPAN / 32], less_of_16[SPAN / 16];  // minus the sums of x, for minima
    float scale;
    float unused[7];
};

// Activations, the same for all types, so that matrices of two types can share a row.
struct BlockRows {
    static int64_t prepared_bytes(int64_t inputs) { return spans(inputs) * int64_t(sizeof(SpanActivations)); }
    static void prepare(const float *x, int64_t inputs, std::byte *to) {
        SpanActivations *out = reinterpret_cast<SpanActivations *>(to);
        for (int64_t start = 0; start < inputs; start += SPAN, ++out) prepare_span(x + start, std::min<int64_t>(SPAN, inputs - start), *out);
    }

  private:
    static void prepare_span(const float *x, int64_t inputs, SpanActivations &out) {
        const float most = std::max(largest(x, inputs), 1e-30f);  // NaN stays, and makes the scale NaN
        const Floats inverse = Floats::all(32766 / most);
        int64_t i = 0;
        for (; i < inputs; i += LANES) store_rounded(load_up_to(x + i, inputs - i) * inverse, out.x + i);
        std::fill(out.x + i, out.x + SPAN, int16_t(0));
        for (int g = 0; g < SPAN / 16; ++g) {
            int32_t total = 0;
            for (int j = 0; j < 16; ++j) total += out.x[16 * g + j];
            out.less_of_16[g] = float(-total);
        }
        for (int g = 0; g < SPAN / 32; ++g) out.less_of_32[g] = out.less_of_16[2 * g] + out.less_of_16[2 * g + 1];
        out.scale = most / 32766;
        if (EVEN_FIRST) even_first(out.x, SPAN, CHUNK);
    }
};

template <class Type>
struct Blocks : BlockRows {
    static constexpr int AT_ONCE = 2;  // outputs whose products share a loop: with four, scales leave no registers
    static int64_t row_bytes(const dbrx_matrix &m) { return m.inputs / Type::INPUTS * Type::BYTES; }

    static void unpack(const dbrx_matrix &m, int64_t output, float *to) {
        Span<Type> span;
        float weights[SPAN];
        for (int64_t s = 0; s < spans(m.inputs); ++s) {
            span.open(static_cast<const uint8_t *>(m.values) + output * row_bytes(m), m.inputs, s);
            span.unpack(weights);
            std::copy_n(weights, std::min<int64_t>(SPAN, m.inputs - s * SPAN), to + s * SPAN);
        }
    }

    template <int W, int R>
    static void dot(const dbrx_matrix &m, const int64_t (&outputs)[W], const std::byte *const *x, float (&y)[W][R]) {
        Floats sums[W][R];
        const uint8_t *rows[W];
        for (int w = 0; w < W; ++w) {
            rows[w] = static_cast<const uint8_t *>(m.values) + outputs[w] * row_bytes(m);
            for (Floats &one : sums[w]) one = Floats::all(0);
        }
        for (int64_t s = 0; s < spans(m.inputs); ++s) add<W, R>(rows, m.inputs, x, s, sums);
        for (int w = 0; w < W; ++w)
            for (int r = 0; r < R; ++r) y[w][r] = sum(sums[w][r]);
    }

  private:
    template <int W, int R>
    static DBRX_INLINE void add(const uint8_t *const (&rows)[W], int64_t inputs, const std::byte *const *x, int64_t index,
                                Floats (&sums)[W][R]) {
        const SpanActivations *of[R];
        for (int r = 0; r < R; ++r) of[r] = reinterpret_cast<const SpanActivations *>(x[r]) + index;
        Span<Type> span[W];
        Floats found[W][R];
        for (int w = 0; w < W; ++w) {
            span[w].open(rows[w], inputs, index);
            for (int64_t line = 0; line < Span<Type>::BYTES; line += 64) read_ahead(span[w].at + line);
            for (int r = 0; r < R; ++r) {
                const float *less = Type::GROUP == 32 ? of[r]->less_of_32 : of[r]->less_of_16;
                found[w][r] = Floats::all(0);
                if constexpr (Type::HAS_MIN)
                    for (int g = 0; g < Span<Type>::GROUPS; g += LANES)
                        found[w][r] = fma(span[w].min[g / LANES], Floats::load(less + g), found[w][r]);
            }
        }
#pragma GCC unroll 8
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
            for (int w = 0; w < W; ++w) {
                Shorts weights[2];
                split(span[w].levels(chunk), Type::IS_SIGNED, weights);
                const Floats scale = span[w].scales(chunk);
                for (int r = 0; r < R; ++r)
                    found[w][r] = fma(to_floats(multiply_32(weights, of[r]->x + chunk * CHUNK)), scale, found[w][r]);
            }
        for (int w = 0; w < W; ++w)
            for (int r = 0; r < R; ++r) sums[w][r] = fma(found[w][r], Floats::all(of[r]->scale), sums[w][r]);
    }
};

}  // namespace dbrx
