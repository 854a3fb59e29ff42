// Products of few activation rows (up to 16) with a matrix: each weight is read from memory once.
#pragma once
#include <algorithm>

#include "formats/floats.h"
#include "formats/int4.h"
#include "formats/int8.h"
#include "pool.h"

namespace dbrx {

constexpr int MAX_ROWS = DBRX_GEMV_MAX_ROWS;
constexpr int64_t PIECE_BYTES = 128 * 1024;  // of weights, that a thread takes at once
constexpr int64_t MAX_OUTPUTS = 256;         // of a piece

// f(format) with the struct of formats/ that reads such a matrix.
template <class F>
auto with_format(const dbrx_matrix &m, F f) {
    switch (m.format) {
        case DBRX_F32: return f(F32{});
        case DBRX_BF16: return f(BF16{});
        case DBRX_INT8: return f(Int8{});
        default: break;
    }
    switch (m.group) {
        case 32: return f(Int4<32>{});
        case 64: return f(Int4<64>{});
        case 128: return f(Int4<128>{});
        default: return f(Int4<256>{});
    }
}

inline int64_t row_bytes(const dbrx_matrix &m) {
    return with_format(m, [&](auto format) { return decltype(format)::row_bytes(m); });
}

// Activation rows as a format wants them, one behind the other in memory that somebody else owns.
struct Prepared {
    std::byte *memory = nullptr;
    int64_t stride = 0;

    static Prepared take(Arena &arena, const dbrx_matrix &m, int64_t n) {
        const int64_t stride =
            with_format(m, [&](auto format) { return (decltype(format)::prepared_bytes(m.inputs) + 63) / 64 * 64; });
        return {arena.take<std::byte>(stride * n), stride};
    }
    const std::byte *row(int64_t i) const { return memory + i * stride; }
    void set(const dbrx_matrix &m, int64_t i, const float *x) const {
        with_format(m, [&](auto format) { decltype(format)::prepare(x, m.inputs, memory + i * stride); });
    }
};

// out[r * stride + o - first] for outputs first <= o < last and n rows. A core that reads four weight rows far apart has more
// bytes under way than with one; of several activation rows, four at a time meet two weight rows in registers. What is
// left over is computed in a whole tile that names its last output more than once.
template <class Format>
void multiply_range(const dbrx_matrix &m, int64_t first, int64_t last, const std::byte *const *x, int64_t n, float *out,
                    int64_t stride) {
    const auto tile = [&]<int W, int R>(const int64_t(&outputs)[W], int64_t row) {
        float y[W][R];
        Format::template dot<W, R>(m, outputs, x + row, y);
        for (int w = 0; w < W; ++w)
            for (int r = 0; r < R; ++r) out[(row + r) * stride + outputs[w] - first] = y[w][r];
    };
    const int64_t wide = n <= 2 ? 4 : 2, apart = (last - first) / wide, rest = first + wide * apart;
    for (int64_t o = first; o < first + apart || (o == first + apart && rest < last); ++o) {
        const bool over = o == first + apart;
        const auto at = [&](int64_t w) { return over ? std::min(rest + w, last - 1) : o + w * apart; };
        if (wide == 4) {
            const int64_t outputs[4] = {at(0), at(1), at(2), at(3)};
            if (n == 1) tile.template operator()<4, 1>(outputs, 0);
            else tile.template operator()<4, 2>(outputs, 0);
            continue;
        }
        const int64_t outputs[2] = {at(0), at(1)};
        int64_t row = 0;
        for (; row + 4 <= n; row += 4) tile.template operator()<2, 4>(outputs, row);
        if (n - row == 3) tile.template operator()<2, 3>(outputs, row);
        if (n - row == 2) tile.template operator()<2, 2>(outputs, row);
        if (n - row == 1) tile.template operator()<2, 1>(outputs, row);
    }
}

inline void multiply(const dbrx_matrix &m, int64_t first, int64_t last, const std::byte *const *x, int64_t n, float *out,
                     int64_t stride) {
    with_format(m, [&](auto format) { multiply_range<decltype(format)>(m, first, last, x, n, out, stride); });
}

// How many outputs make a piece: some 128 KiB of weights, less where there would be too few pieces to share evenly.
inline int64_t piece_outputs(int64_t outputs, int64_t bytes_each, int threads) {
    const int64_t of_size = std::clamp<int64_t>(PIECE_BYTES / bytes_each, 1, MAX_OUTPUTS);
    const int64_t shared = std::max<int64_t>(1, outputs / (8 * threads));
    return (std::min(of_size, shared) + 3) / 4 * 4;
}

// Floats that are stored [inputs, outputs]: rows are scaled and added up. A strip is so many stored rows; each has a sum of
// its own, added in their order later, so that threads can share the work and the numbers do not depend on how.
constexpr int64_t STRIP = 128;

inline int64_t strips(const dbrx_matrix &m) { return (m.inputs + STRIP - 1) / STRIP; }

// sums[r] [outputs] of one strip, for R rows x[r] of all inputs, times factors[r].
template <class T, int R>
void add_strip(const dbrx_matrix &m, int64_t strip, const float *const *x, const float *factors, float *const *sums) {
    constexpr int AT_ONCE = 8;  // stored rows
    const T *values = static_cast<const T *>(m.values);
    const int64_t end = std::min(m.inputs, (strip + 1) * STRIP);
    for (int r = 0; r < R; ++r) std::fill(sums[r], sums[r] + m.outputs, 0.0f);
    for (int64_t i = strip * STRIP; i < end; i += AT_ONCE) {
        Floats scale[R][AT_ONCE];
        const T *rows[AT_ONCE];
        for (int k = 0; k < AT_ONCE; ++k) {
            const bool there = i + k < end;  // else a row that is, times zero
            rows[k] = values + (there ? i + k : i) * m.outputs;
            for (int r = 0; r < R; ++r) scale[r][k] = Floats::all(there ? x[r][i + k] * factors[r] : 0);
        }
        const auto add = [&](int64_t o, auto load, auto store) {
            Floats weights[AT_ONCE];
            for (int k = 0; k < AT_ONCE; ++k) weights[k] = load(rows[k] + o);
            for (int r = 0; r < R; ++r) {
                Floats total = load(sums[r] + o);
                for (int k = 0; k < AT_ONCE; ++k) total = fma(weights[k], scale[r][k], total);
                store(total, sums[r] + o);
            }
        };
        const int64_t whole = m.outputs / LANES * LANES, rest = m.outputs - whole;
        for (int64_t o = 0; o < whole; o += LANES)
            add(o, [](auto *at) { return Floats::load(at); }, [](Floats v, float *to) { v.store(to); });
        if (rest)
            add(whole, [=](auto *at) { return load_part(at, rest); },
                [=](Floats v, float *to) { store_up_to(v, to, rest); });
    }
}

template <class T>
void add_strip(const dbrx_matrix &m, int64_t strip, const float *const *x, const float *factors, int64_t n, float *const *sums) {
    for (; n >= 4; n -= 4, x += 4, factors += 4, sums += 4) add_strip<T, 4>(m, strip, x, factors, sums);
    if (n >= 2) {
        add_strip<T, 2>(m, strip, x, factors, sums);
        n -= 2, x += 2, factors += 2, sums += 2;
    }
    if (n == 1) add_strip<T, 1>(m, strip, x, factors, sums);
}

inline void multiply_strip(const dbrx_matrix &m, int64_t strip, const float *const *x, const float *factors, int64_t n,
                           float *const *sums) {
    if (m.format == DBRX_F32) add_strip<float>(m, strip, x, factors, n, sums);
    else add_strip<uint16_t>(m, strip, x, factors, n, sums);
}

// One product as a phase of a job.
class Linear {
  public:
    Linear(Pool &pool, const dbrx_matrix &m, int64_t n, Arena &arena)
        : pool_(pool), m_(m), n_(n), prepared_(Prepared::take(arena, m, n)),
          each_(piece_outputs(m.outputs, row_bytes(m), pool.threads())) {}

