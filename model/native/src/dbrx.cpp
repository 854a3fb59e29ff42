// One variant of the library: everything behind dbrx.h, compiled for one set of instructions.
#include "dbrx.h"

#include <exception>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "experts.h"

struct dbrx_pool : dbrx::Pool {
    using dbrx::Pool::Pool;
};

namespace {

using namespace dbrx;

thread_local std::string error_text;

template <class F>
int guarded(F f) {
    try {
        f();
        return 0;
    } catch (const std::exception &e) {
        error_text = e.what();
    }
    return 1;
}

void require(bool holds, const char *what) {
    if (!holds) throw std::invalid_argument(what);
}

bool is_float(const dbrx_matrix &m) { return m.format == DBRX_F32 || m.format == DBRX_BF16; }

void check(const dbrx_matrix &m) {
    require(m.outputs > 0 && m.inputs > 0 && m.values, "a matrix is empty");
    require(m.format >= DBRX_F32 && m.format <= DBRX_INT4, "a matrix has an unknown format");
    require(!m.transposed || is_float(m), "only matrices of floats can be transposed");
    require(is_float(m) || m.scale, "a quantized matrix has no scales");
    if (m.format != DBRX_INT4) return;
    require(m.zero, "an int4 matrix has no zero points");
    require(m.group == 32 || m.group == 64 || m.group == 128 || m.group == 256, "int4 groups are 32, 64, 128 or 256 inputs");
    require(m.inputs % 2 == 0, "int4 puts two inputs into a byte, and a matrix has an odd number of them");
}

void check(const dbrx_expert &e) {
    for (const dbrx_matrix *m : {&e.w1, &e.v1, &e.w2}) check(*m);
    require(!e.w1.transposed && !e.v1.transposed, "w1 and v1 cannot be transposed");
    require(e.w1.outputs == e.v1.outputs && e.w1.outputs == e.w2.inputs && e.w1.inputs == e.v1.inputs &&
                e.w1.inputs == e.w2.outputs && e.w1.format == e.v1.format && e.w1.group == e.v1.group,
            "the matrices of an expert do not fit together");
}

void check(const dbrx_block &b, int64_t n, const dbrx_kv *kv) {
    require(0 < n && n <= DBRX_GEMV_MAX_ROWS, "a step takes 1 to 16 rows");
    require(b.kv_heads > 0 && b.heads % b.kv_heads == 0 && b.head_dim % 2 == 0, "the heads do not fit together");
    require(0 < b.top_k && b.top_k <= b.n_experts, "top_k is not between 1 and the number of experts");
    for (const dbrx_matrix *m : {&b.Wqkv, &b.out_proj, &b.router}) check(*m);
    require(!b.Wqkv.transposed && !b.out_proj.transposed && !b.router.transposed && is_float(b.router),
            "attention's and the router's matrices lie row by row, the router's in floats");
    const int64_t width = int64_t(b.heads) * b.head_dim;
    require(b.Wqkv.inputs == b.d_model && b.Wqkv.outputs == width + 2 * int64_t(b.kv_heads) * b.head_dim &&
                b.out_proj.inputs == width && b.out_proj.outputs == b.d_model && b.router.inputs == b.d_model &&
                b.router.outputs == b.n_experts,
            "the matrices of a block do not fit together");
    for (int64_t row = 0; row < n; ++row) require(kv[row].position >= 0 && kv[row].block_tokens > 0, "a row has no place for its keys");
}

// Take memory for what `make(arena)` builds: once to learn the size, once to have it.
template <class Make>
auto in_scratch(Pool &pool, Make make) {
    Arena size(nullptr);
    make(size);
    Arena arena(pool.scratch(size.used()));
    return make(arena);
}

// The first half of a block: Wqkv, attention, out_proj; then norm, router, and what they give.
struct AttendHalf {
    Attention attention;
    Linear qkv, out;
    Prepared router;
    float *row;
    float *normed;

    AttendHalf(Pool &pool, const dbrx_block &b, int64_t n, const dbrx_kv *kv, Arena &arena)
        : attention(pool, b, n, kv, arena), qkv(pool, b.Wqkv, n, arena), out(pool, b.out_proj, n, arena),
          router(Prepared::take(arena, b.router, 1)), row(arena.take<float>(std::max(b.d_model, b.heads * b.head_dim))),
          normed(arena.take<float>(n * b.d_model)) {}

    void choose_experts(const dbrx_block &b, int64_t n, const float *x, float *normed_out, float *probabilities, float *weights,
                        int32_t *ids) const {
        for (int64_t r = 0; r < n; ++r) {
            float *to = normed_out + r * b.d_model, *scores = probabilities + r * b.n_experts;
            layer_norm(x + r * b.d_model, b.norm_2, b.eps, b.d_model, to);
            router.set(b.router, 0, to);
            const std::byte *prepared = router.row(0);
            multiply(b.router, 0, b.n_experts, &prepared, 1, [&](int64_t o, int64_t, float y) { scores[o] = y; });
            choose(scores, b.n_experts, b.top_k, b.normalize, b.norm_order, weights + r * b.top_k, ids + r * b.top_k);
        }
    }

