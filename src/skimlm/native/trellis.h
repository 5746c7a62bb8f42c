// The trellis code of a row, its symbols in the order of the stream (quantize/trellis.py).
//
// The window of a weight is its symbol of B bits and above it the taps, the highest bits, of those behind it,
// 7 bits in all. From the end of the stream to its start the taps are a shift register.
#pragma once
#include <algorithm>
#include <cstdint>

#include "guard.h"

namespace {

constexpr int BITS = 7;  // of a window
constexpr int STATES = 1 << BITS;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
using FloatLanes = float __attribute__((vector_size(4 * LANES)));
using IntLanes = int32_t __attribute__((vector_size(4 * LANES)));

template <int B>
struct Trellis {
  static constexpr int PLAIN = B - 1;  // bits of a symbol that are no tap
  static constexpr int SYMBOLS = 1 << B;
  static constexpr int CLASSES = 1 << (BITS - B);  // of windows, by what they leave to the next
  static constexpr int REACH = BITS - PLAIN;       // weights whose window holds a symbol's tap

  static int window(const uint8_t* code, int64_t c, int64_t j) {
    int out = code[j];
    for (int64_t k = j + 1; k < std::min(j + REACH, c); ++k) out |= (code[k] >> PLAIN) << (PLAIN + k - j);
    return out;
  }
  // What the window before this one has of it: all its taps but the last.
  static constexpr int leaves(int window) { return (window >> PLAIN) % CLASSES; }
  // One of the 2^B windows that leave `k`.
  static constexpr int leaving(int k, int which) {
    return (which & ((1 << PLAIN) - 1)) | (k + (which >> PLAIN) * CLASSES) << PLAIN;
  }
};

// Calls body(Trellis of rows of these bits) if there is one.
template <class Body>
int with_trellis(int64_t bits, const Body& body) {
  if (bits == 1) return body(Trellis<1>()), DONE;
  if (bits == 2) return body(Trellis<2>()), DONE;
  if (bits == 3) return body(Trellis<3>()), DONE;
  if (bits == 4) return body(Trellis<4>()), DONE;
  return MISFIT;
}

}  // namespace
