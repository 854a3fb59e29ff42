// Products of many rows with weights that are read in spans: those of a panel of outputs are unpacked in cache, and meet all rows.
//
// Where integers are multiplied faster, a panel has a span's quantized weights as they are, and a row 14 bits and a sign with a
// scale for each span. What inputs give whose weights share a scale becomes a float before it meets that: 32 of them, or as
// many as a sum of 32 bits can hold, up to the whole span. Only the row is rounded, by 1 in 20,000.
#pragma once
#include "formats/spans.h"
#include "panel.h"

namespace dbrx {

// A span of a panel's outputs, each in a row, then beside each other; and of the rows that meet it. Outputs that are not there
// are zeros, or those of the panel before.
template <class Dot>
struct SpanPanel;

template <>
struct SpanPanel<FloatDot> {
    struct Row {  // zeros behind the last input
        float x[SPAN];
    };
    static void prepare(const float *x, int64_t count, Row &out) {
        std::copy(x, x + count, out.x);
        std::fill(out.x + count, out.x + SPAN, 0.0f);
    }

    alignas(64) float rows[PANEL][SPAN] = {}, words[SPAN][PANEL];

    template <class Span>
    void set(int output, const Span &span) {
        span.unpack(rows[output]);
    }
    void order() { interleave(rows[0], SPAN, SPAN, words[0]); }
    // totals [n, PANEL] += products of n rows.
    void add(const Row *const *x, int64_t n, float (*totals)[PANEL]) const {
        tiles<FloatDot>((const char *const *)x, n, 0, (const char *)words, SPAN, (char *)totals);
    }
};

template <>
struct SpanPanel<ShortDot> {
    static constexpr int PARTS = SPAN / 32, MINIMA = SPAN / 16;  // at most
    // A part's products are one sum of integers, which must stay below 2^31 = 2,147,483,648. That of 32 does with any weights,
    // which are 4,096 at most (`MOST`): 32 * 4,096 * 16,383 = 2,147,352,576. By Cauchy and Schwarz longer ones do whose
    // weights have a norm of 21,400: 21,400 * (100,000 + sqrt(256) / 2) = 2,140,171,200.
    static constexpr int ROW_QMAX = (1 << 14) - 1;
    static constexpr float ROW_NORM = 100000, WEIGHTS_NORM = 21400;

    using Row = SpanActivations;
    static void prepare(const float *x, int64_t count, Row &out) {
        SpanRows::prepare_span(x, count, ROW_QMAX, out, std::sqrt(squares(x, count)) * (ROW_QMAX / ROW_NORM));
    }

    alignas(64) int16_t rows[PANEL][SPAN] = {}, words[SPAN * PANEL];
    alignas(64) float scale_rows[PANEL][PARTS] = {}, scales[PARTS][PANEL];
    alignas(64) float minima_rows[PANEL][MINIMA] = {}, minima[MINIMA][PANEL];
    int n_minima = 0, n_parts = 0;
    bool always_fits = false;  // whatever the weights, one sum holds a span

    template <class Span>
    void set(int output, const Span &span) {
        static_assert(Span::MOST <= 4096);
        span.integers(rows[output], scale_rows[output], minima_rows[output]);
        n_minima = Span::MINIMA, n_parts = span.parts();
        always_fits = float(SPAN) * Span::MOST * Span::MOST <= WEIGHTS_NORM * WEIGHTS_NORM;
    }
    void order() {
        interleave((const float *)rows, SPAN / 2, SPAN / 2, (float *)words);
        interleave(scale_rows[0], PARTS, PARTS, scales[0]);
        if (n_minima) interleave(minima_rows[0], MINIMA, n_minima, minima[0]);
        if (n_parts < PARTS && !always_fits) split_parts();
    }
    void add(const Row *const *x, int64_t n, float (*totals)[PANEL]) const { add_tiles(x, n, totals); }

  private:
    // Makes more parts of a span until no sum can leave 32 bits.
    void split_parts() {
        alignas(64) float square[PARTS][PANEL];  // of the norm of 32 weights
        for (int i = 0; i < PARTS; ++i)
            DBRX_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) {
                WordLanes sum = {};
                for (int word = 16 * i; word < 16 * (i + 1); ++word) {
                    const WordLanes w = load<WordLanes>(words + 2 * (word * PANEL + v * TILE_LANES));
                    sum = ShortDot::add(sum, w, w);
                }
                store(square[i] + v * TILE_LANES, to_float(sum));
            }
        const auto fits = [&] {
            for (int first = 0, each = PARTS / n_parts; first < PARTS; first += each)
                for (int o = 0; o < PANEL; ++o) {
                    float norm = 0;
                    for (int i = first; i < first + each; ++i) norm += square[i][o];
                    if (norm > WEIGHTS_NORM * WEIGHTS_NORM) return false;
                }
            return true;
        };
        while (n_parts < PARTS && !fits()) n_parts *= 2;
    }

