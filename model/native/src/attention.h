// Attention of single tokens, each over the keys and values of its own sequence.
//
// The queries of a group share a key head: a key, and a value, is read once for all of them. Long sequences are cut into
// chunks, whose bounds depend on the number of tokens alone; each chunk of each key head is a piece of work, with a softmax of
// its own (largest score, sum, weighted values), and these are put together in their order.
#pragma once
#include "activations.h"
#include "pool.h"

namespace dbrx {

class Attention {
  public:
    Attention(Pool &pool, const dbrx_block &block, int64_t n, const dbrx_kv *kv, Arena &arena)
        : pool_(pool), b_(block), n_(n), kv_(kv), group_(block.heads / block.kv_heads), width_(block.head_dim),
          stride_(8 + (width_ + 7) / 8 * 8), qkv_(arena.take<float>(n * row_floats())), first_(arena.take<int64_t>(n + 1)) {
        int64_t chunks = 0;
        for (int64_t row = 0; row < n; ++row) {
            if (first_) first_[row] = chunks;
            chunks += chunks_of(row);
        }
        if (first_) first_[n] = chunks;
        partial_ = arena.take<float>(chunks * b_.heads * stride_);
    }

    int64_t row_floats() const { return int64_t(b_.heads + 2 * b_.kv_heads) * width_; }
    float *qkv(int64_t row) const { return qkv_ + row * row_floats(); }
    int64_t pieces() const { return first_[n_] * b_.kv_heads; }

    // Clip and turn queries, keys and values of a row; write keys and values behind those that are there.
    void begin(int64_t row) const {
        const dbrx_kv &kv = kv_[row];
        float *x = qkv(row);
        for (int64_t i = 0; i < row_floats(); ++i) x[i] = std::clamp(x[i], -b_.clip, b_.clip);  // NaN stays
        const float scale = 1 / std::sqrt(float(width_));
        const int64_t half = width_ / 2;
        for (int head = 0; head < b_.heads + b_.kv_heads; ++head) {
            float *at = x + head * width_;
            const float factor = head < b_.heads ? scale : 1;
            for (int64_t i = 0; i < half; ++i) {
                const float low = at[i], high = at[i + half];
                at[i] = (low * kv.cos[i] + high * kv.sin[i]) * factor;
                at[i + half] = (high * kv.cos[i + half] + low * kv.sin[i + half]) * factor;
            }
        }
        const float *keys = x + b_.heads * width_, *values = keys + b_.kv_heads * width_;
        for (int head = 0; head < b_.kv_heads; ++head) {
            put(kv, kv.keys, head, keys + head * width_);
            put(kv, kv.values, head, values + head * width_);
        }
    }

    void work(int64_t piece, int thread) const {
        const int64_t chunk = piece / b_.kv_heads, head = piece % b_.kv_heads;
        const int64_t row = std::upper_bound(first_, first_ + n_, chunk) - first_ - 1;
        const int64_t tokens = kv_[row].position + 1, each = chunk_tokens(tokens);
        const int64_t begin = (chunk - first_[row]) * each, end = std::min(tokens, begin + each);
        float *out = partial_ + (chunk * b_.heads + head * group_) * stride_;
        const float *queries = qkv(row) + head * group_ * width_;
        if (kv_[row].format == DBRX_F32) attend<float>(kv_[row], head, begin, end, queries, out);
        else attend<uint16_t>(kv_[row], head, begin, end, queries, out);
        const int64_t bytes = kv_[row].format == DBRX_F32 ? 4 : 2;
        pool_.count(thread, 2 * (end - begin) * width_ * bytes, 4 * (end - begin) * width_ * group_);
    }

    // What all chunks of a row found, put together: out [heads * head_dim].
    void end(int64_t row, float *out) const {
        const int64_t chunks = first_[row + 1] - first_[row];
        for (int head = 0; head < b_.heads; ++head) {
            const float *found = partial_ + (first_[row] * b_.heads + head) * stride_;
            const int64_t apart = b_.heads * stride_;
            float most = found[0], total = 0;
            for (int64_t c = 1; c < chunks; ++c) most = std::max(most, found[c * apart]);
            float *to = out + head * width_;
            std::fill(to, to + width_, 0.0f);
            for (int64_t c = 0; c < chunks; ++c) {
                const float share = std::exp(found[c * apart] - most);
                total += share * found[c * apart + 1];
                for (int64_t i = 0; i < width_; ++i) to[i] += share * found[c * apart + 8 + i];
            }
            for (int64_t i = 0; i < width_; ++i) to[i] /= total;
        }
    }

  private:
    static constexpr int64_t AT_ONCE = 32;  // tokens whose scores are known before their values are read
    static constexpr int64_t CHUNK = 256, MOST_CHUNKS = 32;
    static constexpr int QUERIES = 4;

    static int64_t chunk_tokens(int64_t tokens) {
        return std::max(CHUNK, ((tokens + MOST_CHUNKS - 1) / MOST_CHUNKS + 63) / 64 * 64);
    }
    int64_t chunks_of(int64_t row) const {
        const int64_t tokens = kv_[row].position + 1, each = chunk_tokens(tokens);
        return (tokens + each - 1) / each;
    }

