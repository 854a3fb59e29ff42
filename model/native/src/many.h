// The chosen experts of a layer for many rows: like `Experts`, by gemm.
//
// A piece of work is some outputs of one expert, of whatever expert: threads wait for each other between two phases only,
// five times a layer, and never inside an expert. What an expert gives a row is kept by slot and added up in the end, by
// ascending expert, so that a row's sum does not depend on who computed what.
//
// Memory: beside prepared rows a slot takes 4 bytes for each inner number, or each of its sums, which come into their place; as
// many rows go through at once as SCRATCH_BYTES hold.
#pragma once
#include "experts.h"
#include "gemm.h"

namespace dbrx {

constexpr int64_t SCRATCH_BYTES = int64_t(256) << 20;

class ManyRows {
  public:
    ManyRows(Pool &pool, const dbrx_expert *experts, const dbrx_expert &like, int activation, int64_t n, int top_k, Arena &arena)
        : pool_(pool), experts_(experts), like_(like), activation_(activation), top_k_(top_k), n_(n), hidden_(like.w1.outputs),
          d_(like.w2.outputs), room_(n * top_k), slots_(arena.take<Slot>(room_)), starts_(arena.take<int64_t>(room_ + 1)),
          slots_of_(arena.take<int32_t>(room_)), n_slots_of_(arena.take<int32_t>(n)), at_(arena.take<const std::byte *>(room_)),
          gate_each_(gemm_outputs(hidden_, pool.threads())), down_each_(gemm_outputs(d_, pool.threads())),
          gate_(arena.take<float>(room_ * std::max(hidden_, d_))), up_(arena.take<float>(pool.threads() * GEMM_ROWS * gate_each_)),
          found_(gate_), rows_(GemmRows::take(arena, like.w1, n)), inner_(GemmRows::take(arena, like.w2, room_)) {}

    // out [n, d] = x, NULL for zeros, plus the weighted sum of what the chosen experts first <= i < last give.
    void run(const float *normed, const int32_t *ids, const float *weights, int first, int last, const float *x, float *out) {
        choose(ids, weights, first, last);
        const Phase phases[] = {
            {[&] { return pieces(n_, ROWS); }, [&](int64_t piece, int) { prepare_rows(piece, normed); }},
            {[&] { return n_active_ * pieces(hidden_, gate_each_); }, [&](int64_t piece, int thread) { gate_work(piece, thread); }},
            {[&] { return pieces(n_slots_, ROWS); }, [&](int64_t piece, int) { prepare_inner(piece); }},
            {[&] { return n_active_ * pieces(d_, down_each_); }, [&](int64_t piece, int thread) { down_work(piece, thread); }},
            {[&] { return pieces(n_, ROWS); }, [&](int64_t piece, int) { add_work(piece, x, out); }}};
        pool_.run(phases);
    }

  private:
    static constexpr int64_t ROWS = 8;  // that are prepared or added up at once

    struct Piece {  // slots first_slot <= i < last_slot, of one expert, and some outputs
        const dbrx_expert &expert;
        int64_t slot, n, first, last;
    };

    static int64_t pieces(int64_t count, int64_t each) { return (count + each - 1) / each; }

    Piece piece_of(int64_t piece, int64_t outputs, int64_t each) const {
        const int64_t active = piece / pieces(outputs, each), first = piece % pieces(outputs, each) * each;
        const int64_t slot = starts_[active], n = starts_[active + 1] - slot;
        return {experts_[slots_[slot].expert], slot, n, first, std::min(outputs, first + each)};
    }

    // Slots by expert, then by row: count each expert's, sum up, put each into its place.
    void choose(const int32_t *ids, const float *weights, int first, int last) {
        std::vector<int64_t> next(size_t(last - first) + 1);
        const auto is_here = [&](int32_t id) { return first <= id && id < last; };
        for (int64_t i = 0; i < room_; ++i)
            if (is_here(ids[i])) next[size_t(ids[i] - first) + 1]++;
        n_active_ = 0;
        for (size_t e = 0; e + 1 < next.size(); ++e) {
            if (next[e + 1]) starts_[n_active_++] = next[e];
            next[e + 1] += next[e];
        }
        n_slots_ = starts_[n_active_] = next.back();
        for (int64_t i = 0; i < room_; ++i)
            if (is_here(ids[i])) slots_[next[size_t(ids[i] - first)]++] = {ids[i], int32_t(i / top_k_), weights[i]};
        std::fill(n_slots_of_, n_slots_of_ + n_, 0);
        for (int64_t i = 0; i < n_slots_; ++i) {
            const int32_t row = slots_[i].row;
            slots_of_[row * top_k_ + n_slots_of_[row]++] = int32_t(i);
        }
    }

