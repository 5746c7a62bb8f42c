"""The native libraries: which one runs, and checked calls into it.

Three builds of the same C++ sources (`kernels.h` is the interface) differ only in instruction set;
the best one the processor has is loaded, or the one `SKIMLM_ISA=avx512|avx2|portable` names.
Every call checks type, layout and device first, so a wrong tensor is a Python error, never a crash.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ISAS = ("portable", "avx2", "avx512")
# tensors of a linear in the order of `SkimlmSparse` in kernels.h; None: that of the adapter's bits
_SPARSE: dict[str, torch.dtype | None] = {
    "weight": torch.uint8,
    "widths": torch.uint8,
    "codebook": torch.int8,
    "row_scale": torch.bfloat16,
    "row_zero": torch.int16,
    "in_scale": torch.float16,
    "positions": torch.uint8,
    "lora_a": None,
    "lora_b": None,
    "lora_a_scale": torch.bfloat16,
    "lora_b_scale": torch.bfloat16,
    "bias": torch.float32,
}
_SIZED = [name for name in _SPARSE if name not in ("widths", "in_scale", "bias")]
_SPARSITY = {None: 0, "2:4": 1, "bitmap": 2}


def _open(isa: str) -> ctypes.CDLL:
    path = Path(__file__).with_name(f"_native_{isa}.so")
    if not path.exists():
        raise ImportError(f"{path.name} is missing: skimlm is not installed; run `pip install .`")
    loaded = ctypes.CDLL(str(path))
    loaded.skimlm_use_openmp(*_openmp())
    return loaded


@functools.cache
def _openmp() -> tuple[ctypes.c_void_p | None, ctypes.c_void_p | None]:
    """GOMP_parallel and omp_get_num_threads of the OpenMP that torch runs on, if it is GNU's.

    Two sets of threads on the same cores hinder each other: attention between two of our products
    took 150 us instead of 20.
    """
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
        loaded = {line.split(maxsplit=5)[5] for line in maps if "/libgomp" in line}
        file = min(loaded, key=lambda name: "/torch" not in name)  # others bring their own
        openmp = ctypes.CDLL(file)
        fork, size = openmp.GOMP_parallel, openmp.omp_get_num_threads
        return ctypes.cast(fork, ctypes.c_void_p), ctypes.cast(size, ctypes.c_void_p)
    except (OSError, ValueError, AttributeError):
        return None, None


@functools.cache
def isa() -> str:
    """Name of the instruction set whose library runs."""
    have = _open("portable").skimlm_best_isa()
    want = os.environ.get("SKIMLM_ISA") or ISAS[have]
    if want not in ISAS[: have + 1]:
        raise ValueError(f"SKIMLM_ISA={want} is not one of {', '.join(ISAS[: have + 1])} here")
    return want


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library."""
    return _open(isa())


def path() -> str:
    """The instruction set of `library`, and whether it has the routines for VBMI."""
    return isa() + (" vbmi" if library().skimlm_has_vbmi() else "")


def many(dtype: torch.dtype) -> bool:
    """Whether products of many tokens are native: not where torch has AMX units for them."""
    amx = torch.cpu._is_amx_tile_supported() and dtype == torch.bfloat16
    return bool(library().skimlm_has_vbmi()) and not amx


def call(name: str, *args: torch.Tensor | int | float | None) -> None:
    """Call `skimlm_<name>` with tensors as pointers, ints as int64, floats as double.

    The number of threads, torch's own count, is appended. Shapes are the caller's to check.
    """
    values: list[object] = []
    for position, arg in enumerate(args):
        if arg is None:
            values.append(ctypes.c_void_p(None))
        elif isinstance(arg, torch.Tensor):
            if arg.device.type != "cpu" or not arg.is_contiguous():
                raise ValueError(
                    f"{name}: argument {position} must be a contiguous tensor on the CPU, got "
                    f"shape {tuple(arg.shape)}, strides {arg.stride()}, on {arg.device}"
                )
            values.append(ctypes.c_void_p(arg.data_ptr()))
        elif isinstance(arg, int):
            values.append(ctypes.c_int64(arg))
        else:
            values.append(ctypes.c_double(arg))
    function = getattr(library(), f"skimlm_{name}")
    function.restype = None
    function(*values, ctypes.c_int(torch.get_num_threads()))


