// Products of many rows: a panel of weights is unpacked in cache, and meets all rows there.
#pragma once
#include "gemm_spans.h"
#include "gemv.h"

namespace dbrx {

// A row of activations as tiles take it: its scale, whether it has a residual, at VALUES its numbers, and zeros up to a
// word of 32 bits. The line that the step takes also keeps rows from beginning in the same sets of the cache.
struct PreparedRow {
    static constexpr int64_t VALUES = 64;
    float step;
    int32_t has_residual;
};

// How rows are prepared for one kind of product.
template <class Dot>
struct Rows;

template <>
struct Rows<FloatDot> {
    static int64_t bytes(int64_t inputs) { return PreparedRow::VALUES + inputs * 4; }
    static void prepare(const float *x, int64_t inputs, bool, std::byte *to) {
        *(PreparedRow *)to = {1, 0};
        std::memcpy(to + PreparedRow::VALUES, x, size_t(inputs) * 4);
    }
};

template <>
struct Rows<HalfDot> {
    static int64_t bytes(int64_t inputs) { return PreparedRow::VALUES + (inputs + 1) / 2 * 4; }
    static void prepare(const float *x, int64_t inputs, bool, std::byte *to) {
        *(PreparedRow *)to = {1, 0};
        uint16_t *out = (uint16_t *)(to + PreparedRow::VALUES);
        for (int64_t i = 0; i < inputs; ++i) out[i] = narrow(x[i]);
        if (inputs % 2) out[inputs] = 0;
    }
};

template <>
struct Rows<ShortDot> {
    static int64_t bytes(int64_t inputs) { return PreparedRow::VALUES + (inputs + 1) / 2 * 4; }
    static void prepare(const float *x, int64_t inputs, bool, std::byte *to) {
        const float step = std::max(std::sqrt(squares(x, inputs)), TINY) / NORM;  // NaN stays
        *(PreparedRow *)to = {step, 0};
        int16_t *out = (int16_t *)(to + PreparedRow::VALUES);
        for (int64_t i = 0; i < inputs; ++i) out[i] = int16_t(std::bit_cast<int32_t>(x[i] * (1 / step) + ROUNDING));
        if (inputs % 2) out[inputs] = 0;
    }
};

// 8 bits. A row whose extreme is farther out than PEAK times its root mean square gets a residual row, of what rounding
// took away: 8 bits are too few for the rest of it. Inside an expert activations are products of two, and nearly all
// rows have extremes.
template <>
struct Rows<ByteDot> {
    static constexpr float PEAK = 6, INNER_PEAK = 10, RESIDUAL_SCALE = 254;  // units of a residual in one of its row
    static int64_t values_bytes(int64_t inputs) { return (inputs + 63) / 64 * 64; }
    static int64_t bytes(int64_t inputs) { return PreparedRow::VALUES + 2 * values_bytes(inputs); }
    static void prepare(const float *x, int64_t inputs, bool inner, std::byte *to) {
        const float most = std::max(largest(x, inputs), TINY), step = most / 127, inverse = 1 / step;  // NaN stays
        const float spread = (inner ? INNER_PEAK : PEAK) * std::sqrt(squares(x, inputs) / float(inputs));
        *(PreparedRow *)to = {step, spread < most};
        uint8_t *first = (uint8_t *)(to + PreparedRow::VALUES), *second = first + values_bytes(inputs);
        for (int64_t i = 0; i < inputs; ++i) {
            const float scaled = x[i] * inverse, quantized = (scaled + ROUNDING) - ROUNDING;
            first[i] = uint8_t(int(quantized) + ByteDot::OFFSET);
            second[i] = uint8_t(int(std::nearbyint((scaled - quantized) * RESIDUAL_SCALE)) + ByteDot::OFFSET);
        }
        std::fill(first + inputs, second, uint8_t(ByteDot::OFFSET));
        std::fill(second + inputs, second + values_bytes(inputs), uint8_t(ByteDot::OFFSET));
    }
};

inline const PreparedRow &prepared(const std::byte *row) { return *reinterpret_cast<const PreparedRow *>(row); }

template <int format>
struct Gemm {
    using Dot = typename Unpack<format>::Dot;
    static constexpr bool SHARES_GEMV_ROWS = format == DBRX_INT8 && std::is_same_v<Dot, ShortDot>;

