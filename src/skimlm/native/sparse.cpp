// out = x W^T + (x A^T) B for a sparse or grid W and an adapter as FORMAT.md stores them, few tokens.
//
// x is made of 24-bit integers (product.h). The sum over the columns that share a scale is an integer,
// exact; times the scale they are added in double, in their order: the same bits on every instruction
// set and for any number of threads. A 4-bit A is a dense grid of `rank` rows, and is multiplied as one.
//
//   any processor   a row becomes integers, 0 where pruned, then one dot product per scale and token
//   VBMI            four rows become bytes in L1, offset so that pruned ones count nothing; from five
//                   tokens on 32 rows do, and from there go to bfloat16 and float sums (gemm.cpp)
//   VBMI, one token 2:4: nothing is expanded, x is permuted to the kept columns in registers instead,
//                   half the products and look-ups; dense grids: nothing leaves the registers
#include <algorithm>
#include <algorithm>
#include <deque>
#include <optional>

#include "adapter.h"
#include "parallel.h"
#include "sparse_bytes.h"

namespace {

constexpr int64_t PER_THREAD = 1 << 16;    // bytes
constexpr int64_t SEVERAL = 5;             // tokens that are worth turning rows into bfloat16

void multiply_rows(const Matrix& m, const Group& g, int64_t begin, int64_t end, const Input& in,
                   const Output& out) {
#if defined(__AVX512F__)
  const bool units = m.scales == 1 || m.span % UNIT == 0 || (m.span == CHUNK && g.width <= 4);
  const auto pairs = units && g.code != TRELLIS ? pairs_of_width[m.grid][g.width] : nullptr;
  if (in.biased && pairs) return pairs(m, g, begin, end, in, out);
  if (in.paired && g.width <= 4) return dense_of_width[g.width](m, g, begin, end, in, out);
  if (in.x.planes) return rows_bytes(m, g, begin, end, in, out);
#endif
  rows_any(m, g, begin, end, in, out);
}

// ---- AVX-512 with VBMI: rows for several tokens

#if defined(__AVX512F__)
// Whether rows of a group become bytes that `ByteRows` may have.
bool is_bytes(const Matrix& m, const Group& g) {
  return g.code != AFFINE && (m.scales == 1 || m.span % CHUNK == 0);
}

// The rows of all groups that do, one after the other; `order` keeps which ones they are.
ByteRows byte_rows(const Matrix& m, std::vector<int32_t>& order) {
  for (const Group& g : m.groups)
    for (int64_t i = 0; is_bytes(m, g) && i < g.rows; ++i) order.push_back(int32_t(m.row(g.first + i)));
  auto make = [&m](int64_t begin, int64_t end, int8_t* bytes, int64_t stride, float* scale) -> StoredBytes {
    Room room(m.c);
    int64_t before = 0;  // rows of the groups before
    for (const Group& g : m.groups) {
      if (!is_bytes(m, g)) continue;
      const int64_t from = before;
      before += g.rows;
      const int64_t first = std::max(begin - from, int64_t(0));
      const int64_t last = std::min(end - from, g.rows);
      if (first >= last) continue;
      const Bytes cut(g.width);
      const uint8_t offset = g.code == GRID ? 1 << (g.width - 1) : 128;
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = g.first + i, place = from + i - begin;
        int8_t* to = bytes + place * stride;
        row_bytes(m, g, i, cut, offset, room, reinterpret_cast<uint8_t*>(to));
        for (int64_t j = 0; j < stride; ++j) to[j] = int8_t(to[j] - offset);  // mod 2^8
        for (int64_t s = 0; s < m.scales; ++s)
          scale[place * m.scales + s] = from_bf16(m.row_scale[at * m.scales + s]);
      }
    }
    return {bytes, stride};
  };
  return {int64_t(order.size()), m.c, m.scales, m.span, order.data(), make};
}
#endif

// Rows of one width, as one turn of a thread takes them; no matrix: of a 16-bit A.
struct Slice {
  const Matrix* matrix;
  const Group* group;
  const Input* input;
  const Output* out;
  int64_t begin, end;
};

