// What formats share that are read in spans of 256 inputs, with weights of 8 bits at most and activations of 16: ggml's
// blocks (blocks.h), and the groups of MLX, GPTQ and AWQ (groups.h).
//
// Activations have a scale for each span, so rounding errs by 1 in 40,000 (root mean square) of numbers that are alike. A
// sum of 128 products with numbers up to 255 and activations up to 32,767 is below 2^31; it becomes a float before it meets
// its scale.
#pragma once
#include <cstddef>

#include "../activations.h"

namespace dbrx {

constexpr int SPAN = 256;  // inputs

inline int64_t spans(int64_t inputs) { return (inputs + SPAN - 1) / SPAN; }

struct SpanActivations {  // zeros behind the last input
    int16_t x[SPAN];      // in the order in which a format's weights come apart
    float less_of_32[SPAN / 32], less_of_16[SPAN / 16];  // minus the sums of x, for minima
    float scale;
    float unused[7];
};

// Activations, the same for all formats but for their order.
struct SpanRows {
    static int64_t prepared_bytes(int64_t inputs) { return spans(inputs) * int64_t(sizeof(SpanActivations)); }
    // In integers of a magnitude up to qmax, which stands for the largest x, or for `least` where that is more.
    static void prepare_span(const float *x, int64_t inputs, int qmax, SpanActivations &out, float least = 0) {
        const float most = std::max(largest(x, inputs), std::max(least, 1e-30f));  // NaN stays, and makes the scale NaN
        const Floats inverse = Floats::all(float(qmax) / most);
        int64_t i = 0;
        for (; i < inputs; i += LANES) store_rounded(load_up_to(x + i, inputs - i) * inverse, out.x + i);
        std::fill(out.x + i, out.x + SPAN, int16_t(0));
        for (int g = 0; g < SPAN / 16; ++g) {
            int32_t total = 0;
            for (int j = 0; j < 16; ++j) total += out.x[16 * g + j];
            out.less_of_16[g] = float(-total);
        }
        for (int g = 0; g < SPAN / 32; ++g) out.less_of_32[g] = out.less_of_16[2 * g] + out.less_of_16[2 * g + 1];
        out.scale = most / float(qmax);
    }
};

// f(w) for outputs side by side. Of a row alone sums stay in registers so, which is a twelfth faster; of more rows there are too
// few of these.
template <int W, int R, class F>
DBRX_INLINE void for_outputs(F f) {
    if constexpr (R == 1) {
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) f(w);
    } else {
        for (int w = 0; w < W; ++w) f(w);
    }
}

// Span: `begin` an output, `open` one of its spans after the other; then, chunk by chunk, its `weights` as Shorts, to `multiply`
// with as many activations, and the `scales` of the lanes that this gives. `less` is what minima add up to; `unpack` gives the
// weights themselves, `integers` what products of many rows take (gemm_spans.h).
template <class Span>
struct Spans : SpanRows {
    using SpanType = Span;
    static constexpr int AT_ONCE = 2;  // outputs whose products with several rows share a loop: with four, scales leave no registers
    static constexpr int QMAX = 32766;
    static int64_t row_bytes(const dbrx_matrix &m) { return Span::row_bytes(m); }

    static void prepare(const float *x, int64_t inputs, std::byte *to) {
        SpanActivations *out = reinterpret_cast<SpanActivations *>(to);
        for (int64_t start = 0; start < inputs; start += SPAN, ++out) {
            prepare_span(x + start, std::min<int64_t>(SPAN, inputs - start), QMAX, *out);
            Span::order(out->x);
        }
    }

    // An output's weights, as the programs dequantize them that made the file, to the bit.
    static void unpack(const dbrx_matrix &m, int64_t output, float *to) {
        Span span;
        float weights[SPAN];
        span.begin(m, output);
        for (int64_t s = 0; s < spans(m.inputs); ++s) {
            span.open(s);
            span.unpack(weights);
            std::copy_n(weights, std::min<int64_t>(SPAN, m.inputs - s * SPAN), to + s * SPAN);
        }
    }

    template <int W, int R>
    static void dot(const dbrx_matrix &m, const int64_t (&outputs)[W], const std::byte *const *x, float (&y)[W][R]) {
        Floats sums[W][R];
        Span of[W];
        for_outputs<W, R>([&](int w) {
            of[w].begin(m, outputs[w]);
            for (Floats &one : sums[w]) one = Floats::all(0);
        });
        for (int64_t s = 0; s < spans(m.inputs); ++s) add<W, R>(of, x, s, sums);
        for_outputs<W, R>([&](int w) {
            for (int r = 0; r < R; ++r) y[w][r] = sum(sums[w][r]);
        });
    }

  private:
    template <int W, int R>
    static DBRX_INLINE void add(Span (&span)[W], const std::byte *const *x, int64_t index, Floats (&sums)[W][R]) {
        const SpanActivations *of[R];
        for (int r = 0; r < R; ++r) of[r] = reinterpret_cast<const SpanActivations *>(x[r]) + index;
        Floats found[W][R];
        for_outputs<W, R>([&](int w) {
            span[w].open(index);
            for (int64_t line = 0; line < Span::BYTES; line += 64) read_ahead(span[w].at + line);
            for (int r = 0; r < R; ++r) found[w][r] = span[w].less(*of[r]);
        });
#pragma GCC unroll 8
        for (int chunk = 0; chunk < SPAN / Span::CHUNK; ++chunk)
            for_outputs<W, R>([&](int w) {
                Shorts weights[Span::CHUNK / 16];
                span[w].weights(chunk, weights);
                const Floats scale = span[w].scales(chunk);
                for (int r = 0; r < R; ++r)
                    found[w][r] = fma(to_floats(Span::multiply(weights, of[r]->x + chunk * Span::CHUNK)), scale, found[w][r]);
            });
        for_outputs<W, R>([&](int w) {
            for (int r = 0; r < R; ++r) sums[w][r] = fma(found[w][r], Floats::all(of[r]->scale), sums[w][r]);
        });
    }
};

}  // namespace dbrx
