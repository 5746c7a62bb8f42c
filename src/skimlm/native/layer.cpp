// A stored layer times x, and as a dense matrix: checked, then handed to the code for its kind.
#include <algorithm>
#include <deque>

#include "guard.h"
#include "product.h"

int skimlm_layer_matmul(const SkimlmLayer* layers, int64_t count, const void* x, int64_t x_bf16, void* out, int64_t n,
                        int64_t exact, int threads) {
  return guarded([&] {
    std::vector<Matrix> m(std::max<int64_t>(count, 0)), a(m.size());
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (layers[i].cols != layers->cols || !lay_out(layers[i], m[i]) || !lay_out_adapter(layers[i], a[i]))
        return MISFIT;
      rows += layers[i].rows;
    }
    if (n < 0) return MISFIT;
    const int64_t size = x_bf16 ? 2 : 4, turn = exact == 2 ? 1 : n;  // tokens at once
    std::vector<ManyProduct> many;
    char* to = static_cast<char*>(out);
    for (int64_t i = 0; i < count; to += layers[i++].rows * size) {
      const SkimlmLayer& w = layers[i];
      const bool whole = x_bf16 && !w.in_scale && n >= IN_BF16 && skimlm_has_vbmi();
      if (is_plain(w) && exact == 1 && whole) {
        many.push_back({w, m[i], {to, true, rows, w.bias}});
        continue;
      }
      if (n && is_plain(w)) {
        matmul_plain(w, m[i], x, x_bf16, n, exact, {to, x_bf16 != 0, rows, w.bias}, threads);
        continue;
      }
      for (int64_t t = 0; t < n; t += turn)
        matmul_any(w, m[i], a[i], static_cast<const char*>(x) + t * w.cols * size, x_bf16, turn,
                   {to + t * rows * size, x_bf16 != 0, rows, w.bias}, threads);
    }
    multiply_many(many, x, n, threads);
    return DONE;
  });
}

int skimlm_layers_matmul(const SkimlmLayer* layers, int64_t count, const void* x, int64_t x_bf16,
                         int64_t shared, void* out, int threads) {
  return guarded([&] {
    std::vector<Matrix> m(std::max<int64_t>(count, 0)), a(m.size());
    for (int64_t i = 0; i < count; ++i) {
      const bool alike = layers[i].rows == layers->rows && layers[i].cols == layers->cols;
      if (!alike || !lay_out(layers[i], m[i]) || !lay_out_adapter(layers[i], a[i])) return MISFIT;
    }
    std::deque<Integers> made;
    const Integers* common = nullptr;  // of the one row there is
    std::vector<Product> products;
    for (int64_t i = 0; i < count; ++i) {
      const SkimlmLayer& w = layers[i];
      const int64_t size = x_bf16 ? 2 : 4;
      const void* from = static_cast<const char*>(x) + (shared ? 0 : i * w.cols * size);
      const Output to{static_cast<char*>(out) + i * w.rows * size, x_bf16 != 0, w.rows, w.bias};
      if (!is_plain(w)) {
        matmul_any(w, m[i], a[i], from, x_bf16, 1, to, threads);
        continue;
      }
      const bool plain = shared && !w.in_scale;
      const Integers* whole = plain ? common : nullptr;
      if (!whole) {
        const std::vector<float> values = to_floats(from, x_bf16, w.in_scale, 1, w.cols);
        whole = &made.emplace_back(to_integers(values.data(), 1, w.cols));
      }
      if (plain) common = whole;
      products.push_back({w, m[i], *whole, to});
    }
    multiply(products.data(), int64_t(products.size()), threads);
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

int skimlm_layer_rows(const SkimlmLayer* layer, const int32_t* places, int64_t count, void* out, int64_t out_bf16,
                      int threads) {
  return guarded([&] {
    Matrix m{}, a{};
    if (!lay_out(*layer, m) || !lay_out_adapter(*layer, a) || count < 0) return MISFIT;
    if (std::any_of(places, places + count, [&](int32_t place) { return place < 0 || place >= m.r; })) return MISFIT;
    unpack_each(*layer, m, places, count, out, out_bf16, threads);
    return DONE;
  });
}