    Phase qkv_phase(const dbrx_block &b, int64_t n, const float *x) const {
        return {[=, &b, this] {
                    for (int64_t r = 0; r < n; ++r) {
                        layer_norm(x + r * b.d_model, b.norm_1, b.eps, b.d_model, row);
                        qkv.prepare(r, row);
                    }
                    return qkv.pieces();
                },
                [this](int64_t piece, int thread) {
                    qkv.work(piece, thread, [&](int64_t o, int64_t r, float y) { attention.qkv(r)[o] = y; });
                }};
    }
    Phase attention_phase(int64_t n) const {
        return {[=, this] {
                    for (int64_t r = 0; r < n; ++r) attention.begin(r);
                    return attention.pieces();
                },
                [this](int64_t piece, int thread) { attention.work(piece, thread); }};
    }
    Phase out_phase(const dbrx_block &b, int64_t n, float *x) const {
        return {[=, this] {
                    for (int64_t r = 0; r < n; ++r) {
                        attention.end(r, row);
                        out.prepare(r, row);
                    }
                    return out.pieces();
                },
                [=, d = b.d_model, this](int64_t piece, int thread) {
                    out.work(piece, thread, [&](int64_t o, int64_t r, float y) { x[r * d + o] += y; });
                }};
    }
};

Phase gate_phase(const Experts &experts, std::function<void()> prepare) {
    return {[&experts, prepare] {
                prepare();
                return experts.gate_pieces();
            },
            [&experts](int64_t piece, int thread) { experts.gate_work(piece, thread); }};
}
Phase down_phase(const Experts &experts, const float *x, float *out) {
    return {[&experts] { return experts.down_pieces(); },
            [&experts, x, out](int64_t piece, int thread) { experts.down_work(piece, thread, x, out); }};
}
Phase add_phase(const Experts &experts, const float *x, float *out) {
    return {[&experts] { return experts.add_pieces(); },
            [&experts, x, out](int64_t piece, int) { experts.add_work(piece, x, out); }};
}

// y [n, outputs] = the product with x, or with its norm.
void linear(Pool &pool, const dbrx_matrix &m, const float *norm, float eps, const float *x, int64_t n, float *y) {
    check(m);
    if (n <= 0) return;
    if (m.transposed) {  // all strips of a row, added in their order
        require(!norm, "the head cannot be transposed");
        float *sums = reinterpret_cast<float *>(pool.scratch(size_t(n * strips(m) * m.outputs) * sizeof(float)));
        const auto of = [&](int64_t row, int64_t strip) { return sums + (row * strips(m) + strip) * m.outputs; };
        const Phase phases[] = {
            {[&] { return strips(m); },
             [&](int64_t strip, int) {
                 for (int64_t r = 0; r < n; ++r) {
                     const float *row = x + r * m.inputs, one = 1;
                     float *to = of(r, strip);
                     multiply_strip(m, strip, &row, &one, 1, &to);
                 }
             }},
            {[&] { return n; },
             [&](int64_t r, int) {
                 std::fill(y + r * m.outputs, y + (r + 1) * m.outputs, 0.0f);
                 for (int64_t s = 0; s < strips(m); ++s)
                     for (int64_t o = 0; o < m.outputs; ++o) y[r * m.outputs + o] += of(r, s)[o];
             }}};
        return pool.run(phases);
    }
    float *row = nullptr;
    const Linear product = in_scratch(pool, [&](Arena &arena) {
        row = arena.take<float>(m.inputs);
        return Linear(pool, m, n, arena);
    });
    const Phase phases[] = {{[&] {
                                 for (int64_t r = 0; r < n; ++r) {
                                     layer_norm(x + r * m.inputs, norm, eps, m.inputs, row);
                                     product.prepare(r, row);
                                 }
                                 return product.pieces();
                             },
                             [&](int64_t piece, int thread) {
                                 product.work(piece, thread, [&](int64_t o, int64_t r, float v) { y[r * m.outputs + o] = v; });
                             }}};
    pool.run(phases);
}

}  // namespace

#define DBRX_API extern "C" __attribute__((visibility("default")))

DBRX_API int dbrx_abi(void) { return DBRX_ABI; }

DBRX_API const char *dbrx_variant(void) {
#if defined(__AVX512VNNI__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_FEATURE_DOTPROD)
    return "neon";
#else
    return "plain";
#endif
}

DBRX_API int dbrx_runs_here(void) {
#if defined(__AVX512VNNI__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;  // every processor of 64 bits that is sold for this has NEON's dot product; the loader computes a probe
#endif
}

