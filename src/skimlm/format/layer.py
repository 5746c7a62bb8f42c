"""One compressed layer: everything that is stored of it, declared once.

`TENSORS` is what a file holds of a layer, `LayerSpec` what fixes the shape of all that: the layer's
entry in config.json; `ROW_CODES` (row_codes.py) are the ways of coding a row. The rest follows:
shapes (`layout`), prices (`row_bits`, `shared_bits`), checks (check.py), packing (pack.py), the
table in FORMAT.md and the C header (`python -m skimlm.format`), the struct of native code
(abi.py), the buffers and the operators in runtime/.

Everything here is pure: tensors in, tensors out, no model, no I/O. Every malformation is a
`FormatError` that names the tensor; the caller who knows the file adds it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from skimlm.errors import FormatError
from skimlm.format.codes import STREAM, Packing
from skimlm.format.row_codes import ROW_CODES, WINDOWS, RowCode, code_bits

METHOD = "skimlm"  # quant_method in config.json
FORMAT_VERSION = 3  # the newest; a folder says the least that its layers need
TABLES_VERSION = 3  # the first in which an embedding or a head can be a layer
ADAPTER_GROUP = 128  # columns that share a scale of a 4-bit adapter
MAX_RANK = 2**16  # keeps the sizes that a hostile config.json implies within int64
ONES = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)
Shape: TypeAlias = tuple[int, ...]
Specs: TypeAlias = dict[str, tuple[torch.dtype, Shape]]  # of tensors, by name


# ---- what a layer is


@dataclass(frozen=True)
class LayerSpec:
    """Shape and coding of one compressed linear layer: its entry in config.json.

    Until widths are chosen `counts` is empty; then `row_bits` says what each would cost. A width is
    the stored byte: `code_bits` of it are the bits of a code.
    """

    rows: int  # outputs
    cols: int  # inputs
    counts: Mapping[int, int] = field(default_factory=dict, hash=False)  # rows of each width
    in_scale: bool = False  # a factor for every input
    sparsity: str | None = None  # "2:4" or "bitmap": which columns of a row have a code
    kept: int = 0  # how many have one, if sparse
    group: int | None = None  # columns that share a scale: codes are a uniform grid
    rank: int = 0  # of a low-rank adapter
    adapter_bits: int = 0  # 4 or 16, of the adapter's numbers

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", dict(sorted(self.counts.items())))

    @classmethod
    def read(cls, entry: Mapping[str, Any], rows: int, cols: int) -> LayerSpec:
        """What config.json says of a layer of this shape; FormatError if that cannot be."""
        counts = _read_counts(entry)
        found = {name: entry[name] for name in OPTIONAL if name in entry}
        for name, value in found.items():
            if name != "sparsity" and (type(value) is not int or value < 1):
                raise FormatError(f"{name} must be a positive integer, got {value!r}")
            if name == "sparsity" and value is None:
                raise FormatError("sparsity must be '2:4' or 'bitmap', got None")
        spec = cls(rows, cols, counts, bool(entry.get("in_scale")), **found)
        spec.check()
        return spec

    def entry(self) -> dict[str, Any]:
        """The layer's entry in config.json; `read` inverts it."""
        widths = {str(width): n for width, n in self.counts.items()}
        return {"widths": widths, "in_scale": self.in_scale, **self.options()}

    def facts(self) -> dict[str, Any]:
        """Shape and every key of config.json, those that the entry leaves out too."""
        facts = {"widths" if k == "counts" else k: v for k, v in asdict(self).items()}
        return facts | {"widths": self.entry()["widths"]}

    def options(self) -> dict[str, Any]:
        """The keys beyond version 1 of the format that the layer uses."""
        return {name: value for name in OPTIONAL if (value := getattr(self, name))}

    @cached_property
    def version(self) -> int:
        """The first version of the format that has such layers."""
        return next(v for v in range(1, FORMAT_VERSION + 1) if not self.beyond(v))

    def beyond(self, version: int) -> list[str]:
        """What of it a version of the format does not have."""
        codes = (code for width in self.counts if (code := self.code_of(width)))
        rows = dict.fromkeys(f"{code.name} rows" for code in codes if code.since > version)
        return [*(self.options() if version < 2 else ()), *rows]

    @property
    def plain(self) -> bool:
        """Whether it is whole rows with one scale each, and nothing else."""
        return not self.options()

    @property
    def codes(self) -> int:
        """Codes stored per row."""
        return self.kept if self.sparsity else self.cols

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return 1 if self.group is None else -(-self.cols // self.group)

    @property
    def position_bits(self) -> int:
        """Bits that say which columns of a row have a code."""
        if self.sparsity is None:
            return 0
        return 3 * (self.cols // 4) if self.sparsity == "2:4" else self.cols

    def without_adapter(self) -> LayerSpec:
        """The same but for the adapter."""
        return replace(self, rank=0, adapter_bits=0)

    def with_widths(self, widths: Tensor) -> LayerSpec:
        """The same with these widths of rows, uint8 [r]."""
        return replace(self, rows=len(widths), counts=histogram(widths))

    def code_of(self, width: int) -> RowCode | None:
        """How rows of a width are coded; None where there is no such code."""
        fitting = (code for code in ROW_CODES if width in code.widths and code.used(self))
        return next(fitting, None)

    def packing(self, width: int) -> Packing:
        """How the codes of rows of a width become bytes."""
        code = self.code_of(width)
        return code.packing if code else STREAM

    @cached_property
    def row_codes(self) -> frozenset[str]:
        """Names of the row codes in use."""
        return frozenset(code.name for width in self.counts if (code := self.code_of(width)))

    def check(self) -> None:
        """Raise FormatError unless there can be such a layer."""
        if self.counts and sum(self.counts.values()) != self.rows:
            raise FormatError(
                f"widths of {sum(self.counts.values())} rows, the model has {self.rows}"
            )
        if self.sparsity not in (None, "2:4", "bitmap"):
            raise FormatError(f"sparsity must be '2:4' or 'bitmap', got {self.sparsity!r}")
        if bool(self.kept) != bool(self.sparsity):
            raise FormatError("sparsity and kept come together")
        if self.sparsity == "2:4" and (self.cols % 4 or 2 * self.kept != self.cols):
            raise FormatError(f"2:4 keeps half of a multiple of 4, not {self.kept} of {self.cols}")
        if not 0 <= self.kept <= self.cols:
            raise FormatError(f"kept must be 1..{self.cols}, got {self.kept}")
        if self.group is not None and self.group < 1:
            raise FormatError(f"group must be positive, got {self.group}")
        if bool(self.rank) != bool(self.adapter_bits):
            raise FormatError("rank and adapter_bits come together")
        if not 0 <= self.rank <= MAX_RANK:
            raise FormatError(f"rank must be 1..{MAX_RANK}, got {self.rank}")
        if self.adapter_bits not in (0, 4, 16):
            raise FormatError(f"adapter_bits must be 4 or 16, got {self.adapter_bits}")


OPTIONAL = ("sparsity", "kept", "group", "rank", "adapter_bits")  # of config.json, if not falsy


def _read_counts(entry: Mapping[str, Any]) -> dict[int, int]:
    """The width histogram of a layer's entry, by width."""
    try:
        counts = {int(b): n for b, n in entry["widths"].items()}
        widths = {b for code in ROW_CODES for b in code.widths}
        good = bool(counts) and all(
            b in widths and type(n) is int and n > 0 for b, n in counts.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        good = False
    if not good:
        raise FormatError("has no valid width histogram")
    return dict(sorted(counts.items()))


def histogram(widths: Tensor) -> dict[int, int]:
    """Count the rows of each width that occurs, uint8 [r]."""
    counts = torch.bincount(widths.long()).tolist()
    return {width: n for width, n in enumerate(counts) if n}


# ---- what is stored of it


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a layer as a file holds it."""

    name: str
    dtype: torch.dtype | Mapping[int, torch.dtype]  # by adapter_bits where that decides
    shape: Callable[[LayerSpec], Shape]  # of no elements where the layer has no such tensor
    # rows lie in "stored" order, sorted by width, or in the "model"'s; None: not by rows
    order: Literal["stored", "model"] | None
    shape_text: str  # the same shape in FORMAT.md's letters
    content: str
    key: str | None = None  # of config.json, without which there is none
    # what is wrong with values, [n, k] of rows of one width or the whole: at load, and by `unpack`
    check: Callable[[Tensor, LayerSpec, int], str | None] | None = None
    strict: Callable[[Tensor, LayerSpec, int], str | None] | None = None

    def dtype_in(self, spec: LayerSpec) -> torch.dtype:
        """Its dtype in a layer."""
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        return self.dtype.get(spec.adapter_bits, torch.uint8)

    def bits(self, spec: LayerSpec) -> int:
        """What it costs."""
        return 8 * self.dtype_in(spec).itemsize * math.prod(self.shape(spec))


def _added(name: str) -> Callable[[LayerSpec], Shape]:
    """Shape of a tensor that row codes add."""

    def shape(spec: LayerSpec) -> Shape:
        sizes = ((spec.code_of(w), code_bits(w), n) for w, n in spec.counts.items())
        return (sum(n * c.adds[name](b) for c, b, n in sizes if c and name in c.adds),)

    return shape


def _shared(name: str, size: int) -> Callable[[LayerSpec], Shape]:
    """Shape of a tensor that the rows of each width share: as many rows as widths in use."""

    def shape(spec: LayerSpec) -> Shape:
        codes = (spec.code_of(width) for width in spec.counts)
        return (sum(code is not None and name in code.shares for code in codes), size)

    return shape


def _factor(side: Literal["rows", "cols"]) -> Callable[[LayerSpec], Shape]:
    """Shape of an adapter's factor, [rank, side], two numbers of 4 bits to a byte."""

    def shape(spec: LayerSpec) -> Shape:
        n = getattr(spec, side)
        return (spec.rank, n if spec.adapter_bits == 16 else -(-n // 2))

    return shape


def _factor_scale(side: Literal["rows", "cols"]) -> Callable[[LayerSpec], Shape]:
    def shape(spec: LayerSpec) -> Shape:
        rank = spec.rank if spec.adapter_bits == 4 else 0
        return (rank, -(-getattr(spec, side) // ADAPTER_GROUP))

    return shape


def _zeros(padding: Tensor) -> str | None:
    """The bits behind what a row holds must be zero."""
    return "padding bits are not zero" if padding.any() else None


def _nibbles(side: Literal["rows", "cols"]) -> Callable[[Tensor, LayerSpec, int], str | None]:
    def check(packed: Tensor, spec: LayerSpec, width: int) -> str | None:
        used = 4 * getattr(spec, side)
        return None if spec.adapter_bits == 16 else _zeros(STREAM.padding(packed, 1, used))

    return check


def _positions(packed: Tensor, spec: LayerSpec, width: int) -> str | None:
    """Of a bitmap every row keeps as many columns as config.json says."""
    if wrong := _zeros(STREAM.padding(packed, 1, spec.position_bits)):
        return wrong
    if spec.sparsity == "bitmap":
        found = ONES.to(packed.device)[packed.int()].sum(1)
        if (found != spec.kept).any():
            got = int(found[found != spec.kept][0])
            return f"every row must keep {spec.kept} columns, got {got}"
    return None


def _patterns(packed: Tensor, spec: LayerSpec, width: int) -> str | None:
    """2:4 has six patterns: of three bits, 6 and 7 are none."""
    if spec.sparsity != "2:4":
        return None
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    bits = bits.flatten(1)[:, : spec.position_bits].unflatten(1, (-1, 3))
    return "holds a pattern above 5" if (bits[..., 1] & bits[..., 2]).any() else None


def wrong_widths(counts: Mapping[int, int], spec: LayerSpec) -> str | None:
    """What is wrong with rows of these widths in such a layer."""
    allowed = sorted(width for code in ROW_CODES if code.used(spec) for width in code.widths)
    if bad := [width for width in counts if width not in allowed]:
        lows = [width for width in allowed if width - 1 not in allowed]
        highs = [width for width in allowed if width + 1 not in allowed]
        known = " or ".join(f"{low}..{high}" for low, high in zip(lows, highs, strict=True))
        return f"row widths must be {known}, got {bad[0]}"
    return None


def _widths(widths: Tensor, spec: LayerSpec, width: int) -> str | None:
    found = histogram(widths)
    if wrong := wrong_widths(found, spec):
        return wrong
    if found != spec.counts:
        return f"rows by width {found} are not config.json's {dict(spec.counts)}"
    return None


# In this order they are written to files, handed to native code and registered as buffers.
TENSORS = (
    StoredTensor(
        "weight",
        torch.uint8,
        lambda s: (
            sum(n * s.packing(w).row_bytes(code_bits(w), s.codes) for w, n in s.counts.items()),
        ),
        "stored",
        "[sum of bytes over rows]",
        "packed codes",
        strict=lambda packed, s, width: _zeros(
            s.packing(width).padding(packed, code_bits(width), s.codes)
        ),
    ),
    StoredTensor(
        "widths",
        torch.uint8,
        lambda s: (s.rows,),
        "model",
        "[r]",
        "width of every row",
        check=_widths,
    ),
    StoredTensor(
        "codebook",
        torch.int8,
        _added("codebook"),
        "stored",
        "[sum of 2^b over table rows]",
        "levels of every table row",
    ),
    StoredTensor(
        "row_scale",
        torch.bfloat16,
        lambda s: (s.rows,) if s.group is None else (s.rows, s.groups),
        "stored",
        '[r], with "group" [r, ceil(c/g)]',
        "a scale per row, or per g columns of a row",
    ),
    StoredTensor(
        "row_zero",
        torch.int16,
        _added("row_zero"),
        "stored",
        "[affine rows]",
        "zero point of every affine row",
    ),
    StoredTensor(
        "trellis",
        torch.int8,
        _shared("trellis", WINDOWS),
        None,
        f"[t, {WINDOWS}]",
        "levels of each of the t trellis widths in use, ascending",
    ),
    StoredTensor(
        "in_scale",
        torch.float16,
        lambda s: (s.cols if s.in_scale else 0,),
        None,
        "[c]",
        "a factor per column",
        "in_scale",
    ),
    StoredTensor(
        "positions",
        torch.uint8,
        lambda s: (s.rows * -(-s.position_bits // 8),),
        "stored",
        "[r * p]",
        "p bytes per row: which columns have a code",
        "sparsity",
        check=_positions,
        strict=_patterns,
    ),
    StoredTensor(
        "lora_a",
        {4: torch.uint8, 16: torch.bfloat16},
        _factor("cols"),
        None,
        "[k, ceil(c/2)], at 16 bits [k, c]",
        "A",
        "rank",
        strict=_nibbles("cols"),
    ),
    StoredTensor(
        "lora_b",
        {4: torch.uint8, 16: torch.bfloat16},
        _factor("rows"),
        None,
        "[k, ceil(r/2)], at 16 bits [k, r]",
        "B",
        "rank",
        strict=_nibbles("rows"),
    ),
    StoredTensor(
        "lora_a_scale",
        torch.bfloat16,
        _factor_scale("cols"),
        None,
        "[k, ceil(c/128)]",
        "scales of A at 4 bits",
        "rank",
    ),
    StoredTensor(
        "lora_b_scale",
        torch.bfloat16,
        _factor_scale("rows"),
        None,
        "[k, ceil(r/128)]",
        "scales of B at 4 bits",
        "rank",
    ),
)
NAMES = tuple(tensor.name for tensor in TENSORS)


@dataclass(frozen=True, eq=False)
class Layer:
    """One compressed linear layer as it is stored: what `pack` makes and kernels multiply by."""

    spec: LayerSpec
    tensors: Mapping[str, Tensor]  # by their names in TENSORS, those that the layer has

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def without_adapter(self) -> Layer:
        """The same but for the adapter."""
        spec = self.spec.without_adapter()
        names = layout(spec)
        return Layer(spec, {name: t for name, t in self.tensors.items() if name in names})


def layout(spec: LayerSpec) -> Specs:
    """Dtype and shape of every stored tensor of a layer; one without elements is not stored."""
    found = ((t.name, t.dtype_in(spec), t.shape(spec)) for t in TENSORS)
    return {name: (dtype, shape) for name, dtype, shape in found if math.prod(shape)}


def row_bits(spec: LayerSpec, width: int) -> int:
    """Every stored bit of one row of this width."""
    row = replace(spec, rows=1, counts={width: 1})
    return sum(tensor.bits(row) for tensor in TENSORS if tensor.order)


def shared_bits(spec: LayerSpec) -> int:
    """Every stored bit of a layer that `row_bits` leaves out.

    Input scale, adapter, and what the rows of each width in `spec.counts` share.
    """
    return sum(tensor.bits(spec) for tensor in TENSORS if not tensor.order)


def stored_groups(layer: Layer) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """Yield (width, indices [n] of its rows in the model, views [n, k] of their stored tensors).

    k is 0 for what these rows do not have. What they share is the same in every row.
    """
    spec, widths, flat = layer.spec, layer.tensors["widths"], {}
    shared: Counter[str] = Counter()  # rows of each shared tensor that are already taken
    stored = [tensor for tensor in TENSORS if tensor.order == "stored"]
    for tensor in stored:
        there = layer.tensors.get(tensor.name)
        absent = widths.new_empty(0, dtype=tensor.dtype_in(spec)) if there is None else there
        flat[tensor.name] = absent.view(-1)
    order, first = widths.argsort(stable=True), 0
    at = dict.fromkeys(flat, 0)
    for width, n in spec.counts.items():
        rows = replace(spec, rows=n, counts={width: n})
        views = {}
        for tensor in stored:
            begin, size = at[tensor.name], math.prod(tensor.shape(rows))
            views[tensor.name] = flat[tensor.name][begin : begin + size].view(n, size // n)
            at[tensor.name] += size
        code = spec.code_of(width)
        for name in code.shares if code else ():
            views[name] = layer.tensors[name][shared[name]].expand(n, -1)
            shared[name] += 1
        yield width, order[first : first + n], views
        first += n
