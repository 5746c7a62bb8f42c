"""The native libraries: which one runs, and checked calls into it.

Three builds of the same C++ sources (`kernels.h` is the interface) differ only in instruction set;
the best one the processor has is loaded, or the one `SKIMLM_ISA=avx512|avx2|portable` names.
Every call checks type, layout and device first, so a wrong tensor is a Python error, never a crash.
"""

import ctypes
import functools
import os
from pathlib import Path

import torch

ISAS = ("portable", "avx2", "avx512")


def _open(isa: str) -> ctypes.CDLL:
    path = Path(__file__).with_name(f"_native_{isa}.so")
    if not path.exists():
        raise ImportError(f"{path.name} is missing: skimlm is not installed; run `pip install .`")
    return ctypes.CDLL(str(path))


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


def require(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has this dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
