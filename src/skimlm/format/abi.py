"""One compressed layer as native code sees it: a struct, and the C header that declares it."""

from __future__ import annotations

import ctypes

import torch

from skimlm.format.layer import ADAPTER_GROUP, NAMES, TENSORS
from skimlm.format.row_codes import MAX_TABLE_WIDTH, MAX_WIDTH, TRELLIS, WIDTHS_END, WINDOW

SPARSITY = {None: 0, "2:4": 1, "bitmap": 2}  # what the struct says of a layer's sparsity
NUMBERS = ("rows", "cols", "sparsity", "kept", "group", "rank", "adapter_bits")
C_TYPES = {
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.bfloat16: "uint16_t",  # their bits
    torch.float16: "uint16_t",
}
HEADER = """\
// Generated from src/skimlm/format/ by `python -m skimlm.format`: change it there.
#pragma once
#include <cstdint>

constexpr int64_t SKIMLM_MAX_WIDTH = {MAX_WIDTH};  // bits of a code
constexpr int64_t SKIMLM_MAX_TABLE_WIDTH = {MAX_TABLE_WIDTH};  // wider rows are affine
constexpr int64_t SKIMLM_TRELLIS = {TRELLIS};  // a row of this width and b: codes of b bits
constexpr int64_t SKIMLM_WINDOW = {WINDOW};  // bits that look up a level of it
constexpr int64_t SKIMLM_WIDTHS_END = {WIDTHS_END};  // widths, as they are stored, lie below
constexpr int64_t SKIMLM_ADAPTER_GROUP = {ADAPTER_GROUP};  // columns of a scale of a 4-bit adapter

// A linear layer of `rows` outputs and `cols` inputs as FORMAT.md stores it. What it does not have
// is null and of size 0. bfloat16 and float16 are given as their bits.
struct SkimlmLayer {{
{pointers}
  // how many elements each of them has
  {sizes}
  const float* bias;  // [rows]
  // sparsity: {sparsity}. group 0: codebooks and affine rows, else a grid.
  int64_t {numbers};
  // What follows from `widths`, if it is known already, else null: which row stands at a stored
  // place, [rows], and how many rows have each width, [SKIMLM_WIDTHS_END].
  const int32_t* order;
  const int64_t* counts;
}};
"""


class LayerStruct(ctypes.Structure):
    """`SkimlmLayer` of native/layer.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in NAMES),
        *((f"{name}_size", ctypes.c_int64) for name in NAMES),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("order", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
    ]


def header() -> str:
    """The text of native/layer.h."""
    pointers = []
    for tensor in TENSORS:
        # by the bits of the adapter: bytes, or bits of bfloat16
        kind = C_TYPES[tensor.dtype] if isinstance(tensor.dtype, torch.dtype) else "void"
        order = f", {tensor.order} order" if tensor.order else ""
        pointers.append(f"  const {kind}* {tensor.name};  // {tensor.content}{order}")
    sizes = [f"{name}_size" for name in NAMES]
    thirds = [", ".join(sizes[i : i + 4]) for i in range(0, len(sizes), 4)]
    return HEADER.format(
        MAX_WIDTH=MAX_WIDTH,
        MAX_TABLE_WIDTH=MAX_TABLE_WIDTH,
        TRELLIS=TRELLIS,
        WINDOW=WINDOW,
        WIDTHS_END=WIDTHS_END,
        ADAPTER_GROUP=ADAPTER_GROUP,
        pointers="\n".join(pointers),
        sizes="\n  ".join(f"int64_t {line};" for line in thirds),
        sparsity=", ".join(f"{n} {name or 'none'}" for name, n in SPARSITY.items()),
        numbers=", ".join(NUMBERS),
    )