    void prepare_rows(int64_t piece, const float *normed) const {
        for (int64_t i = piece * ROWS; i < std::min(n_, (piece + 1) * ROWS); ++i) {
            rows_.set(like_.w1, i, normed + i * d_, false);
            for (int j = 0; j < n_slots_of_[i]; ++j) at_[slots_of_[i * top_k_ + j]] = rows_.row(i);
        }
    }

    // gate = activation(w1 x) * (v1 x)
    void gate_work(int64_t piece, int thread) const {
        const Piece p = piece_of(piece, hidden_, gate_each_);
        float *up = up_ + thread * GEMM_ROWS * gate_each_;
        for (int64_t begin = 0; begin < p.n; begin += GEMM_ROWS) {
            const Piece some{p.expert, p.slot + begin, std::min(GEMM_ROWS, p.n - begin), p.first, p.last};
            float *gate = gate_ + some.slot * hidden_ + p.first;
            product(p.expert.w1, some, gate, hidden_);
            product(p.expert.v1, some, up, gate_each_);
            for (int64_t i = 0; i < some.n; ++i) gate_times_up(activation_, gate + i * hidden_, up + i * gate_each_, p.last - p.first);
        }
        pool_.count(thread, 2 * (p.last - p.first) * row_bytes(like_.w1), 4 * (p.last - p.first) * like_.w1.inputs * p.n);
    }

    void prepare_inner(int64_t piece) const {
        for (int64_t i = piece * ROWS; i < std::min(n_slots_, (piece + 1) * ROWS); ++i) {
            inner_.set(like_.w2, i, gate_ + i * hidden_, true);
            at_[i] = inner_.row(i);
        }
    }

    void down_work(int64_t piece, int thread) const {
        const Piece p = piece_of(piece, d_, down_each_);
        product(p.expert.w2, p, found_ + p.slot * d_ + p.first, d_);
        pool_.count(thread, (p.last - p.first) * row_bytes(like_.w2), 2 * (p.last - p.first) * hidden_ * p.n);
    }

    // out: the piece's slots and outputs, `width` numbers from a slot to the next.
    void product(const dbrx_matrix &m, const Piece &p, float *out, int64_t width) const {
        gemm(m, at_ + p.slot, p.n, p.first, p.last, [&](int64_t i, int64_t output, int count, const float *values) {
            std::copy(values, values + count, out + i * width + output - p.first);
        });
    }

    void add_work(int64_t piece, const float *x, float *out) const {
        for (int64_t i = piece * ROWS; i < std::min(n_, (piece + 1) * ROWS); ++i) {
            float *to = out + i * d_;
            if (!x) std::fill(to, to + d_, 0.0f);
            else if (x != out) std::copy(x + i * d_, x + (i + 1) * d_, to);
            for (int j = 0; j < n_slots_of_[i]; ++j) {
                const int64_t slot = slots_of_[i * top_k_ + j];
                const float weight = slots_[slot].weight, *found = found_ + slot * d_;
                for (int64_t o = 0; o < d_; ++o) to[o] += weight * found[o];
            }
        }
    }

    Pool &pool_;
    const dbrx_expert *experts_;
    const dbrx_expert &like_;
    int activation_, top_k_;
    int64_t n_, hidden_, d_, room_;
    Slot *slots_;
    int64_t *starts_, n_slots_ = 0, n_active_ = 0;
    int32_t *slots_of_, *n_slots_of_;      // of a row: [n, k], ascending; how many
    const std::byte **at_;                 // prepared rows of slots
    int64_t gate_each_, down_each_;        // outputs of a piece
    float *gate_, *up_, *found_;           // [slots, hidden]; [threads, GEMM_ROWS, gate_each]; [slots, d], where gate was
    GemmRows rows_, inner_;
};

// Any number of rows, as many at once as memory allows.
inline void many_rows(Pool &pool, const dbrx_expert *experts, const dbrx_expert &like, int activation, const float *normed,
                      int64_t n, const int32_t *ids, const float *weights, int top_k, int first, int last, const float *x,
                      float *out) {
    const int64_t d = like.w2.outputs;
    const auto bytes_of = [&](int64_t rows) {
        Arena size(nullptr);
        ManyRows(pool, experts, like, activation, rows, top_k, size);
        return int64_t(size.used());
    };
    const int64_t most = std::max<int64_t>(MAX_ROWS + 1, SCRATCH_BYTES / std::max<int64_t>(1, bytes_of(64) / 64));
    for (int64_t begin = 0; begin < n; begin += most) {
        const int64_t count = std::min(most, n - begin);
        Arena arena(pool.scratch(size_t(bytes_of(count))));
        ManyRows rows(pool, experts, like, activation, count, top_k, arena);
        rows.run(normed + begin * d, ids + begin * top_k, weights + begin * top_k, first, last, x ? x + begin * d : nullptr, out + begin * d);
    }
}

}  // namespace dbrx
