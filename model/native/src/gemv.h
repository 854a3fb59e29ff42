// Products of few activation rows (up to 16) with a matrix: each weight is read from memory once.
#pragma once
#include <algorithm>

#include "formats/blocks.h"
#include "formats/floats.h"
#include "formats/affine.h"
#include "formats/groups.h"
#include "formats/int8.h"
#include "pool.h"

namespace dbrx {

constexpr int MAX_ROWS = DBRX_GEMV_MAX_ROWS;
constexpr int64_t PIECE_BYTES = 256 * 1024;  // of weights, that a thread takes at once
constexpr int PLACES = 4;                   // of a matrix that a core reads side by side: of one it has too few bytes under way

// f(format) with the `Spans` of a matrix that other programs made.
template <class F>
auto with_spans(const dbrx_matrix &m, F f) {
    if (m.format < DBRX_Q4_0) return with_groups(m, f);
    return with_blocks(m, [&](auto type) { return f(Spans<BlockSpan<decltype(type)>>{}); });
}

// f(format) with the struct of formats/ that reads such a matrix.
template <class F>
auto with_format(const dbrx_matrix &m, F f) {
    switch (m.format) {
        case DBRX_F32: return f(F32{});
        case DBRX_BF16: return f(BF16{});
        case DBRX_INT8: return f(Int8{});
        case DBRX_INT3: return f(Affine<3, 128>{});
        case DBRX_INT4: break;
        default: return with_spans(m, f);
    }
    switch (m.group) {
        case 32: return f(Affine<4, 32>{});
        case 64: return f(Affine<4, 64>{});
        case 128: return f(Affine<4, 128>{});
        default: return f(Affine<4, 256>{});
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

// The outputs of a matrix in pieces: `each` behind each other at each of four places, which lie a quarter of the matrix
// apart. A thread takes pieces behind each other, so at each place it reads on where it was, as processors expect it:
// that is a quarter faster than places that begin anew with each piece.
//     10 outputs, each 2: quarters begin at 0, 3, 6 and 9; pieces {0 1, 3 4, 6 7, 9} and {2, 5, 8}
struct Places {
    int64_t outputs, apart, each;

    static Places whole(int64_t outputs) { return {outputs, quarter(outputs), quarter(outputs)}; }
    // Pieces of some 256 KiB of weights, less where there would be too few of them to share evenly.
    static Places shared(int64_t outputs, int64_t bytes_each, int threads) {
        const int64_t of_size = PIECE_BYTES / (PLACES * bytes_each), fair = quarter(outputs) / (2 * threads);
        const int64_t each = std::max<int64_t>(1, std::min(of_size, fair));
        return {outputs, quarter(outputs), each < LANES ? each : each / LANES * LANES};
    }
    int64_t pieces() const { return (apart + each - 1) / each; }
    // f(first, last) for the outputs of a piece at each place.
    template <class F>
    void ranges(int64_t piece, F f) const {
        for (int64_t place = 0; place < PLACES; ++place) {
            const int64_t first = place * apart + piece * each;
            f(first, std::min({first + each, (place + 1) * apart, outputs}));
        }
    }
    int64_t count(int64_t piece) const {  // of its outputs
        int64_t total = 0;
        ranges(piece, [&](int64_t first, int64_t last) { total += std::max<int64_t>(0, last - first); });
        return total;
    }

  private:
    static int64_t quarter(int64_t outputs) { return (outputs + PLACES - 1) / PLACES; }
};

// f.operator()<R>() for R = count, from LEAST to MOST.
template <int LEAST, int MOST, class F>
void with_count(int64_t count, F f) {
    if constexpr (MOST > LEAST)
        if (count < MOST) return with_count<LEAST, MOST - 1>(count, f);
    f.template operator()<MOST>();
}

// out[r * stride + o] = the product, or what it was and the product, for the outputs of a piece and n rows. In registers
// LEAST to MOST rows meet an output of W places.
template <class Format, int W, int LEAST, int MOST>
void multiply(const dbrx_matrix &m, const Places &places, int64_t piece, const std::byte *const *x, int64_t n, float *out,
              int64_t stride, bool add) {
    const int64_t first = piece * places.each, last = std::min(first + places.each, places.apart);
    for (int64_t o = first; o < last; ++o) {
        const int64_t there = std::min<int64_t>(PLACES, (m.outputs - 1 - o) / places.apart + 1);
        for (int64_t place = 0; place < there; place += W) {
            int64_t outputs[W];  // behind the last output it is computed again, and not stored
            for (int w = 0; w < W; ++w) outputs[w] = std::min(o + (place + w) * places.apart, m.outputs - 1);
            for (int64_t row = 0, tiles = (n + MOST - 1) / MOST, count; row < n; row += count, --tiles) {
                count = (n - row + tiles - 1) / tiles;  // 5 rows are 3 and 2
                with_count<LEAST, MOST>(count, [&]<int R>() {
                    float y[W][R];
                    Format::template dot<W, R>(m, outputs, x + row, y);
                    for (int64_t w = 0; w < std::min<int64_t>(W, there - place); ++w)
                        for (int r = 0; r < R; ++r) {
                            float &to = out[(row + r) * stride + outputs[w]];
                            to = add ? to + y[w][r] : y[w][r];
                        }
                });
            }
        }
    }
}

// One row meets all places, so that a core has as much of them under way as it can; of several rows a format says what fits.
inline void multiply(const dbrx_matrix &m, const Places &places, int64_t piece, const std::byte *const *x, int64_t n,
                     float *out, int64_t stride, bool add = false) {
    with_format(m, [&](auto format) {
        using Format = decltype(format);
        if constexpr (ROWS_AT_ONCE == 1) multiply<Format, 1, 1, 1>(m, places, piece, x, n, out, stride, add);
        else if (n == 1) multiply<Format, PLACES, 1, 1>(m, places, piece, x, n, out, stride, add);
        else multiply<Format, Format::AT_ONCE, 2, ROWS_AT_ONCE>(m, places, piece, x, n, out, stride, add);
    });
}

// Floats that are stored [inputs, outputs]: rows are scaled and added up. A strip is so many stored rows; each has a sum of
// its own, added in their order later, so that threads can share the work and the numbers do not depend on how.
constexpr int64_t STRIP = 128;

inline int64_t strips(const dbrx_matrix &m) { return (m.inputs + STRIP - 1) / STRIP; }

// sums[r] [outputs] of one strip, for R rows x[r] of all inputs. Eight stored rows are added at once, from eight places of the strip:
//     of rows 0 to 127 first 0, 16, 32 ... 112, then 1, 17, 33 ... 113
template <class T, int R>
void add_strip(const dbrx_matrix &m, int64_t strip, const float *const *x, float *const *sums) {
    constexpr int AT_ONCE = 8, STEP = 2 * LANES;
    const T *values = static_cast<const T *>(m.values);
    const int64_t begin = strip * STRIP, end = std::min(m.inputs, begin + STRIP), apart = (end - begin + AT_ONCE - 1) / AT_ONCE;
    const int64_t whole = m.outputs / STEP * STEP;
    for (int r = 0; r < R; ++r) std::fill(sums[r], sums[r] + m.outputs, 0.0f);
    for (int64_t i = begin; i < begin + apart; ++i) {
        Floats scale[R][AT_ONCE];
        const T *rows[AT_ONCE];
        for (int k = 0; k < AT_ONCE; ++k) {
            const int64_t at = i + k * apart;
            rows[k] = values + std::min(at, end - 1) * m.outputs;  // behind the last: times zero
            for (int r = 0; r < R; ++r) scale[r][k] = Floats::all(at < end ? x[r][at] : 0);
        }
        for (int64_t o = 0; o < whole; o += STEP) {
            Floats totals[R][2];
            for (int r = 0; r < R; ++r) totals[r][0] = Floats::load(sums[r] + o), totals[r][1] = Floats::load(sums[r] + o + LANES);
            for (int k = 0; k < AT_ONCE; ++k) {
                Floats weights[2];
                read_ahead(rows[k] + o);
                load_weights(rows[k] + o, weights);
                for (int r = 0; r < R; ++r)
                    for (int half = 0; half < 2; ++half) totals[r][half] = fma(weights[half], scale[r][k], totals[r][half]);
            }
            for (int r = 0; r < R; ++r) totals[r][0].store(sums[r] + o), totals[r][1].store(sums[r] + o + LANES);
        }
        for (int64_t o = whole; o < m.outputs; o += LANES)
            for (int r = 0; r < R; ++r) {
                Floats total = load_up_to(sums[r] + o, m.outputs - o);
                for (int k = 0; k < AT_ONCE; ++k) total = fma(load_up_to(rows[k] + o, m.outputs - o), scale[r][k], total);
                store_up_to(total, sums[r] + o, m.outputs - o);
            }
    }
    if (EVEN_FIRST && sizeof(T) == 2)
        for (int r = 0; r < R; ++r) even_last(sums[r], whole, STEP);
}

template <class T>
void add_strip(const dbrx_matrix &m, int64_t strip, const float *const *x, int64_t n, float *const *sums) {
    for (; n >= 4; n -= 4, x += 4, sums += 4) add_strip<T, 4>(m, strip, x, sums);
    if (n >= 2) {
        add_strip<T, 2>(m, strip, x, sums);
        n -= 2, x += 2, sums += 2;
    }
    if (n == 1) add_strip<T, 1>(m, strip, x, sums);
}

inline void multiply_strip(const dbrx_matrix &m, int64_t strip, const float *const *x, int64_t n, float *const *sums) {
    if (m.format == DBRX_F32) add_strip<float>(m, strip, x, n, sums);
    else add_strip<uint16_t>(m, strip, x, n, sums);
}

// One product as a phase of a job.
class Linear {
  public:
    Linear(Pool &pool, const dbrx_matrix &m, int64_t n, Arena &arena)
        : pool_(pool), m_(m), n_(n), prepared_(Prepared::take(arena, m, n)),
          places_(Places::shared(m.outputs, row_bytes(m), pool.threads())) {}

    void prepare(int64_t row, const float *x) const { prepared_.set(m_, row, x); }
    int64_t pieces() const { return places_.pieces(); }

    // y [n, outputs] = the product, or what y was and the product; n <= MAX_ROWS.
    void work(int64_t piece, int thread, float *y, bool add) const {
        const std::byte *x[MAX_ROWS];
        for (int64_t r = 0; r < n_; ++r) x[r] = prepared_.row(r);
        multiply(m_, places_, piece, x, n_, y, m_.outputs, add);
        const int64_t count = places_.count(piece);
        pool_.count(thread, count * row_bytes(m_), 2 * count * m_.inputs * n_);
    }

  private:
    Pool &pool_;
    const dbrx_matrix &m_;
    int64_t n_;
    Prepared prepared_;
    Places places_;
};

}  // namespace dbrx
