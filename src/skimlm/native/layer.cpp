// A stored layer times x, and as a dense matrix: checked, then handed to the code for its kind.
#include "guard.h"
#include "product.h"

int skimlm_layer_matmul(const SkimlmLayer* layer, const void* x, int64_t x_bf16, void* out, int64_t n,
                        int64_t exact, int threads) {
  return guarded([&] {
    const SkimlmLayer& w = *layer;
    Matrix m{}, a{};
    if (n < 0 || !lay_out(w, m) || !lay_out_adapter(w, a)) return MISFIT;
    const Output output{out, x_bf16 != 0, w.rows, w.bias};
    if (n && is_plain(w))
      matmul_plain(w, m, x, x_bf16, n, exact, output, threads);
    else if (n)
      matmul_any(w, m, a, x, x_bf16, n, output, threads);
    return DONE;
  });
}

int skimlm_layer_unpack(const SkimlmLayer* layer, void* out, int64_t out_bf16, int64_t begin, int64_t end,
                        int64_t stored, int threads) {
  return guarded([&] {
    Matrix m{}, a{};
    if (!lay_out(*layer, m) || !lay_out_adapter(*layer, a) || begin < 0 || begin > end || end > m.r) return MISFIT;
    unpack(*layer, m, out, out_bf16, begin, end, stored, threads);
    return DONE;
  });
}
