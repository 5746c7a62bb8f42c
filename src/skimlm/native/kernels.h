// The C interface of skimlm's native libraries: plain pointers and sizes, no Python, no torch.
//
// Matrices are dense and row-major: r rows (output channels), c columns (input channels). Rows are
// independent: every function splits them over `threads` workers, and its result does not depend on
// how many there are. A codebook is [r, k], row i using its first sizes[i] entries, ascending.
// The readable torch version of each function stands in the Python module named beside it. Python checks
// shapes, types and layout before it calls; here only the sizes of a layer's tensors are.
//
// A function that does work returns 0, or: 1, nothing done, sizes do not fit each other; 2 out of memory;
// 3 any other failure. After 2 and 3 what it writes to holds anything.
#pragma once
#include <cstdint>

#include "layer.h"

#if defined(_WIN32)
#define SKIMLM_API extern "C" __declspec(dllexport)
#else
#define SKIMLM_API extern "C" __attribute__((visibility("default")))
#endif

// The version of this interface, and the bytes of the structs that cross it: what native/__init__.py was
// written for must be the same. 0: the version, then the structs in the order of STRUCTS in native/structs.py; -1 behind.
SKIMLM_API int64_t skimlm_abi(int64_t what);

SKIMLM_API int skimlm_best_isa();

// Run threads through these two functions of an OpenMP from now on; null for the library's own threads.
SKIMLM_API void skimlm_use_openmp(void* gomp_parallel, void* omp_get_num_threads);

// Reads `bytes` (a multiple of 8) once, on all threads; *sum keeps the compiler from leaving it out.
SKIMLM_API int skimlm_read(const uint64_t* data, int64_t bytes, uint64_t* sum, int threads);

// Exact weighted 1-D k-means of every row for k = 2, 4, .. 2^max_bits (quantize/kmeans.py).
// centroids [r, 2^(max_bits+1) - 2]: the k values of each width in turn, ascending; costs [r, max_bits].
// edges: places where clusters of a row of more than twice as many points may begin; 0: everywhere.
SKIMLM_API int skimlm_kmeans_rows(const float* w, const float* f, int64_t r, int64_t c, int64_t max_bits,
                                   int64_t edges, float* centroids, double* costs, int threads);

// codes[i, j] = the entry of row i nearest to w[i, j]; a tie goes to the lower one (quantize/kmeans.py).
SKIMLM_API int skimlm_nearest_codes(const float* w, const float* codebook, const int32_t* sizes,
                                     uint8_t* codes, int64_t r, int64_t c, int64_t k, int threads);

// Cyclic coordinate descent under h [c, c], codebooks fixed (quantize/refine.py).
// gradient [r, c] = (w_hat - w) h on entry and on return; codes change in place.
SKIMLM_API int skimlm_coordinate_descent(const float* h, float* gradient, const float* codebook,
                                          const int32_t* sizes, uint8_t* codes, int64_t r, int64_t c,
                                          int64_t k, int64_t sweeps, int threads);

// The same for sparse rows: code 255 is a weight of 0, others are worth codebook[code] times the scale of
// the row's group of `group` columns, scale [r, ceil(c / group)] (quantize/refine.py). With `pairs`, c is a
// multiple of 4 and each aligned four columns of a row keep two: which two is chosen anew.
SKIMLM_API int skimlm_sparse_descent(const float* h, float* gradient, const float* codebook,
                                      const int32_t* sizes, const float* scale, int64_t group,
                                      uint8_t* codes, int64_t r, int64_t c, int64_t k, int64_t pairs,
                                      int64_t sweeps, int threads);

// The symbols of trellis rows of `bits` bits with least sum of f (scale * table[window] - w)^2: table [128],
// scale [r], codes [r, c] (quantize/trellis.py).
SKIMLM_API int skimlm_trellis_viterbi(const float* w, const float* f, const float* table, const float* scale,
                                       uint8_t* codes, int64_t r, int64_t c, int64_t bits, int threads);

// Descent over their symbols under h, columns in the order of the stream, `run` at once at every `stride`-th, a
// divisor of 48; `run` is at most 8 more (quantize/trellis.py). gradient [r, c] as above; codes change in place.
SKIMLM_API int skimlm_trellis_descend(const float* h, float* gradient, const float* table,
                                       const float* scale, uint8_t* codes, int64_t r, int64_t c,
                                       int64_t bits, int64_t run, int64_t stride, int64_t sweeps,
                                       int threads);

// a [128, 128] = sum of weight P^T h P over rows, P [c, 128] being 1 where a weight has a window, windows [r, c]
// (quantize/trellis.py).
SKIMLM_API int skimlm_trellis_normal(const float* h, const uint8_t* windows, const float* weight, double* a,
                                      int64_t r, int64_t c, int threads);

// Least-squares codebooks under h, codes fixed up to sorting, code 255 a weight of 0 (quantize/refine.py).
// gradient [r, c] as above, or null.
SKIMLM_API int skimlm_codebook_step(const float* h, const float* w, const int32_t* sizes,
                                     uint8_t* codes, float* codebook, float* gradient, int64_t r,
                                     int64_t c, int64_t k, double ridge, int threads);

// codes [r, c] of rows packed one code after the other, `bits` each, 1..8 (quantize/codes.py).
SKIMLM_API int skimlm_unpack_codes(const uint8_t* packed, uint8_t* codes, int64_t r, int64_t c, int64_t bits,
                                    int threads);

