// Floats -> 8, 4 or 3 bits a weight: the numbers of quantization/int8.py and quantization/affine.py.
//
// A few outputs at a time become float32, with their factors, in memory that stays in cache, whichever way they lie in the
// checkpoint; then each output is quantized by itself.
#pragma once
#include <atomic>
#include <stdexcept>

#include "checks.h"
#include "panel.h"
#include "pool.h"

namespace dbrx {

constexpr int QUANTIZED_AT_ONCE = 32;  // outputs: a cache line of transposed bfloat16, which half of it would read twice

// Outputs of a matrix of floats, times their factors, as rows of float32.
template <class Stored>
void float_rows(const dbrx_matrix &m, int64_t first, int count, const float *row_scale, const float *column_scale, float *rows,
                int64_t stride) {
    const Stored *values = (const Stored *)m.values;
    if (!m.transposed) {
        for (int o = 0; o < count; ++o) {
            const Stored *from = values + (first + o) * m.inputs;
            const float factor = row_scale ? row_scale[first + o] : 1;
            float *to = rows + o * stride;
            for (int64_t i = 0; i < m.inputs; ++i) to[i] = widen(from[i]) * factor;
            if (column_scale)
                for (int64_t i = 0; i < m.inputs; ++i) to[i] *= column_scale[i];
        }
        return;
    }
    float block[8][QUANTIZED_AT_ONCE] = {}, factors[QUANTIZED_AT_ONCE];
    for (int o = 0; o < QUANTIZED_AT_ONCE; ++o) factors[o] = row_scale && o < count ? row_scale[first + o] : 1;
    for (int64_t i = 0; i < m.inputs; i += 8) {
        const int inputs = int(std::min<int64_t>(8, m.inputs - i));
        for (int k = 0; k < inputs; ++k) {
            const Stored *from = values + (i + k) * m.outputs + first;
            const float factor = column_scale ? column_scale[i + k] : 1;
            if (count == QUANTIZED_AT_ONCE)
                for (int o = 0; o < QUANTIZED_AT_ONCE; ++o) block[k][o] = widen(from[o]) * factors[o] * factor;
            else
                for (int o = 0; o < count; ++o) block[k][o] = widen(from[o]) * factors[o] * factor;
        }
        for (int o = 0; o < QUANTIZED_AT_ONCE; o += 8) transpose_8(block[0] + o, QUANTIZED_AT_ONCE, rows + o * stride + i, stride);
    }
}

// Rounded to -127 ... 127; NaN and infinity show in the scale.
inline void quantize_int8(const float *x, int64_t inputs, int8_t *values, float *scale) {
    int32_t most = 0;  // of numbers without sign, bits are ordered as the numbers are, NaN last
    for (int64_t i = 0; i < inputs; ++i) most = std::max(most, std::bit_cast<int32_t>(x[i]) & 0x7FFFFFFF);
    *scale = std::bit_cast<float>(most) / 127;
    const float inverse = *scale > 0 ? 1 / *scale : 0;
    for (int64_t i = 0; i < inputs; ++i) values[i] = int8_t(std::bit_cast<int32_t>(x[i] * inverse + ROUNDING));
}

// Numbers 0 to qmax for each group, fitted to its weights: rounding and range are improved in turn, eight groups side by
// side.
class AffineFit {
  public:
    AffineFit(int group, int qmax) : group_(group), qmax_(Floats::all(float(qmax))) {}