    template <int R = TILE_ROWS>
    __attribute__((noinline)) void add_tiles(const Row *const *x, int64_t n, float (*totals)[PANEL]) const {
        for (; n >= R; n -= R, x += R, totals += R) add_tile<R>(x, totals);
        if constexpr (R > 1)
            if (n) add_tiles<R - 1>(x, n, totals);
    }

    template <int R>
    DBRX_INLINE void add_tile(const Row *const *x, float (*totals)[PANEL]) const {
        FloatLanes found[R][TILE_VECTORS] = {};
        const int inputs = SPAN / n_parts;
        for (int i = 0; i < SPAN; i += inputs) {
            WordLanes sum[R][TILE_VECTORS] = {};
            const char *row[R];
            DBRX_UNROLL for (int r = 0; r < R; ++r) row[r] = (const char *)(x[r]->x + i);
            multiply_words<ShortDot>(row, (const char *)(words + i * PANEL), inputs / 2, sum);
            DBRX_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) {
                const FloatLanes scale = load<FloatLanes>(scales[i / 32] + v * TILE_LANES);
                DBRX_UNROLL for (int r = 0; r < R; ++r) found[r][v] = multiply_add(to_float(sum[r][v]), scale, found[r][v]);
            }
        }
        const float *less[R];
        DBRX_UNROLL for (int r = 0; r < R; ++r) less[r] = n_minima == SPAN / 32 ? x[r]->less_of_32 : x[r]->less_of_16;
        for (int g = 0; g < n_minima; ++g)
            DBRX_UNROLL for (int r = 0; r < R; ++r)
                DBRX_UNROLL for (int v = 0; v < TILE_VECTORS; ++v)
                    found[r][v] = multiply_add(FloatLanes{} + less[r][g], load<FloatLanes>(minima[g] + v * TILE_LANES), found[r][v]);
        DBRX_UNROLL for (int r = 0; r < R; ++r)
            DBRX_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) {
                float *total = totals[r] + v * TILE_LANES;
                store(total, multiply_add(found[r][v], FloatLanes{} + x[r]->scale, load<FloatLanes>(total)));
            }
    }
};

// What is the same for all formats.
class SpanProducts {
  public:
    static int64_t prepared_bytes(int64_t inputs) {
        const int64_t bytes = spans(inputs) * int64_t(sizeof(Row));
        return (bytes + 127) / 128 * 128 + 64;  // an odd number of lines, so that rows begin in different sets
    }
    static void prepare(const float *x, int64_t inputs, bool, std::byte *to) {
        Row *out = reinterpret_cast<Row *>(to);
        for (int64_t start = 0; start < inputs; start += SPAN) Panel::prepare(x + start, std::min<int64_t>(SPAN, inputs - start), *out++);
    }

  protected:
#if defined(__AVX2__) || defined(DBRX_EMULATE)
    using Panel = SpanPanel<ShortDot>;
#else
    using Panel = SpanPanel<FloatDot>;
#endif
    using Row = Panel::Row;
    // Sets a span of `count` outputs from `output` on.
    using Fill = void (*)(Panel &panel, const dbrx_matrix &m, int64_t output, int count, int64_t span);

    static void some(const dbrx_matrix &m, const std::byte *const *x, int64_t begin, int64_t n, int64_t first, int64_t last,
                     const GemmWrite &write, Fill fill) {
        const Row *rows[GEMM_ROWS];
        alignas(64) float totals[GEMM_ROWS][PANEL];
        Panel panel;
        for (int64_t output = first; output < last; output += PANEL) {
            const int outputs = int(std::min<int64_t>(PANEL, last - output));
            std::memset(totals, 0, size_t(n) * sizeof totals[0]);
            for (int64_t s = 0; s < spans(m.inputs); ++s) {
                fill(panel, m, output, outputs, s);
                panel.order();
                for (int64_t i = 0; i < n; ++i) rows[i] = reinterpret_cast<const Row *>(x[i]) + s;
                panel.add(rows, n, totals);
            }
            for (int64_t i = 0; i < n; ++i) write(begin + i, output, outputs, totals[i]);
        }
    }
};

template <class Span>
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
        Span span;
        for (int o = 0; o < count; ++o) {
            span.begin(m, output + o);
            span.open(index);
            // What the next panel has there comes while rows meet this one.
            for (int64_t line = 0; line < Span::BYTES; line += 64) read_ahead(span.at + line, PANEL * Span::row_bytes(m));
            panel.set(o, span);
        }
    }
};

}  // namespace dbrx