    void prepare(int64_t row, const float *x) const { prepared_.set(m_, row, x); }
    int64_t pieces() const { return (m_.outputs + each_ - 1) / each_; }

    // y [n, outputs] = the product, or what y was and the product.
    void work(int64_t piece, int thread, float *y, bool add) const {
        const int64_t first = piece * each_, last = std::min(m_.outputs, first + each_);
        for (int64_t row = 0; row < n_; row += MAX_ROWS) {
            const int64_t count = std::min<int64_t>(MAX_ROWS, n_ - row);
            const std::byte *x[MAX_ROWS];
            for (int64_t r = 0; r < count; ++r) x[r] = prepared_.row(row + r);
            float *to = y + row * m_.outputs + first;
            if (!add) {
                multiply(m_, first, last, x, count, to, m_.outputs);
                continue;
            }
            float found[MAX_ROWS * MAX_OUTPUTS];
            multiply(m_, first, last, x, count, found, MAX_OUTPUTS);
            for (int64_t r = 0; r < count; ++r)
                for (int64_t i = 0; i < last - first; ++i) to[r * m_.outputs + i] += found[r * MAX_OUTPUTS + i];
        }
        pool_.count(thread, (last - first) * row_bytes(m_), 2 * (last - first) * m_.inputs * n_);
    }

  private:
    Pool &pool_;
    const dbrx_matrix &m_;
    int64_t n_;
    Prepared prepared_;
    int64_t each_;
};

}  // namespace dbrx
