// Recorded calls, made again and compared with answers that numpy found in float64 (tests/make_native_vectors.py).
//
// The file holds calls and answers; inputs and weights are made here and there of the same random numbers. Whoever loads
// a library replays it first, so that a processor on which nobody tried these kernels cannot give wrong numbers; the
// driver of the tests replays it under sanitizers and for other processors.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "dbrx.h"

namespace {

// ---- numbers

float widened(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint16_t cut(float value) {  // to bfloat16, towards zero
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return uint16_t(bits >> 16);
}

// The float of 16 bits that is the same, of magnitudes from 2^-14 to 65,504.
uint16_t half(uint16_t bf16) { return uint16_t((bf16 & 0x8000) | ((bf16 & 0x7fff) * 8 - ((127 - 15) << 10))); }

// Number i of a stream: SplitMix64's mixing of a counter, so that numpy makes a whole stream at once.
uint64_t random(uint64_t stream, int64_t i) {
    uint64_t z = ((stream << 32) + uint64_t(i) + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// In [-1, 1), of 24 bits: exact in float32.
float uniform(uint64_t stream, int64_t i) { return float(random(stream, i) >> 40) / 8388608.0f - 1.0f; }

// Zeros that end exactly where a sanitizer watches, and begin at a multiple of an element's size only, as tensors do in a
// mapped file.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t n) : n_(n), bytes_(std::make_unique<char[]>(size_t(n + 1) * sizeof(T))) {}
    T *data() { return reinterpret_cast<T *>(bytes_.get()) + 1; }
    T &operator[](int64_t i) { return data()[i]; }
    int64_t size() const { return n_; }

  private:
    int64_t n_;
    std::unique_ptr<char[]> bytes_;
};
using Floats = Buffer<float>;

// `peaks`: every 97th is 64 times as large, as some activations of real models are.
Floats random_floats(uint64_t stream, int64_t n, bool peaks = false) {
    Floats made(n);
    for (int64_t i = 0; i < n; ++i) made[i] = uniform(stream, i) * (peaks && i % 97 == 13 ? 64.0f : 1.0f);
    return made;
}

// ---- the file

class Reader {
  public:
    Reader(const void *recorded, int64_t size) : at_(static_cast<const char *>(recorded)), left_(size) {}
    bool done() const { return left_ == 0; }
    int32_t number() { return take<int32_t>(); }
    float real() { return take<float>(); }
    std::string text() {
        char name[48];
        take(name, sizeof name);
        return {name, strnlen(name, sizeof name)};
    }
    Floats floats(int64_t n) {
        Floats found(n);
        take(found.data(), n * int64_t(sizeof(float)));
        return found;
    }
    Buffer<int32_t> numbers(int64_t n) {
        Buffer<int32_t> found(n);
        take(found.data(), n * int64_t(sizeof(int32_t)));
        return found;
    }

  private:
    template <class T>
    T take() {
        T value;
        take(&value, sizeof value);
        return value;
    }
    void take(void *to, int64_t n) {
        if (n < 0 || n > left_) throw std::runtime_error("the recorded file is too short");
        std::memcpy(to, at_, size_t(n));
        at_ += n, left_ -= n;
    }

    const char *at_;
    int64_t left_;
};

// ---- matrices

struct Shape {
    int32_t format, transposed, group, ranges;
    int64_t outputs, inputs;

    static Shape read(Reader &from) {
        const int32_t format = from.number(), transposed = from.number(), group = from.number(), ranges = from.number();
        const int64_t outputs = from.number();
        return {format, transposed, group, ranges, outputs, from.number()};
    }
    int64_t numbers() const { return outputs * inputs; }
    bool is_groups() const { return DBRX_GROUPS_2 <= format && format <= DBRX_GROUPS_8; }
    int bits() const { return is_groups() ? format - 128 : format == DBRX_INT4 ? 4 : format == DBRX_INT3 ? 3 : 0; }  // of a weight
    bool has_biases() const { return is_groups() && !(ranges & DBRX_ZERO_POINTS); }
    bool has_wide_ranges() const { return is_groups() && ranges & DBRX_RANGES_F32; }
    int64_t groups() const { return group ? (inputs + group - 1) / group : 0; }
};

// ggml's types: inputs and bytes of a block, and in which a float of 16 bits begins.
struct Blocks {
    int32_t format;
    int64_t inputs, bytes;
    int halves[2];
};
constexpr Blocks BLOCKS[] = {
    {DBRX_Q4_0, 32, 18, {0, 0}},      {DBRX_Q4_1, 32, 20, {0, 2}},      {DBRX_Q5_0, 32, 22, {0, 0}},
    {DBRX_Q5_1, 32, 24, {0, 2}},      {DBRX_Q8_0, 32, 34, {0, 0}},      {DBRX_IQ4_NL, 32, 18, {0, 0}},
    {DBRX_Q2_K, 256, 84, {80, 82}},   {DBRX_Q3_K, 256, 110, {108, 108}}, {DBRX_Q4_K, 256, 144, {0, 2}},
    {DBRX_Q5_K, 256, 176, {0, 2}},    {DBRX_Q6_K, 256, 210, {208, 208}}, {DBRX_IQ4_XS, 256, 136, {0, 0}},
};
const Blocks *blocks_of(int32_t format) {
    for (const Blocks &each : BLOCKS)
        if (each.format == format) return &each;
    return nullptr;
}

// A matrix with the memory it points to; the parts that its format has no use for are empty.
struct Matrix {
    Shape shape;
    Floats f32;
    Buffer<uint16_t> bf16;
    Buffer<uint8_t> bytes;  // of int8 too
    Floats scale;
    Buffer<uint16_t> scales, zeros;
    Floats wide_scales, wide_zeros;
    dbrx_matrix is;

    explicit Matrix(const Shape &s)
        : shape(s),
          f32(s.format == DBRX_F32 ? s.numbers() : 0),
          bf16(s.format == DBRX_BF16 ? s.numbers() : 0),
          bytes(bytes_of(s)),
          scale(s.format == DBRX_INT8 ? s.outputs : 0),
          scales(s.has_wide_ranges() ? 0 : s.outputs * s.groups()),
          zeros(scales.size()),
          wide_scales(s.has_wide_ranges() ? s.outputs * s.groups() : 0),
          wide_zeros(wide_scales.size()),
          is{s.format, s.transposed, s.group, s.ranges, s.outputs, s.inputs, nullptr, nullptr, nullptr} {
        if (s.format == DBRX_F32) is.values = f32.data();
        if (s.format == DBRX_BF16) is.values = bf16.data();
        if (blocks_of(s.format)) is.values = bytes.data();
        if (s.format == DBRX_INT8) is.values = bytes.data(), is.scale = scale.data();
        if (s.bits()) is.values = bytes.data(), is.scale = scales.data(), is.zero = zeros.data();
        if (s.has_wide_ranges()) is.scale = wide_scales.data(), is.zero = wide_zeros.data();
    }

    Matrix(const Shape &s, uint64_t stream) : Matrix(s) {
        for (int64_t i = 0; i < f32.size(); ++i) f32[i] = uniform(stream, i);
        for (int64_t i = 0; i < bf16.size(); ++i) bf16[i] = cut(uniform(stream, i));
        for (int64_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(random(stream, i) >> 56);
        if (const Blocks *b = blocks_of(s.format))
            for (int64_t block = 0; block < bytes.size(); block += b->bytes)
                for (const int half : b->halves) bytes[block + half + 1] = (bytes[block + half + 1] & 0x83) | 0x24;
        for (int64_t i = 0; i < scale.size(); ++i) scale[i] = (2.0f + uniform(stream + 1, i)) / 256.0f;
        const float middle = float(1 << s.bits()) / 2;
        for (int64_t i = 0; i < s.outputs * s.groups(); ++i) {
            const uint16_t scale_of = cut((2.0f + uniform(stream + 1, i)) / 16.0f);
            const uint16_t zero_of = cut((middle + middle / 2 * uniform(stream + 2, i)) * (s.has_biases() ? -1.0f / 8 : 1));
            if (s.has_wide_ranges()) wide_scales[i] = widened(scale_of), wide_zeros[i] = widened(zero_of);
            else if (s.is_groups() && s.ranges & DBRX_RANGES_F16) scales[i] = half(scale_of), zeros[i] = half(zero_of);
            else scales[i] = scale_of, zeros[i] = zero_of;
        }
    }

    static int64_t bytes_of(const Shape &s) {
        if (const Blocks *b = blocks_of(s.format)) return s.numbers() / b->inputs * b->bytes;
        return s.format == DBRX_INT8 ? s.numbers() : s.numbers() * s.bits() / 8;
    }

    static Matrix read(Reader &from) {
        const Shape shape = Shape::read(from);
        return {shape, uint64_t(from.number())};
    }

    int quantized(int64_t output, int64_t input) {  // of int4 and int3
        if (shape.format == DBRX_INT4) return (bytes[(output * shape.inputs + input) / 2] >> (input % 2 * 4)) & 15;
        const int64_t row = output * shape.inputs * 3 / 8;
        const int low = (bytes[row + input / 4] >> (input % 4 * 2)) & 3;
        return low + 4 * ((bytes[row + shape.inputs / 4 + input / 8] >> (input % 8)) & 1);
    }

    // The number that is meant, of a quantized matrix.
    float at(int64_t output, int64_t input) {
        const int64_t n = output * shape.inputs + input;
        if (shape.format == DBRX_INT8) return float(int8_t(bytes[n])) * scale[output];
        const int64_t part = output * shape.groups() + input / shape.group;
        return (float(quantized(output, input)) - widened(zeros[part])) * widened(scales[part]);
    }
};

// ---- answers

class Wrong : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

void succeeded(int failed) {
    if (failed) throw Wrong(dbrx_error());
}

// Each row's difference, of the norm of the row that should be; a number that is none never passes.
void near(const char *what, Floats &found, Floats &wanted, int64_t row, double tolerance) {
    for (int64_t start = 0; start < wanted.size(); start += row) {
        double difference = 0, norm = 0;
        for (int64_t i = start; i < start + row; ++i) {
            difference += std::pow(double(found[i]) - double(wanted[i]), 2);
            norm += std::pow(double(wanted[i]), 2);
        }
        if (!(difference <= tolerance * tolerance * norm)) {
            char text[120];
            std::snprintf(text, sizeof text, "%s, row %lld: off by %.2g of its norm", what,
                          static_cast<long long>(start / row), std::sqrt(difference / norm));
            throw Wrong(text);
        }
    }
}

// ---- calls

void linear(Reader &from, dbrx_pool *pool, double tolerance) {
    const int64_t n = from.number();
    const bool peaks = from.number();
    const uint64_t stream = uint64_t(from.number());
    Matrix matrix = Matrix::read(from);
    Floats x = random_floats(stream, n * matrix.shape.inputs, peaks), y(n * matrix.shape.outputs);
    Floats wanted = from.floats(y.size());
    succeeded(dbrx_linear(pool, &matrix.is, x.data(), n, y.data()));
    near("product", y, wanted, matrix.shape.outputs, tolerance);
}

void head(Reader &from, dbrx_pool *pool, double tolerance) {
    const int64_t n = from.number();
    const uint64_t stream = uint64_t(from.number());
    const bool normed = from.number();
    const float eps = from.real();
    Matrix matrix = Matrix::read(from);
    Floats x = random_floats(stream, n * matrix.shape.inputs), norm = random_floats(stream + 1, matrix.shape.inputs);
    Floats y(n * matrix.shape.outputs), wanted = from.floats(y.size());
    succeeded(dbrx_head(pool, normed ? norm.data() : nullptr, eps, &matrix.is, x.data(), n, y.data()));
    near("logits", y, wanted, matrix.shape.outputs, tolerance);
}

// Experts of one shape, w1, v1 and w2 of each behind each other's streams.
struct Experts {
    std::vector<Matrix> matrices;
    std::vector<dbrx_expert> are;

    Experts(Reader &from, int32_t count) {
        const Shape up = Shape::read(from), down = Shape::read(from);
        const uint64_t stream = uint64_t(from.number());
        for (int32_t i = 0; i < 3 * count; ++i)
            matrices.emplace_back(i % 3 == 2 ? down : up, stream + 4 * uint64_t(i));
        for (size_t i = 0; i < matrices.size(); i += 3)
            are.push_back({matrices[i].is, matrices[i + 1].is, matrices[i + 2].is});
    }
};

void experts(Reader &from, dbrx_pool *pool, double tolerance) {
    const int64_t n = from.number(), d = from.number();
    const int32_t count = from.number(), top_k = from.number(), activation = from.number();
    const uint64_t stream = uint64_t(from.number());
    Experts all(from, count);
    Buffer<int32_t> ids = from.numbers(n * top_k);
    Floats normed = random_floats(stream, n * d), weights = random_floats(stream + 1, n * top_k);
    Floats x = random_floats(stream + 2, n * d), out(n * d), sum = from.floats(n * d), with_x(n * d);
    for (int64_t i = 0; i < n * d; ++i) with_x[i] = sum[i] + x[i];
    auto call = [&](int32_t first, int32_t last, const float *on) {
        succeeded(dbrx_experts(pool, all.are.data(), count, first, last, activation, normed.data(), n, ids.data(),
                               weights.data(), top_k, on, out.data()));
    };
    call(0, count, nullptr);
    near("sum of experts", out, sum, d, tolerance);
    call(0, count, x.data());
    near("sum of experts on x", out, with_x, d, tolerance);
    call(0, count / 2, x.data());
    call(count / 2, count, out.data());
    near("sum of experts in two calls", out, with_x, d, tolerance);
}

// Keys and values of a row, in blocks. `by_head`: a block is [heads, tokens, head_dim], else [tokens, heads, head_dim].
template <class T>
struct Cache {
    int64_t block;
    std::vector<Buffer<T>> memory;
    std::vector<void *> blocks;

    Cache(int64_t count, int64_t size, uint64_t stream, T (*made)(float)) : block(size) {
        for (int64_t b = 0; b < count; ++b) {
            memory.emplace_back(size);
            for (int64_t i = 0; i < size; ++i) memory.back()[i] = made(uniform(stream, b * size + i));
            blocks.push_back(memory.back().data());
        }
    }
};

struct Row {
    Cache<float> keys, values;
    Cache<uint16_t> half_keys, half_values;
    Floats cos, sin;
};

void step(Reader &from, dbrx_pool *pool, double tolerance) {
    const int64_t n = from.number();
    dbrx_block block{};
    block.d_model = from.number(), block.heads = from.number(), block.kv_heads = from.number();
    block.head_dim = from.number(), block.n_experts = from.number(), block.top_k = from.number();
    block.activation = from.number(), block.normalize = from.number();
    block.norm_order = from.real(), block.clip = from.real(), block.eps = from.real();
    const int64_t d = block.d_model, block_tokens = from.number(), by_head = from.number();
    const int32_t format = from.number();
    const uint64_t stream = uint64_t(from.number());
    Matrix Wqkv = Matrix::read(from), out_proj = Matrix::read(from), router = Matrix::read(from);
    Experts all(from, block.n_experts);
    Floats norm_1 = random_floats(stream + 1, d), norm_2 = random_floats(stream + 2, d);
    block.norm_1 = norm_1.data(), block.norm_2 = norm_2.data(), block.experts = all.are.data();
    block.Wqkv = Wqkv.is, block.out_proj = out_proj.is, block.router = router.is;

    const int64_t width = int64_t(block.kv_heads) * block.head_dim, size = block_tokens * width;
    const int64_t token_stride = by_head ? block.head_dim : width;
    const int64_t head_stride = by_head ? block_tokens * block.head_dim : block.head_dim;
    Buffer<int32_t> positions = from.numbers(n);
    std::vector<Row> rows;
    std::vector<dbrx_kv> kv;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t blocks = positions[i] / block_tokens + 1;
        const int64_t whole = format == DBRX_F32 ? blocks : 0, half = blocks - whole;
        const uint64_t of_row = stream + 10 + 4 * uint64_t(i);
        auto same = +[](float value) { return value; };
        rows.push_back({{whole, size, of_row, same}, {whole, size, of_row + 1, same},
                        {half, size, of_row, cut}, {half, size, of_row + 1, cut},
                        random_floats(of_row + 2, block.head_dim), random_floats(of_row + 3, block.head_dim)});
        Row &row = rows.back();
        kv.push_back({whole ? row.keys.blocks.data() : row.half_keys.blocks.data(),
                      whole ? row.values.blocks.data() : row.half_values.blocks.data(), block_tokens, token_stride,
                      head_stride, format, 0, positions[i], row.cos.data(), row.sin.data()});
    }
    // Floats that were written behind the others, [n, kv_heads * head_dim].
    auto written = [&](Cache<float> Row::*whole, Cache<uint16_t> Row::*half) {
        Floats found(n * width);
        for (int64_t i = 0; i < n * width; ++i) {
            Row &row = rows[size_t(i / width)];
            const int64_t position = positions[i / width], g = i % width / block.head_dim;
            const int64_t place = position % block_tokens * token_stride + g * head_stride + i % block.head_dim;
            const auto b = size_t(position / block_tokens);
            found[i] = format == DBRX_F32 ? (row.*whole).memory[b][place] : widened((row.*half).memory[b][place]);
        }
        return found;
    };

    Floats attended = from.floats(n * d), normed_wanted = from.floats(n * d);
    Floats keys_wanted = from.floats(n * width), values_wanted = from.floats(n * width);
    Floats probabilities_wanted = from.floats(n * block.n_experts), weights_wanted = from.floats(n * block.top_k);
    Buffer<int32_t> ids_wanted = from.numbers(n * block.top_k);
    Floats x_wanted = from.floats(n * d);

    for (const bool whole : {false, true}) {
        Floats x = random_floats(stream, n * d), normed(n * d);
        Floats probabilities(n * block.n_experts), weights(n * block.top_k);
        Buffer<int32_t> ids(n * block.top_k);
        if (whole)
            succeeded(dbrx_step(pool, &block, 1, n, kv.data(), x.data(), probabilities.data(), weights.data(),
                                      ids.data()));
        else
            succeeded(dbrx_attend(pool, &block, n, kv.data(), x.data(), normed.data(), probabilities.data(),
                                  weights.data(), ids.data()));
        near(whole ? "a block" : "attention", x, whole ? x_wanted : attended, d, tolerance);
        if (!whole) near("norm", normed, normed_wanted, d, tolerance);
        Floats keys = written(&Row::keys, &Row::half_keys), values = written(&Row::values, &Row::half_values);
        near("keys", keys, keys_wanted, width, tolerance);
        near("values", values, values_wanted, width, tolerance);
        near("probabilities", probabilities, probabilities_wanted, block.n_experts, tolerance);
        near("weights of experts", weights, weights_wanted, block.top_k, tolerance);
        for (int64_t i = 0; i < ids.size(); ++i)
            if (ids[i] != ids_wanted[i]) throw Wrong("another expert was chosen");
    }
}

void quantize(Reader &from, dbrx_pool *pool, double tolerance) {
    Matrix floats = Matrix::read(from), quantized(Shape::read(from));
    const bool scaled = from.number();
    const uint64_t stream = uint64_t(from.number());
    const int64_t outputs = floats.shape.outputs, inputs = floats.shape.inputs;
    Floats rows = random_floats(stream, outputs), columns = random_floats(stream + 1, inputs);
    Floats wanted = from.floats(outputs * inputs), found(outputs * inputs);
    succeeded(dbrx_quantize(pool, &floats.is, scaled ? rows.data() : nullptr, scaled ? columns.data() : nullptr,
                            &quantized.is));
    for (int64_t i = 0; i < found.size(); ++i) found[i] = quantized.at(i / inputs, i % inputs);
    near("quantized numbers", found, wanted, inputs, tolerance);
}

void row(Reader &from, dbrx_pool *pool, double tolerance) {
    Matrix matrix = Matrix::read(from);
    const int64_t at = from.number();
    Floats found(matrix.shape.inputs), wanted = from.floats(found.size());
    succeeded(dbrx_rows(pool, &matrix.is, &at, 1, found.data()));
    near("row", found, wanted, found.size(), tolerance);
}

void call(int32_t kind, Reader &from, dbrx_pool *pool, double tolerance) {
    switch (kind) {
        case 0: return linear(from, pool, tolerance);
        case 1: return head(from, pool, tolerance);
        case 2: return experts(from, pool, tolerance);
        case 3: return step(from, pool, tolerance);
        case 4: return quantize(from, pool, tolerance);
        case 5: return row(from, pool, tolerance);
        default: throw std::runtime_error("no such call was recorded");
    }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int dbrx_replay(dbrx_pool *pool, const void *recorded, int64_t size,
                                                                  char *said, int64_t room) {
    if (!said || room < 1) return 1;
    std::string name;
    try {
        if (!pool || !recorded || size < 0) throw std::runtime_error("a pool and a recorded file are needed");
        Reader from(recorded, size);
        while (!from.done()) {
            name = from.text();
            const int32_t kind = from.number();
            call(kind, from, pool, double(from.real()));
        }
        return 0;
    } catch (const std::exception &error) {
        std::snprintf(said, size_t(room), "%s%s%s", name.c_str(), name.empty() ? "" : ": ", error.what());
    } catch (...) {
        std::snprintf(said, size_t(room), "%s: failed", name.c_str());
    }
    return 1;
}
