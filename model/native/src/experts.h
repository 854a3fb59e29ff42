// The chosen experts of a layer: gate and up, the activation, down, the weighted sum.
//
// A slot is one row of one chosen expert. Slots are ordered by expert, then by row: rows 0 and 1 with experts {5, 2} and
// {2, 7} are the slots (2: row 0), (2: row 1), (5: row 0), (7: row 1). A row's experts are added in that order, so its sum
// does not depend on the rows beside it.
#pragma once
#include "gemv.h"

namespace dbrx {

struct Slot {
    int32_t expert, row;
    float weight;
};

class Experts {
  public:
    // n rows that choose top_k each; `like`: an expert whose sizes and formats all others share.
    Experts(Pool &pool, const dbrx_expert *experts, const dbrx_expert &like, int activation, int64_t n, int top_k, Arena &arena)
        : pool_(pool), experts_(experts), like_(like), activation_(activation), n_(n), hidden_(like.w1.outputs),
          d_(like.w2.outputs), room_(n * top_k), slots_(arena.take<Slot>(room_)), starts_(arena.take<int64_t>(room_ + 1)),
          gate_(arena.take<float>(room_ * hidden_)), up_(arena.take<float>(room_ * hidden_)),
          inner_(Prepared::take(arena, like.w1, n)),
          gate_each_(piece_outputs(hidden_, 2 * row_bytes(like.w1), pool.threads())) {
        if (like.w2.transposed) sums_ = arena.take<float>(room_ * strips(like.w2) * d_);
        else outer_ = Prepared::take(arena, like.w2, room_);
    }

    // Which experts first <= i < last compute what.
    void choose(const int32_t *ids, const float *weights, int top_k, int first, int last) {
        n_slots_ = n_active_ = 0;
        for (int64_t i = 0; i < n_ * top_k; ++i)
            if (first <= ids[i] && ids[i] < last) slots_[n_slots_++] = {ids[i], int32_t(i / top_k), weights[i]};
        std::sort(slots_, slots_ + n_slots_, [](const Slot &a, const Slot &b) {
            return a.expert != b.expert ? a.expert < b.expert : a.row < b.row;
        });
        for (int64_t i = 0; i < n_slots_; ++i)
            if (i == 0 || slots_[i].expert != slots_[i - 1].expert) starts_[n_active_++] = i;
        starts_[n_active_] = n_slots_;
    }

    void prepare(int64_t row, const float *x) const { inner_.set(like_.w1, row, x); }

    // gate = activation(w1 x) * (v1 x): a piece is some hidden rows of one expert.
    int64_t d_model() const { return d_; }
    int64_t gate_pieces() const { return n_active_ * per_expert(hidden_, gate_each_); }
    void gate_work(int64_t piece, int thread) const {
        const int64_t per = per_expert(hidden_, gate_each_), active = piece / per;
        const int64_t first = piece % per * gate_each_, last = std::min(hidden_, first + gate_each_);
        const dbrx_expert &expert = expert_of(active);
        for (int64_t slot = starts_[active]; slot < starts_[active + 1]; slot += MAX_ROWS) {
            const int64_t count = std::min<int64_t>(MAX_ROWS, starts_[active + 1] - slot);
            const std::byte *x[MAX_ROWS];
            for (int64_t r = 0; r < count; ++r) x[r] = inner_.row(slots_[slot + r].row);
            for (const auto &[matrix, to] : {std::pair{&expert.w1, gate_}, std::pair{&expert.v1, up_}}) {
                multiply(*matrix, first, last, x, count, to + slot * hidden_ + first, hidden_);
            }
            for (int64_t r = slot; r < slot + count; ++r)
                gate_times_up(activation_, gate_ + r * hidden_ + first, up_ + r * hidden_ + first, last - first);
        }
        const int64_t rows = starts_[active + 1] - starts_[active];
        pool_.count(thread, 2 * (last - first) * row_bytes(like_.w1), 4 * (last - first) * like_.w1.inputs * rows);
    }

