// The C interface of skimlm's native libraries: plain pointers and sizes, no Python, no torch.
//
// Matrices are dense and row-major: r rows (output channels), c columns (input channels). Rows are
// independent: every function splits them over `threads` workers, and its result does not depend on
// how many there are. A codebook is [r, k], row i using its first sizes[i] entries, ascending.
// The readable torch version of each function stands in the Python module named beside it; nothing
// is checked here, the Python side checks shapes, types and layout before it calls.
#pragma once
#include <cstdint>

#define SKIMLM_API extern "C" __attribute__((visibility("default")))

SKIMLM_API int skimlm_best_isa();

// Run threads through these two functions of an OpenMP from now on; null for the library's own threads.
SKIMLM_API void skimlm_use_openmp(void* gomp_parallel, void* omp_get_num_threads);

// Reads `bytes` (a multiple of 8) once, on all threads; *sum keeps the compiler from leaving it out.
SKIMLM_API void skimlm_read(const uint64_t* data, int64_t bytes, uint64_t* sum, int threads);

// Exact weighted 1-D k-means of every row for k = 2, 4, .. 2^max_bits (quantize/kmeans.py).
// centroids [r, 2^(max_bits+1) - 2]: the k values of each width in turn, ascending; costs [r, max_bits].
// edges: places where clusters of a row of more than twice as many points may begin; 0: everywhere.
SKIMLM_API void skimlm_kmeans_rows(const float* w, const float* f, int64_t r, int64_t c, int64_t max_bits,
                                   int64_t edges, float* centroids, double* costs, int threads);

// codes[i, j] = the entry of row i nearest to w[i, j]; a tie goes to the lower one (quantize/kmeans.py).
SKIMLM_API void skimlm_nearest_codes(const float* w, const float* codebook, const int32_t* sizes,
                                     uint8_t* codes, int64_t r, int64_t c, int64_t k, int threads);

// Cyclic coordinate descent under h [c, c], codebooks fixed (quantize/refine.py).
// gradient [r, c] = (w_hat - w) h on entry and on return; codes change in place.
SKIMLM_API void skimlm_coordinate_descent(const float* h, float* gradient, const float* codebook,
                                          const int32_t* sizes, uint8_t* codes, int64_t r, int64_t c,
                                          int64_t k, int64_t sweeps, int threads);

// The same for sparse rows: code 255 is a weight of 0, others are worth codebook[code] times the scale of
// the row's group of `group` columns, scale [r, ceil(c / group)] (quantize/refine.py). With `pairs`, c is a
// multiple of 4 and each aligned four columns of a row keep two: which two is chosen anew.
SKIMLM_API void skimlm_sparse_descent(const float* h, float* gradient, const float* codebook,
                                      const int32_t* sizes, const float* scale, int64_t group,
                                      uint8_t* codes, int64_t r, int64_t c, int64_t k, int64_t pairs,
                                      int64_t sweeps, int threads);

// Least-squares codebooks under h, codes fixed up to sorting, code 255 a weight of 0 (quantize/refine.py).
// gradient [r, c] as above, or null.
SKIMLM_API void skimlm_codebook_step(const float* h, const float* w, const int32_t* sizes,
                                     uint8_t* codes, float* codebook, float* gradient, int64_t r,
                                     int64_t c, int64_t k, double ridge, int threads);

// out[i, j] = codebook[i, codes[i, j]] as bfloat16 bits (train/codebooks.py).
SKIMLM_API void skimlm_lookup_bf16(const uint8_t* codes, const float* codebook, uint16_t* out,
                                   int64_t r, int64_t c, int64_t k, int threads);

// out[i, m] = sum of gradient[i, j] (bfloat16 bits) over the j with codes[i, j] = m (train/codebooks.py).
SKIMLM_API void skimlm_reduce_bf16(const uint8_t* codes, const uint16_t* gradient, float* out,
                                   int64_t r, int64_t c, int64_t k, int threads);

