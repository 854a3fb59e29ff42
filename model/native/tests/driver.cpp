// Drives a library of native kernels without Python and PyTorch: what sanitizers and qemu-user run.
//
//     driver LIBRARY VECTORS
//
// It replays recorded calls with several numbers of threads, and from two threads at once; compares, bit by bit, rows that
// were computed alone and beside others; and makes wrong calls, each of which must end with a code and a text.
// Exit code 0: all as it should be; 77: the processor cannot run this library.
#include <dlfcn.h>

#include <climits>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "dbrx.h"

namespace {

int faults = 0;

void fault(const std::string &text) {
    std::printf("%s\n", text.c_str());
    ++faults;
}

struct Library {
    void *handle;
#define FUNCTION(name) decltype(&dbrx_##name) name = reinterpret_cast<decltype(&dbrx_##name)>(dlsym(handle, "dbrx_" #name))
    FUNCTION(abi);
    FUNCTION(variant);
    FUNCTION(runs_here);
    FUNCTION(error);
    FUNCTION(pool_create);
    FUNCTION(pool_destroy);
    FUNCTION(pool_threads);
    FUNCTION(pool_counters);
    FUNCTION(linear);
    FUNCTION(experts);
    FUNCTION(attend);
    FUNCTION(step);
    FUNCTION(head);
    FUNCTION(quantize);
    FUNCTION(rows);
    FUNCTION(replay);
#undef FUNCTION
};

std::string recorded(const char *path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void replay(const Library &lib, const std::string &vectors, int threads) {
    dbrx_pool *pool = lib.pool_create(threads);
    char said[200] = "";
    if (!pool) return fault("no pool of " + std::to_string(threads) + ": " + lib.error());
    if (lib.pool_threads(pool) != threads) fault("a pool has another number of threads");
    if (lib.replay(pool, vectors.data(), int64_t(vectors.size()), said, sizeof said))
        fault(std::to_string(threads) + " threads: " + said);
    lib.pool_destroy(pool);
}

// ---- a small network of each format, for calls by hand

constexpr int32_t D = 64, HIDDEN = 96, EXPERTS = 3, TOP_K = 2, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 16, ROWS = 16;

bool has_groups(int32_t format) { return format == DBRX_INT4 || format == DBRX_GROUPS_3 || format == DBRX_GROUPS_4; }

struct Matrix {
    std::vector<unsigned char> values;
    std::vector<float> scale;
    std::vector<uint16_t> scales, zeros;
    dbrx_matrix is;

    Matrix(int32_t format, int64_t outputs, int64_t inputs)
        : values(size_t(outputs * inputs) * 4), scale(size_t(outputs), 0.01f),
          scales(size_t(outputs * inputs), 0x3c00), zeros(size_t(outputs * inputs), 0x4100),  // 2^-7 and 8 in bfloat16
          is{format, 0, has_groups(format) ? 32 : format == DBRX_INT3 ? 128 : 0, 0, outputs, inputs, values.data(), nullptr, nullptr} {
        for (size_t i = 0; i < values.size(); ++i) values[i] = (unsigned char)(i * 37 % 251);
        if (format == DBRX_F32 || format == DBRX_BF16)  // the upper bytes of a number near 1
            for (size_t step = format == DBRX_F32 ? 4 : 2, i = step - 1; i < values.size(); i += step)
                values[i] = (unsigned char)(0x3e | (i / step % 2) << 7);
        if (format == DBRX_Q4_1)  // scale and minimum of a block: floats of 16 bits near 2^-6
            for (size_t block = 0; block + 20 <= values.size(); block += 20) values[block + 1] = values[block + 3] = 0x24;
        if (format == DBRX_INT8) is.scale = scale.data();
        if (is.group) is.scale = scales.data(), is.zero = zeros.data();
    }
};

struct Network {
    int32_t format;
    Matrix Wqkv, out_proj, router, w1, v1, w2;
    std::vector<dbrx_expert> experts;
    std::vector<float> norm, x, out, normed, probabilities, weights, cos, keys, values;
    std::vector<int32_t> ids;
    void *key_blocks[1], *value_blocks[1];
    std::vector<dbrx_kv> kv;
    dbrx_block block{};

    explicit Network(int32_t f)
        : format(f), Wqkv(f, (HEADS + 2 * KV_HEADS) * HEAD_DIM, D), out_proj(f, D, HEADS * HEAD_DIM),
          router(DBRX_F32, EXPERTS, D), w1(f, HIDDEN, D), v1(f, HIDDEN, D), w2(f, D, HIDDEN),
          experts(EXPERTS, {w1.is, v1.is, w2.is}), norm(D, 1), x(ROWS * D), out(ROWS * 256), normed(ROWS * D),
          probabilities(ROWS * EXPERTS), weights(ROWS * TOP_K, 0.5f), cos(HEAD_DIM, 1), keys(8 * KV_HEADS * HEAD_DIM),
          values(keys), ids(ROWS * TOP_K), key_blocks{keys.data()}, value_blocks{values.data()} {
        for (size_t i = 0; i < x.size(); ++i) x[i] = float(i * 29 % 101) / 50 - 1;
        for (size_t i = 0; i < ids.size(); ++i) ids[i] = int32_t(i) % EXPERTS;
        block = {D, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, DBRX_SILU, 1, 1, 8, 1e-5f, 0,
                 norm.data(), norm.data(), Wqkv.is, out_proj.is, router.is, experts.data()};
        kv.assign(1, {key_blocks, value_blocks, 8, KV_HEADS * HEAD_DIM, HEAD_DIM, DBRX_F32, 0, 3, cos.data(), cos.data()});
    }
};

// What is computed for a row depends neither on the rows beside it nor on the number of threads.
void rows_alone(const Library &lib) {
    dbrx_pool *one = lib.pool_create(1), *three = lib.pool_create(3);
    for (const int32_t format : {DBRX_F32, DBRX_BF16, DBRX_INT8, DBRX_INT4, DBRX_INT3, DBRX_GROUPS_3, DBRX_GROUPS_4, DBRX_Q4_1}) {
        Network net(format);
        std::vector<float> together(ROWS * D), alone(ROWS * D);
        const auto same = [&](const char *what) {
            if (std::memcmp(together.data(), alone.data(), together.size() * sizeof(float)))
                fault(std::string(what) + ", format " + std::to_string(format) + ": a row depends on its neighbours or on threads");
        };
        const auto succeeded = [&](int failed) {
            if (failed) fault(std::string("a right call fails: ") + lib.error());
        };
        succeeded(lib.linear(three, &net.out_proj.is, net.x.data(), ROWS, together.data()));
        for (int64_t r = 0; r < ROWS; ++r)
            succeeded(lib.linear(one, &net.out_proj.is, &net.x[size_t(r * D)], 1, &alone[size_t(r * D)]));
        same("linear");
        const auto experts = [&](dbrx_pool *pool, int64_t r, int64_t n, float *out) {
            succeeded(lib.experts(pool, net.experts.data(), EXPERTS, 0, EXPERTS, DBRX_SILU, &net.x[size_t(r * D)], n,
                                  &net.ids[size_t(r * TOP_K)], &net.weights[size_t(r * TOP_K)], TOP_K, nullptr, out));
        };
        experts(three, 0, ROWS, together.data());
        for (int64_t r = 0; r < ROWS; ++r) experts(one, r, 1, &alone[size_t(r * D)]);
        same("experts");
    }
    lib.pool_destroy(one);
    lib.pool_destroy(three);
}

// ---- wrong calls

struct Wrong {
    const Library &lib;
    dbrx_pool *pool;
    Network net;

    // Something is changed in a fresh network; the call must fail with a text, or succeed where `may_succeed`.
    void refused(const char *what, const std::function<void(Network &)> &change,
                 const std::function<int(Network &)> &call, bool may_succeed = false) {
        Network fresh(net.format);
        change(fresh);
        if (!call(fresh)) {
            if (!may_succeed) fault(std::string("not refused: ") + what);
        } else if (!*lib.error()) {
            fault(std::string("refused without a text: ") + what);
        }
    }

    void matrices() {
        const auto call = [&](Network &n) { return lib.linear(pool, &n.out_proj.is, n.x.data(), 1, n.out.data()); };
        const auto wrong = [&](const char *what, const std::function<void(dbrx_matrix &)> &change) {
            refused(what, [&](Network &n) { change(n.out_proj.is); }, call);
        };
        wrong("no outputs", [](dbrx_matrix &m) { m.outputs = 0; });
        wrong("no inputs", [](dbrx_matrix &m) { m.inputs = 0; });
        wrong("outputs below 0", [](dbrx_matrix &m) { m.outputs = -64; });
        wrong("inputs below 0", [](dbrx_matrix &m) { m.inputs = INT64_MIN; });
        wrong("outputs times inputs above 64 bits", [](dbrx_matrix &m) { m.outputs = m.inputs = INT64_C(1) << 40; });
        wrong("an unknown format", [](dbrx_matrix &m) { m.format = 99; });
        wrong("a format below 0", [](dbrx_matrix &m) { m.format = -1; });
        wrong("no values", [](dbrx_matrix &m) { m.values = nullptr; });
        if (net.format >= DBRX_INT8) wrong("transposed and quantized", [](dbrx_matrix &m) { m.transposed = 1; });
        if (net.format == DBRX_INT8 || net.w1.is.group) wrong("no scale", [](dbrx_matrix &m) { m.scale = nullptr; });
        if (net.format == DBRX_Q4_1) {
            wrong("half a block", [](dbrx_matrix &m) { m.inputs = 48; });
            wrong("half a block of 256", [](dbrx_matrix &m) { m.format = DBRX_Q4_K; });
            wrong("another of ggml's types", [](dbrx_matrix &m) { m.format = 256 + 16; });
        }
        if (net.w1.is.group) {
            wrong("no zero points", [](dbrx_matrix &m) { m.zero = nullptr; });
            for (const int32_t group : {0, -32, 7, 48, INT_MAX})
                wrong("an odd group", [=](dbrx_matrix &m) { m.group = group; });
            wrong("odd inputs", [](dbrx_matrix &m) { m.inputs = 63; });
        }
        if (net.format == DBRX_GROUPS_4) {
            wrong("levels of 7 bits", [](dbrx_matrix &m) { m.format = 128 + 7; });
            wrong("scales of an unknown type", [](dbrx_matrix &m) { m.ranges = 3; });
        }
        refused("odd sizes", [](Network &n) { n.out_proj.is.outputs = 7, n.out_proj.is.inputs = 34; }, call, true);
    }

    void products() {
        const auto none = [](Network &) {};
        const auto linear = [&](const char *what, dbrx_pool *p, bool m, bool x, int64_t n, bool y, bool may = false) {
            refused(what, none, [&](Network &net) {
                return lib.linear(p, m ? &net.out_proj.is : nullptr, x ? net.x.data() : nullptr, n,
                                  y ? net.out.data() : nullptr);
            }, may);
            refused(what, none, [&](Network &net) {
                return lib.head(p, net.norm.data(), 1e-5f, m ? &net.out_proj.is : nullptr, x ? net.x.data() : nullptr,
                                n, y ? net.out.data() : nullptr);
            }, may);
        };
        linear("no pool", nullptr, true, true, 1, true);
        linear("no matrix", pool, false, true, 1, true);
        linear("no input", pool, true, false, 1, true);
        linear("no output", pool, true, true, 1, false);
        linear("no rows", pool, true, true, 0, true, true);
        linear("rows below 0", pool, true, true, -1, true);
        linear("too many rows", pool, true, true, INT64_MAX / 2, true);
    }

    void rows() {
        const auto take = [&](const char *what, dbrx_pool *p, bool m, int64_t id, int64_t n, bool to, bool may = false) {
            refused(what, [](Network &) {}, [&](Network &net) {
                return lib.rows(p, m ? &net.out_proj.is : nullptr, &id, n, to ? net.out.data() : nullptr);
            }, may);
        };
        const bool may = net.format >= DBRX_GROUPS_2;
        take("a row", pool, true, D - 1, 1, true, may);
        take("no row", pool, true, 0, 0, true, may);
        take("a row behind the last", pool, true, D, 1, true);
        take("a row before the first", pool, true, -1, 1, true);
        take("rows below 0 of a matrix", pool, true, 0, -1, true);
        take("too many rows of a matrix", pool, true, 0, INT64_MAX / 2, true);
        take("rows without a pool", nullptr, true, 0, 1, true);
        take("rows of no matrix", pool, false, 0, 1, true);
        take("rows to nowhere", pool, true, 0, 1, false);
    }

    void experts() {
        struct Call {
            dbrx_pool *pool;
            int32_t n_experts = EXPERTS, first = 0, last = EXPERTS, activation = DBRX_SILU, top_k = TOP_K;
            int64_t n = 2;
            bool experts = true, normed = true, ids = true, weights = true, out = true;
        };
        const auto wrong = [&](const char *what, const std::function<void(Call &, Network &)> &change, bool may = false) {
            Call c{pool};
            refused(what, [&](Network &n) { change(c, n); }, [&](Network &n) {
                return lib.experts(c.pool, c.experts ? n.experts.data() : nullptr, c.n_experts, c.first, c.last,
                                   c.activation, c.normed ? n.x.data() : nullptr, c.n, c.ids ? n.ids.data() : nullptr,
                                   c.weights ? n.weights.data() : nullptr, c.top_k, nullptr,
                                   c.out ? n.out.data() : nullptr);
            }, may);
        };
        wrong("no pool for experts", [](Call &c, Network &) { c.pool = nullptr; });
        wrong("no experts", [](Call &c, Network &) { c.experts = false; });
        wrong("a number of experts below 1", [](Call &c, Network &) { c.n_experts = 0; });
        wrong("first below 0", [](Call &c, Network &) { c.first = -1; });
        wrong("last above the number", [](Call &c, Network &) { c.last = EXPERTS + 1; });
        wrong("last below first", [](Call &c, Network &) { c.first = 2, c.last = 1; });
        wrong("an empty range", [](Call &c, Network &) { c.last = 0; }, true);
        wrong("an unknown activation", [](Call &c, Network &) { c.activation = 3; });
        wrong("an activation below 0", [](Call &c, Network &) { c.activation = -1; });
        wrong("no rows of experts", [](Call &c, Network &) { c.n = 0; }, true);
        wrong("rows below 0 of experts", [](Call &c, Network &) { c.n = -5; });
        wrong("top_k below 1", [](Call &c, Network &) { c.top_k = 0; });
        wrong("top_k above the experts", [](Call &c, Network &) { c.top_k = EXPERTS + 1; });
        wrong("no normed", [](Call &c, Network &) { c.normed = false; });
        wrong("no ids", [](Call &c, Network &) { c.ids = false; });
        wrong("no weights", [](Call &c, Network &) { c.weights = false; });
        wrong("nowhere to write", [](Call &c, Network &) { c.out = false; });
        wrong("an id above", [](Call &, Network &n) { n.ids[1] = EXPERTS; });
        wrong("an id below 0", [](Call &, Network &n) { n.ids[3] = -1; });
        wrong("w1 of another size", [](Call &, Network &n) { n.experts[0].w1.outputs = 32; });
        wrong("w2 of another size", [](Call &, Network &n) { n.experts[0].w2.outputs = 32; });
        wrong("an expert of another size", [](Call &, Network &n) {
            for (dbrx_expert &e : {std::ref(n.experts[1])}) e.w1.outputs = e.v1.outputs = e.w2.inputs = 32;
        });
        wrong("an expert without values", [](Call &, Network &n) { n.experts[1].v1.values = nullptr; });
    }

    void steps() {
        const auto wrong = [&](const char *what, const std::function<void(Network &)> &change, bool may = false) {
            refused(what, change, [&](Network &n) {
                return lib.attend(pool, &n.block, 1, n.kv.data(), n.x.data(), n.normed.data(), n.probabilities.data(),
                                  n.weights.data(), n.ids.data());
            }, may);
            refused(what, change, [&](Network &n) {
                return lib.step(pool, &n.block, 1, 1, n.kv.data(), n.x.data(), n.probabilities.data(),
                                      n.weights.data(), n.ids.data());
            }, may);
        };
        wrong("no heads", [](Network &n) { n.block.heads = 0; });
        wrong("heads below 0", [](Network &n) { n.block.heads = -4; });
        wrong("no kv heads", [](Network &n) { n.block.kv_heads = 0; });
        wrong("kv heads that do not divide", [](Network &n) { n.block.kv_heads = 3; });
        wrong("heads of no size", [](Network &n) { n.block.head_dim = 0; });
        wrong("heads of an odd size", [](Network &n) { n.block.head_dim = 15; });
        wrong("a huge head", [](Network &n) { n.block.head_dim = INT_MAX - 1; });
        wrong("another d_model", [](Network &n) { n.block.d_model = 32; });
        wrong("d_model below 0", [](Network &n) { n.block.d_model = -64; });
        wrong("no experts at all", [](Network &n) { n.block.n_experts = 0; });
        wrong("other experts than the router's", [](Network &n) { n.block.n_experts = 2; });
        wrong("no top_k", [](Network &n) { n.block.top_k = 0; });
        wrong("a large top_k", [](Network &n) { n.block.top_k = EXPERTS + 1; });
        wrong("no norm", [](Network &n) { n.block.norm_1 = nullptr; });
        wrong("no second norm", [](Network &n) { n.block.norm_2 = nullptr; });
        wrong("Wqkv without values", [](Network &n) { n.block.Wqkv.values = nullptr; });
        wrong("a quantized router", [](Network &n) { n.block.router.format = DBRX_INT8; });
        wrong("an unknown activation in a block", [](Network &n) { n.block.activation = 9; });
        wrong("no key table", [](Network &n) { n.kv[0].keys = nullptr; });
        wrong("no value table", [](Network &n) { n.kv[0].values = nullptr; });
        wrong("no block of keys", [](Network &n) { n.key_blocks[0] = nullptr; });
        wrong("no block of values", [](Network &n) { n.value_blocks[0] = nullptr; });
        wrong("blocks of no tokens", [](Network &n) { n.kv[0].block_tokens = 0; });
        wrong("blocks below 0", [](Network &n) { n.kv[0].block_tokens = -8; });
        wrong("a position below 0", [](Network &n) { n.kv[0].position = -1; });
        wrong("a huge position", [](Network &n) { n.kv[0].position = INT64_MAX; });
        wrong("a stride below 0", [](Network &n) { n.kv[0].token_stride = -1; });
        wrong("a head stride below 0", [](Network &n) { n.kv[0].head_stride = -1; });
        wrong("keys in int8", [](Network &n) { n.kv[0].format = DBRX_INT8; });
        wrong("no cosines", [](Network &n) { n.kv[0].cos = nullptr; });
        wrong("no sines", [](Network &n) { n.kv[0].sin = nullptr; });

        const auto none = [](Network &) {};
        for (const int missing : {0, 1, 2, 3, 4, 5, 6, 7})
            for (const bool whole : {false, true})
                refused("a null pointer of a step", none, [&](Network &n) {
                    const auto given = [&](int i, auto *p) { return i == missing ? nullptr : p; };
                    if (whole)
                        return lib.step(given(0, pool), given(1, &n.block), 1, 1, given(2, n.kv.data()),
                                              given(3, n.x.data()), given(5, n.probabilities.data()),
                                              given(6, n.weights.data()), given(7, n.ids.data()));
                    return lib.attend(given(0, pool), given(1, &n.block), 1, given(2, n.kv.data()), given(3, n.x.data()),
                                      given(4, n.normed.data()), given(5, n.probabilities.data()),
                                      given(6, n.weights.data()), given(7, n.ids.data()));
                }, whole && missing == 4);
        for (const int64_t rows : {INT64_C(-1), INT64_C(0), INT64_C(17), INT64_MAX})
            refused("a number of rows", none, [&](Network &n) {
                return lib.attend(pool, &n.block, rows, n.kv.data(), n.x.data(), n.normed.data(),
                                  n.probabilities.data(), n.weights.data(), n.ids.data());
            }, rows == 0);
        for (const int32_t count : {-1, 0})
            refused("a number of blocks", none, [&](Network &n) {
                return lib.step(pool, &n.block, count, 1, n.kv.data(), n.x.data(), n.probabilities.data(),
                                n.weights.data(), n.ids.data());
            });
        refused("a step without experts", [](Network &n) { n.block.experts = nullptr; }, [&](Network &n) {
            return lib.step(pool, &n.block, 1, 1, n.kv.data(), n.x.data(), n.probabilities.data(), n.weights.data(),
                                  n.ids.data());
        });
    }

    void quantizing() {
        const auto wrong = [&](const char *what, const std::function<void(dbrx_matrix &, dbrx_matrix &)> &change) {
            Matrix from(DBRX_F32, 8, 64), to(net.format, 8, 64);
            change(from.is, to.is);
            if (!lib.quantize(pool, &from.is, nullptr, nullptr, &to.is))
                fault(std::string("not refused: quantize, ") + what);
            else if (!*lib.error())
                fault(std::string("refused without a text: quantize, ") + what);
        };
        if (net.format < DBRX_INT8) return wrong("to floats", [](dbrx_matrix &, dbrx_matrix &) {});
        wrong("of bytes", [](dbrx_matrix &from, dbrx_matrix &) { from.format = DBRX_INT8; });
        wrong("of nothing", [](dbrx_matrix &from, dbrx_matrix &) { from.values = nullptr; });
        wrong("of other outputs", [](dbrx_matrix &from, dbrx_matrix &) { from.outputs = 7; });
        wrong("of other inputs", [](dbrx_matrix &, dbrx_matrix &to) { to.inputs = 32; });
        wrong("of no inputs", [](dbrx_matrix &from, dbrx_matrix &to) { from.inputs = to.inputs = 0; });
        wrong("of huge sides", [](dbrx_matrix &from, dbrx_matrix &to) {
            from.inputs = to.inputs = from.outputs = to.outputs = INT64_C(1) << 40;
        });
        wrong("to nowhere", [](dbrx_matrix &, dbrx_matrix &to) { to.values = nullptr; });
        wrong("without scales", [](dbrx_matrix &, dbrx_matrix &to) { to.scale = nullptr; });
        Matrix matrix(DBRX_F32, 8, 64);
        if (!lib.quantize(nullptr, &matrix.is, nullptr, nullptr, &matrix.is)) fault("quantize without a pool");
        if (!lib.quantize(pool, nullptr, nullptr, nullptr, &matrix.is)) fault("quantize of null");
        if (!lib.quantize(pool, &matrix.is, nullptr, nullptr, nullptr)) fault("quantize to null");
    }
};

void pools(const Library &lib, const std::string &vectors) {
    for (const int threads : {0, -1, INT_MIN, INT_MAX})
        if (dbrx_pool *pool = lib.pool_create(threads)) {
            fault("a pool of " + std::to_string(threads) + " threads");
            lib.pool_destroy(pool);
        } else if (!*lib.error()) {
            fault("no pool, without a text");
        }
    lib.pool_destroy(nullptr);
    dbrx_pool *pool = lib.pool_create(2);
    dbrx_counters counters;
    if (lib.pool_threads(nullptr)) fault("threads of no pool");
    if (!lib.pool_counters(nullptr, 0, &counters)) fault("counters of no pool");
    if (!lib.pool_counters(pool, 0, nullptr)) fault("counters to nowhere");
    for (const int thread : {-1, 2, INT_MAX})
        if (!lib.pool_counters(pool, thread, &counters)) fault("counters of a thread that is not there");
    if (lib.pool_counters(pool, 1, &counters)) fault("no counters of a thread");
    char said[80];
    for (const size_t size : {size_t(1), size_t(47), size_t(60), vectors.size() / 2, vectors.size() - 1})
        if (!lib.replay(pool, vectors.data(), int64_t(size), said, sizeof said)) fault("a recorded file that was cut is not noticed");
    if (!lib.replay(pool, nullptr, 4, said, sizeof said)) fault("replaying nothing");
    if (!lib.replay(nullptr, vectors.data(), 400, said, sizeof said)) fault("replaying without a pool");
    std::string changed = vectors;
    changed[changed.size() - 2] = char(changed[changed.size() - 2] ^ 0x40);
    if (!lib.replay(pool, changed.data(), int64_t(changed.size()), said, sizeof said)) fault("a wrong answer is not noticed");
    lib.pool_destroy(pool);
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 3) return std::fprintf(stderr, "usage: driver LIBRARY VECTORS\n"), 2;
    Library lib{dlopen(argv[1], RTLD_NOW)};
    if (!lib.handle) return std::fprintf(stderr, "%s\n", dlerror()), 2;
    if (!lib.runs_here()) return std::printf("%s: not for this processor\n", lib.variant()), 77;
    if (lib.abi() != DBRX_ABI) fault("another ABI");
    const std::string vectors = recorded(argv[2]);
    for (const int threads : {1, 2, 5}) replay(lib, vectors, threads);
    std::thread beside([&] { replay(lib, vectors, 2); });
    replay(lib, vectors, 2);
    beside.join();
    rows_alone(lib);
    dbrx_pool *pool = lib.pool_create(2);
    for (const int32_t format : {DBRX_F32, DBRX_BF16, DBRX_INT8, DBRX_INT4, DBRX_INT3, DBRX_GROUPS_3, DBRX_GROUPS_4, DBRX_Q4_1}) {
        Wrong wrong{lib, pool, Network(format)};
        wrong.matrices(), wrong.products(), wrong.rows(), wrong.experts(), wrong.steps(), wrong.quantizing();
    }
    lib.pool_destroy(pool);
    pools(lib, vectors);
    std::printf("%s: %s\n", lib.variant(), faults ? "FAILED" : "all as it should be");
    return faults != 0;
}