    void put(const dbrx_kv &kv, void *const *blocks, int64_t head, const float *from) const {
        void *block = blocks[kv.position / kv.block_tokens];
        const int64_t at = kv.position % kv.block_tokens * kv.token_stride + head * kv.head_stride;
        if (kv.format == DBRX_F32) std::copy(from, from + width_, static_cast<float *>(block) + at);
        else std::transform(from, from + width_, static_cast<uint16_t *>(block) + at, narrow);
    }

    // One key head's tokens begin <= t < end. out: for each query of the group largest score, sum, and from 8 on values.
    template <class T>
    void attend(const dbrx_kv &kv, int64_t head, int64_t begin, int64_t end, const float *queries, float *out) const {
        for (int64_t q = 0; q < group_; ++q) {
            std::fill(out + q * stride_, out + (q + 1) * stride_, 0.0f);
            out[q * stride_] = -INFINITY;
        }
        for (int64_t t = begin; t < end; t += AT_ONCE) {
            const int64_t count = std::min(AT_ONCE, end - t);
            const T *keys[AT_ONCE], *values[AT_ONCE];
            for (int64_t i = 0; i < count; ++i) {
                const int64_t block = (t + i) / kv.block_tokens;
                const int64_t at = (t + i) % kv.block_tokens * kv.token_stride + head * kv.head_stride;
                keys[i] = static_cast<const T *>(kv.keys[block]) + at;
                values[i] = static_cast<const T *>(kv.values[block]) + at;
            }
            for (int64_t q = 0; q < group_; q += QUERIES) {
                const float *of = queries + q * width_;
                float *to = out + q * stride_;
                switch (std::min<int64_t>(QUERIES, group_ - q)) {
                    case 1: step<T, 1>(keys, values, count, of, to); break;
                    case 2: step<T, 2>(keys, values, count, of, to); break;
                    case 3: step<T, 3>(keys, values, count, of, to); break;
                    default: step<T, 4>(keys, values, count, of, to);
                }
            }
        }
    }

    // Q queries and some tokens: two keys at a time, then two vectors of each value, meet all queries in registers.
    template <class T, int Q>
    void step(const T *const *keys, const T *const *values, int64_t count, const float *queries, float *out) const {
        float scores[Q][AT_ONCE];
        const int64_t whole = width_ / LANES * LANES, rest = width_ - whole;
        for (int64_t t = 0; t < count; t += 2) {
            const T *const pair[2] = {keys[t], keys[std::min(t + 1, count - 1)]};
            Floats sums[Q][2];
            for (auto &row : sums) row[0] = row[1] = Floats::all(0);
            const auto add = [&](int64_t k, auto load) {
                const Floats first = load(pair[0] + k), second = load(pair[1] + k);
                for (int q = 0; q < Q; ++q) {
                    const Floats query = load(queries + q * width_ + k);
                    sums[q][0] = fma(first, query, sums[q][0]);
                    sums[q][1] = fma(second, query, sums[q][1]);
                }
            };
            for (int64_t k = 0; k < whole; k += LANES) add(k, [](auto *at) { return Floats::load(at); });
            if (rest) add(whole, [=](auto *at) { return load_part(at, rest); });
            for (int q = 0; q < Q; ++q)
                for (int i = 0; i < 2; ++i) scores[q][t + i] = sum(sums[q][i]);
        }
        float shrink[Q];
        for (int q = 0; q < Q; ++q) {
            float *to = out + q * stride_;
            const float most = std::max(to[0], *std::max_element(scores[q], scores[q] + count));
            shrink[q] = std::exp(to[0] - most);
            to[1] = to[1] * shrink[q] + exponentials(scores[q], count, most);
            to[0] = most;
        }
        const auto add = [&]<int V>(int64_t k, auto load) {
            Floats sums[Q][V];
            for (int q = 0; q < Q; ++q)
                for (int v = 0; v < V; ++v)
                    sums[q][v] = Floats::load(out + q * stride_ + 8 + k + v * LANES) * Floats::all(shrink[q]);
            for (int64_t t = 0; t < count; ++t) {
                Floats value[V];
                for (int v = 0; v < V; ++v) value[v] = load(values[t] + k + v * LANES);
                for (int q = 0; q < Q; ++q)
                    for (int v = 0; v < V; ++v) sums[q][v] = fma(value[v], Floats::all(scores[q][t]), sums[q][v]);
            }
            for (int q = 0; q < Q; ++q)
                for (int v = 0; v < V; ++v) sums[q][v].store(out + q * stride_ + 8 + k + v * LANES);
        };
        const auto load = [](auto *at) { return Floats::load(at); };
        int64_t k = 0;
        for (; k + 2 * LANES <= whole; k += 2 * LANES) add.template operator()<2>(k, load);
        if (k < whole) add.template operator()<1>(k, load);
        if (rest) add.template operator()<1>(whole, [=](auto *at) { return load_part(at, rest); });
    }

    Pool &pool_;
    const dbrx_block &b_;
    int64_t n_;
    const dbrx_kv *kv_;
    int64_t group_, width_, stride_;
    float *qkv_;
    int64_t *first_;  // chunk of each row, and all of them
    float *partial_;
};

}  // namespace dbrx