    // x [8 groups] -> quantized, a byte each, in the same order; scale and zero [8] in bfloat16. The numbers are those of
    // affine.py but for the order of sums, and for t / scale, here t * (1 / scale) until the fit is done: they differ
    // where that is a tie.
    void fit(const float *x, uint8_t *quantized, uint16_t *scale_out, uint16_t *zero_out) {
        for (int i = 0; i < group_; i += 8) transpose_8(x + i, group_, w_[i], LANES);
        Floats low = at(w_, 0), high = low, mean = Floats::all(0);
        for (int i = 0; i < group_; ++i) {
            low = min(low, at(w_, i)), high = max(high, at(w_, i));
            mean = mean + at(w_, i);
        }
        mean = mean * Floats::all(1.0f / float(group_));
        for (int i = 0; i < group_; ++i) (at(w_, i) - mean).store(centred_[i]);
        Floats best_error = Floats::all(INFINITY), best_scale = Floats::all(1), best_base = low;
        for (const float share : {1.0f, 0.9f, 0.8f, 0.7f}) {
            Floats scale = max((high - low) * Floats::all(share) / qmax_, tiny());
            Floats base = (low + high) * Floats::all(0.5f) - scale * qmax_ * Floats::all(0.5f);
            improve(mean, high - low, scale, base);
            const Floats error = error_of(scale, base);
            best_scale = where_less(error, best_error, scale, best_scale);
            best_base = where_less(error, best_error, base, best_base);
            best_error = where_less(error, best_error, error, best_error);
        }
        write(best_scale, best_base, quantized, scale_out, zero_out);
    }

  private:
    static constexpr int ROUNDS = 8, MOST = 256;
    using Lanes = float[LANES];
    static Floats tiny() { return Floats::all(1e-12f); }
    static Floats at(const Lanes *lanes, int i) { return Floats::load(lanes[i]); }
    Floats clamped(Floats t) const { return max(Floats::all(0), min(qmax_, round(t))); }

    // Rounds to a range, then takes the range of least squares for what came out, until nothing changes.
    // Steps between whole numbers are no larger than the group's range, but for noise divided by noise where all weights are
    // the same.
    void improve(Floats mean, Floats range, Floats &scale, Floats &base) const {
        const Floats share = Floats::all(1.0f / float(group_));
        for (int turn = 0; turn < ROUNDS; ++turn) {
            const Floats inverse = Floats::all(1) / scale;
            Floats sum[2], squares[2], products[2];  // two each, since an addition waits for the one before
            for (int j = 0; j < 2; ++j) sum[j] = squares[j] = products[j] = Floats::all(0);
            for (int i = 0; i < group_; i += 2) {
                DBRX_UNROLL for (int j = 0; j < 2; ++j) {
                    const Floats q = clamped((at(w_, i + j) - base) * inverse);
                    sum[j] = sum[j] + q;
                    squares[j] = fma(q, q, squares[j]);
                    products[j] = fma(q, at(centred_, i + j), products[j]);
                }
            }
            const Floats all = sum[0] + sum[1], middle = all * share;
            const Floats variance = squares[0] + squares[1] - all * middle;  // exact: of whole numbers up to 57,600
            const Floats found = max(min((products[0] + products[1]) / max(variance, tiny()), range), tiny());
            const Floats next = mean - found * middle;
            const bool same = equal(found, scale) && equal(next, base);
            scale = found, base = next;
            if (same) return;  // and so would all further turns
        }
    }

    static bool equal(Floats a, Floats b) {
        Lanes x, y;
        a.store(x), b.store(y);
        return std::memcmp(x, y, sizeof x) == 0;
    }

    Floats error_of(Floats scale, Floats base) const {
        const Floats inverse = Floats::all(1) / scale;
        Floats error[2] = {Floats::all(0), Floats::all(0)};
        for (int i = 0; i < group_; i += 2)
            DBRX_UNROLL for (int j = 0; j < 2; ++j) {
                const Floats w = at(w_, i + j), off = clamped((w - base) * inverse) * scale + base - w;
                error[j] = fma(off, off, error[j]);
            }
        return error[0] + error[1];
    }

    // Kept in bfloat16: weights are rounded to what is kept.
    void write(Floats best_scale, Floats best_base, uint8_t *quantized, uint16_t *scale_out, uint16_t *zero_out) {
        Lanes scales, bases;
        best_scale.store(scales), best_base.store(bases);
        for (int g = 0; g < LANES; ++g) {
            scale_out[g] = narrow(scales[g]);
            zero_out[g] = narrow(-bases[g] / widen(scale_out[g]));
            scales[g] = widen(scale_out[g]), bases[g] = widen(zero_out[g]);
        }
        const Floats scale = Floats::load(scales), zero = Floats::load(bases);
        for (int i = 0; i < group_; ++i) {
            Lanes at_i;
            clamped(at(w_, i) / scale + zero).store(at_i);
            for (int g = 0; g < LANES; ++g) quantized[g * group_ + i] = uint8_t(at_i[g]);
        }
    }

