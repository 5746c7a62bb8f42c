"""One linear as values (`QuantizedWeight`) and as bytes (`pack`, `unpack`): FORMAT.md in code.

A weight is stored per output row: row i has its own width b_i in 1..8, so codes of b_i bits, and

    value[i, j] = level[i, j] * row_scale[i] * in_scale[j]
    level[i, j] = codebook[i, code[i, j]]      b_i <= 5: 2**b_i int8 levels of this row
                = code[i, j] - row_zero[i]     b_i >= 6: an affine grid, tables cost too much

in float32. On disk the rows are sorted by width (stably, so `widths` alone gives the permutation
and no file can hold an invalid one); every row is a little-endian bit stream padded to a byte.

Everything here is pure: tensors in, tensors out, no model, no I/O. Every malformation is a
`FormatError` that names the tensor; the caller who knows the file adds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skimlm.errors import FormatError

MAX_WIDTH = 8
MAX_TABLE_WIDTH = 5  # wider rows are affine
TABLE = 2**MAX_TABLE_WIDTH  # columns of QuantizedWeight.codebook


@dataclass(frozen=True)
class QuantizedWeight:
    """One linear of `r` rows (outputs) and `c` columns (inputs), rows in the model's order."""

    codes: Tensor  # uint8 [r, c], codes[i, j] < 2**widths[i]
    widths: Tensor  # uint8 [r], 1..8
    codebook: Tensor  # int8 [r, 32]: the first 2**widths[i] entries count, 0 elsewhere
    row_scale: Tensor  # bfloat16 [r]
    row_zero: Tensor  # int16 [r], 0 where widths[i] <= 5
    in_scale: Tensor | None = None  # float16 [c]