void split(const Matrix& m, const Input& in, const Output& out, int64_t turn, std::vector<Slice>& to) {
  for (const Group& g : m.groups) {
    const int64_t bytes = g.stride + m.places + m.scales * 2;
    const int64_t step = std::max<int64_t>(4, turn / bytes / 4 * 4);
    for (int64_t i = 0; i < g.rows; i += step)
      to.push_back({&m, &g, &in, &out, i, std::min(i + step, g.rows)});
  }
}

// The numbers of x, and what matrices read of them: those that read the same share it.
struct Inputs {
  const float* x;  // [n, c]
  Integers whole;
  std::deque<Input> made;  // where they stand does not change
  Inputs(const float* x, int64_t n, int64_t c) : x(x), whole(to_integers(x, n, c, 1)) {}

  const Input& of(const Matrix& m) {
    for (const Input& in : made)
      if (in.sparsity == m.sparsity && in.narrow == is_narrow(m) && in.span == m.span) return in;
    made.push_back(to_input(whole, m));
    return made.back();
  }
};

// One linear times x: turns that may go in any order, then, of an adapter, blocks that add its part.
// Neither copied nor moved once it is made: turns point into it.
struct Work {
  const SkimlmLayer& w;
  const Matrix &m, &a;
  const float* x;  // [n, c], in_scale left out
  int64_t n, bytes;
  float *u, *y;  // [n, rank] and, with an adapter, [n, r]: x A^T, x W^T
  Output components, sparse, result;
  std::vector<Slice> turns;

  Work(const SkimlmLayer& w, const Matrix& m, const Matrix& a, Inputs& scaled, Inputs& plain,
       int64_t n, float* u, float* y, const Output& out, int threads)
      : w(w), m(m), a(a), x(plain.x), n(n), bytes(size(w)), u(u), y(y),
        components{u, false, w.rank, nullptr},
        sparse(w.rank ? Output{y, false, w.rows, nullptr} : out), result(out) {
    const int64_t turn = std::max(WORK, bytes / (TURNS * threads));
    if (!a.groups.empty()) split(a, plain.of(a), components, turn, turns);
    if (w.rank && a.groups.empty())
      for (int64_t k = 0, step = std::max<int64_t>(1, turn / (2 * w.cols)); k < w.rank; k += step)
        turns.push_back({nullptr, nullptr, nullptr, &components, k, std::min(k + step, w.rank)});
    split(m, scaled.of(m), sparse, turn, turns);
  }
  Work(const Work&) = delete;

  static int64_t size(const SkimlmLayer& w) {
    return w.weight_size + w.positions_size + 2 * w.row_scale_size +
           (w.lora_a_size + w.lora_b_size) * (w.adapter_bits == 4 ? 1 : 2);
  }

  void turn(int64_t at) const {
    const Slice& p = turns[at];
    if (p.matrix) return multiply_rows(*p.matrix, *p.group, p.begin, p.end, *p.input, *p.out);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t k = p.begin; k < p.end; ++k)
        u[t * w.rank + k] = dot_adapter(w, k, x + t * w.cols);
  }

  int64_t blocks() const { return w.rank ? divide_up(w.rows, ADAPTER) : 0; }
  void block(int64_t at) const {
    add_adapter(w, u, y, n, at * ADAPTER, std::min((at + 1) * ADAPTER, w.rows), result);
  }
};

}  // namespace

void multiply(const SparseProduct* products, int64_t count, const float* x, Team& team,
              std::atomic<int64_t>* next) {
  Inputs inputs(x, 1, products[0].layer.cols);
  std::deque<Matrix> matrices;
  std::deque<Work> works;
  bool adapters = false;
  for (int64_t i = 0; i < count; ++i) {
    const auto& [w, u, out] = products[i];
    Matrix &m = matrices.emplace_back(), &a = matrices.emplace_back();
    lay_out(w, m);
    lay_out_adapter(w, a);
    // y stands where the sum goes: a block reads what it replaces
    works.emplace_back(w, m, a, inputs, inputs, 1, u, static_cast<float*>(out.data), out, team.size);
    adapters |= w.rank > 0;
  }
  auto all = [&](auto size, auto run, std::atomic<int64_t>& from) {
    int64_t first = 0, at = from.fetch_add(1);
    for (const Work& work : works) {
      for (; at < first + size(work); at = from.fetch_add(1)) run(work, at - first);
      first += size(work);
    }
  };
  all([](const Work& w) { return int64_t(w.turns.size()); },
      [](const Work& w, int64_t at) { w.turn(at); }, next[0]);
  if (!adapters) return;
  team.wait();
  all([](const Work& w) { return w.blocks(); }, [](const Work& w, int64_t at) { w.block(at); },
      next[1]);
}

