// One variant of the library: everything behind dbrx.h, compiled for one set of instructions.
#include "dbrx.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <exception>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "checks.h"
#include "many.h"
#include "quantize.h"

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

// f() while nobody else uses the pool.
template <class F>
int in_turn(dbrx_pool *pool, F f) {
    return guarded([&] {
        require(pool, "a pool is needed");
        const std::lock_guard<std::mutex> turn(pool->turn());
        f();
    });
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
            multiply(b.router, Places::whole(b.n_experts), 0, &prepared, 1, scores, b.n_experts);
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
                [this](int64_t piece, int thread) { qkv.work(piece, thread, attention.qkv(0), false); }};
    }
    Phase attention_phase(int64_t n) const {
        return {[=, this] {
                    for (int64_t r = 0; r < n; ++r) attention.begin(r);
                    return attention.pieces();
                },
                [this](int64_t piece, int thread) { attention.work(piece, thread); }};
    }
    Phase out_phase(int64_t n, float *x) const {
        return {[=, this] {
                    for (int64_t r = 0; r < n; ++r) {
                        attention.end(r, row);
                        out.prepare(r, row);
                    }
                    return out.pieces();
                },
                [=, this](int64_t piece, int thread) { out.work(piece, thread, x, true); }};
    }
};

Phase gate_phase(const Experts &experts, std::function<void()> prepare) {
    return {[&experts, prepare] {
                prepare();
                return experts.gate_pieces();
            },
            [&experts](int64_t piece, int thread) { experts.gate_work(piece, thread); }};
}
Phase down_phase(const Experts &experts) {
    return {[&experts] { return experts.down_pieces(); },
            [&experts](int64_t piece, int thread) { experts.down_work(piece, thread); }};
}
Phase add_phase(const Experts &experts, const float *x, float *out) {
    return {[&experts] { return experts.add_pieces(); },
            [&experts, x, out](int64_t piece, int) { experts.add_work(piece, x, out); }};
}

