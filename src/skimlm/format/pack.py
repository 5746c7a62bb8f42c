"""One layer as values (`QuantizedWeight`) and as bytes (`pack`, `unpack`): FORMAT.md in code.

A weight is stored per output row: row i has its own width, so codes of b_i bits, 1..8, and

    value[i, j] = level[i, j] * row_scale[i] * in_scale[j]
    level[i, j] = codebook[i, code[i, j]]      b_i <= 5: 2**b_i int8 levels of this row
                = code[i, j] - row_zero[i]     b_i >= 6: an affine grid, tables cost too much
                = trellis[b_i, window[i, j]]   widths 16 + b_i: 128 int8 levels that rows share

in float32. On disk the rows are sorted by width (stably, so `widths` alone gives the permutation
and no file can hold an invalid one); how a row becomes bytes is in codes.py.

Since version 2 a layer may have more: codes of some columns only, the others being 0; a uniform
grid with a scale per group of columns in place of codebooks; a low-rank adapter. Version 3 has
trellis rows: the level of a code depends on it and on the highest bits of those behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from skimlm.errors import FormatError
from skimlm.format.check import check_stored, spelled, spelled_of
from skimlm.format.codes import pack_codes, unpack_codes
from skimlm.format.layer import (
    ADAPTER_GROUP,
    Layer,
    LayerSpec,
    Shape,
    histogram,
    layout,
    stored_groups,
    wrong_widths,
)
from skimlm.format.row_codes import (
    MAX_TABLE_WIDTH,
    TABLE,
    TRELLIS,
    WINDOWS,
    code_bits,
)

# 2:4: which of four columns pattern k keeps; 6 and 7 are never written
PATTERNS = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]
    + 2 * [[0, 0, 1, 1]],
    dtype=torch.bool,
)


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

    codes: Tensor  # uint8 [r, c] or, with a mask, [r, kept]; codes[i, j] < 2**code_bits(widths[i])
    widths: Tensor  # uint8 [r], 1..8, or of a trellis 17..20
    codebook: Tensor  # int8 [r, 32]: the first 2**widths[i] entries count, 0 elsewhere
    row_scale: Tensor  # bfloat16 [r] or, on a grid, [r, ceil(c / group)]
    row_zero: Tensor  # int16 [r], 0 but where widths[i] is 6..8
    in_scale: Tensor | None = None  # float16 [c]
    mask: Tensor | None = None  # bool [r, c], True where there is a code, `kept` of them in a row
    sparsity: str | None = None  # with a mask: "2:4" or "bitmap", how it is stored
    group: int | None = None  # a grid: levels are code - 2**(b - 1), codebook and row_zero are 0
    adapter: Adapter | None = None
    trellis: Tensor = field(default_factory=lambda: torch.zeros(0, WINDOWS, dtype=torch.int8))
    # int8 [widths of a trellis in use, 128], ascending in width

    @property
    def shape(self) -> tuple[int, int]:
        """(r, c) of the weight this stands for."""
        rows, cols = (self.codes if self.mask is None else self.mask).shape
        return rows, cols

    @property
    def spec(self) -> LayerSpec:
        """What config.json says of it once it is stored."""
        kept, scaled = 0 if self.mask is None else self.codes.shape[1], self.in_scale is not None
        rank, bits = 0, 0
        if self.adapter is not None:
            rank, bits = len(self.adapter.a), 16 if self.adapter.a_scale is None else 4
        counts = histogram(self.widths)
        return LayerSpec(*self.shape, counts, scaled, self.sparsity, kept, self.group, rank, bits)


def groups(widths: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (width, the original indices of its rows) in stored order."""
    for width in histogram(widths):
        yield width, (widths == width).nonzero().flatten()


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


def row_values(
    spec: LayerSpec,
    width: int,
    codes: Tensor,
    added: Mapping[str, Tensor],
    mask: Tensor | None,
    scale: Tensor,
    in_scale: Tensor | None,
) -> Tensor:
    """Weights float32 [n, c] of rows of one width: codes [n, kept] to levels to values.

    `added` has the tensors [n, k] of their row code, what they share in every row; `mask` bool
    [n, c] where the codes are, `scale` is [n, groups].
    """
    code = spec.code_of(width)
    if code is None:
        raise FormatError(f"has rows of width {width}, which this skimlm cannot read")
    level = code.levels(codes, code_bits(width), added)
    if mask is not None:
        level = level.new_zeros(mask.shape).masked_scatter_(mask, level)
    scale = scale.float() if spec.group is None else spread(scale, spec.group, spec.cols)
    value = level * scale
    return value if in_scale is None else value * in_scale.float()


def dequantize(q: QuantizedWeight) -> Tensor:
    """The weight this stands for without its adapter, float32 [r, c], 0 where pruned."""
    out, spec = torch.empty(q.shape, device=q.codes.device), q.spec
    for width, index in groups(q.widths):
        mask = None if q.mask is None else q.mask[index]
        scale = q.row_scale[index].view(len(index), -1)
        added = _added(q, spec, width, index) | _shared(q, spec, width, index)
        out[index] = row_values(spec, width, q.codes[index], added, mask, scale, q.in_scale)
    return out