    // Down. Of a matrix row by row a piece is some outputs of all experts; of a transposed one, a strip of one expert.
    int64_t down_pieces() const {
        if (like_.w2.transposed) return n_active_ * strips(like_.w2);
        for (int64_t i = 0; i < n_slots_; ++i) outer_.set(like_.w2, i, gate_ + i * hidden_);
        return per_expert(d_, down_each());
    }
    // out [n, d] = x + the sum over a row's slots; transposed: later, in `add_up`.
    void down_work(int64_t piece, int thread, const float *x, float *out) const {
        if (like_.w2.transposed) return strip_work(piece, thread);
        const int64_t first = piece * down_each(), last = std::min(d_, first + down_each());
        begin_sums(x, out, first, last);
        for (int64_t active = 0; active < n_active_; ++active)
            for (int64_t slot = starts_[active]; slot < starts_[active + 1]; slot += MAX_ROWS) {
                const int64_t count = std::min<int64_t>(MAX_ROWS, starts_[active + 1] - slot);
                const std::byte *rows[MAX_ROWS];
                for (int64_t r = 0; r < count; ++r) rows[r] = outer_.row(slot + r);
                float found[MAX_ROWS * MAX_OUTPUTS];
                multiply(expert_of(active).w2, first, last, rows, count, found, MAX_OUTPUTS);
                for (int64_t r = 0; r < count; ++r) {
                    const Slot &of = slots_[slot + r];
                    float *to = out + of.row * d_ + first;
                    for (int64_t i = 0; i < last - first; ++i) to[i] += of.weight * found[r * MAX_OUTPUTS + i];
                }
            }
        pool_.count(thread, n_active_ * (last - first) * row_bytes(like_.w2), 2 * (last - first) * hidden_ * n_slots_);
    }

    // The strips' sums, in order; a piece is some numbers of all rows.
    int64_t add_pieces() const { return like_.w2.transposed ? per_expert(d_, ADD_EACH) : 0; }
    void add_work(int64_t piece, const float *x, float *out) const {
        const int64_t first = piece * ADD_EACH, last = std::min(d_, first + ADD_EACH);
        begin_sums(x, out, first, last);
        for (int64_t i = 0; i < n_slots_; ++i) {
            float *to = out + slots_[i].row * d_;
            for (int64_t strip = 0; strip < strips(like_.w2); ++strip) {
                const float *sums = sums_ + (i * strips(like_.w2) + strip) * d_;
                for (int64_t o = first; o < last; ++o) to[o] += sums[o];
            }
        }
    }

  private:
    static constexpr int64_t ADD_EACH = 256;

    static int64_t per_expert(int64_t outputs, int64_t each) { return (outputs + each - 1) / each; }
    int64_t down_each() const {
        return piece_outputs(d_, row_bytes(like_.w2) * std::max<int64_t>(1, n_active_), pool_.threads());
    }
    const dbrx_expert &expert_of(int64_t active) const { return experts_[slots_[starts_[active]].expert]; }

    void begin_sums(const float *x, float *out, int64_t first, int64_t last) const {
        for (int64_t row = 0; row < n_; ++row)
            for (int64_t o = row * d_ + first; o < row * d_ + last; ++o) out[o] = x ? x[o] : 0;
    }

    void strip_work(int64_t piece, int thread) const {
        const int64_t active = piece / strips(like_.w2), strip = piece % strips(like_.w2);
        const dbrx_matrix &w2 = expert_of(active).w2;
        for (int64_t slot = starts_[active]; slot < starts_[active + 1]; slot += MAX_ROWS) {
            const int64_t count = std::min<int64_t>(MAX_ROWS, starts_[active + 1] - slot);
            const float *x[MAX_ROWS];
            float factors[MAX_ROWS], *sums[MAX_ROWS];
            for (int64_t r = 0; r < count; ++r) {
                x[r] = gate_ + (slot + r) * hidden_;
                factors[r] = slots_[slot + r].weight;
                sums[r] = sums_ + ((slot + r) * strips(w2) + strip) * d_;
            }
            multiply_strip(w2, strip, x, factors, count, sums);
        }
        const int64_t rows = std::min(STRIP, hidden_ - strip * STRIP);
        pool_.count(thread, rows * row_bytes(w2) / w2.inputs * d_, 2 * rows * d_ * (starts_[active + 1] - starts_[active]));
    }

    Pool &pool_;
    const dbrx_expert *experts_;
    const dbrx_expert &like_;
    int activation_;
    int64_t n_, hidden_, d_, room_;
    Slot *slots_;
    int64_t *starts_, n_slots_ = 0, n_active_ = 0;
    float *gate_, *up_, *sums_ = nullptr;
    Prepared inner_, outer_;
    int64_t gate_each_;
};

}  // namespace dbrx