    static int64_t prepared_bytes(int64_t inputs) {
        const int64_t bytes = SHARES_GEMV_ROWS ? Int8::prepared_bytes(inputs) : Rows<Dot>::bytes(inputs);
        return (bytes + 127) / 128 * 128 + 64;  // an odd number of lines, so that rows begin in different sets
    }

    // inner: x is what an expert computes before w2.
    static void prepare(const float *x, int64_t inputs, bool inner, std::byte *to) {
        if constexpr (SHARES_GEMV_ROWS) {  // the same numbers, so that a row has the same result with many as with few
            Int8::prepare(x, inputs, to);
            ((PreparedRow *)to)->has_residual = 0;
        } else {
            Rows<Dot>::prepare(x, inputs, inner, to);
        }
    }

    // Prepared rows times outputs first .. last - 1: write(i, output, count, values) for each row i and panel.
    static void run(const dbrx_matrix &m, const std::byte *const *x, int64_t n, int64_t first, int64_t last,
                    const GemmWrite &write) {
        for (int64_t begin = 0; begin < n; begin += GEMM_ROWS) some(m, x + begin, begin, std::min(GEMM_ROWS, n - begin), first, last, write);
    }

  private:
    static constexpr bool HAS_RESIDUALS = std::is_same_v<Dot, ByteDot>;

    // Of a panel, as tiles add them up: integers or floats; then floats.
    struct Sums {
        alignas(64) float at[(HAS_RESIDUALS ? 2 : 1) * GEMM_ROWS][PANEL];

        void finish(int64_t row, float step, const Panel<format> &panel) {
            DBRX_UNROLL for (int v = 0; v < PANEL; v += TILE_LANES) {
                auto sum = load<typename Dot::Sum>(at[row] + v);
                if constexpr (HAS_RESIDUALS) sum -= ByteDot::OFFSET * load<WordLanes>(panel.total + v);
                store(at[row] + v, to_float(sum) * step * load<FloatLanes>(panel.step + v));
            }
        }
    };

    static void some(const dbrx_matrix &m, const std::byte *const *x, int64_t begin, int64_t n, int64_t first, int64_t last,
                     const GemmWrite &write) {
        const char *rows[2 * GEMM_ROWS];  // residuals behind the rows that have some
        int32_t residual_of[GEMM_ROWS];
        int64_t all = n;
        for (int64_t i = 0; i < n; ++i) {
            rows[i] = (const char *)x[i] + PreparedRow::VALUES;
            if (!HAS_RESIDUALS || !prepared(x[i]).has_residual) continue;
            residual_of[all - n] = int32_t(i);
            rows[all++] = rows[i] + Rows<ByteDot>::values_bytes(m.inputs);
        }
        Sums sums;
        Panel<format> panel;
        for (int64_t output = first; output < last; output += PANEL) {
            const int outputs = int(std::min<int64_t>(PANEL, last - output));
            panel.open(m, output, outputs);
            std::memset(sums.at, 0, size_t(all) * sizeof sums.at[0]);
            for (int64_t k = 0; k < m.inputs; k += panel.INPUTS) {
                const int64_t words = panel.fill(k);
                tiles<Dot>(rows, all, k * int64_t(sizeof(typename Dot::Element)), panel.words(), words, (char *)sums.at);
            }
            for (int64_t i = 0; i < n; ++i) sums.finish(i, prepared(x[i]).step, panel);
            for (int64_t i = n; i < all; ++i) {
                const int32_t of = residual_of[i - n];
                sums.finish(i, prepared(x[of]).step / Rows<ByteDot>::RESIDUAL_SCALE, panel);
                for (int o = 0; o < PANEL; ++o) sums.at[of][o] += sums.at[i][o];
            }
            for (int64_t i = 0; i < n; ++i) write(begin + i, output, outputs, sums.at[i]);
        }
    }
};

// f(gemm) with the `Gemm` of a matrix's format.
template <class F>
auto with_gemm(const dbrx_matrix &m, F f) {
    switch (m.format) {
        case DBRX_F32: return f(Gemm<DBRX_F32>{});
        case DBRX_BF16: return f(Gemm<DBRX_BF16>{});
        case DBRX_INT8: return f(Gemm<DBRX_INT8>{});
        case DBRX_INT4: return f(Gemm<DBRX_INT4>{});
        case DBRX_INT3: return f(Gemm<DBRX_INT3>{});
        default: return with_spans(m, [&](auto format) { return f(SpanGemm<typename decltype(format)::SpanType>{}); });
    }
}

// Activation rows [n] as the gemm of a matrix wants them.
struct GemmRows {
    std::byte *memory = nullptr;
    int64_t stride = 0;

