"""The native libraries: which one runs, and checked calls into it.

Three builds of the same C++ sources (`kernels.h` is the interface) differ only in instruction set;
the best one the processor has is loaded, or the one `SKIMLM_ISA=avx512|avx2|portable` names. Where
none can be, `missing()` says why, once on stderr, and callers take their torch references.
Every call checks type, layout and device first, so a wrong tensor is a Python error, never a crash.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from skimlm.errors import SkimError
from skimlm.format.layer import Layer
from skimlm.native.structs import POINTER, SIZE, STRUCTS, BodyStruct, layer_struct, with_order

ISAS = ("portable", "avx2", "avx512")
ABI = 7  # of kernels.h; raised whenever a function or a struct there changes
FOLDER = Path(__file__).parent  # where the libraries are
SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}  # elsewhere .so: as CMake names shared libraries
REINSTALL = "reinstall skimlm with `pip install --force-reinstall .`"


def file(isa: str, platform: str = sys.platform) -> Path:
    """Where the library for an instruction set is, or should be."""
    return FOLDER / f"_native_{isa}{SUFFIXES.get(platform, '.so')}"


def _open(isa: str) -> ctypes.CDLL:
    """Load a library; ImportError, in one line, if there is none that this code was written for."""
    path = file(isa)
    if not path.exists():
        raise ImportError(f"{path} is missing: {REINSTALL}")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"{path} cannot be loaded ({error}): {REINSTALL}") from error
    _check_abi(loaded, path)
    loaded.skimlm_use_openmp(*_openmp())
    return loaded


def _check_abi(loaded: Any, path: Path) -> None:
    """Raise ImportError unless interface and structs of a library are those of this code."""
    expected = {"interface": ABI} | {name: ctypes.sizeof(kind) for name, kind in STRUCTS.items()}
    try:
        function = loaded.skimlm_abi
    except AttributeError:
        raise ImportError(f"{path} states no interface, {ABI} is expected: {REINSTALL}") from None
    function.restype, function.argtypes = SIZE, [SIZE]
    for index, (name, size) in enumerate(expected.items()):
        if (found := function(index)) != size:
            unit = "" if name == "interface" else " bytes"
            raise ImportError(
                f"{path} has {name} {found}{unit}, {size}{unit} is expected: {REINSTALL}"
            )


@functools.cache
def _openmp() -> tuple[ctypes.c_void_p | None, ctypes.c_void_p | None]:
    """GOMP_parallel and omp_get_num_threads of torch's OpenMP, if it has GNU's calls.

    Two sets of threads on the same cores hinder each other: attention between two of our products
    took 150 us instead of 20, and vLLM, which preloads Intel's, did 12 tokens/s instead of 90.
    """
    try:
        openmp = ctypes.CDLL(None)  # what all libraries find first, torch's too
        if not hasattr(openmp, "GOMP_parallel"):
            maps = Path("/proc/self/maps").read_text().splitlines()
            loaded = {line.split(maxsplit=5)[5] for line in maps if "/libgomp" in line}
            # others bring their own
            openmp = ctypes.CDLL(min(loaded, key=lambda name: "/torch" not in name))
        fork, size = openmp.GOMP_parallel, openmp.omp_get_num_threads
        return ctypes.cast(fork, ctypes.c_void_p), ctypes.cast(size, ctypes.c_void_p)
    except (OSError, ValueError, AttributeError, TypeError):  # the last where there is no None
        return None, None


@functools.cache
def isa() -> str:
    """Name of the instruction set whose library runs; ImportError where there is none.

    Raises SkimError if `SKIMLM_ISA` names one that cannot run here.
    """
    asked = os.environ.get("SKIMLM_ISA")
    try:
        have = ISAS[: _open("portable").skimlm_best_isa() + 1]
    except ImportError as error:
        if asked:
            raise SkimError(f"SKIMLM_ISA={asked} cannot run: {error}") from error
        raise
    if asked and asked not in have:
        raise SkimError(f"SKIMLM_ISA={asked} is not one of {', '.join(have)} here")
    return asked or have[-1]


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; ImportError where there is none."""
    try:
        return _open(isa())
    except ImportError as error:
        if asked := os.environ.get("SKIMLM_ISA"):
            raise SkimError(f"SKIMLM_ISA={asked} cannot run: {error}") from error
        raise


@functools.cache
def missing() -> str | None:
    """Why no library runs here, None if one does; the first call tells the user."""
    try:
        library()
    except ImportError as error:
        warnings.warn(f"{error}; until then everything runs in torch, slowly", stacklevel=2)
        return str(error)
    return None


def path() -> str:
    """The instruction set of `library`, and whether it has the routines for VBMI."""
    return isa() + (" vbmi" if library().skimlm_has_vbmi() else "")


def many(dtype: torch.dtype) -> bool:
    """Whether products of many tokens are native: not where torch has AMX units for them."""
    amx = torch.cpu._is_amx_tile_supported() and dtype == torch.bfloat16
    return bool(library().skimlm_has_vbmi()) and not amx


