// Products of many rows with weights that are read in spans: those of a panel of outputs are unpacked in cache, and meet all rows.
//
// Where integers are multiplied faster, a span of 256 weights of an output, and one of a row, are rounded to 16 bits with a
// scale of their own, and what a span gives becomes a float before the next one: all in all that errs by 1 in 7,000.
#pragma once
#include "formats/spans.h"
#include "panel.h"

namespace dbrx {

// What is the same for all formats.
class SpanProducts {
  public:
#if defined(__AVX2__) || defined(DBRX_EMULATE)
    using Dot = ShortDot;
#else
    using Dot = FloatDot;
#endif

    // A row: the steps of its spans, then its numbers and zeros up to a whole span.
    static int64_t prepared_bytes(int64_t inputs) {
        const int64_t bytes = steps_bytes(inputs) + spans(inputs) * SPAN * int64_t(sizeof(Element));
        return (bytes + 127) / 128 * 128 + 64;  // an odd number of lines, so that rows begin in different sets
    }
    static void prepare(const float *x, int64_t inputs, bool, std::byte *to) {
        float *step = reinterpret_cast<float *>(to);
        Element *out = reinterpret_cast<Element *>(to + steps_bytes(inputs));
        for (int64_t start = 0; start < inputs; start += SPAN, out += SPAN) {
            const int64_t count = std::min<int64_t>(SPAN, inputs - start);
            *step++ = round_span(x + start, count, out);
            std::fill(out + count, out + SPAN, Element(0));
        }
    }

  protected:
    using Element = typename Dot::Element;
    static constexpr bool ROUNDS = std::is_same_v<Dot, ShortDot>;
    static constexpr float SPAN_NORM = 46300;  // of both factors: rounding adds at most 8, and 46,308 squared is below 2^31

    static int64_t steps_bytes(int64_t inputs) { return (spans(inputs) * 4 + 63) / 64 * 64; }

    static float round_span(const float *x, int64_t count, float *out) {
        std::copy(x, x + count, out);
        return 1;
    }
    static float round_span(const float *x, int64_t count, int16_t *out) {
        Floats squares = Floats::all(0), most = Floats::all(0);
        for (int64_t i = 0; i < count; i += LANES) {
            const Floats part = Floats::load(x + i);
            squares = fma(part, part, squares), most = max(most, abs(part));
        }
        const float norm = std::sqrt(sum(squares)) / SPAN_NORM;  // NaN stays
        const float step = std::max(std::max(norm, largest_lane(most) / 32766), TINY), inverse = 1 / step;
        for (int64_t i = 0; i < count; ++i) out[i] = int16_t(std::bit_cast<int32_t>(x[i] * inverse + ROUNDING));
        return step;
    }

    struct Panel {
        alignas(64) Element rows[PANEL][SPAN] = {};  // outputs that are not there are zeros
        alignas(64) Element words[PANEL * SPAN];
        alignas(64) float step[PANEL] = {};
    };
    // Rounds a span of the weights of `count` outputs from `output` on to rows and steps of a panel.
    using Fill = void (*)(Panel &panel, const dbrx_matrix &m, int64_t output, int count, int64_t span);

    static void some(const dbrx_matrix &m, const std::byte *const *x, int64_t begin, int64_t n, int64_t first, int64_t last,
                     const GemmWrite &write, Fill fill) {
        const char *rows[GEMM_ROWS];
        for (int64_t i = 0; i < n; ++i) rows[i] = (const char *)x[i] + steps_bytes(m.inputs);
        alignas(64) float totals[GEMM_ROWS][PANEL], sums[ROUNDS ? GEMM_ROWS : 1][PANEL];  // sums: integers, of a span
        for (int64_t output = first; output < last; output += PANEL) {
            const int outputs = int(std::min<int64_t>(PANEL, last - output));
            Panel panel;
            std::memset(totals, 0, size_t(n) * sizeof totals[0]);
            for (int64_t s = 0; s < spans(m.inputs); ++s) {
                fill(panel, m, output, outputs, s);
                interleave((const float *)panel.rows, SPAN / Dot::TOGETHER, SPAN / Dot::TOGETHER, (float *)panel.words);
                const int64_t offset = s * SPAN * int64_t(sizeof(Element)), words = SPAN / Dot::TOGETHER;
                if constexpr (!ROUNDS) {
                    tiles<Dot>(rows, n, offset, (const char *)panel.words, words, (char *)totals);
                } else {
                    std::memset(sums, 0, size_t(n) * sizeof sums[0]);
                    tiles<Dot>(rows, n, offset, (const char *)panel.words, words, (char *)sums);
                    for (int64_t i = 0; i < n; ++i) {
                        const float step = reinterpret_cast<const float *>(x[i])[s];
                        DBRX_UNROLL for (int v = 0; v < PANEL; v += TILE_LANES) {
                            const FloatLanes found = to_float(load<WordLanes>(sums[i] + v)) * step;
                            store(totals[i] + v, multiply_add(found, load<FloatLanes>(panel.step + v), load<FloatLanes>(totals[i] + v)));
                        }
                    }
                }
            }
            for (int64_t i = 0; i < n; ++i) write(begin + i, output, outputs, totals[i]);
        }
    }
};

template <class Format>
class SpanGemm : public SpanProducts {
  public:
    // Prepared rows times outputs first .. last - 1: write(i, output, count, values) for each row i and panel.
    static void run(const dbrx_matrix &m, const std::byte *const *x, int64_t n, int64_t first, int64_t last,
                    const GemmWrite &write) {
        for (int64_t begin = 0; begin < n; begin += GEMM_ROWS)
            some(m, x + begin, begin, std::min(GEMM_ROWS, n - begin), first, last, write, fill);
    }

  private:
    static void fill(Panel &panel, const dbrx_matrix &m, int64_t output, int count, int64_t index) {
        alignas(64) float weights[SPAN];
        for (int o = 0; o < count; ++o) {
            Format::unpack_span(m, output + o, index, weights);
            panel.step[o] = round_span(weights, SPAN, panel.rows[o]);
        }
    }
};

}  // namespace dbrx