    static GemmRows take(Arena &arena, const dbrx_matrix &m, int64_t n) {
        const int64_t stride = with_gemm(m, [&](auto gemm) { return gemm.prepared_bytes(m.inputs); });
        return {arena.take<std::byte>(stride * n), stride};
    }
    const std::byte *row(int64_t i) const { return memory + i * stride; }
    void set(const dbrx_matrix &m, int64_t i, const float *x, bool inner) const {
        with_gemm(m, [&](auto gemm) { gemm.prepare(x, m.inputs, inner, memory + i * stride); });
    }
};

inline void gemm(const dbrx_matrix &m, const std::byte *const *x, int64_t n, int64_t first, int64_t last, const GemmWrite &write) {
    with_gemm(m, [&](auto gemm) { gemm.run(m, x, n, first, last, write); });
}

// Outputs of a piece of work: whole lines of transposed weights, less where there would be too few pieces to share.
inline int64_t gemm_outputs(int64_t outputs, int threads) {
    const int64_t shared = (outputs / (4 * threads) + PANEL - 1) / PANEL * PANEL;
    return std::clamp<int64_t>(shared, PANEL, 64);
}

// y [n, outputs] = x, or its norm, times the matrix. Two phases: rows are prepared, then some outputs of all rows are
// a piece of work.
inline void gemm_linear(Pool &pool, const dbrx_matrix &m, const float *norm, float eps, const float *x, int64_t n, float *y) {
    constexpr int64_t ROWS = 8;  // that are prepared at once
    GemmRows rows;
    float *normed = nullptr;
    const std::byte **at = nullptr;
    const auto place = [&](Arena arena) {
        rows = GemmRows::take(arena, m, n);
        normed = arena.take<float>(norm ? pool.threads() * m.inputs : 0);
        at = arena.take<const std::byte *>(n);
        return arena.used();
    };
    place(Arena(pool.scratch(place(Arena(nullptr)))));
    const int64_t each = gemm_outputs(m.outputs, pool.threads());
    const Phase phases[] = {
        {[&] { return (n + ROWS - 1) / ROWS; },
         [&](int64_t piece, int thread) {
             for (int64_t i = piece * ROWS; i < std::min(n, (piece + 1) * ROWS); ++i) {
                 const float *row = x + i * m.inputs;
                 float *to = normed + thread * m.inputs;
                 if (norm) layer_norm(row, norm, eps, m.inputs, to);
                 rows.set(m, i, norm ? to : row, false);
                 at[i] = rows.row(i);
             }
         }},
        {[&] { return (m.outputs + each - 1) / each; },
         [&](int64_t piece, int thread) {
             const int64_t first = piece * each, last = std::min(m.outputs, first + each);
             gemm(m, at, n, first, last, [&](int64_t i, int64_t output, int count, const float *values) {
                 std::copy(values, values + count, y + i * m.outputs + output);
             });
             pool.count(thread, m.inputs * (last - first), 2 * m.inputs * (last - first) * n);
         }}};
    pool.run(phases);
}

}  // namespace dbrx