DBRX_API const char *dbrx_error(void) { return error_text.c_str(); }

DBRX_API dbrx_pool *dbrx_pool_create(int threads) {
    dbrx_pool *pool = nullptr;
    guarded([&] {
        require(threads > 0, "a pool needs at least one thread");
        pool = new dbrx_pool(threads);
    });
    return pool;
}

DBRX_API void dbrx_pool_destroy(dbrx_pool *pool) { delete pool; }

DBRX_API int dbrx_pool_threads(const dbrx_pool *pool) { return pool->threads(); }

DBRX_API int dbrx_pool_counters(const dbrx_pool *pool, int thread, dbrx_counters *out) {
    return guarded([&] {
        require(0 <= thread && thread < pool->threads(), "there is no such thread");
        *out = pool->counters(thread);
    });
}

DBRX_API int dbrx_linear(dbrx_pool *pool, const dbrx_matrix *matrix, const float *x, int64_t n, float *y) {
    return guarded([&] { linear(*pool, *matrix, nullptr, 0, x, n, y); });
}

DBRX_API int dbrx_head(dbrx_pool *pool, const float *norm, float eps, const dbrx_matrix *head, const float *x, int64_t n,
                       float *logits) {
    return guarded([&] { linear(*pool, *head, norm, eps, x, n, logits); });
}

DBRX_API int dbrx_experts(dbrx_pool *pool, const dbrx_expert *experts, int32_t n_experts, int32_t first, int32_t last,
                          int32_t activation, const float *normed, int64_t n, const int32_t *ids, const float *weights,
                          int32_t top_k, const float *x, float *out) {
    return guarded([&] {
        if (n <= 0) return;
        int32_t like = first;  // one that is chosen: only those need be in memory
        for (int64_t i = 0; i < n * top_k; ++i) {
            require(0 <= ids[i] && ids[i] < n_experts, "an expert's id is not below their number");
            if (first <= ids[i] && ids[i] < last) like = ids[i];
        }
        check(experts[like]);
        Experts job = in_scratch(*pool, [&](Arena &arena) {
            return Experts(*pool, experts, experts[like], activation, n, top_k, arena);
        });
        const Phase phases[] = {gate_phase(job,
                                           [&] {
                                               job.choose(ids, weights, top_k, first, last);
                                               for (int64_t r = 0; r < n; ++r) job.prepare(r, normed + r * job.d_model());
                                           }),
                                down_phase(job, x, out), add_phase(job, x, out)};
        pool->run(phases);
    });
}

DBRX_API int dbrx_attend(dbrx_pool *pool, const dbrx_block *block, int64_t n, const dbrx_kv *kv, float *x, float *normed,
                         float *probabilities, float *weights, int32_t *ids) {
    return guarded([&] {
        const dbrx_block &b = *block;
        check(b, n, kv);
        const AttendHalf half = in_scratch(*pool, [&](Arena &arena) { return AttendHalf(*pool, b, n, kv, arena); });
        const Phase phases[] = {half.qkv_phase(b, n, x), half.attention_phase(n), half.out_phase(b, n, x)};
        pool->run(phases);
        half.choose_experts(b, n, x, normed, probabilities, weights, ids);
    });
}

DBRX_API int dbrx_block_step(dbrx_pool *pool, const dbrx_block *block, int64_t n, const dbrx_kv *kv, float *x,
                             float *probabilities, float *weights, int32_t *ids) {
    return guarded([&] {
        const dbrx_block &b = *block;
        check(b, n, kv);
        require(b.experts, "the experts are not in memory");
        check(b.experts[0]);
        struct Both {
            AttendHalf half;
            Experts experts;
        } both = in_scratch(*pool, [&](Arena &arena) {
            return Both{AttendHalf(*pool, b, n, kv, arena),
                        Experts(*pool, b.experts, b.experts[0], b.activation, n, b.top_k, arena)};
        });
        const Phase phases[] = {both.half.qkv_phase(b, n, x), both.half.attention_phase(n), both.half.out_phase(b, n, x),
                                gate_phase(both.experts,
                                           [&] {
                                               both.half.choose_experts(b, n, x, both.half.normed, probabilities, weights, ids);
                                               both.experts.choose(ids, weights, b.top_k, 0, b.n_experts);
                                               for (int64_t r = 0; r < n; ++r)
                                                   both.experts.prepare(r, both.half.normed + r * b.d_model);
                                           }),
                                down_phase(both.experts, x, x), add_phase(both.experts, x, x)};
        pool->run(phases);
    });
}

DBRX_API int dbrx_quantize(dbrx_pool *, const dbrx_matrix *, const float *, const float *, dbrx_matrix *) {
    return guarded([] { throw std::invalid_argument("quantizing is not there yet"); });
}
