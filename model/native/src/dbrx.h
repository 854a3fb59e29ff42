// The C interface of the native kernels: plain structs of pointers and sizes, called through ctypes.
//
// Nothing here knows a checkpoint or a configuration. Activations are float32 everywhere; weights are what `dbrx_matrix`
// says. Every function returns 0, or 1 with a sentence in `dbrx_error()`; no C++ exception crosses this line.
// Sums of floats have a fixed order: what is computed for a row depends neither on the number of threads nor on the
// rows beside it.
//
// A letter behind a name gives its shape: n rows, d = d_model, h = hidden size of an expert, e experts, k = top_k.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DBRX_ABI 5           // what `dbrx_abi()` gives; raised with every change of this file
#define DBRX_GEMV_MAX_ROWS 16  // up to so many rows each weight is read once and multiplied where it stands

enum dbrx_format {
    DBRX_F32 = 0,   // values float [outputs, inputs]
    DBRX_BF16 = 1,  // values uint16_t [outputs, inputs]: the upper half of a float
    DBRX_INT8 = 2,  // values int8_t [outputs, inputs], scale float [outputs]: value * scale
    DBRX_INT4 = 3,  // values uint8_t [outputs, inputs / 2], an even input in the low half of a byte and the odd one after
                    // it in the high half; scale and zero bfloat16 [outputs, ceil(inputs / group)]: (quantized - zero) * scale
    DBRX_INT3 = 4,  // values uint8_t [outputs, inputs * 3 / 8]: two bits of all inputs, four in a byte, then the third bits,
                    // eight in a byte; the first input in the lowest bits. scale and zero as above
    // Groups of inputs as MLX, GPTQ and AWQ have them, by 128 and the bits of a weight: values uint8_t [outputs, inputs * bits / 8],
    // quantized bit by bit, the first in the lowest bits; scale and zero [outputs, ceil(inputs / group)] as `ranges` says:
    // scale * q + zero, or scale * (q - zero)
    DBRX_GROUPS_2 = 130,
    DBRX_GROUPS_3 = 131,
    DBRX_GROUPS_4 = 132,
    DBRX_GROUPS_5 = 133,
    DBRX_GROUPS_6 = 134,
    DBRX_GROUPS_8 = 136,
    // ggml's blocks, by 256 and ggml's number of a type: values uint8_t [outputs, bytes of a row] as a GGUF file holds
    // them, in blocks of 32 inputs, or of 256 for those named K and IQ4_XS.
    DBRX_Q4_0 = 258,
    DBRX_Q4_1 = 259,
    DBRX_Q5_0 = 262,
    DBRX_Q5_1 = 263,
    DBRX_Q8_0 = 264,
    DBRX_Q2_K = 266,
    DBRX_Q3_K = 267,
    DBRX_Q4_K = 268,
    DBRX_Q5_K = 269,
    DBRX_Q6_K = 270,
    DBRX_IQ4_NL = 276,
    DBRX_IQ4_XS = 279,
};

// Of groups of inputs: the type of scale and zero, and whether zero is a zero point.
enum dbrx_ranges { DBRX_RANGES_BF16 = 0, DBRX_RANGES_F16 = 1, DBRX_RANGES_F32 = 2, DBRX_ZERO_POINTS = 4 };

enum dbrx_activation { DBRX_SILU = 0, DBRX_GELU = 1, DBRX_RELU = 2 };  // gelu: the exact one, with erf

// A matrix [outputs, inputs] as it lies in memory, which may be a mapped file.
typedef struct {
    int32_t format;      // dbrx_format
    int32_t transposed;  // floats only: values are [inputs, outputs], as a checkpoint stores w2
    int32_t group;       // inputs that share scale and zero point, of formats that have groups; else 0
    int32_t ranges;      // dbrx_ranges: one of the first three, and maybe the last
    int64_t outputs, inputs;
    const void *values, *scale, *zero;
} dbrx_matrix;

// silu(w1 x) * (v1 x), then w2: w1 and v1 [h, d], w2 [d, h].
typedef struct {
    dbrx_matrix w1, v1, w2;
} dbrx_expert;

// What one block of the network needs beside the experts.
typedef struct {
    int32_t d_model, heads, kv_heads, head_dim, n_experts, top_k;
    int32_t activation;          // dbrx_activation
    int32_t normalize;           // 1: router weights are divided by their norm of order `norm_order`
    float norm_order, clip, eps;  // clip: bound of queries, keys and values, INFINITY for none; eps: of both norms
    float reserved;
    const float *norm_1, *norm_2;  // [d]
    dbrx_matrix Wqkv, out_proj;    // [(heads + 2 kv_heads) * head_dim, d], [d, heads * head_dim]
    dbrx_matrix router;            // [e, d], floats
    const dbrx_expert *experts;    // [e]; NULL where they are not in memory: then only `dbrx_attend` is called
} dbrx_block;

