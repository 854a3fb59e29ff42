// How fast decode kernels read: bench LIBRARY [THREADS] [SECONDS a figure]
//
// Sizes of a layer of `mini` (d_model 1024, experts of 1792). For each format: a layer's four chosen experts, in turn with
// plain reading of as many bytes by as many threads, both from memory that is too much for the caches. The best of many
// short runs counts, so that what else the machine does matters less.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "../src/dbrx.h"

namespace {

using Clock = std::chrono::steady_clock;
constexpr int D = 1024, HIDDEN = 1792, EXPERTS = 48, CHOSEN = 4, HEADS = 16, KV_HEADS = 4, HEAD = 64;

double seconds(const std::function<void()> &f) {
    const auto begin = Clock::now();
    f();
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

std::mt19937 random_bits(1);

// Memory that is really there, with numbers that are small ones in each format.
std::vector<uint16_t> filled(size_t bytes, int format) {
    std::vector<uint16_t> out(bytes / 2 + 64);
    for (uint16_t &word : out) {
        const uint32_t bits = random_bits();
        word = uint16_t(format == DBRX_BF16 || format == DBRX_F32 ? 0x3c00 | (bits & 0x807f) : bits);
    }
    return out;
}

struct Weights {
    std::vector<std::vector<uint16_t>> memory;
    dbrx_matrix matrix(int format, int64_t outputs, int64_t inputs, bool transposed = false) {
        const int64_t bytes[] = {inputs * 4, inputs * 2, inputs, inputs / 2, inputs * 3 / 8};
        const int group = format == DBRX_INT4 ? 32 : format == DBRX_INT3 ? 128 : 0;
        memory.push_back(filled(size_t(outputs * bytes[format]), format));
        dbrx_matrix m = {format, transposed, group, 0, outputs, inputs, memory.back().data(), nullptr, nullptr};
        if (format >= DBRX_INT8) {  // two bytes a scale of a group, or four of an output: small floats
            for (const void **part : {&m.scale, &m.zero}) {
                memory.push_back(filled(size_t(outputs * (group ? inputs / group * 2 : 4)), DBRX_BF16));
                *part = memory.back().data();
            }
        }
        return m;
    }
    size_t bytes() const {
        return std::accumulate(memory.begin(), memory.end(), size_t(0), [](size_t sum, const auto &m) { return sum + m.size() * 2; });
    }
};

// Seconds that `threads` take to read so many bytes, four places at a time each.
double read_plainly(const std::vector<uint16_t> &memory, size_t bytes, int threads) {
    static size_t start = 0;
    if (start + bytes > memory.size() * 2) start = 0;
    const char *from = reinterpret_cast<const char *>(memory.data()) + start;
    start += bytes;
    const auto read = [=](int thread) {
        typedef uint64_t Line __attribute__((vector_size(32)));
        const size_t share = bytes / threads / 256 * 64, first = thread * 4 * share;
        Line sums[8] = {};
        for (size_t i = 0; i < share; i += 64)
            for (int s = 0; s < 4; ++s)
                for (int half = 0; half < 2; ++half) {
                    Line line;
                    __builtin_memcpy(&line, from + first + s * share + i + half * 32, 32);
                    sums[2 * s + half] += line;
                }
        for (Line &sum : sums) asm volatile("" : : "m"(sum));
    };
    return seconds([&] {
        std::vector<std::thread> others;
        for (int t = 1; t < threads; ++t) others.emplace_back(read, t);
        read(0);
        for (std::thread &other : others) other.join();
    });
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 2) return std::puts("usage: bench LIBRARY [THREADS] [SECONDS]"), 2;
    void *library = dlopen(argv[1], RTLD_NOW);
    if (!library) return std::puts(dlerror()), 1;
    const int threads = argc > 2 ? std::atoi(argv[2]) : 2;
    const double patience = argc > 3 ? std::atof(argv[3]) : 1;
#define FUNCTION(name) const auto name = reinterpret_cast<decltype(&::name)>(dlsym(library, #name))
    FUNCTION(dbrx_pool_create);
    FUNCTION(dbrx_pool_destroy);
    FUNCTION(dbrx_pool_counters);
    FUNCTION(dbrx_experts);
    FUNCTION(dbrx_step);
    FUNCTION(dbrx_error);
    FUNCTION(dbrx_variant);
    dbrx_pool *pool = dbrx_pool_create(threads);
    const auto must = [&](int code) {
        if (code) std::puts(dbrx_error()), std::exit(1);
    };
    std::printf("%s, %d threads\n%-22s %9s %9s %9s %6s\n", dbrx_variant(), threads, "", "us", "GB/s", "read GB/s", "ratio");
    const std::vector<uint16_t> plain = filled(512 << 20, DBRX_INT8);

    // The best of many, of f and of reading the same bytes: as much as the threads would take from memory.
    const auto report = [&](const char *name, int64_t rows, size_t bytes, const std::function<void()> &f) {
        double best = 1e9, best_read = 1e9;
        for (const auto begin = Clock::now(); std::chrono::duration<double>(Clock::now() - begin).count() < patience;) {
            for (int i = 0; i < 8; ++i) best = std::min(best, seconds(f));
            for (int i = 0; i < 8; ++i) best_read = std::min(best_read, read_plainly(plain, bytes, threads));
        }
        char title[64];
        std::snprintf(title, sizeof title, "%s, %ld rows", name, long(rows));
        std::printf("%-22s %9.0f %9.1f %9.1f %6.2f\n", title, best * 1e6, bytes / best / 1e9, bytes / best_read / 1e9, best_read / best);
        std::fflush(stdout);
    };
    std::vector<float> x(16 * D, 0.1f), out(16 * D), weights(16 * CHOSEN, 0.25f), probabilities(16 * EXPERTS), norm(D, 1.0f);
    std::vector<int32_t> ids(16 * CHOSEN);
    for (float &one : x) one = float(random_bits() % 2001) / 1000 - 1;
    const char *names[] = {"f32", "bf16", "int8", "int4", "int3"};
    for (int format = 4; format >= 1; --format) {
        Weights w;
        std::vector<dbrx_expert> experts;
        for (int i = 0; i < EXPERTS; ++i)
            experts.push_back({w.matrix(format, HIDDEN, D), w.matrix(format, HIDDEN, D), w.matrix(format, D, HIDDEN, format < DBRX_INT8)});
        const size_t of_one = w.bytes() / EXPERTS;
        std::vector<int> order(EXPERTS);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random_bits);
        size_t next = 0;
        for (const int rows : {1, 2, 4, 8, 16}) {  // all rows choose the same experts: one row's bytes
            report(names[format], rows, of_one * CHOSEN, [&] {
                for (int i = 0; i < CHOSEN; ++i, ++next)
                    for (int r = 0; r < rows; ++r) ids[r * CHOSEN + i] = order[next % EXPERTS];
                must(dbrx_experts(pool, experts.data(), EXPERTS, 0, EXPERTS, DBRX_SILU, x.data(), rows, ids.data(), weights.data(),
                                  CHOSEN, nullptr, out.data()));
            });
        }
        // A whole block with 16 of the experts, behind so many tokens.
        Weights attention;
        dbrx_block block = {D, HEADS, KV_HEADS, HEAD, 16, CHOSEN, DBRX_SILU, 1, 1, 8, 1e-5f, 0, norm.data(), norm.data(),
                            attention.matrix(format, D + 2 * KV_HEADS * HEAD, D), attention.matrix(format, D, D),
                            attention.matrix(DBRX_BF16, 16, D), nullptr};
        for (const int64_t tokens : {64, 2048, 32768}) {
            constexpr int64_t BLOCK = 256, COPIES = 4;  // of keys and values, in turn, so that they come from memory
            const int64_t blocks = tokens / BLOCK + 1, numbers = blocks * BLOCK * KV_HEADS * HEAD;
            const std::vector<uint16_t> cache = filled(size_t(2 * COPIES * numbers * 2), DBRX_BF16);
            std::vector<void *> keys, values;
            for (int64_t i = 0; i < COPIES * blocks; ++i) {
                keys.push_back(const_cast<uint16_t *>(cache.data()) + 2 * i * BLOCK * KV_HEADS * HEAD);
                values.push_back(static_cast<uint16_t *>(keys.back()) + BLOCK * KV_HEADS * HEAD);
            }
            const std::vector<float> cos(HEAD, 1.0f), sin(HEAD, 0.0f);
            std::vector<float> state(x);
            int64_t turn = 0;
            char name[32];
            std::snprintf(name, sizeof name, "%s block at %ld", names[format], long(tokens));
            report(name, 1, attention.bytes() + of_one * CHOSEN + size_t(2 * tokens * KV_HEADS * HEAD * 2), [&] {
                const int64_t at = turn++ % COPIES * blocks;
                const dbrx_kv kv = {&keys[at], &values[at], BLOCK, KV_HEADS * HEAD, HEAD, DBRX_BF16, 0, tokens, cos.data(), sin.data()};
                block.experts = experts.data() + turn % 3 * 16;
                must(dbrx_step(pool, &block, 1, 1, &kv, state.data(), probabilities.data(), weights.data(), ids.data()));
            });
        }
    }
    for (int t = 0; t < threads; ++t) {
        dbrx_counters c;
        dbrx_pool_counters(pool, t, &c);
        std::printf("thread %d: %.1f GB, waited %.2f s in %ld waits, slept %ld times\n", t, double(c.bytes) / 1e9,
                    double(c.waited_ns) / 1e9, long(c.barriers), long(c.sleeps));
    }
    dbrx_pool_destroy(pool);
}