def effective(q: QuantizedWeight) -> Tensor:
    """The weight a layer multiplies by, W + B^T A, float32 [r, c]."""
    if q.adapter is None:
        return dequantize(q)
    a, b = q.adapter.values()
    return dequantize(q) + b.T @ a


def pack(q: QuantizedWeight) -> Layer:
    """The layer as it is stored; refuses what would not come back equal."""
    check_values(q)
    spec = q.spec
    rows: dict[str, list[Tensor]] = {}
    for width, index in groups(q.widths):
        codes = spec.packing(width).pack(q.codes[index], code_bits(width))
        pieces = {"weight": codes, "row_scale": q.row_scale[index]}
        pieces |= _added(q, spec, width, index)
        if q.mask is not None and q.sparsity is not None:
            pieces["positions"] = pack_positions(q.mask[index], q.sparsity)
        for name, piece in pieces.items():
            rows.setdefault(name, []).append(piece.flatten())
    tensors = {name: torch.cat(pieces) for name, pieces in rows.items()}
    tensors |= {"widths": q.widths.clone(), "trellis": q.trellis.clone()}
    if q.in_scale is not None:
        tensors["in_scale"] = q.in_scale.clone()
    tensors |= pack_adapter(q.adapter)
    # which file of several a tensor goes to depends on the order: that of `layout` can be planned
    return Layer(spec, {name: tensors[name].view(s) for name, (_, s) in layout(spec).items()})


def unpack(layer: Layer, *, name: str = "") -> QuantizedWeight:
    """Read a layer back, checking every size and value; `name` is the layer's, for the error."""
    check_stored(layer, name=name, strict=True)
    spec, tensors = layer.spec, layer.tensors
    rows, cols = spec.rows, spec.cols
    codes = torch.empty(rows, spec.codes, dtype=torch.uint8)
    row_scale = torch.empty_like(tensors["row_scale"])
    mask = None if spec.sparsity is None else torch.empty(rows, cols, dtype=torch.bool)
    dense = {
        "codebook": torch.zeros(rows, TABLE, dtype=torch.int8),
        "row_zero": torch.zeros(rows, dtype=torch.int16),
    }
    shared = {"trellis": tensors["trellis"]} if "trellis" in tensors else {}
    for width, index, views in stored_groups(layer):
        packing = spec.packing(width)
        codes[index] = packing.unpack(views["weight"], code_bits(width), spec.codes)
        row_scale.view(rows, -1)[index] = views["row_scale"]
        if mask is not None and spec.sparsity is not None:
            mask[index] = unpack_positions(views["positions"], spec.sparsity, cols)
        for added in dense.keys() & views.keys():
            stored = views[added]
            dense[added].view(rows, -1)[index, : stored.shape[1]] = stored
    return QuantizedWeight(
        codes,
        tensors["widths"],
        dense["codebook"],
        row_scale,
        dense["row_zero"],
        tensors.get("in_scale"),
        mask,
        spec.sparsity,
        spec.group,
        unpack_adapter(layer),
        **shared,
    )