// y [n, outputs] = the product with x, or with its norm.
void linear(Pool &pool, const dbrx_matrix &m, const float *norm, float eps, const float *x, int64_t n, float *y) {
    if (n == 0) return;
    if (n > MAX_ROWS) return gemm_linear(pool, m, norm, eps, x, n, y);
    if (m.transposed) {  // all strips of a row, added in their order
        require(!norm, "the head cannot be transposed");
        float *sums = reinterpret_cast<float *>(pool.scratch(size_t(n * strips(m) * m.outputs) * sizeof(float)));
        const auto of = [&](int64_t row, int64_t strip) { return sums + (row * strips(m) + strip) * m.outputs; };
        const Phase phases[] = {
            {[&] { return strips(m); },
             [&](int64_t strip, int) {
                 for (int64_t r = 0; r < n; ++r) {
                     const float *row = x + r * m.inputs;
                     float *to = of(r, strip);
                     multiply_strip(m, strip, &row, 1, &to);
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
                             [&](int64_t piece, int thread) { product.work(piece, thread, y, false); }}};
    pool.run(phases);
}

// A whole block.
void step(Pool &pool, const dbrx_block &b, int64_t n, const dbrx_kv *kv, float *x, float *probabilities, float *weights,
          int32_t *ids) {
    struct Both {
        AttendHalf half;
        Experts experts;
    } both = in_scratch(pool, [&](Arena &arena) {
        return Both{AttendHalf(pool, b, n, kv, arena), Experts(pool, b.experts, b.experts[0], b.activation, n, b.top_k, arena)};
    });
    const auto prepare = [&] {
        both.half.choose_experts(b, n, x, both.half.normed, probabilities, weights, ids);
        both.experts.choose(ids, weights, b.top_k, 0, b.n_experts);
        for (int64_t r = 0; r < n; ++r) both.experts.prepare(r, both.half.normed + r * b.d_model);
    };
    const Phase phases[] = {both.half.qkv_phase(b, n, x), both.half.attention_phase(n),    both.half.out_phase(n, x),
                            gate_phase(both.experts, prepare), down_phase(both.experts), add_phase(both.experts, x, x)};
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
#elif defined(__ARM_FEATURE_DOTPROD) && defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;  // a Cortex-A72 has no dot product
#else
    return 1;
#endif
}

DBRX_API const char *dbrx_error(void) { return error_text.c_str(); }

DBRX_API dbrx_pool *dbrx_pool_create(int threads) {
    dbrx_pool *pool = nullptr;
    guarded([&] {
        require(0 < threads && threads <= MOST_THREADS, "a pool has 1 to 1024 threads");
        pool = new dbrx_pool(threads);
    });
    return pool;
}

DBRX_API void dbrx_pool_destroy(dbrx_pool *pool) { delete pool; }

DBRX_API int dbrx_pool_threads(const dbrx_pool *pool) { return pool ? pool->threads() : 0; }

DBRX_API int dbrx_pool_counters(const dbrx_pool *pool, int thread, dbrx_counters *out) {
    return guarded([&] {
        require(pool && out, "a pool and a place for its counters are needed");
        require(0 <= thread && thread < pool->threads(), "there is no such thread");
        *out = pool->counters(thread);
    });
}

DBRX_API int dbrx_linear(dbrx_pool *pool, const dbrx_matrix *matrix, const float *x, int64_t n, float *y) {
    return in_turn(pool, [&] {
        check(pool, matrix, x, n, y);
        linear(*pool, *matrix, nullptr, 0, x, n, y);
    });
}

DBRX_API int dbrx_head(dbrx_pool *pool, const float *norm, float eps, const dbrx_matrix *head, const float *x, int64_t n,
                       float *logits) {
    return in_turn(pool, [&] {
        check(pool, head, x, n, logits);
        linear(*pool, *head, norm, eps, x, n, logits);
    });
}

DBRX_API int dbrx_experts(dbrx_pool *pool, const dbrx_expert *experts, int32_t n_experts, int32_t first, int32_t last,
                          int32_t activation, const float *normed, int64_t n, const int32_t *ids, const float *weights,
                          int32_t top_k, const float *x, float *out) {
    return in_turn(pool, [&] {
        const int32_t like = check_experts(pool, experts, n_experts, first, last, activation, normed, n, ids, weights,
                                           top_k, out);
        if (n == 0) return;
        if (n > MAX_ROWS)
            return many_rows(*pool, experts, experts[like], activation, normed, n, ids, weights, top_k, first, last, x, out);
        Experts job = in_scratch(*pool, [&](Arena &arena) {
            return Experts(*pool, experts, experts[like], activation, n, top_k, arena);
        });
        const Phase phases[] = {gate_phase(job,
                                           [&] {
                                               job.choose(ids, weights, top_k, first, last);
                                               for (int64_t r = 0; r < n; ++r) job.prepare(r, normed + r * job.d_model());
                                           }),
                                down_phase(job), add_phase(job, x, out)};
        pool->run(phases);
    });
}

DBRX_API int dbrx_attend(dbrx_pool *pool, const dbrx_block *block, int64_t n, const dbrx_kv *kv, float *x, float *normed,
                         float *probabilities, float *weights, int32_t *ids) {
    return in_turn(pool, [&] {
        check_step(pool, block, n, kv, x, probabilities, weights, ids);
        require(normed, "a pointer is null");
        const dbrx_block &b = *block;
        const AttendHalf half = in_scratch(*pool, [&](Arena &arena) { return AttendHalf(*pool, b, n, kv, arena); });
        const Phase phases[] = {half.qkv_phase(b, n, x), half.attention_phase(n), half.out_phase(n, x)};
        pool->run(phases);
        half.choose_experts(b, n, x, normed, probabilities, weights, ids);
    });
}

DBRX_API int dbrx_step(dbrx_pool *pool, const dbrx_block *blocks, int32_t count, int64_t n, const dbrx_kv *kv, float *x,
                       float *probabilities, float *weights, int32_t *ids) {
    return in_turn(pool, [&] {
        require(count > 0 && blocks && kv, "there are no blocks");
        for (int32_t i = 0; i < count; ++i) {
            check_step(pool, blocks + i, n, kv + i * n, x, probabilities, weights, ids);
            check_held(blocks[i]);
            require(blocks[i].d_model == blocks[0].d_model && blocks[i].n_experts == blocks[0].n_experts &&
                        blocks[i].top_k == blocks[0].top_k,
                    "the blocks do not fit together");
        }
        for (int32_t i = 0; i < count; ++i)
            step(*pool, blocks[i], n, kv + i * n, x, probabilities + i * n * blocks[i].n_experts, weights, ids);
    });
}

DBRX_API int dbrx_rows(dbrx_pool *pool, const dbrx_matrix *matrix, const int64_t *rows, int64_t n, float *to) {
    return in_turn(pool, [&] {
        check_rows(pool, matrix, rows, n, to);
        const Phase phases[] = {{[&] { return n; },
                                 [&](int64_t i, int) {
                                     with_spans(*matrix, [&](auto format) {
                                         format.unpack(*matrix, rows[i], to + i * matrix->inputs);
                                     });
                                 }}};
        pool->run(phases);
    });
}

DBRX_API int dbrx_quantize(dbrx_pool *pool, const dbrx_matrix *from, const float *row_scale, const float *column_scale,
                           dbrx_matrix *to) {
    return in_turn(pool, [&] {
        check_quantize(pool, from, to);
        quantize(*pool, *from, row_scale, column_scale, *to);
    });
}
