// float32 and bfloat16 weights, row by row: float32 sums, eight lanes a pair of a weight row and an activation row.
#pragma once
#include <cstddef>

#include "../activations.h"

namespace dbrx {

template <class T>
struct FloatRows {
    static int64_t row_bytes(const dbrx_matrix &m) { return m.inputs * int64_t(sizeof(T)); }

    static constexpr int AT_ONCE = 4;  // outputs whose products with several rows share a loop
    static constexpr int STEP = 16;  // inputs, two vectors

    // Activations: the floats, and zeros up to a whole step.
    static int64_t padded(int64_t inputs) { return (inputs + STEP - 1) / STEP * STEP; }
    static int64_t prepared_bytes(int64_t inputs) { return padded(inputs) * int64_t(sizeof(float)); }
    static void prepare(const float *x, int64_t inputs, std::byte *to) {
        float *out = reinterpret_cast<float *>(to);
        std::copy(x, x + inputs, out);
        std::fill(out + inputs, out + padded(inputs), 0.0f);
        if (EVEN_FIRST && sizeof(T) == 2) even_first(out, padded(inputs), STEP);
    }

    // y[w][r] = weight row outputs[w] times activation row x[r].
    template <int W, int R>
    static void dot(const dbrx_matrix &m, const int64_t (&outputs)[W], const std::byte *const *x, float (&y)[W][R]) {
        const T *weights[W];
        const float *rows[R];
        Floats sums[W][R];
        for (int w = 0; w < W; ++w) weights[w] = static_cast<const T *>(m.values) + outputs[w] * m.inputs;
        for (int r = 0; r < R; ++r) rows[r] = reinterpret_cast<const float *>(x[r]);
        for (auto &row : sums)
            for (Floats &one : row) one = Floats::all(0);
        const int64_t whole = m.inputs / STEP * STEP;
        if (whole < m.inputs) {  // through memory of its own, since nothing may be read behind a matrix
            T last[W][STEP] = {};
            for (int w = 0; w < W; ++w) std::copy(weights[w] + whole, weights[w] + m.inputs, last[w]);
            for (int w = 0; w < W; ++w) add<R>(last[w], rows, whole, sums[w]);
        }
        for (int64_t i = 0; i < whole; i += STEP)
            for (int w = 0; w < W; ++w) add<R>(weights[w] + i, rows, i, sums[w]);
        for (int w = 0; w < W; ++w)
            for (int r = 0; r < R; ++r) y[w][r] = sum(sums[w][r]);
    }

  private:
    template <int R>
    static DBRX_INLINE void add(const T *weights, const float *const (&rows)[R], int64_t i, Floats (&sums)[R]) {
        Floats weight[2];
        read_ahead(weights);
        load_weights(weights, weight);
        for (int half = 0; half < 2; ++half)
            for (int r = 0; r < R; ++r) sums[r] = fma(weight[half], Floats::load(rows[r] + i + half * LANES), sums[r]);
    }
};

using F32 = FloatRows<float>;
using BF16 = FloatRows<uint16_t>;

}  // namespace dbrx
