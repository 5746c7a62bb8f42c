// The trellis code of a row: weight j takes its level from a table of 128 at its window (quantize/trellis.py).
//
// A symbol has B bits. The highest T of them, its taps, stand in a stream; a window is the symbol with as
// many taps of the symbols behind it as make 7 bits. From the end of the row to its start the part of the
// window that is a piece of the stream is a shift register.
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

template <int B, int T>
struct Trellis {
  static constexpr int PLAIN = B - T;                       // bits of a symbol that are no taps
  static constexpr int SYMBOLS = 1 << B;
  static constexpr int CLASSES = 1 << (BITS - B);           // of windows, by what they leave to the next
  static constexpr int REACH = (BITS - PLAIN + T - 1) / T;  // weights whose window holds a symbol's taps

  static int window(const uint8_t* code, int64_t c, int64_t j) {
    int out = code[j];
    for (int64_t k = j + 1; k < std::min(j + REACH, c); ++k)
      out |= (code[k] >> PLAIN) << (B + (k - j - 1) * T);
    return out & (STATES - 1);
  }
  // What the window before this one, in the order of the columns, has of it: its bits above its symbol's.
  static constexpr int leaves(int window) { return (window >> PLAIN) % CLASSES; }
  // One of the 2^B windows that leave `k`.
  static constexpr int leaving(int k, int which) {
    return (which & ((1 << PLAIN) - 1)) | (k + (which >> PLAIN) * CLASSES) << PLAIN;
  }
};

// Calls body(Trellis of rows of this kind) if there is one.
template <class Body>
int with_trellis(int64_t bits, int64_t taps, const Body& body) {
  if (bits == 1 && taps == 1) return body(Trellis<1, 1>()), DONE;
  if (bits == 2 && taps == 1) return body(Trellis<2, 1>()), DONE;
  if (bits == 2 && taps == 2) return body(Trellis<2, 2>()), DONE;
  if (bits == 3 && taps == 1) return body(Trellis<3, 1>()), DONE;
  if (bits == 3 && taps == 3) return body(Trellis<3, 3>()), DONE;
  if (bits == 4 && taps == 1) return body(Trellis<4, 1>()), DONE;
  if (bits == 4 && taps == 4) return body(Trellis<4, 4>()), DONE;
  return MISFIT;
}

}  // namespace
