"""One linear as values (`QuantizedWeight`) and as bytes (`pack`, `unpack`): FORMAT.md in code.

A weight is stored per output row: row i has its own width b_i in 1..8, so codes of b_i bits, and

    value[i, j] = level[i, j] * row_scale[i] * in_scale[j]
    level[i, j] = codebook[i, code[i, j]]      b_i <= 5: 2**b_i int8 levels of this row
                = code[i, j] - row_zero[i]     b_i >= 6: an affine grid, tables cost too much

in float32. On disk the rows are sorted by width (stably, so `widths` alone gives the permutation
and no file can hold an invalid one); every row is a little-endian bit stream padded to a byte.

Since version 2 a linear may have `Parts` besides: codes of some columns only, the others being 0;
a uniform grid with a scale per group of columns in place of codebooks; a low-rank adapter.

Everything here is pure: tensors in, tensors out, no model, no I/O. Every malformation is a
`FormatError` that names the tensor; the caller who knows the file adds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from skimlm.errors import FormatError

MAX_WIDTH = 8
MAX_TABLE_WIDTH = 5  # wider rows are affine
TABLE = 2**MAX_TABLE_WIDTH  # columns of QuantizedWeight.codebook
ADAPTER_GROUP = 128  # columns that share a scale of a 4-bit adapter
MAX_RANK = 2**16  # keeps the sizes that a hostile config.json implies within int64
# 2:4: which of four columns pattern k keeps; 6 and 7 are never written
PATTERNS = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
    + 2 * [[0, 0, 1, 1]],
    dtype=torch.bool,
)
ONES = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)
Specs: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of tensors, by name


@dataclass(frozen=True)
class Adapter:
    """B^T A, added to a weight [r, c]; component k of it is the outer product of b[k] and a[k]."""

    a: Tensor  # [rank, c] bfloat16, or int8 codes -8..7 if a_scale is given
    b: Tensor  # [rank, r], the same
    a_scale: Tensor | None = None  # bfloat16 [rank, ceil(c / 128)]
    b_scale: Tensor | None = None  # bfloat16 [rank, ceil(r / 128)]

    def values(self) -> tuple[Tensor, Tensor]:
        """A [rank, c] and B [rank, r], float32."""
        return factor_values(self.a, self.a_scale), factor_values(self.b, self.b_scale)


@dataclass(frozen=True)
class QuantizedWeight:
    """One linear of `r` rows (outputs) and `c` columns (inputs), rows in the model's order."""

    codes: Tensor  # uint8 [r, c] or, with a mask, [r, kept]; codes[i, j] < 2**widths[i]
    widths: Tensor  # uint8 [r], 1..8
    codebook: Tensor  # int8 [r, 32]: the first 2**widths[i] entries count, 0 elsewhere
    row_scale: Tensor  # bfloat16 [r] or, on a grid, [r, ceil(c / group)]
    row_zero: Tensor  # int16 [r], 0 where widths[i] <= 5
    in_scale: Tensor | None = None  # float16 [c]
    mask: Tensor | None = None  # bool [r, c], True where there is a code, `kept` of them in a row
    sparsity: str | None = None  # with a mask: "2:4" or "bitmap", how it is stored
    group: int | None = None  # a grid: levels are code - 2**(b - 1), codebook and row_zero are 0
    adapter: Adapter | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(r, c) of the weight this stands for."""
        rows, cols = (self.codes if self.mask is None else self.mask).shape
        return rows, cols


@dataclass(frozen=True)
class Parts:
    """What a linear has beyond version 1: the keys of its entry in config.json, absent if falsy."""

    sparsity: str | None = None  # "2:4" or "bitmap"
    kept: int = 0  # codes stored per row, if sparse
    group: int | None = None  # columns that share a scale, if on a grid
    rank: int = 0  # of the adapter
    adapter_bits: int = 0  # 4 or 16, if there is an adapter

    @classmethod
    def of(cls, q: QuantizedWeight) -> Parts:
        """The parts `q` has."""
        kept = 0 if q.mask is None else q.codes.shape[1]
        if q.adapter is None:
            return cls(q.sparsity, kept, q.group)
        bits = 16 if q.adapter.a_scale is None else 4
        return cls(q.sparsity, kept, q.group, len(q.adapter.a), bits)

    @classmethod
    def read(cls, entry: Mapping[str, Any], cols: int) -> Parts:
        """The parts in the config entry of a linear of `cols` columns; FormatError if invalid."""
        given = {f.name: entry[f.name] for f in fields(cls) if f.name in entry}
        for name, value in given.items():
            if name != "sparsity" and (type(value) is not int or value < 1):
                raise FormatError(f"{name} must be a positive integer, got {value!r}")
            if name == "sparsity" and value is None:
                raise FormatError("sparsity must be '2:4' or 'bitmap', got None")
        parts = cls(**given)
        parts.check(cols)
        return parts

    def entry(self) -> dict[str, Any]:
        """The keys of the config entry; `read` inverts it."""
        return {name: value for name, value in asdict(self).items() if value}

    def check(self, cols: int) -> None:
        """Raise FormatError unless a linear of `cols` columns can have these parts."""
        if self.sparsity not in (None, "2:4", "bitmap"):
            raise FormatError(f"sparsity must be '2:4' or 'bitmap', got {self.sparsity!r}")
        if bool(self.kept) != bool(self.sparsity):
            raise FormatError("sparsity and kept come together")
        if self.sparsity == "2:4" and (cols % 4 or 2 * self.kept != cols):
            raise FormatError(f"2:4 keeps half of a multiple of 4, not {self.kept} of {cols}")
        if self.kept > cols:
            raise FormatError(f"kept must be 1..{cols}, got {self.kept}")
        if self.group is not None and self.group < 1:
            raise FormatError(f"group must be positive, got {self.group}")
        if bool(self.rank) != bool(self.adapter_bits):
            raise FormatError("rank and adapter_bits come together")
        if self.rank > MAX_RANK:
            raise FormatError(f"rank must be 1..{MAX_RANK}, got {self.rank}")
        if self.adapter_bits not in (0, 4, 16):
            raise FormatError(f"adapter_bits must be 4 or 16, got {self.adapter_bits}")

    def without_adapter(self) -> Parts:
        """The same but for the adapter."""
        return replace(self, rank=0, adapter_bits=0)

    def codes(self, cols: int) -> int:
        """Codes stored per row."""
        return self.kept if self.sparsity else cols

    def position_bytes(self, cols: int) -> int:
        """Bytes that say which columns of a row have a code."""
        if self.sparsity is None:
            return 0
        return row_bytes(3, cols // 4) if self.sparsity == "2:4" else row_bytes(1, cols)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Shape of `row_scale`."""
        return (rows,) if self.group is None else (rows, -(-cols // self.group))

    def adapter(self, rows: int, cols: int) -> Specs:
        """Dtype and shape of every stored tensor of the adapter."""
        specs: Specs = {}
        for name, n in (("lora_a", cols), ("lora_b", rows)) if self.rank else ():
            if self.adapter_bits == 16:
                specs[name] = torch.bfloat16, (self.rank, n)
            else:
                specs[name] = torch.uint8, (self.rank, -(-n // 2))
                specs[f"{name}_scale"] = torch.bfloat16, (self.rank, -(-n // ADAPTER_GROUP))
        return specs


PLAIN = Parts()


def row_bytes(width: int, cols: int) -> int:
    """Bytes of one row's packed codes."""
    return -(-cols * width // 8)


def row_bits(width: int, cols: int, parts: Parts = PLAIN) -> int:
    """Every stored bit of one row: padded codes, positions, levels, scales, width byte."""
    levels = 8 * 2**width if width <= MAX_TABLE_WIDTH else 16
    scales = 1 if parts.group is None else -(-cols // parts.group)
    packed = row_bytes(width, parts.codes(cols)) + parts.position_bytes(cols)
    return 8 * packed + (levels if parts.group is None else 0) + 16 * scales + 8


def shared_bits(rows: int, cols: int, parts: Parts = PLAIN, in_scale: bool = False) -> int:
    """Every stored bit of a linear that `row_bits` leaves out: its adapter and input scale."""
    sizes = parts.adapter(rows, cols).values()
    stored = sum(8 * dtype.itemsize * math.prod(shape) for dtype, shape in sizes)
    return stored + (16 * cols if in_scale else 0)


def histogram(widths: Tensor) -> dict[int, int]:
    """Count the rows of each width that occurs: what config.json keeps of every linear."""
    counts = torch.bincount(widths.long(), minlength=MAX_WIDTH + 1).tolist()
    return {width: n for width, n in enumerate(counts) if n}


def layout(counts: Mapping[int, int], cols: int, in_scale: bool, parts: Parts = PLAIN) -> Specs:
    """Dtype and shape of every stored tensor of a linear, from its config entry alone."""
    rows, kept = sum(counts.values()), parts.codes(cols)
    leveled = counts if parts.group is None else {}
    table = sum(n * 2**b for b, n in leveled.items() if b <= MAX_TABLE_WIDTH)
    affine = sum(n for b, n in leveled.items() if b > MAX_TABLE_WIDTH)
    tensors: Specs = {
        "weight": (torch.uint8, (sum(n * row_bytes(b, kept) for b, n in counts.items()),)),
        "widths": (torch.uint8, (rows,)),
        "codebook": (torch.int8, (table,)),
        "row_scale": (torch.bfloat16, parts.scale_shape(rows, cols)),
        "row_zero": (torch.int16, (affine,)),
        "in_scale": (torch.float16, (cols if in_scale else 0,)),
        "positions": (torch.uint8, (rows * parts.position_bytes(cols),)),
        **parts.adapter(rows, cols),
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
    if width in (1, 2, 4, 8):  # no code spans two bytes
        shift = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        return ((packed.unsqueeze(-1) >> shift) & (2**width - 1)).flatten(1)[:, :cols]
    start = torch.arange(cols, device=packed.device) * width
    # a code spans two bytes at most; the byte behind the last one is never used, only indexed
    wide = torch.nn.functional.pad(packed, (0, 1)).to(torch.int16)
    pair = wide[:, start // 8] | (wide[:, start // 8 + 1] << 8)
    return ((pair >> (start % 8).to(torch.int16)) & (2**width - 1)).to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes -8..7 [..., n] into uint8 [..., ceil(n/2)]: code + 8, even columns low."""
    nibbles = torch.nn.functional.pad((codes + 8).to(torch.uint8), (0, codes.shape[-1] % 2))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, cols: int) -> Tensor:
    """Invert `pack_nibbles`: int8 [..., cols]."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :cols]
    return nibbles.to(torch.int8) - 8


def pack_positions(mask: Tensor, sparsity: str) -> Tensor:
    """Pack a mask bool [n, c] into uint8 [n, bytes]: a bit per column, or 3 per four columns."""
    if sparsity == "bitmap":
        return pack_codes(mask.to(torch.uint8), 1)
    place = 1 << torch.arange(4)
    code = torch.zeros(16, dtype=torch.uint8)  # of a pattern read as a number, 7 and 6 once each
    code[(PATTERNS * place).sum(1)[:6]] = torch.arange(6, dtype=torch.uint8)
    return pack_codes(code[(mask.view(len(mask), -1, 4) * place).sum(2)], 3)


def unpack_positions(packed: Tensor, sparsity: str, cols: int) -> Tensor:
    """Invert `pack_positions`: bool [n, cols]; the patterns 6 and 7 are read as 5."""
    if sparsity == "bitmap":
        return unpack_codes(packed, 1, cols).bool()
    pattern = unpack_codes(packed, 3, cols // 4).int()
    whole = PATTERNS.to(packed.device).view(torch.int32).flatten()  # four bools looked up at once
    return whole[pattern].view(torch.bool)


def spread(scale: Tensor, group: int, cols: int) -> Tensor:
    """Scales [n, ceil(cols / group)] of groups of columns to float32 [n, cols]."""
    return scale.float().repeat_interleave(min(group, cols), 1)[:, :cols]


def factor_values(codes: Tensor, scale: Tensor | None) -> Tensor:
    """One factor of an adapter, float32 [rank, n]."""
    value = codes.float()
    return value if scale is None else value * spread(scale, ADAPTER_GROUP, codes.shape[1])


def dequantize(q: QuantizedWeight) -> Tensor:
    """The weight this stands for without its adapter, float32 [r, c], 0 where pruned."""
    codes, (_, cols) = q.codes.long(), q.shape
    if q.group is None:
        table = q.codebook.float().gather(1, codes.clamp(max=TABLE - 1))
        affine = codes - q.row_zero.long().unsqueeze(1)
        level = torch.where((q.widths <= MAX_TABLE_WIDTH).unsqueeze(1), table, affine.float())
        scale = q.row_scale.float().unsqueeze(1)
    else:
        level = (codes - 2 ** (q.widths.long() - 1).unsqueeze(1)).float()
        scale = spread(q.row_scale, q.group, cols)
    if q.mask is not None:
        level = level.new_zeros(q.shape).masked_scatter_(q.mask, level)
    value = level * scale
    return value if q.in_scale is None else value * q.in_scale.float()


def effective(q: QuantizedWeight) -> Tensor:
    """The weight a layer multiplies by, W + B^T A, float32 [r, c]."""
    if q.adapter is None:
        return dequantize(q)
    a, b = q.adapter.values()
    return dequantize(q) + b.T @ a


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """The stored tensors of a linear by their last name; refuses what would not come back equal."""
    check_values(q)
    order = torch.argsort(q.widths, stable=True)
    weight, codebook = [], []
    for width, index in groups(q.widths):
        weight.append(pack_codes(q.codes[index], width).flatten())
        if q.group is None and width <= MAX_TABLE_WIDTH:
            codebook.append(q.codebook[index, : 2**width].flatten())
    tensors = {
        "weight": torch.cat(weight),
        "widths": q.widths.clone(),
        "row_scale": q.row_scale[order],
    }
    if codebook:
        tensors["codebook"] = torch.cat(codebook)
    affine = order[q.widths[order] > MAX_TABLE_WIDTH]
    if len(affine) and q.group is None:
        tensors["row_zero"] = q.row_zero[affine]
    if q.in_scale is not None:
        tensors["in_scale"] = q.in_scale.clone()
    if q.mask is not None and q.sparsity is not None:
        tensors["positions"] = pack_positions(q.mask[order], q.sparsity).flatten()
    tensors |= pack_adapter(q.adapter)
    # which file of several a tensor goes to depends on the order: that of `layout` can be planned
    specs = layout(histogram(q.widths), q.shape[1], q.in_scale is not None, Parts.of(q))
    return {name: tensors[name] for name in specs}


def unpack(
    tensors: Mapping[str, Tensor], rows: int, cols: int, parts: Parts = PLAIN, *, name: str = ""
) -> QuantizedWeight:
    """Read a linear back, checking every size and value; `name` is the linear's, for the error."""
    check_stored(tensors, rows, cols, parts, name=name)
    widths, kept = tensors["widths"], parts.codes(cols)
    codes = torch.empty(rows, kept, dtype=torch.uint8)
    codebook = torch.zeros(rows, TABLE, dtype=torch.int8)
    row_zero = torch.zeros(rows, dtype=torch.int16)
    row_scale = torch.empty_like(tensors["row_scale"])
    mask = None if parts.sparsity is None else torch.empty(rows, cols, dtype=torch.bool)
    row_scale[torch.argsort(widths, stable=True)] = tensors["row_scale"]
    for width, index, part in stored_groups(tensors, cols, parts):
        codes[index] = unpack_codes(part["weight"], width, kept)
        _check_padding(part["weight"], kept * width, _join(name, "weight"))
        if "codebook" in part:
            codebook[index, : 2**width] = part["codebook"]
        if "row_zero" in part:
            row_zero[index] = part["row_zero"]
        if mask is not None and parts.sparsity is not None:
            mask[index] = unpack_positions(part["positions"], parts.sparsity, cols)
            if (
                parts.sparsity == "2:4"
                and (unpack_codes(part["positions"], 3, cols // 4) > 5).any()
            ):
                raise FormatError("holds a pattern above 5", tensor=_join(name, "positions"))
    return QuantizedWeight(
        codes,
        widths,
        codebook,
        row_scale,
        row_zero,
        tensors.get("in_scale"),
        mask,
        parts.sparsity,
        parts.group,
        unpack_adapter(tensors, rows, cols, parts, name),
    )


def pack_adapter(adapter: Adapter | None) -> dict[str, Tensor]:
    """The stored tensors of an adapter by their last name."""
    tensors = {}
    for name, codes, scale in _factors(adapter):
        tensors[name] = codes.clone() if scale is None else pack_nibbles(codes)
        if scale is not None:
            tensors[f"{name}_scale"] = scale.clone()
    return tensors


def unpack_adapter(
    tensors: Mapping[str, Tensor], rows: int, cols: int, parts: Parts, name: str = ""
) -> Adapter | None:
    """Invert `pack_adapter`; None for a linear of other parts."""
    if not parts.rank:
        return None
    a, b = tensors["lora_a"], tensors["lora_b"]
    if parts.adapter_bits == 16:
        return Adapter(a, b)
    for tensor, n in (("lora_a", cols), ("lora_b", rows)):
        _check_padding(tensors[tensor], 4 * n, _join(name, tensor))
    scales = tensors["lora_a_scale"], tensors["lora_b_scale"]
    return Adapter(unpack_nibbles(a, cols), unpack_nibbles(b, rows), *scales)


def _factors(adapter: Adapter | None) -> list[tuple[str, Tensor, Tensor | None]]:
    """(name in the file, codes or values, scale) of both factors of an adapter."""
    if adapter is None:
        return []
    return [("lora_a", adapter.a, adapter.a_scale), ("lora_b", adapter.b, adapter.b_scale)]


def stored_groups(
    tensors: Mapping[str, Tensor], cols: int, parts: Parts = PLAIN
) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """Yield (width b, original row indices [n], views of that width's part of the tensors).

    The part holds `weight` uint8 [n, row_bytes], `row_scale` [n] or [n, groups], `codebook` int8
    [n, 2**b] or `row_zero` [n] unless on a grid, and if sparse `positions` uint8 [n, bytes].
    """
    row = byte = entry = zero = 0
    places = parts.position_bytes(cols)
    for width, index in groups(tensors["widths"]):
        n, size, levels = len(index), row_bytes(width, parts.codes(cols)), 2**width
        part = {
            "weight": tensors["weight"][byte : byte + n * size].view(n, size),
            "row_scale": tensors["row_scale"][row : row + n],
        }
        if places:
            positions = tensors["positions"][row * places : (row + n) * places]
            part["positions"] = positions.view(n, places)
        if parts.group is None and width <= MAX_TABLE_WIDTH:
            part["codebook"] = tensors["codebook"][entry : entry + n * levels].view(n, levels)
            entry += n * levels
        elif parts.group is None:
            part["row_zero"] = tensors["row_zero"][zero : zero + n]
            zero += n
        yield width, index, part
        row, byte = row + n, byte + n * size


def check_stored(
    tensors: Mapping[str, Tensor], rows: int, cols: int, parts: Parts = PLAIN, *, name: str = ""
) -> None:
    """Raise FormatError unless these are the stored tensors of a [rows, cols] linear.

    `weight` may live on the meta device: any bytes of the right length are valid codes.
    """
    check_sizes(tensors, rows, cols, parts, name=name)
    for tensor, stored in tensors.items():
        if stored.is_floating_point() and not stored.isfinite().all():
            raise FormatError("holds NaN or Inf", tensor=_join(name, tensor))
    if parts.sparsity is None:
        return
    where = _join(name, "positions")
    packed = tensors["positions"].view(rows, -1)
    _check_padding(packed, 3 * (cols // 4) if parts.sparsity == "2:4" else cols, where)
    if parts.sparsity == "bitmap":
        found = ONES.to(packed.device)[packed.int()].sum(1)
        if (found != parts.kept).any():
            got = int(found[found != parts.kept][0])
            raise FormatError(f"every row must keep {parts.kept} columns, got {got}", tensor=where)


def _check_padding(packed: Tensor, bits: int, tensor: str) -> None:
    """Raise FormatError unless the bits behind the first `bits` of every row are zero."""
    used = bits % 8  # of each row's last byte
    if used and (packed[:, -1] >> used).any():
        raise FormatError("padding bits are not zero", tensor=tensor)


def check_sizes(
    tensors: Mapping[str, Tensor], rows: int, cols: int, parts: Parts = PLAIN, *, name: str = ""
) -> None:
    """The part of `check_stored` that keeps native code inside its buffers: dtypes and shapes."""

    def fail(tensor: str, reason: str) -> FormatError:
        return FormatError(reason, tensor=_join(name, tensor))

    parts.check(cols)
    if "widths" not in tensors:
        raise fail("widths", "is missing")
    widths = tensors["widths"]
    if widths.dtype != torch.uint8 or widths.shape != (rows,):
        raise fail("widths", f"must be uint8 [{rows}], got {_spec(widths)}")
    counts = histogram(widths)
    if not set(counts) <= set(range(1, MAX_WIDTH + 1)):
        bad = widths[(widths < 1) | (widths > MAX_WIDTH)]
        raise fail("widths", f"row widths must be 1..{MAX_WIDTH}, got {int(bad[0])}")
    expected = layout(counts, cols, "in_scale" in tensors, parts)
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
    (rows, cols), parts = q.shape, Parts.of(q)
    parts.check(cols)
    shapes: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
        "codes": (q.codes, torch.uint8, (rows, parts.codes(cols))),
        "widths": (q.widths, torch.uint8, (rows,)),
        "codebook": (q.codebook, torch.int8, (rows, TABLE)),
        "row_scale": (q.row_scale, torch.bfloat16, parts.scale_shape(rows, cols)),
        "row_zero": (q.row_zero, torch.int16, (rows,)),
    }
    if q.in_scale is not None:
        shapes["in_scale"] = (q.in_scale, torch.float16, (cols,))
    if q.mask is not None:
        shapes["mask"] = (q.mask, torch.bool, (rows, cols))
    for (name, codes, scale), n in zip(_factors(q.adapter), (cols, rows), strict=False):
        kind = torch.bfloat16 if parts.adapter_bits == 16 else torch.int8
        shapes[name] = (codes, kind, (parts.rank, n))
        if scale is not None:
            size = (parts.rank, -(-n // ADAPTER_GROUP))
            shapes[f"{name}_scale"] = (scale, torch.bfloat16, size)
        if (scale is None) != (parts.adapter_bits == 16):
            raise FormatError("both factors have scales, or none", tensor=f"{name}_scale")
        if scale is not None and ((codes < -8) | (codes > 7)).any():
            raise FormatError("codes must be -8..7", tensor=name)
    for name, (tensor, dtype, shape) in shapes.items():
        if tensor.dtype != dtype or tensor.shape != shape:
            want = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            raise FormatError(f"must be {want}, got {_spec(tensor)}", tensor=name)
        if dtype.is_floating_point and not tensor.isfinite().all():
            raise FormatError("holds NaN or Inf", tensor=name)
    if not ((q.widths >= 1) & (q.widths <= MAX_WIDTH)).all():
        raise FormatError(f"row widths must be 1..{MAX_WIDTH}", tensor="widths")
    if (q.codes > (2 ** q.widths.int() - 1).unsqueeze(1)).any():
        raise FormatError("a code does not fit its row's width", tensor="codes")
    if q.row_zero[q.widths <= MAX_TABLE_WIDTH].any():
        raise FormatError("only rows wider than 5 bits have a zero point", tensor="row_zero")
    for name, levels in (("codebook", q.codebook), ("row_zero", q.row_zero)):
        if q.group is not None and levels.any():
            raise FormatError("a grid has none, it must be 0", tensor=name)
    if q.mask is not None and (q.mask.sum(1) != parts.kept).any():
        raise FormatError(f"every row must keep {parts.kept} columns", tensor="mask")
    if q.mask is not None and q.sparsity == "2:4" and (q.mask.view(rows, -1, 4).sum(2) != 2).any():
        raise FormatError("2:4 keeps two of every four columns", tensor="mask")


def _join(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor


def _spec(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


METHOD = "skimlm"  # quant_method in config.json
FORMAT_VERSION = 2  # the newest; a folder without any of its parts says 1
