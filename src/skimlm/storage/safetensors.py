"""A folder of safetensors as bytes: headers checked going in, all or nothing going out.

Nothing here knows models. Headers are parsed by hand, for a truncated file should be reported with
the tensor it cuts; `file_bytes` says how large a file will be before it is written.
"""

from __future__ import annotations

import glob
import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skimlm.errors import FormatError, SkimError, first_line

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8}
BITS |= {"U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}
# the order of data in a file, and the names of a header
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}


def tensor_files(path: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Map every tensor of a folder to its file and header entry, all files checked for length."""
    index, single = path / INDEX, path / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FormatError("has no weight_map", file=index)
    elif single.is_file():
        return {name: (single, entry) for name, entry in read_header(single).items()}
    else:
        pickled = next(path.glob("*.bin"), None) or next(path.glob("*.pt*"), None)
        if pickled:
            raise SkimError(f"{pickled}: pickled weights are never opened, convert to safetensors")
        raise SkimError(f"{path}: no model.safetensors or {INDEX}")
    headers: dict[str, dict[str, Any]] = {}
    tensors = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise FormatError(f"shard {shard!r} is not a plain file name", file=index, tensor=name)
        if not (path / shard).is_file():
            raise FormatError("shard is missing", file=path / shard, tensor=name)
        if shard not in headers:
            headers[shard] = read_header(path / shard)
        if name not in headers[shard]:
            raise FormatError("is not in the shard the index names", file=path / shard, tensor=name)
        tensors[name] = (path / shard, headers[shard][name])
    return tensors


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Read a header: {tensor: {dtype, shape, data_offsets}}, every tensor inside the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise FormatError("truncated or not safetensors: the header does not fit", file=file)
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [(name, *entry["data_offsets"]) for name, entry in header.items()]
        for name, begin, end in sorted(entries, key=lambda entry: entry[1:]):
            if 8 + length + end > size:
                raise FormatError(
                    f"truncated: ends at byte {8 + length + end}, the file at {size}",
                    file=file,
                    tensor=name,
                )
            entry = header[name]
            count = 1
            for n in entry["shape"]:
                count *= n
            if entry["dtype"] in BITS and count * BITS[entry["dtype"]] // 8 != end - begin:
                raise FormatError("byte range does not fit the shape", file=file, tensor=name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError("truncated or not safetensors: bad header", file=file) from error
    return header


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SkimError(f"{file}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise FormatError(f"not valid JSON: {first_line(error)}", file=file) from error
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", file=file)
    return value


def check_finite(files: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> None:
    """Read every tensor of floats once, one at a time, and refuse NaN and Inf.

    A single number may be infinite: a bound that does not bind (gemma4's audio tower has such).
    """
    floats: dict[Path, list[str]] = {}
    for name, (file, entry) in files.items():
        if entry["dtype"].startswith(("F", "BF")):
            floats.setdefault(file, []).append(name)
    for file, names in floats.items():
        try:
            with safe_open(file, framework="pt") as shard:
                for name in names:
                    tensor = shard.get_tensor(name)
                    unbound = tensor.numel() == 1 and not tensor.isnan()
                    if not (finite(tensor) or unbound):
                        raise FormatError("holds NaN or Inf", file=file, tensor=name)
        except SafetensorError as error:
            raise FormatError(first_line(error), file=file) from error


def finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # float8 has no aminmax
        tensor = tensor.float()
    least, most = (
        tensor.aminmax()
    )  # both are NaN if any element is; no temporary as large as the tensor
    return bool(least.isfinite() and most.isfinite())


def split_shards(
    tensors: Mapping[str, Tensor], max_shard_size: int | str
) -> dict[str, dict[str, Tensor]]:
    """Divide tensors over files: {file name: {tensor name: tensor}}."""
    plan = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    return {
        file: {name: tensors[name] for name in names}
        for file, names in plan.filename_to_tensors.items()
    }


def index_text(shards: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The index of a sharded folder, None where one file holds everything."""
    if len(shards) == 1:
        return None
    where = {name: file for file, part in shards.items() for name in part}
    total = sum(tensor.nbytes for part in shards.values() for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return json.dumps(index, indent=2) + "\n"


def write_shards(
    folder: Path,
    shards: Mapping[str, Mapping[str, Tensor]],
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write shards and index. What is on the meta device is had by `read` when its turn comes."""
    for file, part in shards.items():
        _write_one(folder / file, part, read)
    if text := index_text(shards):
        (folder / INDEX).write_text(text, encoding="utf-8")


def _write_one(
    file: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor] | None
) -> None:
    """One file, as safetensors' own `save_file` makes it, a tensor in memory at a time."""
    header, order = _header(tensors)
    with file.open("wb") as stream:
        stream.write(header)
        for name in order:
            tensor = tensors[name].detach()
            if tensor.is_meta and read is not None:
                tensor = read(name)
                if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
                    raise FormatError("is not what was planned", file=file, tensor=name)
            stream.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def write_file(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file, whole or not at all; SkimError naming it if that fails.

    What a killed process left of the same file is removed.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob(f".{glob.escape(file.name)}.*-*.part"):
            owner = left.name.removeprefix(f".{file.name}.").partition("-")[0]
            if owner.isdigit() and not psutil.pid_exists(int(owner)):
                left.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode  # what files get here: `save_file` makes them private
        save_file(tensors, part, metadata)
        part.chmod(mode)
        part.replace(file)
    except (OSError, SafetensorError) as error:
        raise SkimError(f"{file}: could not be written: {first_line(error)}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of the file that holds these tensors: they may be on the meta device."""
    return len(_header(tensors)[0]) + sum(tensor.nbytes for tensor in tensors.values())


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """The first bytes of the file that holds these tensors, and the order in which they follow."""
    order = list(DTYPES.values())
    kinds = {name: DTYPES[tensor.dtype] for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (order.index(kinds[name]), name))
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names
