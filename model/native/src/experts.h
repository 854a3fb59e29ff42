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
          strips_(like.w2.transposed ? strips(like.w2) : 1), sums_(arena.take<float>(room_ * strips_ * d_)),
          inner_(Prepared::take(arena, like.w1, n)),
          gate_places_(Places::shared(hidden_, 2 * row_bytes(like.w1), pool.threads())),
          down_places_(Places::shared(d_, row_bytes(like.w2), pool.threads())) {
        if (!like.w2.transposed) outer_ = Prepared::take(arena, like.w2, room_);
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
    int64_t gate_pieces() const { return n_active_ * gate_places_.pieces(); }
    void gate_work(int64_t piece, int thread) const {
        const int64_t active = piece / gate_places_.pieces(), at = piece % gate_places_.pieces();
        const dbrx_expert &expert = expert_of(active);
        for (int64_t slot = starts_[active]; slot < starts_[active + 1]; slot += MAX_ROWS) {
            const int64_t count = std::min<int64_t>(MAX_ROWS, starts_[active + 1] - slot);
            const std::byte *x[MAX_ROWS];
            for (int64_t r = 0; r < count; ++r) x[r] = inner_.row(slots_[slot + r].row);
            multiply(expert.w1, gate_places_, at, x, count, gate_ + slot * hidden_, hidden_);
            multiply(expert.v1, gate_places_, at, x, count, up_ + slot * hidden_, hidden_);
            for (int64_t r = slot; r < slot + count; ++r)
                gate_places_.ranges(at, [&](int64_t first, int64_t last) {
                    gate_times_up(activation_, gate_ + r * hidden_ + first, up_ + r * hidden_ + first, last - first);
                });
        }
        count(active, thread, 2 * gate_places_.count(at), like_.w1);
    }

    // Down: a piece is some outputs of one expert, or, of a transposed matrix, a strip of it.
    int64_t down_pieces() const {
        if (like_.w2.transposed) return n_active_ * strips_;
        for (int64_t i = 0; i < n_slots_; ++i) outer_.set(like_.w2, i, gate_ + i * hidden_);
        return n_active_ * down_places_.pieces();
    }
    void down_work(int64_t piece, int thread) const {
        if (like_.w2.transposed) return strip_work(piece, thread);
        const int64_t active = piece / down_places_.pieces(), at = piece % down_places_.pieces();
        for (int64_t slot = starts_[active]; slot < starts_[active + 1]; slot += MAX_ROWS) {
            const int64_t count = std::min<int64_t>(MAX_ROWS, starts_[active + 1] - slot);
            const std::byte *x[MAX_ROWS];
            for (int64_t r = 0; r < count; ++r) x[r] = outer_.row(slot + r);
            multiply(expert_of(active).w2, down_places_, at, x, count, sums_ + slot * d_, d_);
        }
        count(active, thread, down_places_.count(at), like_.w2);
    }

    // out [n, d] = x, NULL for zeros, plus the weighted sum over a row's slots: a piece is some numbers of all rows.
    int64_t add_pieces() const { return (d_ + ADD_EACH - 1) / ADD_EACH; }
    void add_work(int64_t piece, const float *x, float *out) const {
        const int64_t first = piece * ADD_EACH, last = std::min(d_, first + ADD_EACH);
        for (int64_t row = 0; row < n_; ++row)
            for (int64_t o = row * d_ + first; o < row * d_ + last; ++o) out[o] = x ? x[o] : 0;
        for (int64_t i = 0; i < n_slots_; ++i) {
            float *to = out + slots_[i].row * d_;
            for (int64_t strip = 0; strip < strips_; ++strip) {
                const float *sums = sums_ + (i * strips_ + strip) * d_;
                for (int64_t o = first; o < last; ++o) to[o] += slots_[i].weight * sums[o];
            }
        }
    }

  private:
    static constexpr int64_t ADD_EACH = 256;

    const dbrx_expert &expert_of(int64_t active) const { return experts_[slots_[starts_[active]].expert]; }

    void strip_work(int64_t piece, int thread) const {
        const int64_t active = piece / strips_, strip = piece % strips_;
        const dbrx_matrix &w2 = expert_of(active).w2;
        for (int64_t slot = starts_[active]; slot < starts_[active + 1]; slot += MAX_ROWS) {
            const int64_t count = std::min<int64_t>(MAX_ROWS, starts_[active + 1] - slot);
            const float *x[MAX_ROWS];
            float *sums[MAX_ROWS];
            for (int64_t r = 0; r < count; ++r) {
                x[r] = gate_ + (slot + r) * hidden_;
                sums[r] = sums_ + ((slot + r) * strips_ + strip) * d_;
            }
            multiply_strip(w2, strip, x, count, sums);
        }
        const int64_t rows = std::min(STRIP, hidden_ - strip * STRIP);
        pool_.count(thread, rows * row_bytes(w2) / w2.inputs * d_, 2 * rows * d_ * (starts_[active + 1] - starts_[active]));
    }

    void count(int64_t active, int thread, int64_t outputs, const dbrx_matrix &m) const {
        pool_.count(thread, outputs * row_bytes(m), 2 * outputs * m.inputs * (starts_[active + 1] - starts_[active]));
    }

    Pool &pool_;
    const dbrx_expert *experts_;
    const dbrx_expert &like_;
    int activation_;
    int64_t n_, hidden_, d_, room_;
    Slot *slots_;
    int64_t *starts_, n_slots_ = 0, n_active_ = 0;
    float *gate_, *up_;
    int64_t strips_;  // sums of a slot
    float *sums_;
    Prepared inner_, outer_;
    Places gate_places_, down_places_;
};

}  // namespace dbrx