def cut(layer: Layer, begin: int, end: int) -> Layer:
    """Rows begin..end of a layer as a layer of their own.

    ValueError if they cut a scale of its adapter in two: one of 4 bits has a scale for 128 rows.
    """
    q, rows = unpack(layer), slice(begin, end)
    adapter = q.adapter
    if adapter is not None:
        b_scale = adapter.b_scale
        if b_scale is not None:
            if begin % ADAPTER_GROUP:
                raise ValueError(f"an adapter of 4 bits cannot be cut at row {begin}")
            b_scale = b_scale[:, begin // ADAPTER_GROUP : -(-end // ADAPTER_GROUP)]
        adapter = replace(adapter, b=adapter.b[:, rows], b_scale=b_scale)
    widths = q.widths[rows]
    before = q.widths[q.widths > TRELLIS].unique()
    used = torch.isin(before, widths)
    by_row = ("codes", "codebook", "row_scale", "row_zero", "mask")
    cut_rows: dict[str, Any] = {
        name: None if (whole := getattr(q, name)) is None else whole[rows] for name in by_row
    }
    return pack(replace(q, widths=widths, adapter=adapter, trellis=q.trellis[used], **cut_rows))


def _added(q: QuantizedWeight, spec: LayerSpec, width: int, index: Tensor) -> dict[str, Tensor]:
    """What the row code of a width stores besides codes, [n, k] of rows `index`."""
    code, n, bits = spec.code_of(width), len(index), code_bits(width)
    sizes = {} if code is None else {name: size(bits) for name, size in code.adds.items()}
    return {name: getattr(q, name)[index].view(n, -1)[:, :k] for name, k in sizes.items()}


def _shared(q: QuantizedWeight, spec: LayerSpec, width: int, index: Tensor) -> dict[str, Tensor]:
    """What rows `index` of a width share, the same [n, k] in all of them."""
    code = spec.code_of(width)
    before = [c for w in spec.counts if w < width and (c := spec.code_of(w))]
    return {
        name: getattr(q, name)[sum(name in c.shares for c in before)].expand(len(index), -1)
        for name in (code.shares if code else ())
    }


def pack_adapter(adapter: Adapter | None) -> dict[str, Tensor]:
    """The stored tensors of an adapter by their last name."""
    tensors = {}
    for name, codes, scale in _factors(adapter):
        tensors[name] = codes.clone() if scale is None else pack_nibbles(codes)
        if scale is not None:
            tensors[f"{name}_scale"] = scale.clone()
    return tensors


def unpack_adapter(layer: Layer) -> Adapter | None:
    """The adapter of a layer; None if it has none."""
    spec, stored = layer.spec, layer.tensors
    if not spec.rank:
        return None
    a, b = stored["lora_a"], stored["lora_b"]
    if spec.adapter_bits == 16:
        return Adapter(a, b)
    codes = unpack_nibbles(a, spec.cols), unpack_nibbles(b, spec.rows)
    return Adapter(*codes, stored["lora_a_scale"], stored["lora_b_scale"])


def _factors(adapter: Adapter | None) -> list[tuple[str, Tensor, Tensor | None]]:
    """(name in the file, codes or values, scale) of both factors of an adapter."""
    if adapter is None:
        return []
    return [("lora_a", adapter.a, adapter.a_scale), ("lora_b", adapter.b, adapter.b_scale)]


def check_values(q: QuantizedWeight) -> None:
    """Raise FormatError unless `q` is a weight that `pack` can store without loss."""
    spec = q.spec
    spec.check()
    for name, tensor, dtype, shape in _fields(q, spec):
        if tensor.dtype != dtype or tensor.shape != shape:
            raise FormatError(
                f"must be {spelled(dtype, shape)}, got {spelled_of(tensor)}", tensor=name
            )
        if dtype.is_floating_point and not tensor.isfinite().all():
            raise FormatError("holds NaN or Inf", tensor=name)
    if wrong := wrong_widths(spec.counts, spec):
        raise FormatError(wrong, tensor="widths")
    if (q.codes > (2 ** code_bits(q.widths).int() - 1).unsqueeze(1)).any():
        raise FormatError("a code does not fit its row's width", tensor="codes")
    if q.row_zero[code_bits(q.widths) <= MAX_TABLE_WIDTH].any():
        raise FormatError("only rows wider than 5 bits have a zero point", tensor="row_zero")
    if q.codebook[q.widths > TRELLIS].any():
        raise FormatError("trellis rows have none, it must be 0", tensor="codebook")
    for name, levels in (("codebook", q.codebook), ("row_zero", q.row_zero)):
        if q.group is not None and levels.any():
            raise FormatError("a grid has none, it must be 0", tensor=name)
    if q.mask is not None and (q.mask.sum(1) != spec.kept).any():
        raise FormatError(f"every row must keep {spec.kept} columns", tensor="mask")
    if q.mask is not None and q.sparsity == "2:4":
        if (q.mask.view(spec.rows, -1, 4).sum(2) != 2).any():
            raise FormatError("2:4 keeps two of every four columns", tensor="mask")
    for name, codes, scale in _factors(q.adapter):
        if scale is not None and ((codes < -8) | (codes > 7)).any():
            raise FormatError("codes must be -8..7", tensor=name)


def _fields(
    q: QuantizedWeight, spec: LayerSpec
) -> Iterator[tuple[str, Tensor, torch.dtype, Shape]]:
    """Every tensor of `q` with the dtype and shape it must have."""
    rows, cols = q.shape
    stored = layout(spec)
    yield "codes", q.codes, torch.uint8, (rows, spec.codes)
    yield "widths", q.widths, *stored["widths"]
    yield "codebook", q.codebook, torch.int8, (rows, TABLE)
    yield "row_scale", q.row_scale, *stored["row_scale"]
    yield "row_zero", q.row_zero, torch.int16, (rows,)
    yield "trellis", q.trellis, *stored.get("trellis", (torch.int8, (0, WINDOWS)))
    if q.in_scale is not None:
        yield "in_scale", q.in_scale, *stored["in_scale"]
    if q.mask is not None:
        yield "mask", q.mask, torch.bool, (rows, cols)
    for (name, codes, scale), n in zip(_factors(q.adapter), (cols, rows), strict=False):
        if (scale is None) != (spec.adapter_bits == 16):
            raise FormatError("both factors have scales, or none", tensor=f"{name}_scale")
        yield name, codes, torch.bfloat16 if scale is None else torch.int8, (spec.rank, n)
        if scale is not None:
            yield f"{name}_scale", scale, *stored[f"{name}_scale"]
