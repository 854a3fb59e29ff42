// What is done to rows of floats between two products: norm, softmax, the experts' activation; accurate to float32.
#pragma once
#include <algorithm>

#include "dbrx.h"
#include "simd.h"

namespace dbrx {

// e^x to 1.5 units of the last place: x = n log 2 + r, and a polynomial for |r| <= log(2) / 2. NaN stays NaN.
DBRX_INLINE Floats exp(Floats x) {
    const Floats bounded = max(Floats::all(-87.3f), min(Floats::all(88.7f), x));  // NaN: the second is taken
    const Floats n = round(bounded * Floats::all(1.44269504f));
    Floats r = fma(n, Floats::all(-0.693145752f), bounded);  // log 2 in two parts: the first times n is exact
    r = fma(n, Floats::all(-1.42860677e-6f), r);
    Floats p = Floats::all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fma(p, r, Floats::all(c));
    const Floats near = fma(p, r * r, r) + Floats::all(1);
    const Floats half = round(n * Floats::all(0.5f));  // 2^128 is no float
    const Floats value = near * power_of_2(half) * power_of_2(n - half);
    return where_less(x, Floats::all(-87.3f), Floats::all(0), where_less(Floats::all(88.7f), x, Floats::all(INFINITY), value));
}

DBRX_INLINE Floats activate(int activation, Floats x) {
    if (activation == DBRX_SILU) return x / (Floats::all(1) + exp(Floats::all(0) - x));
    if (activation == DBRX_RELU) return where_less(x, Floats::all(0), Floats::all(0), x);  // NaN stays
    float each[LANES];
    x.store(each);
    for (float &one : each) one = 0.5f * one * std::erfc(-one * 0.70710678118f);
    return Floats::load(each);
}

// gate[i] = activation(gate[i]) * up[i].
inline void gate_times_up(int activation, float *gate, const float *up, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats product = activate(activation, load_up_to(gate + i, count - i)) * load_up_to(up + i, count - i);
        store_up_to(product, gate + i, count - i);
    }
}

inline float sum(const float *x, int64_t count) {
    Floats total = Floats::all(0);
    for (int64_t i = 0; i < count; i += LANES) total = total + load_up_to(x + i, count - i);
    return sum(total);
}

inline float dot(const float *a, const float *b, int64_t count) {
    Floats total = Floats::all(0);
    for (int64_t i = 0; i < count; i += LANES) total = fma(load_up_to(a + i, count - i), load_up_to(b + i, count - i), total);
    return sum(total);
}

// The largest magnitude; NaN or infinite where one of the numbers is.
inline float largest(const float *x, int64_t count) {
    Floats most = Floats::all(0), poison = Floats::all(0);
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats part = load_up_to(x + i, count - i);
        most = max(most, abs(part));
        poison = fma(part, Floats::all(0), poison);  // 0 x NaN and 0 x infinity are NaN
    }
    return largest_lane(most) + sum(poison);
}

// (x - mean) / sqrt(variance + eps) * weight, of one row; weight NULL: x itself.
inline void layer_norm(const float *x, const float *weight, float eps, int64_t d, float *out) {
    if (!weight) return void(std::copy(x, x + d, out));
    const float mean = sum(x, d) / float(d);
    const Floats middle = Floats::all(mean);
    Floats squares = Floats::all(0);
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        const Floats off = Floats::load(x + i) - middle;
        squares = fma(off, off, squares);
    }
    float variance = sum(squares);
    for (; i < d; ++i) variance += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1 / std::sqrt(variance / float(d) + eps);
    for (i = 0; i < d; i += LANES) {
        const Floats scaled = (load_up_to(x + i, d - i) - middle) * Floats::all(inverse);
        store_up_to(scaled * load_up_to(weight + i, d - i), out + i, d - i);
    }
}

// x[i] = e^(x[i] - largest); gives their sum.
inline float exponentials(float *x, int64_t count, float largest) {
    const Floats most = Floats::all(largest);
    for (int64_t i = 0; i < count; i += LANES)
        store_up_to(exp(load_up_to(x + i, count - i) - most), x + i, count - i);
    return sum(x, count);
}

// Logits -> probabilities, in place; then weights and ids of the k best, the best first, of equal ones the lower id.
// normalize: weights are divided by their norm of order p.
inline void choose(float *logits, int experts, int k, bool normalize, float p, float *weights, int32_t *ids) {
    float most = logits[0];
    for (int i = 1; i < experts; ++i)
        if (!(logits[i] <= most)) most = logits[i];  // NaN wins and stays
    const float total = exponentials(logits, experts, most);
    for (int i = 0; i < experts; ++i) logits[i] /= total;
    for (int slot = 0; slot < k; ++slot) {
        int best = -1;
        for (int i = 0; i < experts; ++i)
            if (std::find(ids, ids + slot, i) == ids + slot && (best < 0 || logits[i] > logits[best])) best = i;
        ids[slot] = best;
        weights[slot] = logits[best];
    }
    if (!normalize) return;
    float norm = 0;
    for (int slot = 0; slot < k; ++slot) {
        if (std::isinf(p)) norm = p > 0 || slot == 0 ? std::max(norm, weights[slot]) : std::min(norm, weights[slot]);
        else norm += p == 1 ? weights[slot] : p == 2 ? weights[slot] * weights[slot] : std::pow(weights[slot], p);
    }
    if (p == 2) norm = std::sqrt(norm);
    else if (p != 1 && p != 0 && !std::isinf(p)) norm = std::pow(norm, 1 / p);
    for (int slot = 0; slot < k; ++slot) weights[slot] /= norm;
}

}  // namespace dbrx