// A row's keys and values of one layer: blocks of `block_tokens` tokens each. The number at token t, head g, place i of a
// head is element (t % block_tokens) * token_stride + g * head_stride + i of block t / block_tokens.
typedef struct {
    void *const *keys, *const *values;  // [blocks] each
    int64_t block_tokens, token_stride, head_stride;
    int32_t format;  // DBRX_F32 or DBRX_BF16
    int32_t reserved;
    int64_t position;          // tokens that are there; this one's keys and values are written behind them
    const float *cos, *sin;    // [head_dim] of that position, the first half of sin negated: rotate(x) = x * cos + swapped(x) * sin
} dbrx_kv;

typedef struct dbrx_pool dbrx_pool;  // threads, and memory for what lies between two products

typedef struct {
    int64_t barriers, sleeps;         // of one thread, since the pool was made: how often it waited, how often it slept
    int64_t waited_ns;
    int64_t bytes, operations;        // of weights that this thread read; multiplications and additions that it made
} dbrx_counters;

int dbrx_abi(void);
const char *dbrx_variant(void);     // "avx2", "avx512", "neon", "plain": what this library was compiled for
int dbrx_runs_here(void);           // whether this processor has the instructions (asked before anything else)
const char *dbrx_error(void);       // of this thread's last call that failed

// threads: how many compute, the caller among them. They inherit the caller's affinity, spin a little, then sleep.
dbrx_pool *dbrx_pool_create(int threads);
void dbrx_pool_destroy(dbrx_pool *pool);
int dbrx_pool_threads(const dbrx_pool *pool);
int dbrx_pool_counters(const dbrx_pool *pool, int thread, dbrx_counters *out);

// y [n, outputs] = x [n, inputs] times the matrix; any n.
int dbrx_linear(dbrx_pool *pool, const dbrx_matrix *matrix, const float *x, int64_t n, float *y);

// out [n, d] = x + the weighted sum of the chosen experts' outputs of `normed`; x may be NULL (zeros) or `out` itself.
// ids and weights [n, k]. Only experts first <= i < last are computed, so that a caller may listen to Ctrl-C between
// calls; the sum of calls over all ranges is that of one call, up to rounding. Up to DBRX_GEMV_MAX_ROWS rows n go
// through gemv, more through gemm.
int dbrx_experts(dbrx_pool *pool, const dbrx_expert *experts, int32_t n_experts, int32_t first, int32_t last,
                 int32_t activation, const float *normed, int64_t n, const int32_t *ids, const float *weights,
                 int32_t top_k, const float *x, float *out);

// The first half of a block for n <= DBRX_GEMV_MAX_ROWS tokens of different sequences, kv [n]: x [n, d] gets attention
// added in place; then normed [n, d], probabilities [n, e] (softmax over all), weights [n, k] and ids [n, k] of the best.
int dbrx_attend(dbrx_pool *pool, const dbrx_block *block, int64_t n, const dbrx_kv *kv, float *x, float *normed,
                float *probabilities, float *weights, int32_t *ids);

// `count` whole blocks one after the other, each `dbrx_attend`, then `dbrx_experts`, with at most 6 barriers: kv [count, n],
// probabilities [count, n, e]; weights and ids [n, k] are the last block's.
int dbrx_step(dbrx_pool *pool, const dbrx_block *blocks, int32_t count, int64_t n, const dbrx_kv *kv, float *x,
              float *probabilities, float *weights, int32_t *ids);

// logits [n, outputs] = head times the norm of x [n, d]; norm NULL: of x itself.
int dbrx_head(dbrx_pool *pool, const float *norm, float eps, const dbrx_matrix *head, const float *x, int64_t n,
              float *logits);

// to [n, inputs] = some rows of a matrix that another program made (`DBRX_GROUPS_2` and those behind it), as floats.
int dbrx_rows(dbrx_pool *pool, const dbrx_matrix *matrix, const int64_t *rows, int64_t n, float *to);

// Floats [outputs, inputs] of a DBRX_F32 or DBRX_BF16 matrix (transposed ones too) -> the parts of an int8, int4 or int3 one,
// whose pointers `to` holds and which are written. The numbers are those of quantization/int8.py and affine.py.
// row_scale [outputs] and column_scale [inputs], NULL for ones, multiply the floats first (equalizing).
int dbrx_quantize(dbrx_pool *pool, const dbrx_matrix *from, const float *row_scale, const float *column_scale,
                  dbrx_matrix *to);

// Computes `recorded` (vectors.bin) again and compares with the answers in it: 0, or 1 and a sentence in `said`.
int dbrx_replay(dbrx_pool *pool, const void *recorded, int64_t size, char *said, int64_t room);

#ifdef __cplusplus
}
#endif
