// Attention of single tokens, each over the keys and values of its own sequence.
//
// The queries of a group share a key head: a key, and a value, is read once for up to six of them. Long sequences are cut
// into chunks, whose bounds depend on the number of tokens alone; each chunk of each key head is a piece of work, with a softmax
// of its own (largest score, sum, weighted values), and these are put together in their order.
//
// A chunk is read in tiles of 32 tokens: the scores of all, their exponentials, then the values. A processor reads ahead within
// 4 KiB, about where the keys of a tile end and its values begin; so values are fetched while keys are multiplied, and the
// next tile's keys while exponentials are taken.
#pragma once
#include <numeric>

#include "activations.h"
#include "pool.h"

namespace dbrx {

class Attention {
  public:
    Attention(Pool &pool, const dbrx_block &block, int64_t n, const dbrx_kv *kv, Arena &arena)
        : pool_(pool), b_(block), n_(n), kv_(kv), group_(block.heads / block.kv_heads), width_(block.head_dim),
          padded_((width_ + STEP - 1) / STEP * STEP), stride_(VALUES + padded_), qkv_(arena.take<float>(n * row_floats())),
          queries_(arena.take<float>(n * block.heads * padded_)), first_(arena.take<int64_t>(n + 1)) {
        int64_t chunks = 0;
        for (int64_t row = 0; row < n; ++row) {
            if (first_) first_[row] = chunks;
            chunks += chunks_of(row);
        }
        if (first_) first_[n] = chunks;
        partial_ = arena.take<float>(chunks * b_.heads * stride_);
        if (width_ < padded_) copies_ = arena.take<float>(pool.threads() * 2 * TOKENS * padded_);
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
        for (int head = 0; head < b_.heads; ++head) {
            float *to = queries_ + (row * b_.heads + head) * padded_;
            std::copy_n(x + head * width_, width_, to);
            std::fill(to + width_, to + padded_, 0.0f);
            if (apart(kv)) even_first(to, padded_, STEP);
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
        const Piece of{kv_[row], head, begin, end, thread};
        const float *queries = queries_ + (row * b_.heads + head * group_) * padded_;
        float *out = partial_ + (chunk * b_.heads + head * group_) * stride_;
        if (of.kv.format == DBRX_F32) attend<float>(of, queries, out);
        else attend<uint16_t>(of, queries, out);
        const int64_t bytes = of.kv.format == DBRX_F32 ? 4 : 2;
        pool_.count(thread, 2 * (end - begin) * width_ * bytes, 4 * (end - begin) * width_ * group_);
    }

    // What all chunks of a row found, put together: out [heads * head_dim].
    void end(int64_t row, float *out) const {
        const int64_t chunks = first_[row + 1] - first_[row], distance = b_.heads * stride_;
        for (int head = 0; head < b_.heads; ++head) {
            float *found = partial_ + (first_[row] * b_.heads + head) * stride_, *values = found + VALUES;
            float most = found[0], total = 0;
            for (int64_t c = 1; c < chunks; ++c) most = std::max(most, found[c * distance]);
            for (int64_t c = 0; c < chunks; ++c) {
                const float share = std::exp(found[c * distance] - most);
                total += share * found[c * distance + 1];
                for (int64_t i = 0; i < padded_; i += LANES) {
                    const Floats of_chunk = Floats::load(values + c * distance + i) * Floats::all(share);
                    (c ? Floats::load(values + i) + of_chunk : of_chunk).store(values + i);
                }
            }
            if (apart(kv_[row])) even_last(values, padded_, STEP);
            for (int64_t i = 0; i < width_; ++i) out[head * width_ + i] = values[i] / total;
        }
    }

  private:
    static constexpr int64_t TOKENS = 32;  // of a tile
    static constexpr int64_t CHUNK = 256, MOST_CHUNKS = 32;
    static constexpr int64_t STEP = 2 * LANES, LINE = 64;
    static constexpr int64_t VALUES = 8;  // where they begin in what a piece found
    static constexpr int QUERIES = 6;  // whose sums fit into registers

    struct Piece {
        const dbrx_kv &kv;
        int64_t head, begin, end;  // tokens begin <= t < end
        int thread;
    };

    // Tokens one behind the other in a block.
    template <class T>
    struct Tile {
        const T *keys, *values;  // of the first one
        int64_t stride, count;
        const T *key(int64_t i) const { return keys + i * stride; }
        const T *value(int64_t i) const { return values + i * stride; }
    };

    static int64_t chunk_tokens(int64_t tokens) {
        return std::max(CHUNK, ((tokens + MOST_CHUNKS - 1) / MOST_CHUNKS + 63) / 64 * 64);
    }
    int64_t chunks_of(int64_t row) const {
        const int64_t tokens = kv_[row].position + 1, each = chunk_tokens(tokens);
        return (tokens + each - 1) / each;
    }

    // Whether `load_weights` gives the even numbers of a step before the odd ones.
    static bool apart(const dbrx_kv &kv) { return EVEN_FIRST && kv.format == DBRX_BF16; }

    void put(const dbrx_kv &kv, void *const *blocks, int64_t head, const float *from) const {
        void *block = blocks[kv.position / kv.block_tokens];
        const int64_t at = kv.position % kv.block_tokens * kv.token_stride + head * kv.head_stride;
        if (kv.format == DBRX_F32) std::copy(from, from + width_, static_cast<float *>(block) + at);
        else std::transform(from, from + width_, static_cast<uint16_t *>(block) + at, narrow);
    }

    template <class T>
    void fetch(const T *at) const {
        for (int64_t i = 0; i < width_; i += LINE / int64_t(sizeof(T))) __builtin_prefetch(at + i);
    }

    // The tile that begins with token t; it ends where its block does.
    template <class T>
    static Tile<T> tile_at(const Piece &of, int64_t t) {
        const int64_t block = t / of.kv.block_tokens, within = t % of.kv.block_tokens;
        const int64_t at = within * of.kv.token_stride + of.head * of.kv.head_stride;
        return {static_cast<const T *>(of.kv.keys[block]) + at, static_cast<const T *>(of.kv.values[block]) + at,
                of.kv.token_stride, std::min({TOKENS, of.end - t, of.kv.block_tokens - within})};
    }

    // The same with keys and values of whole steps: where they are not, a copy with zeros behind each.
    template <class T>
    Tile<T> in_steps(const Tile<T> &tile, int thread) const {
        if (width_ == padded_) return tile;
        T *keys = reinterpret_cast<T *>(copies_ + thread * 2 * TOKENS * padded_), *values = keys + TOKENS * padded_;
        std::fill_n(keys, 2 * TOKENS * padded_, T(0));
        for (int64_t i = 0; i < tile.count; ++i) {
            std::copy_n(tile.key(i), width_, keys + i * padded_);
            std::copy_n(tile.value(i), width_, values + i * padded_);
        }
        return {keys, values, padded_, tile.count};
    }

    // out: for each query of the group largest score, sum, and from VALUES on values.
    template <class T>
    void attend(const Piece &of, const float *queries, float *out) const {
        const int64_t passes = (group_ + QUERIES - 1) / QUERIES, each = (group_ + passes - 1) / passes;
        for (int64_t left = group_; left > 0; left -= each, queries += each * padded_, out += each * stride_) {
            switch (std::min(each, left)) {
                case 1: attend<T, 1>(of, queries, out); break;
                case 2: attend<T, 2>(of, queries, out); break;
                case 3: attend<T, 3>(of, queries, out); break;
                case 4: attend<T, 4>(of, queries, out); break;
                case 5: attend<T, 5>(of, queries, out); break;
                default: attend<T, 6>(of, queries, out);
            }
        }
    }

    // The same for Q queries. A vector of scores holds K tokens of each: with 3 queries, tokens 10 and 11 are the lanes
    //     q0 t10, q0 t11, q1 t10, q1 t11, q2 t10, q2 t11, unused, unused
    // so that eight sums over lanes, or eight exponentials, are computed at once.
    template <class T, int Q>
    void attend(const Piece &of, const float *queries, float *out) const {
        constexpr int K = LANES / Q;
        Floats most = Floats::all(-INFINITY), total = Floats::all(0);
        for (int q = 0; q < Q; ++q) std::fill_n(out + q * stride_ + VALUES, padded_, 0.0f);
        Tile<T> next = tile_at<T>(of, of.begin);
        for (int64_t t = of.begin; t < of.end;) {
            const Tile<T> tile = in_steps(next, of.thread);
            t += tile.count;
            next = t < of.end ? tile_at<T>(of, t) : Tile<T>{};
            float scores[TOKENS / K * LANES];
            const Floats largest = multiply_keys<T, Q, K>(tile, queries, most, scores);
            const Floats shrink = exp(most - largest);
            most = largest;
            total = total * shrink;
            for (int64_t i = 0; i < tile.count; i += K) {
                const Floats shares = exp(Floats::load(scores + i / K * LANES) - most);
                shares.store(scores + i / K * LANES);
                total = total + shares;
                for (int64_t k = i; k < std::min(i + K, next.count); ++k) fetch(next.key(k));
            }
            add_values<T, Q, K>(tile, scores, shrink, out);
        }
        float largest[LANES], totals[LANES];
        most.store(largest), total.store(totals);
        for (int q = 0; q < Q; ++q) {
            out[q * stride_] = largest[q * K];
            out[q * stride_ + 1] = std::accumulate(totals + q * K, totals + q * K + K, 0.0f);
        }
    }

    // The scores of a tile; returns the largest of each query so far, in all of its lanes.
    template <class T, int Q, int K>
    Floats multiply_keys(const Tile<T> &tile, const float *queries, Floats most, float *scores) const {
        for (int64_t first = 0; first < tile.count; first += K, scores += LANES) {
            const T *keys[K];
            for (int k = 0; k < K; ++k) {
                keys[k] = tile.key(std::min(first + k, tile.count - 1));
                if (first + k < tile.count) fetch(tile.value(first + k));
            }
            Floats sums[LANES];
            for (Floats &one : sums) one = Floats::all(0);
            for (int64_t i = 0; i < padded_; i += STEP) {
                Floats key[K][2];
                for (int k = 0; k < K; ++k) load_weights(keys[k] + i, key[k]);
                for (int half = 0; half < 2; ++half)
                    for (int q = 0; q < Q; ++q) {
                        const Floats query = Floats::load(queries + q * padded_ + i + half * LANES);
                        for (int k = 0; k < K; ++k) sums[q * K + k] = fma(key[k][half], query, sums[q * K + k]);
                    }
            }
            each_sum(sums).store(scores);
            for (int lane = 0; first + K > tile.count && lane < Q * K; ++lane)  // keys that were named twice
                if (first + lane % K >= tile.count) scores[lane] = -INFINITY;
            most = max(Floats::load(scores), most);
        }
        float lanes[LANES];
        most.store(lanes);
        for (int q = 0; q < Q; ++q) std::fill_n(lanes + q * K, K, *std::max_element(lanes + q * K, lanes + q * K + K));
        return Floats::load(lanes);
    }

    // values = values * shrink + shares times the values of a tile.
    template <class T, int Q, int K>
    void add_values(const Tile<T> &tile, const float *shares, Floats shrink, float *out) const {
        float lanes[LANES];
        shrink.store(lanes);
        for (int64_t i = 0; i < padded_; i += STEP) {
            Floats sums[Q][2];
            const auto place = [=, this](int q, int half) { return out + q * stride_ + VALUES + i + half * LANES; };
            const auto add = [&](const T *at, const float *share) {
                Floats value[2];
                load_weights(at, value);
                for (int q = 0; q < Q; ++q)
                    for (int half = 0; half < 2; ++half)
                        sums[q][half] = fma(value[half], Floats::all(share[q * K]), sums[q][half]);
            };
            for (int q = 0; q < Q; ++q)
                for (int half = 0; half < 2; ++half) sums[q][half] = Floats::load(place(q, half)) * Floats::all(lanes[q * K]);
            int64_t token = 0;
            for (; token + K <= tile.count; token += K)
                for (int k = 0; k < K; ++k) add(tile.value(token + k) + i, shares + token / K * LANES + k);
            for (int k = 0; token + k < tile.count; ++k) add(tile.value(token + k) + i, shares + token / K * LANES + k);
            for (int q = 0; q < Q; ++q)
                for (int half = 0; half < 2; ++half) sums[q][half].store(place(q, half));
        }
    }

    Pool &pool_;
    const dbrx_block &b_;
    int64_t n_;
    const dbrx_kv *kv_;
    int64_t group_, width_, padded_, stride_;
    float *qkv_, *queries_;
    int64_t *first_;  // chunk of each row, and all of them
    float *partial_, *copies_ = nullptr;
};

}  // namespace dbrx
