// 8 bits a weight, a scale for each output. Activations are 16 bits wide, with one scale a row.
//
// No sum overflows. By Cauchy and Schwarz a sum of products, and a sum of any part of them, is at most |w| |x| in
// magnitude, where |w| <= 128 sqrt(inputs). So the scale is chosen such that the rounded row has
// |x| <= (2^31 - 1) / (128 sqrt(inputs)), and no number beyond 32767. For 1024 inputs that is a norm of 524,287, or
// 16,384 for each number on average: rounding errs by 1 in 57,000 (root mean square), less than float16 would.
#pragma once
#include <cstddef>

#include "../activations.h"

namespace dbrx {

struct Int8 {
    static constexpr int AT_ONCE = 4;  // outputs whose products with several rows share a loop
    static int64_t row_bytes(const dbrx_matrix &m) { return m.inputs + 4; }

    // Activations: the scale, at 64 bytes the rounded numbers, and zeros up to a whole step.
    static constexpr int STEP = 32;
    static int64_t padded(int64_t inputs) { return (inputs + STEP - 1) / STEP * STEP; }
    static int64_t prepared_bytes(int64_t inputs) { return 64 + 2 * padded(inputs); }
    static void prepare(const float *x, int64_t inputs, std::byte *to) {
        int16_t *out = reinterpret_cast<int16_t *>(to + 64);
        const float most = std::max(largest(x, inputs), 1e-30f);  // NaN stays, and makes the scale NaN
        const Floats inverse = Floats::all(1 / most);
        Floats squares = Floats::all(0);
        for (int64_t i = 0; i < inputs; i += LANES) {
            const Floats part = load_up_to(x + i, inputs - i) * inverse;
            squares = fma(part, part, squares);
        }
        const float root = std::sqrt(float(inputs));
        const float bound = 2147483647.0f * 0.9999f / (128 * root) - 0.5f * root;  // rounding adds at most half of each
        const float qmax = std::min(32766.0f, bound / std::sqrt(sum(squares)));
        const Floats factor = Floats::all(qmax);
        int64_t i = 0;
        for (; i < inputs; i += LANES) store_rounded(load_up_to(x + i, inputs - i) * inverse * factor, out + i);
        for (; i < padded(inputs); ++i) out[i] = 0;
        *reinterpret_cast<float *>(to) = most / qmax;
    }

    template <int W, int R>
    static void dot(const dbrx_matrix &m, const int64_t (&outputs)[W], const std::byte *const *x, float (&y)[W][R]) {
        const int8_t *weights[W];
        const int16_t *rows[R];
        Ints sums[W][R];
        for (int w = 0; w < W; ++w) weights[w] = static_cast<const int8_t *>(m.values) + outputs[w] * m.inputs;
        for (int r = 0; r < R; ++r) rows[r] = reinterpret_cast<const int16_t *>(x[r] + 64);
        for (auto &row : sums)
            for (Ints &one : row) one = Ints::zero();
        const int64_t whole = m.inputs / STEP * STEP;
        if (whole < m.inputs) {  // through memory of its own, since nothing may be read behind a matrix
            int8_t last[W][STEP] = {};
            for (int w = 0; w < W; ++w) std::copy(weights[w] + whole, weights[w] + m.inputs, last[w]);
            for (int w = 0; w < W; ++w) add<R>(last[w], rows, whole, sums[w]);
        }
        for (int64_t i = 0; i < whole; i += STEP)
            for (int w = 0; w < W; ++w) add<R>(weights[w] + i, rows, i, sums[w]);
        const float *scale = static_cast<const float *>(m.scale);
        for (int w = 0; w < W; ++w)
            for (int r = 0; r < R; ++r)
                y[w][r] = float(sum(sums[w][r])) * *reinterpret_cast<const float *>(x[r]) * scale[outputs[w]];
    }

  private:
    template <int R>
    static DBRX_INLINE void add(const int8_t *weights, const int16_t *const (&rows)[R], int64_t i, Ints (&sums)[R]) {
        Shorts weight[2];
        read_ahead(weights);
        load_weights(weights, weight);
        for (int half = 0; half < 2; ++half)
            for (int r = 0; r < R; ++r) sums[r] = multiply_add(weight[half], Shorts::load(rows[r] + i + 16 * half), sums[r]);
    }
};

}  // namespace dbrx
