// A stored layer as rows grouped by width.
#include "layout.h"

#include <algorithm>

#include "lanes.h"

namespace {

// Columns that a row keeps, bytes of their positions, scales. False if that cannot be.
bool lay_out_columns(const SkimlmLayer& w, Matrix& m) {
  if (w.rows < 1 || w.cols < 1 || w.rows > INT32_MAX || w.cols > INT32_MAX || w.group < 0 ||
      w.sparsity < DENSE || w.sparsity > BITMAP || w.widths_size != w.rows ||
      (w.in_scale && w.in_scale_size != w.cols))
    return false;
  m.sparsity = Sparsity(w.sparsity);
  m.grid = w.group > 0;
  m.r = w.rows;
  m.c = w.cols;
  m.kept = m.sparsity == DENSE ? w.cols : w.kept;
  m.positions = w.positions;
  m.places = 0;
  m.row_scale = w.row_scale;
  m.scales = 1;
  m.span = w.cols;
  if (m.kept < 1 || m.kept > w.cols) return false;
  if (m.sparsity == PAIRS) {
    if (w.cols % 4 || w.kept != w.cols / 2) return false;
    m.places = divide_up(w.cols / 4 * 3, 8);
  }
  if (m.sparsity == BITMAP) m.places = divide_up(w.cols, 8);
  if (m.grid) {
    m.span = std::min(w.group, w.cols);
    m.scales = divide_up(w.cols, m.span);
  }
  return w.positions_size == w.rows * m.places && w.row_scale_size == w.rows * m.scales;
}

}  // namespace

bool lay_out(const SkimlmLayer& w, Matrix& m) {
  if (!lay_out_columns(w, m)) return false;
  if (!w.order) m.found.resize(w.rows);
  m.order = w.order ? w.order : m.found.data();
  int64_t count[SKIMLM_WIDTHS_END] = {}, rows = 0, bytes = 0, levels = 0, shared = 0;
  m.affine = 0;
  // width by width: a histogram would wait on its own counts
  for (int width = 1; width < SKIMLM_WIDTHS_END && rows < w.rows; ++width) {
    const int b = code_bits(w, width);
    if (!b) continue;
    const int64_t n = w.order ? w.counts[width] : rows_of_width(width, w.widths, w.rows, m.found.data() + rows);
    count[width] = n;
    rows += n;
    const RowCode code = code_of(w, width);
    bytes += n * bytes_of_row(code, b, m.kept);
    if (code == TABLE) levels += n << b;
    if (code == AFFINE) m.affine += n;
    if (code == TRELLIS && n) shared += int64_t(1) << WINDOW;
  }
  if (rows != w.rows || bytes != w.weight_size || levels != w.codebook_size ||
      m.affine != w.row_zero_size || shared != w.trellis_size)
    return false;
  m.groups.clear();
  int64_t first = 0;
  const uint8_t* packed = w.weight;
  const int8_t *codebook = w.codebook, *trellis = w.trellis;
  const int16_t* zeros = w.row_zero;
  for (int width = 1; width < SKIMLM_WIDTHS_END; ++width) {
    const int64_t n = count[width];
    if (!n) continue;
    const int b = code_bits(w, width);
    const RowCode code = code_of(w, width);
    const int64_t stride = bytes_of_row(code, b, m.kept);
    m.groups.push_back({b, code, n, first, packed, code == TRELLIS ? trellis : codebook, zeros, stride});
    first += n;
    packed += n * stride;
    if (code == TABLE) codebook += n << b;
    if (code == AFFINE) zeros += n;
    if (code == TRELLIS) trellis += int64_t(1) << WINDOW;
  }
  return true;
}

bool lay_out_adapter(const SkimlmLayer& w, Matrix& m) {
  if (!w.rank)
    return !w.lora_a_size && !w.lora_b_size && !w.lora_a_scale_size && !w.lora_b_scale_size;
  if (w.rank < 1 || w.rank > 1 << 16) return false;
  const bool four = w.adapter_bits == 4;
  if (!four && w.adapter_bits != 16) return false;
  const int64_t a = four ? divide_up(w.cols, 2) : w.cols, b = four ? divide_up(w.rows, 2) : w.rows;
  const int64_t groups = four ? divide_up(w.cols, ADAPTER) : 0;
  if (w.lora_a_size != w.rank * a || w.lora_b_size != w.rank * b ||
      w.lora_a_scale_size != w.rank * groups ||
      w.lora_b_scale_size != w.rank * (four ? divide_up(w.rows, ADAPTER) : 0))
    return false;
  if (four)
    m = {DENSE, true, w.rank, w.cols, w.cols, nullptr, 0, w.lora_a_scale, groups, ADAPTER, 0, nullptr, {},
         {{4, GRID, w.rank, 0, static_cast<const uint8_t*>(w.lora_a), nullptr, nullptr, a}}};
  return true;
}