def row_bytes(width: int, cols: int) -> int:
    """Bytes of one row's packed codes."""
    return -(-cols * width // 8)


def row_bits(width: int, cols: int) -> int:
    """Every stored bit of one row: padded codes, codebook or zero point, scale, width byte."""
    levels = 8 * 2**width if width <= MAX_TABLE_WIDTH else 16
    return 8 * row_bytes(width, cols) + levels + 16 + 8


def histogram(widths: Tensor) -> dict[int, int]:
    """Count the rows of each width that occurs: what config.json keeps of every linear."""
    counts = torch.bincount(widths.long(), minlength=MAX_WIDTH + 1).tolist()
    return {width: n for width, n in enumerate(counts) if n}


def layout(
    counts: Mapping[int, int], cols: int, in_scale: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every stored tensor of a linear, from its width histogram alone."""
    rows = sum(counts.values())
    table = sum(n * 2**b for b, n in counts.items() if b <= MAX_TABLE_WIDTH)
    affine = sum(n for b, n in counts.items() if b > MAX_TABLE_WIDTH)
    tensors = {
        "weight": (torch.uint8, (sum(n * row_bytes(b, cols) for b, n in counts.items()),)),
        "widths": (torch.uint8, (rows,)),
        "codebook": (torch.int8, (table,)),
        "row_scale": (torch.bfloat16, (rows,)),
        "row_zero": (torch.int16, (affine,)),
        "in_scale": (torch.float16, (cols if in_scale else 0,)),
    }
    return {name: spec for name, spec in tensors.items() if spec[1] != (0,)}


def groups(widths: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (width, the original indices of its rows) in stored order."""
    for width in histogram(widths):
        yield width, (widths == width).nonzero().flatten()


def pack_codes(codes: Tensor, width: int) -> Tensor:
    """Pack codes uint8 [n, c] into uint8 [n, row_bytes]: code j at bit j*width, LSB first."""
    n, cols = codes.shape
    bits = (codes.unsqueeze(-1) >> torch.arange(width, dtype=torch.uint8)) & 1  # [n, c, width]
    bits = torch.nn.functional.pad(bits.view(n, cols * width), (0, -cols * width % 8))
    place = 1 << torch.arange(8, dtype=torch.uint8)
    return (bits.view(n, -1, 8) * place).sum(-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, width: int, cols: int) -> Tensor:
    """Invert `pack_codes`: uint8 [n, row_bytes] to codes uint8 [n, cols]."""
    start = torch.arange(cols, device=packed.device) * width
    # a code spans two bytes at most; the byte behind the last one is never used, only indexed
    wide = torch.nn.functional.pad(packed, (0, 1)).to(torch.int16)
    pair = wide[:, start // 8] | (wide[:, start // 8 + 1] << 8)
    return ((pair >> (start % 8).to(torch.int16)) & (2**width - 1)).to(torch.uint8)


def dequantize(q: QuantizedWeight) -> Tensor:
    """The weight this stands for, float32 [r, c]."""
    codes = q.codes.long()
    table = q.codebook.float().gather(1, codes.clamp(max=TABLE - 1))
    affine = codes - q.row_zero.long().unsqueeze(1)
    level = torch.where((q.widths <= MAX_TABLE_WIDTH).unsqueeze(1), table, affine.float())
    value = level * q.row_scale.float().unsqueeze(1)
    return value if q.in_scale is None else value * q.in_scale.float()


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """The stored tensors of a linear by their last name; refuses what would not come back equal."""
    check_values(q)
    order = torch.argsort(q.widths, stable=True)
    weight, codebook = [], []
    for width, index in groups(q.widths):
        weight.append(pack_codes(q.codes[index], width).flatten())
        if width <= MAX_TABLE_WIDTH:
            codebook.append(q.codebook[index, : 2**width].flatten())
    tensors = {
        "weight": torch.cat(weight),
        "widths": q.widths.clone(),
        "row_scale": q.row_scale[order],
    }
    if codebook:
        tensors["codebook"] = torch.cat(codebook)
    affine = order[q.widths[order] > MAX_TABLE_WIDTH]
    if len(affine):
        tensors["row_zero"] = q.row_zero[affine]
    if q.in_scale is not None:
        tensors["in_scale"] = q.in_scale.clone()
    return tensors


def unpack(
    tensors: Mapping[str, Tensor], rows: int, cols: int, *, name: str = ""
) -> QuantizedWeight:
    """Read a linear back, checking every size and value; `name` is the linear's, for the error."""
    check_stored(tensors, rows, cols, name=name)
    widths = tensors["widths"]
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    codebook = torch.zeros(rows, TABLE, dtype=torch.int8)
    row_zero = torch.zeros(rows, dtype=torch.int16)
    row_scale = torch.empty(rows, dtype=torch.bfloat16)
    row_scale[torch.argsort(widths, stable=True)] = tensors["row_scale"]
    for width, index, part in stored_groups(tensors, cols):
        codes[index] = unpack_codes(part["weight"], width, cols)
        used = cols * width % 8  # bits of each row's last byte
        if used and (part["weight"][:, -1] >> used).any():
            raise FormatError("padding bits are not zero", tensor=_join(name, "weight"))
        if width <= MAX_TABLE_WIDTH:
            codebook[index, : 2**width] = part["codebook"]
        else:
            row_zero[index] = part["row_zero"]
    return QuantizedWeight(codes, widths, codebook, row_scale, row_zero, tensors.get("in_scale"))


def stored_groups(
    tensors: Mapping[str, Tensor], cols: int
) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """Yield (width b, original row indices [n], views of that width's part of the tensors).

    The part holds `weight` uint8 [n, row_bytes], `row_scale` [n], and `codebook` int8 [n, 2**b] or
    `row_zero` [n].
    """
    row = byte = entry = zero = 0
    for width, index in groups(tensors["widths"]):
        n, size, levels = len(index), row_bytes(width, cols), 2**width
        part = {
            "weight": tensors["weight"][byte : byte + n * size].view(n, size),
            "row_scale": tensors["row_scale"][row : row + n],
        }
        if width <= MAX_TABLE_WIDTH:
            part["codebook"] = tensors["codebook"][entry : entry + n * levels].view(n, levels)
            entry += n * levels
        else:
            part["row_zero"] = tensors["row_zero"][zero : zero + n]
            zero += n
        yield width, index, part
        row, byte = row + n, byte + n * size


def check_stored(tensors: Mapping[str, Tensor], rows: int, cols: int, *, name: str = "") -> None:
    """Raise FormatError unless these are the stored tensors of a [rows, cols] linear.

    `weight` may live on the meta device: any bytes of the right length are valid codes.
    """
    check_sizes(tensors, rows, cols, name=name)
    for tensor in ("row_scale", "in_scale"):
        if tensor in tensors and not tensors[tensor].isfinite().all():
            raise FormatError("holds NaN or Inf", tensor=_join(name, tensor))


def check_sizes(tensors: Mapping[str, Tensor], rows: int, cols: int, *, name: str = "") -> None:
    """The part of `check_stored` that keeps native code inside its buffers: dtypes and shapes."""

    def fail(tensor: str, reason: str) -> FormatError:
        return FormatError(reason, tensor=_join(name, tensor))

    if "widths" not in tensors:
        raise fail("widths", "is missing")
    widths = tensors["widths"]
    if widths.dtype != torch.uint8 or widths.shape != (rows,):
        raise fail("widths", f"must be uint8 [{rows}], got {_spec(widths)}")
    counts = histogram(widths)
    if not set(counts) <= set(range(1, MAX_WIDTH + 1)):
        bad = widths[(widths < 1) | (widths > MAX_WIDTH)]
        raise fail("widths", f"row widths must be 1..{MAX_WIDTH}, got {int(bad[0])}")
    expected = layout(counts, cols, "in_scale" in tensors)
    for tensor, (dtype, shape) in expected.items():
        if tensor not in tensors:
            raise fail(tensor, "is missing")
        if tensors[tensor].dtype != dtype or tensors[tensor].shape != shape:
            want = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            raise fail(tensor, f"must be {want}, got {_spec(tensors[tensor])}")
    if extra := sorted(set(tensors) - set(expected)):
        raise fail(extra[0], "does not belong here")


def check_values(q: QuantizedWeight) -> None:
    """Raise FormatError unless `q` is a weight that `pack` can store without loss."""
    rows, cols = q.codes.shape
    shapes = {
        "codes": (q.codes, torch.uint8, (rows, cols)),
        "widths": (q.widths, torch.uint8, (rows,)),
        "codebook": (q.codebook, torch.int8, (rows, TABLE)),
        "row_scale": (q.row_scale, torch.bfloat16, (rows,)),
        "row_zero": (q.row_zero, torch.int16, (rows,)),
    }
    if q.in_scale is not None:
        shapes["in_scale"] = (q.in_scale, torch.float16, (cols,))
    for name, (tensor, dtype, shape) in shapes.items():
        if tensor.dtype != dtype or tensor.shape != shape:
            want = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            raise FormatError(f"must be {want}, got {_spec(tensor)}", tensor=name)
    if not ((q.widths >= 1) & (q.widths <= MAX_WIDTH)).all():
        raise FormatError(f"row widths must be 1..{MAX_WIDTH}", tensor="widths")
    if (q.codes > (2 ** q.widths.int() - 1).unsqueeze(1)).any():
        raise FormatError("a code does not fit its row's width", tensor="codes")
    if q.row_zero[q.widths <= MAX_TABLE_WIDTH].any():
        raise FormatError("only rows wider than 5 bits have a zero point", tensor="row_zero")
    for name, scale in (("row_scale", q.row_scale), ("in_scale", q.in_scale)):
        if scale is not None and not scale.isfinite().all():
            raise FormatError("holds NaN or Inf", tensor=name)


def _join(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor


def _spec(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
