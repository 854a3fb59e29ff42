// What a caller may get wrong: every size, code and pointer is looked at before anything is read or written.
//
// Where memory ends, nobody can see from here: the Python side compares tensors' sizes (native/tensors.py).
#pragma once
#include <cstdint>
#include <initializer_list>
#include <stdexcept>

#include "formats/blocks.h"

namespace dbrx {

constexpr int64_t LARGEST = INT32_MAX;      // of a side, of rows, of tokens
constexpr int64_t MOST = int64_t(1) << 46;  // numbers of one array: its bytes never leave 64 bits
constexpr int MOST_THREADS = 1024;

inline void require(bool holds, const char *what) {
    if (!holds) throw std::invalid_argument(what);
}

inline bool is_float(const dbrx_matrix &m) { return m.format == DBRX_F32 || m.format == DBRX_BF16; }

inline bool is_affine(const dbrx_matrix &m) { return m.format == DBRX_INT4 || m.format == DBRX_INT3; }
inline int bits_of(const dbrx_matrix &m) { return m.format == DBRX_INT4 ? 4 : 3; }  // of such a matrix

// Sides of at most LARGEST, whose product is at most MOST.
inline bool fits(int64_t rows, int64_t columns) {
    return 0 < rows && rows <= LARGEST && 0 < columns && columns <= LARGEST && rows <= MOST / columns;
}

inline bool is_blocks(const dbrx_matrix &m) { return m.format >= DBRX_Q4_0; }
inline bool is_groups(const dbrx_matrix &m) { return m.format >= DBRX_GROUPS_2 && !is_blocks(m); }

inline void check_blocks(const dbrx_matrix &m) {
    with_blocks(m, [&](auto type) {
        require(m.format == type.FORMAT, "a matrix has an unknown format");
        require(m.inputs % type.INPUTS == 0, "a matrix's rows are no whole blocks");
    });
    require(!m.transposed, "only matrices of floats can be transposed");
}

inline void check_groups(const dbrx_matrix &m) {
    const int bits = m.format - 128;
    require((2 <= bits && bits <= 6) || bits == 8, "a matrix has an unknown format");
    require(m.scale && m.zero, "a matrix with groups has no scales, or no zero points");
    require(m.group == 32 || m.group == 64 || m.group == 128, "groups are 32, 64 or 128 inputs");
    const int type = m.ranges & ~DBRX_ZERO_POINTS;
    require(DBRX_RANGES_BF16 <= type && type <= DBRX_RANGES_F32, "scales have an unknown type");
    require(m.inputs * bits % 8 == 0, "the inputs of a matrix fill no whole bytes");
    require(!m.transposed, "only matrices of floats can be transposed");
}

inline void check(const dbrx_matrix &m) {
    require(fits(m.outputs, m.inputs), "a matrix is empty, or too large");
    require(m.values, "a matrix has no values");
    if (is_blocks(m)) return check_blocks(m);
    if (is_groups(m)) return check_groups(m);
    require(m.format >= DBRX_F32 && m.format <= DBRX_INT3, "a matrix has an unknown format");
    require(!m.transposed || is_float(m), "only matrices of floats can be transposed");
    require(is_float(m) || m.scale, "a quantized matrix has no scales");
    if (!is_affine(m)) return;
    require(m.zero, "a matrix with groups has no zero points");
    require(m.group == 128 || (m.format == DBRX_INT4 && (m.group == 32 || m.group == 64 || m.group == 256)),
            "groups are 128 inputs, or in int4 32, 64 or 256");
    require(m.inputs * bits_of(m) % 8 == 0, "the inputs of a matrix fill no whole bytes");
}

// A product with n rows of x, which may be none.
inline void check(const dbrx_pool *pool, const dbrx_matrix *m, const float *x, int64_t n, const float *y) {
    require(pool && m && x && y, "a pool, a matrix, rows and a place for the product are needed");
    check(*m);
    require(n == 0 || (fits(n, m->inputs) && fits(n, m->outputs)), "a number of rows is below 0, or too large");
}

inline void check_activation(int32_t activation) {
    require(activation >= DBRX_SILU && activation <= DBRX_RELU, "an unknown activation");
}

// Whether both take activations that were prepared for one of them.
inline bool same_rows(const dbrx_matrix &a, const dbrx_matrix &b) {
    return (a.format == b.format && a.group == b.group) || (is_blocks(a) && is_blocks(b));
}

inline void check(const dbrx_expert &e) {
    for (const dbrx_matrix *m : {&e.w1, &e.v1, &e.w2}) check(*m);
    require(!e.w1.transposed && !e.v1.transposed, "w1 and v1 cannot be transposed");
    require(e.w1.outputs == e.v1.outputs && e.w1.outputs == e.w2.inputs && e.w1.inputs == e.v1.inputs &&
                e.w1.inputs == e.w2.outputs && same_rows(e.w1, e.v1),
            "the matrices of an expert do not fit together");
}

// Beside another one, for which memory was taken.
inline void check(const dbrx_expert &e, const dbrx_expert &like) {
    check(e);
    const auto same = [](const dbrx_matrix &a, const dbrx_matrix &b) {
        return a.outputs == b.outputs && a.inputs == b.inputs && a.format == b.format && a.group == b.group &&
               a.transposed == b.transposed;
    };
    require(same(e.w1, like.w1) && same(e.w2, like.w2), "the experts of a layer differ in size or format");
}

// Returns the place of one of the range that is chosen, if there is any: only chosen ones need be in memory.
inline int32_t check_experts(const dbrx_pool *pool, const dbrx_expert *experts, int32_t n_experts, int32_t first,
                             int32_t last, int32_t activation, const float *normed, int64_t n, const int32_t *ids,
                             const float *weights, int32_t top_k, const float *out) {
    require(pool && experts && normed && ids && weights && out, "a pointer is null");
    require(0 <= first && first <= last && last <= n_experts, "the range of experts is none of their number");
    require(0 < top_k && top_k <= n_experts, "top_k is not between 1 and the number of experts");
    require(n == 0 || fits(n, top_k), "a number of rows is below 0, or too large");
    check_activation(activation);
    int32_t like = -1;
    for (int64_t i = 0; i < n * top_k; ++i) {
        require(0 <= ids[i] && ids[i] < n_experts, "an expert's id is not below their number");
        if (ids[i] < first || ids[i] >= last) continue;
        if (like < 0) check(experts[like = ids[i]]);
        check(experts[ids[i]], experts[like]);
    }
    if (like < 0) check(experts[like = first < n_experts ? first : n_experts - 1]);
    require(n == 0 || (fits(n, experts[like].w1.inputs) && fits(n, experts[like].w1.outputs)), "too many rows");
    return like;
}

inline void check(const dbrx_kv &kv) {
    require(kv.keys && kv.values && kv.cos && kv.sin, "a pointer of a row's keys and values is null");
    require(kv.format == DBRX_F32 || kv.format == DBRX_BF16, "keys and values have an unknown format");
    require(0 <= kv.position && kv.position < LARGEST && 0 < kv.block_tokens && kv.block_tokens <= LARGEST &&
                0 < kv.token_stride && kv.token_stride <= LARGEST && 0 < kv.head_stride && kv.head_stride <= MOST,
            "a row has no place for its keys");
    for (int64_t block = 0; block <= kv.position / kv.block_tokens; ++block)
        require(kv.keys[block] && kv.values[block], "a block of keys or values is not there");
}

inline void check_step(const dbrx_pool *pool, const dbrx_block *block, int64_t n, const dbrx_kv *kv, const float *x,
                       const float *probabilities, const float *weights, const int32_t *ids) {
    require(pool && block && kv && x && probabilities && weights && ids, "a pointer is null");
    require(0 < n && n <= DBRX_GEMV_MAX_ROWS, "a step takes 1 to 16 rows");
    const dbrx_block &b = *block;
    require(b.norm_1 && b.norm_2, "a block has no norm");
    require(0 < b.kv_heads && 0 < b.heads && b.heads % b.kv_heads == 0 && 0 < b.head_dim && b.head_dim % 2 == 0,
            "the heads do not fit together");
    require(0 < b.top_k && b.top_k <= b.n_experts, "top_k is not between 1 and the number of experts");
    check_activation(b.activation);
    for (const dbrx_matrix *m : {&b.Wqkv, &b.out_proj, &b.router}) check(*m);
    require(!b.Wqkv.transposed && !b.out_proj.transposed && !b.router.transposed && is_float(b.router),
            "attention's and the router's matrices lie row by row, the router's in floats");
    const int64_t width = int64_t(b.heads) * b.head_dim, of_keys = int64_t(b.kv_heads) * b.head_dim;
    require(b.Wqkv.inputs == b.d_model && b.Wqkv.outputs == width + 2 * of_keys && b.out_proj.inputs == width &&
                b.out_proj.outputs == b.d_model && b.router.inputs == b.d_model && b.router.outputs == b.n_experts,
            "the matrices of a block do not fit together");
    for (int64_t row = 0; row < n; ++row) check(kv[row]);
}

inline void check_rows(const dbrx_pool *pool, const dbrx_matrix *m, const int64_t *rows, int64_t n, const float *to) {
    require(pool && m && rows && to, "a pool, a matrix, numbers of rows and a place for them are needed");
    check(*m);
    require(is_blocks(*m) || is_groups(*m), "rows are taken of matrices that other programs made");
    require(n == 0 || fits(n, m->inputs), "a number of rows is below 0, or too large");
    for (int64_t i = 0; i < n; ++i) require(0 <= rows[i] && rows[i] < m->outputs, "a matrix has no such row");
}

// The experts of a block that computes with all of them.
inline void check_held(const dbrx_block &b) {
    require(b.experts, "the experts are not in memory");
    for (int32_t i = 0; i < b.n_experts; ++i) check(b.experts[i], b.experts[0]);
    require(b.experts[0].w1.inputs == b.d_model, "the experts do not fit the block");
}

inline void check_quantize(const dbrx_pool *pool, const dbrx_matrix *from, const dbrx_matrix *to) {
    require(pool && from && to, "a pool and two matrices are needed");
    check(*from);
    check(*to);
    require(is_float(*from) && (to->format == DBRX_INT8 || is_affine(*to)), "quantizing goes from floats to int8, int4 or int3");
    require(from->outputs == to->outputs && from->inputs == to->inputs, "two matrices differ in size");
}

}  // namespace dbrx
