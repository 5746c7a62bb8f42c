// The part of an adapter, as FORMAT.md stores it: (x A^T) B.
#pragma once
#include "sparse.h"

// Row `row` of a 16-bit A times x [c], in a fixed order.
float dot_adapter(const SkimlmLayer& w, int64_t row, const float* x);

// out [n, r] = y + u B, columns begin..end of a block of 128.
void add_adapter(const SkimlmLayer& w, const float* u, const float* y, int64_t n, int64_t begin,
                 int64_t end, const Output& out);