@functools.cache
def _matmul(loaded: ctypes.CDLL) -> Callable[..., int]:
    function = loaded.skimlm_matmul
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, size, pointer, size, pointer, pointer, size, pointer, pointer]
    function.argtypes += [size, pointer, pointer, pointer, *([size] * 4), ctypes.c_int]
    return function


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    widths: torch.Tensor,
    codebook: torch.Tensor | None,
    row_scale: torch.Tensor,
    row_zero: torch.Tensor | None,
    in_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    count: int,
    rows: int,
    cols: int,
    exact: bool,
) -> bool:
    """`skimlm_matmul`, called hundreds of times per token: False if the buffers do not fit.

    Sizes are checked in native code, where it costs microseconds less; types and layout here.
    """
    stored = (
        (weight, torch.uint8, None),
        (widths, torch.uint8, rows),
        (codebook, torch.int8, None),
        (row_scale, torch.bfloat16, rows),
        (row_zero, torch.int16, None),
        (in_scale, torch.float16, cols),
        (bias, torch.float32, rows),
    )
    if weight is None or widths is None or row_scale is None:
        return False
    at: list[int | None] = []
    for tensor, dtype, length in stored:
        if tensor is None:
            at.append(None)
            continue
        fits = tensor.dtype == dtype and tensor.dim() == 1 and tensor.is_contiguous()
        if not fits or not tensor.is_cpu or (length is not None and len(tensor) != length):
            return False
        at.append(tensor.data_ptr())
    status = _matmul(library())(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        at[0],
        weight.numel(),
        at[1],
        at[2],
        0 if codebook is None else codebook.numel(),
        at[3],
        at[4],
        0 if row_zero is None else row_zero.numel(),
        at[5],
        at[6],
        out.data_ptr(),
        count,
        rows,
        cols,
        exact,
        torch.get_num_threads(),
    )
    return status == 0


class Sparse(ctypes.Structure):
    """`SkimlmSparse` of kernels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _SPARSE),
        *((f"{name}_size", ctypes.c_int64) for name in _SIZED),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "sparsity", "kept", "group")),
        *((name, ctypes.c_int64) for name in ("rank", "adapter_bits")),
        *((name, ctypes.c_void_p) for name in ("order", "counts")),
    ]


def sparse(
    stored: Mapping[str, torch.Tensor | None],
    bias: torch.Tensor | None,
    rows: int,
    cols: int,
    sparsity: str | None,
    kept: int,
    group: int | None,
    rank: int,
    adapter_bits: int,
) -> Sparse | None:
    """Tensors by their names in FORMAT.md as native code sees them; None if they cannot be that.

    Types and layout are checked here, and the lengths that the structure leaves out; the sizes in
    it by native code.
    """
    factor = torch.bfloat16 if adapter_bits == 16 else torch.uint8
    at: list[int | None] = []
    sizes: list[int] = []
    for name, dtype in _SPARSE.items():
        tensor = bias if name == "bias" else stored.get(name)
        if tensor is None:
            if name in ("weight", "widths", "row_scale"):
                return None
            at.append(None)
            if name in _SIZED:
                sizes.append(0)
            continue
        fits = tensor.dtype == (dtype or factor) and tensor.is_contiguous() and tensor.is_cpu
        length = rows if name in ("widths", "bias") else cols if name == "in_scale" else None
        if not fits or (length is not None and tensor.shape != (length,)):
            return None
        at.append(tensor.data_ptr())
        if name in _SIZED:
            sizes.append(tensor.numel())
    how = _SPARSITY.get(sparsity, -1)
    return Sparse(*at, *sizes, rows, cols, how, kept, group or 0, rank, adapter_bits)


@functools.cache
def _sparse_matmul(loaded: ctypes.CDLL) -> Callable[..., int]:
    function = loaded.skimlm_sparse_matmul
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, size, pointer, size, ctypes.c_int]
    return function


def sparse_matmul(
    x: torch.Tensor,
    stored: Mapping[str, torch.Tensor | None],
    bias: torch.Tensor | None,
    out: torch.Tensor,
    count: int,
    rows: int,
    cols: int,
    *how: Any,
) -> bool:
    """`skimlm_sparse_matmul`: False if the tensors do not fit; `how`: the fields of `Parts`.

    `x` [count, cols] and `out` [count, rows] are contiguous, on the CPU, float32 or bfloat16 alike;
    `bias` is float32.
    """
    linear = sparse(stored, bias, rows, cols, *how)
    if linear is None:
        return False
    status = _sparse_matmul(library())(
        ctypes.byref(linear),
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        out.data_ptr(),
        count,
        torch.get_num_threads(),
    )
    return status == 0


def sparse_unpack(
    stored: Mapping[str, torch.Tensor | None],
    out: torch.Tensor,
    rows: int,
    cols: int,
    begin: int,
    end: int | None,
    *how: Any,
) -> bool:
    """`skimlm_sparse_unpack`: False if the tensors do not fit; `how`: the fields of `Parts`.

    All rows to their places in `out` [rows, cols], or stored rows begin..end to its start; `out` is
    contiguous, on the CPU, float32 or bfloat16.
    """
    last, at_start = (rows, False) if end is None else (end, True)
    linear = sparse(stored, None, rows, cols, *how)
    if linear is None or out.numel() < (last - begin) * cols:
        return False
    status = library().skimlm_sparse_unpack(
        ctypes.byref(linear),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(out.dtype == torch.bfloat16),
        ctypes.c_int64(begin),
        ctypes.c_int64(last),
        ctypes.c_int64(at_start),
        ctypes.c_int(torch.get_num_threads()),
    )
    return status == 0


def require(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has this dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