def _done(name: str, status: int) -> bool:
    """Whether a call did its work, False if sizes did not fit each other (guard.h); else raise."""
    if status < 2:
        return status == 0
    if status == 2:
        raise MemoryError(f"out of memory in native code ({name})")
    raise RuntimeError(f"native code failed ({name}, status {status})")


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
    if not _done(name, function(*values, ctypes.c_int(torch.get_num_threads()))):
        raise ValueError(f"{name}: sizes do not fit each other")


@functools.cache
def _function(loaded: ctypes.CDLL, name: str, arguments: tuple[Any, ...]) -> Callable[..., int]:
    function = getattr(loaded, name)
    function.argtypes = [*arguments, ctypes.c_int]
    return function


_MATMUL = (ctypes.c_char_p, SIZE, POINTER, SIZE, POINTER, SIZE, SIZE)
_EACH = (ctypes.c_char_p, SIZE, POINTER, SIZE, SIZE, POINTER)
_UNPACK = (ctypes.c_char_p, POINTER, SIZE, SIZE, SIZE, SIZE)
_ROWS = (ctypes.c_char_p, POINTER, SIZE, POINTER, SIZE)
_DECODE = (POINTER, POINTER, POINTER, POINTER, SIZE, POINTER, SIZE, POINTER)


def layer_matmul(
    x: torch.Tensor,
    layers: Sequence[Layer],
    biases: Sequence[torch.Tensor | None],
    out: torch.Tensor,
    exact: int,
) -> bool:
    """`skimlm_layer_matmul`, called hundreds of times per token: False if tensors do not fit.

    `x` [..., cols] and `out` [..., rows of all] are contiguous, on the CPU, float32 or bfloat16
    alike; biases are float32.
    """
    fields = [layer_struct(layer, bias) for layer, bias in zip(layers, biases, strict=True)]
    if None in fields:
        return False
    status = _function(library(), "skimlm_layer_matmul", _MATMUL)(
        b"".join(fields),  # type: ignore[arg-type]
        len(layers),
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        out.data_ptr(),
        x.numel() // layers[0].spec.cols,
        exact,
        torch.get_num_threads(),
    )
    return status == 0 or _done("layer_matmul", status)


def layers_matmul(x: torch.Tensor, layers: Sequence[Layer], out: torch.Tensor) -> bool:
    """`skimlm_layers_matmul`: False if tensors do not fit.

    `x` [layers, cols], or [1, cols] for all of them, and `out` [layers, rows] are contiguous, on
    the CPU, float32 or bfloat16 alike.
    """
    fields = [layer_struct(layer, None) for layer in layers]
    if None in fields:
        return False
    status = _function(library(), "skimlm_layers_matmul", _EACH)(
        b"".join(fields),  # type: ignore[arg-type]
        len(layers),
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        len(x) == 1,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return status == 0 or _done("layers_matmul", status)


def layer_unpack(out: torch.Tensor, layer: Layer, begin: int = 0, end: int | None = None) -> bool:
    """`skimlm_layer_unpack`: False if tensors do not fit.

    All rows to their places in `out` [rows, cols], or stored rows begin..end to its start; `out` is
    contiguous, on the CPU, float32 or bfloat16.
    """
    last = layer.spec.rows if end is None else end
    fields = layer_struct(layer, None)
    if fields is None or out.numel() < (last - begin) * layer.spec.cols:
        return False
    bf16 = out.dtype == torch.bfloat16
    status = _function(library(), "skimlm_layer_unpack", _UNPACK)(
        fields, out.data_ptr(), bf16, begin, last, end is not None, torch.get_num_threads()
    )
    return _done("layer_unpack", status)


def layer_rows(
    out: torch.Tensor,
    layer: Layer,
    places: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
) -> bool:
    """`skimlm_layer_rows`: False if tensors do not fit.

    The stored rows `places` int32 [n], one after the other, into `out` [n, cols]; `order` int32
    [rows] and `counts` int64 are those of a `SkimlmLayer`. All are contiguous and on the CPU, `out`
    is float32 or bfloat16.
    """
    fields = layer_struct(layer, None)
    if fields is None or out.numel() < len(places) * layer.spec.cols:
        return False
    status = _function(library(), "skimlm_layer_rows", _ROWS)(
        with_order(fields, order, counts),
        places.data_ptr(),
        len(places),
        out.data_ptr(),
        out.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return _done("layer_rows", status)


def decode(
    body: BodyStruct,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sequences: Any,
    out: torch.Tensor,
) -> bool:
    """`skimlm_decode`: False if sizes do not fit each other.

    `sequences` is an array of SequenceStructs, one for every token of `x` [n, width].
    """
    status = _function(library(), "skimlm_decode", _DECODE)(
        ctypes.addressof(body),
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[-1],
        ctypes.addressof(sequences),
        len(sequences),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return _done("decode", status)


def require(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has this dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