// windows [r, c] of packed trellis rows of `bits` bits, 1..4: what each code looks up.
SKIMLM_API int skimlm_unpack_windows(const uint8_t* packed, uint8_t* windows, int64_t r, int64_t c, int64_t bits,
                                      int threads);

// out[i, j] = codebook[i, codes[i, j]] as bfloat16 bits (train/codebooks.py).
SKIMLM_API int skimlm_lookup_bf16(const uint8_t* codes, const float* codebook, uint16_t* out,
                                   int64_t r, int64_t c, int64_t k, int threads);

// out[i, m] = sum of gradient[i, j] (bfloat16 bits) over the j with codes[i, j] = m (train/codebooks.py).
SKIMLM_API int skimlm_reduce_bf16(const uint8_t* codes, const uint16_t* gradient, float* out,
                                   int64_t r, int64_t c, int64_t k, int threads);

// Whether the routines for AVX-512 with VBMI, VNNI, BF16 and GFNI run: the processor has them, this library too.
SKIMLM_API int skimlm_has_vbmi();

// out [n, rows of all] = x [n, cols] times `count` layers transposed, side by side, their adapters and biases
// included (runtime/ops.py, FORMAT.md). x and out are float, or bfloat16 bits if x_bf16. exact = 0, of layers without sparsity, grid
// and adapter: x is rounded to int8 per token and 128 columns; 2: every token to the bit what it gives alone.
// `threads` is not 0.
SKIMLM_API int skimlm_layer_matmul(const SkimlmLayer* layers, int64_t count, const void* x, int64_t x_bf16,
                                   void* out, int64_t n, int64_t exact, int threads);

// One token for each of `count` layers of one shape, such as the experts a token is sent to: row i of
// out [count, rows] is row i of x [count, cols] (or, if `shared`, the one row there is) times layers[i]
// transposed, exactly as above.
SKIMLM_API int skimlm_layers_matmul(const SkimlmLayer* layers, int64_t count, const void* x, int64_t x_bf16,
                                    int64_t shared, void* out, int threads);

// The dense matrix of a layer without its adapter, out [rows, cols] as float or bfloat16 bits, 0 where pruned.
// Only the stored rows begin..end: each at its own place in out or, if `stored`, one after the other from
// the start of out.
SKIMLM_API int skimlm_layer_unpack(const SkimlmLayer* layer, void* out, int64_t out_bf16, int64_t begin,
                                   int64_t end, int64_t stored, int threads);

// The same for the stored rows places[0 .. count - 1], in this order from the start of out: [count, cols].
SKIMLM_API int skimlm_layer_rows(const SkimlmLayer* layer, const int32_t* places, int64_t count, void* out,
                                 int64_t out_bf16, int threads);

// out [n, r] = x [n, c] times a table of 8 or 4 bits transposed (runtime/tables.py, FORMAT.md); exact: in integers
// however many tokens there are, which are then to the bit what they are alone.
SKIMLM_API int skimlm_table_matmul(const void* x, int64_t x_bf16, const uint8_t* codes, int64_t bits,
                                    const uint16_t* scale, void* out, int64_t n, int64_t r, int64_t c,
                                    int64_t exact, int threads);

// A block has one mlp, or `experts` of them, of which each token takes the `chosen` likeliest; their probabilities
// are divided by the sum of those chosen if `normalised`. Experts are layers without sparsity, grid and adapter,
// whose sizes the caller has checked.
struct SkimlmBlock {
  int64_t in_count, mlp_count, experts, chosen, normalised;
  const void *norm, *q_norm, *k_norm, *mlp_norm;  // the middle two may be null
  const void* router;                             // [experts, width], null without experts
  const SkimlmLayer* in[3];                       // q, k, v, or all in one
  const SkimlmLayer* o;
  const SkimlmLayer* const* mlp;   // gate, up, or both in one, as all experts have them
  const SkimlmLayer* const* down;  // one, or of every expert
};

struct SkimlmBody {
  int64_t bf16, width, heads, kv_heads, head_dim, count;
  double eps, scale;
  const void* norm;  // the last one
  const SkimlmBlock* blocks;
};

// What stands before a sequence in one key-value head (runtime/prefix.py): keys and values [length, head_dim] of
// the body's type, and what is added to their logits [length], or null.
struct SkimlmPrefix {
  const void *keys, *values;
  const float* bias;
  int64_t length;
};

// A sequence that gets one more token: `places` has the keys of every block, then the values, [kv_heads, capacity,
// head_dim] each; the token's go to place `length`, and what lies below stays. `prefix` has one for every key-value
// head of every block, in this order, or is null.
struct SkimlmSequence {
  void* const* places;
  int64_t capacity, length;
  const SkimlmPrefix* prefix;
};

// One token each of n sequences through the blocks of a model (decode.cpp, runtime/decode.py): x and out [n, width],
// cos and sin [n, rotary], all bfloat16 bits or float. The body's structs do not change from token to token;
// native/structs.py has the same.
SKIMLM_API int skimlm_decode(const SkimlmBody* body, const void* x, const void* cos, const void* sin,
                             int64_t rotary, const SkimlmSequence* sequences, int64_t n, void* out, int threads);
