// float32 and bfloat16 weights, row by row: float32 sums, eight lanes a pair of a weight row and an activation row.
#pragma once
#include <cstddef>

#include "../activations.h"

namespace dbrx {

template <class T>
struct FloatRows {
    static int64_t row_bytes(const dbrx_matrix &m) { return m.inputs * int64_t(sizeof(T)); }

    // Activations: the floats, and zeros up to a whole vector.
    static int64_t prepared_bytes(int64_t inputs) { return (inputs + 15) / 16 * 64; }
    static void prepare(const float *x, int64_t inputs, std::byte *to) {
        float *out = reinterpret_cast<float *>(to);
        std::copy(x, x + inputs, out);
        std::fill(out + inputs, out + (inputs + 15) / 16 * 16, 0.0f);
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
        const int64_t whole = m.inputs / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES)
            for (int w = 0; w < W; ++w) {
                const Floats weight = Floats::load(weights[w] + i);
                for (int r = 0; r < R; ++r) sums[w][r] = fma(weight, Floats::load(rows[r] + i), sums[w][r]);
            }
        if (whole < m.inputs)
            for (int w = 0; w < W; ++w) {
                const Floats weight = load_part(weights[w] + whole, m.inputs - whole);
                for (int r = 0; r < R; ++r) sums[w][r] = fma(weight, Floats::load(rows[r] + whole), sums[w][r]);
            }
        for (int w = 0; w < W; ++w)
            for (int r = 0; r < R; ++r) y[w][r] = sum(sums[w][r]);
    }
};

using F32 = FloatRows<float>;
using BF16 = FloatRows<uint16_t>;

}  // namespace dbrx