#if defined(__AVX512F__)
// Several tokens: rows become bfloat16 in cache (gemm.cpp), but for those of 6 bits and more of codebooks.
static void multiply_several(const SkimlmLayer& w, const Matrix& m, const Matrix& a, const void* x, bool bf16,
                      int64_t n, const Output& out, int threads) {
  std::vector<float> u(n * w.rank), y(w.rank ? n * w.rows : 0);
  const Output sparse = w.rank ? Output{y.data(), false, w.rows, nullptr} : out;
  std::vector<int32_t> order, components;
  const ByteRows rows = byte_rows(m, order);
  multiply_many(rows, x, bf16, w.in_scale, n, sparse, threads);
  if (rows.r < m.r) {
    const std::vector<float> values = to_floats(x, bf16, w.in_scale, n, w.cols);
    Inputs inputs(values.data(), n, w.cols);
    const Input& in = inputs.of(m);
    for (const Group& g : m.groups)
      if (!is_bytes(m, g))
        parallel_rows(g.rows, 4, threads, [&](int64_t from, int64_t to) {
          multiply_rows(m, g, from, to, in, sparse);
        });
  }
  if (!w.rank) return;
  if (!a.groups.empty()) {
    multiply_many(byte_rows(a, components), x, bf16, nullptr, n, {u.data(), false, w.rank, nullptr}, threads);
  } else {
    const std::vector<float> plain = to_floats(x, bf16, nullptr, n, w.cols);
    
    parallel_rows(w.rank, 4, threads, [&](int64_t from, int64_t to) {
      for (int64_t t = 0; t < n; ++t)
        for (int64_t k = from; k < to; ++k)
          u[t * w.rank + k] = dot_adapter(w, k, &plain[t * w.cols]);
    });
  }
  parallel_rows(divide_up(w.rows, ADAPTER), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at)
      add_adapter(w, u.data(), y.data(), n, at * ADAPTER, std::min((at + 1) * ADAPTER, w.rows), out);
  });
}
#endif

void matmul_any(const SkimlmLayer& w, const Matrix& m, const Matrix& a, const void* x, bool bf16, int64_t n,
                const Output& out, int threads) {
#if defined(__AVX512F__)
  const auto bytes = [&m](const Group& g) { return is_bytes(m, g); };
  if (n >= SEVERAL && skimlm_has_vbmi() && std::any_of(m.groups.begin(), m.groups.end(), bytes))
    return multiply_several(w, m, a, x, bf16, n, out, threads);
#endif
  const std::vector<float> values = to_floats(x, bf16, w.in_scale, n, w.cols);
  Inputs scaled(values.data(), n, w.cols);
  std::vector<float> raw;
  std::optional<Inputs> own;
  if (w.rank && w.in_scale) {
    raw = to_floats(x, bf16, nullptr, n, w.cols);
    own.emplace(raw.data(), n, w.cols);
  }
  // A second thread for a few microseconds of work costs more than it brings.
  threads = int(std::clamp<int64_t>(Work::size(w) / PER_THREAD, 1, threads));
  std::vector<float> u(n * w.rank), y(w.rank ? n * w.rows : 0);
  const Work work(w, m, a, scaled, own ? *own : scaled, n, u.data(), y.data(), out, threads);
  parallel_rows(int64_t(work.turns.size()), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) work.turn(at);
  });
  parallel_rows(work.blocks(), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) work.block(at);
  });
}