    int group_;
    Floats qmax_;
    alignas(32) float w_[MOST][LANES];        // input i of eight groups
    alignas(32) float centred_[MOST][LANES];  // less their means
};

// An output in a few bits. x has room for whole eights of groups, and is written over behind the last input: a short group
// is filled with its last weight.
inline void quantize_affine(AffineFit &fit, float *x, const dbrx_matrix &to, int64_t output, uint8_t *quantized) {
    const int64_t groups = (to.inputs + to.group - 1) / to.group;
    std::fill(x + to.inputs, x + (groups + 7) / 8 * 8 * to.group, x[to.inputs - 1]);
    uint16_t *scale = (uint16_t *)to.scale + output * groups, *zero = (uint16_t *)to.zero + output * groups;
    for (int64_t g = 0; g < groups; g += 8) {
        uint16_t scales[8], zeros[8];
        fit.fit(x + g * to.group, quantized + g * to.group, scales, zeros);
        const int64_t count = std::min<int64_t>(8, groups - g);
        std::copy(scales, scales + count, scale + g);
        std::copy(zeros, zeros + count, zero + g);
    }
    uint8_t *row = (uint8_t *)to.values + output * (to.inputs * bits_of(to) / 8);
    if (to.format == DBRX_INT4) pack_quantized<4>(quantized, to.inputs, row);
    else pack_quantized<3>(quantized, to.inputs, row);
}

inline bool all_finite(const float *x, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, std::bit_cast<int32_t>(x[i]) & 0x7FFFFFFF);
    return most < 0x7F800000;
}

inline void quantize(Pool &pool, const dbrx_matrix &from, const float *row_scale, const float *column_scale, dbrx_matrix &to) {
    const int64_t group = is_affine(to) ? to.group : 1;
    const int64_t stride = (from.inputs + 8 * group - 1) / (8 * group) * (8 * group) + 16;
    const int64_t bytes_each = stride * (QUANTIZED_AT_ONCE * 4 + 1);
    std::byte *scratch = pool.scratch(size_t(bytes_each * pool.threads()));
    std::atomic<bool> finite{true};
    const auto work = [&](int64_t piece, int thread) {
        float *rows = (float *)(scratch + bytes_each * thread);
        uint8_t *quantized = (uint8_t *)(rows + stride * QUANTIZED_AT_ONCE);
        const int64_t first = piece * QUANTIZED_AT_ONCE;
        const int count = int(std::min<int64_t>(QUANTIZED_AT_ONCE, from.outputs - first));
        if (from.format == DBRX_F32) float_rows<float>(from, first, count, row_scale, column_scale, rows, stride);
        else float_rows<uint16_t>(from, first, count, row_scale, column_scale, rows, stride);
        AffineFit fit(int(group), (1 << bits_of(to)) - 1);
        for (int o = 0; o < count; ++o) {
            float *row = rows + o * stride;
            const int64_t output = first + o;
            if (to.format == DBRX_INT8) {
                quantize_int8(row, from.inputs, (int8_t *)to.values + output * from.inputs, (float *)to.scale + output);
            } else if (all_finite(row, from.inputs)) {
                quantize_affine(fit, row, to, output, quantized);
            } else {
                finite.store(false);
            }
        }
    };
    const Phase phases[] = {{[&] { return (from.outputs + QUANTIZED_AT_ONCE - 1) / QUANTIZED_AT_ONCE; }, work}};
    pool.run(phases);
    if (!finite.load()) throw std::invalid_argument("the weights hold numbers that are not finite");
}

}  // namespace dbrx
