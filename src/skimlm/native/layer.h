// Generated from src/skimlm/format/ by `python -m skimlm.format`: change it there.
#pragma once
#include <cstdint>

constexpr int64_t SKIMLM_MAX_WIDTH = 8;  // bits of a code
constexpr int64_t SKIMLM_MAX_TABLE_WIDTH = 5;  // wider rows are affine
constexpr int64_t SKIMLM_TRELLIS = 16;  // a row of this width and b: codes of b bits
constexpr int64_t SKIMLM_WINDOW = 7;  // bits that look up a level of it
constexpr int64_t SKIMLM_WIDTHS_END = 21;  // widths, as they are stored, lie below
constexpr int64_t SKIMLM_ADAPTER_GROUP = 128;  // columns of a scale of a 4-bit adapter

// A linear layer of `rows` outputs and `cols` inputs as FORMAT.md stores it. What it does not have
// is null and of size 0. bfloat16 and float16 are given as their bits.
struct SkimlmLayer {
  const uint8_t* weight;  // packed codes, stored order
  const uint8_t* widths;  // width of every row, model order
  const int8_t* codebook;  // levels of every table row, stored order
  const uint16_t* row_scale;  // a scale per row, or per g columns of a row, stored order
  const int16_t* row_zero;  // zero point of every affine row, stored order
  const int8_t* trellis;  // levels of each of the t trellis widths in use, ascending
  const uint16_t* in_scale;  // a factor per column
  const uint8_t* positions;  // p bytes per row: which columns have a code, stored order
  const void* lora_a;  // A
  const void* lora_b;  // B
  const uint16_t* lora_a_scale;  // scales of A at 4 bits
  const uint16_t* lora_b_scale;  // scales of B at 4 bits
  // how many elements each of them has
  int64_t weight_size, widths_size, codebook_size, row_scale_size;
  int64_t row_zero_size, trellis_size, in_scale_size, positions_size;
  int64_t lora_a_size, lora_b_size, lora_a_scale_size, lora_b_scale_size;
  const float* bias;  // [rows]
  // sparsity: 0 none, 1 2:4, 2 bitmap. group 0: codebooks and affine rows, else a grid.
  int64_t rows, cols, sparsity, kept, group, rank, adapter_bits;
  // What follows from `widths`, if it is known already, else null: which row stands at a stored
  // place, [rows], and how many rows have each width, [SKIMLM_WIDTHS_END].
  const int32_t* order;
  const int64_t* counts;
};