// The dense matrix of a packed linear, out [r, c] as float or bfloat16 bits (runtime/ops.py, FORMAT.md).
// widths are in row order; packed, codebook (int8), row_scale (bfloat16 bits) and row_zero are in stored
// order, i.e. rows stably sorted by width; in_scale [c] is float16 bits, or null. Only the stored rows
// begin..end: each at its own place in out or, if `stored`, one after the other from the start of out.
SKIMLM_API void skimlm_unpack(const uint8_t* packed, const uint8_t* widths, const int8_t* codebook,
                              const uint16_t* row_scale, const int16_t* row_zero,
                              const uint16_t* in_scale, void* out, int64_t out_bf16, int64_t r,
                              int64_t c, int64_t begin, int64_t end, int64_t stored, int threads);

// Whether the routines for AVX-512 with VBMI, VNNI and BF16 run: the processor has them, this library too.
SKIMLM_API int skimlm_has_vbmi();

// out [n, r] = x [n, c] times a packed linear transposed, plus bias [r] unless it is null (runtime/ops.py,
// FORMAT.md). x and out are float, or bfloat16 bits if x_bf16; the rest as in skimlm_unpack, sizes in
// elements. exact = 0 rounds x to int8 per token and 128 columns. Returns 1, having done nothing, if the
// sizes are not those of the widths.
SKIMLM_API int skimlm_matmul(const void* x, int64_t x_bf16, const uint8_t* packed, int64_t packed_size,
                             const uint8_t* widths, const int8_t* codebook, int64_t codebook_size,
                             const uint16_t* row_scale, const int16_t* row_zero, int64_t zeros,
                             const uint16_t* in_scale, const float* bias, void* out, int64_t n, int64_t r,
                             int64_t c, int64_t exact, int threads);

// A linear with parts of format version 2 as it is stored (FORMAT.md), in elements; what it does not have
// is null and of size 0. sparsity: 0 dense, 1 2:4, 2 bitmap. group 0: codebooks. As in skimlm_matmul,
// `widths`, `in_scale` and `bias` are as long as r and c say.
struct SkimlmSparse {
  const uint8_t* weight;
  const uint8_t* widths;
  const int8_t* codebook;
  const uint16_t* row_scale;
  const int16_t* row_zero;
  const uint16_t* in_scale;
  const uint8_t* positions;
  const void* lora_a;
  const void* lora_b;
  const uint16_t* lora_a_scale;
  const uint16_t* lora_b_scale;
  const float* bias;
  int64_t weight_size, codebook_size, scale_size, zeros_size, positions_size;
  int64_t a_size, b_size, a_scale_size, b_scale_size;
  int64_t r, c, sparsity, kept, group, rank, adapter_bits;
  // What follows from `widths`, if it is known already, else null: which row stands at a stored place,
  // [r], and how many rows have each width, [9].
  const int32_t* order;
  const int64_t* counts;
};

// out [n, r] = x [n, c] times such a linear transposed, plus its adapter's part and bias; few tokens. x and
// out are float, or bfloat16 bits if x_bf16. Returns 1, having done nothing, if the sizes do not fit.
SKIMLM_API int skimlm_sparse_matmul(const SkimlmSparse* linear, const void* x, int64_t x_bf16, void* out,
                                    int64_t n, int threads);

// The dense matrix of such a linear without its adapter, out [r, c], 0 where pruned; out_bf16, begin, end
// and stored as in skimlm_unpack. Returns 1, having done nothing, if the sizes do not fit.
SKIMLM_API int skimlm_sparse_unpack(const SkimlmSparse* linear, void* out, int64_t out_bf16, int64_t begin,
                                    int64_t end, int64_t stored, int threads);

// out [n, r] = x [n, c] times a table of 8 or 4 bits transposed (runtime/linear.py, FORMAT.md).
SKIMLM_API void skimlm_table_matmul(const void* x, int64_t x_bf16, const uint8_t* codes, int64_t bits,
                                    const uint16_t* scale, void* out, int64_t n, int64_t r, int64_t c,
                                    int threads);

// One token through the blocks of a model (decode.cpp, runtime/decode.py): x and out [width], cos and sin [rotary],
// all bfloat16 bits or float; past: the keys of every block, then the values, [kv_heads, capacity,
// head_dim] each, this token's go to place `length`. Returns 1, what lies below `length` unchanged, if
// sizes do not fit each other.
struct SkimlmBody;
SKIMLM_API int skimlm_decode(const SkimlmBody* body, const void* x, const void* cos, const void* sin,
                             int64_t rotary, void* const* past, int64_t capacity, int64_t length,
                             void* out, int threads);
