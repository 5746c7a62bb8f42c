"""What is in a compressed folder, and how results look to people.

`inspect` reads headers and the small tensors only, never the codes, and refuses a folder whose
files do not fit each other: what it prints is what will load. Bits per weight are every stored byte
of the compressed linears times 8 over their weights; all else counts in `bytes`.
"""

import json
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from skimlm import native
from skimlm.errors import SkimError
from skimlm.format.row_codes import TRELLIS, code_bits
from skimlm.integrations.swap import check_files, swap_in
from skimlm.integrations.transformers import SkimlmConfig
from skimlm.models.architecture import skeleton
from skimlm.models.blocks import embeddings
from skimlm.models.checkpoint import open_compressed
from skimlm.runtime.linear import CompressedLinear, Packed
from skimlm.storage.folder import folder_bytes
from skimlm.storage.safetensors import tensor_files


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a compressed folder as plain values, JSON-ready."""
    source = open_compressed(path)
    config = SkimlmConfig(**_as_dict(source.config.quantization_config))
    entries = {n: entry for n, (_, entry) in tensor_files(source.path).items()}
    model = skeleton(source.path / "config.json", source.config)
    swap_in(model, config, torch.bfloat16)
    check_files(model, config, sorted(set(source.files.values())))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear)}
    described = [_describe(n, m) for n, m in layers.items()]
    packed = {n: m for n, m in model.named_modules() if isinstance(m, Packed) and m.owns_layer}
    weights = sum(m.in_features * m.out_features for m in layers.values())
    stored = sum(entry["nbytes"] for entry in described)
    rows: Counter[int] = Counter()
    for module in layers.values():
        rows.update(module.spec.counts)
    return {
        "path": str(path),
        "model_type": source.config.model_type,
        "format_version": config.format_version,
        "bits_per_weight": 8 * stored / max(weights, 1),  # tables alone may be compressed
        "weights": weights,
        "embed_bits": config.embed_bits,
        "bytes": folder_bytes(source.path),
        "bytes_by_part": _parts(source.path, model, stored, entries),
        "widths": {str(b): rows[b] for b in sorted(rows)},
        "linears": described,
        "tables": [_describe(n, m) for n, m in packed.items() if n not in layers],
        "provenance": config.provenance,
    }


def _as_dict(config: Any) -> dict[str, Any]:
    return config if isinstance(config, dict) else config.to_dict()


def _describe(name: str, layer: Packed) -> dict[str, Any]:
    """Return the facts of one compressed linear, or of an embedding or a head that is stored so."""
    spec = layer.spec
    return {
        "name": name,
        "rows": spec.rows,
        "cols": spec.cols,
        "bits_per_weight": 8 * layer.nbytes / (spec.rows * spec.cols),
        "nbytes": layer.nbytes,
        **spec.facts(),
    }


def _parts(
    path: Path, model: Any, linears: int, entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, int]:
    """Divide the folder's bytes: linears, embeddings and head, other tensors, other files."""
    sizes = {n: e["data_offsets"][1] - e["data_offsets"][0] for n, e in entries.items()}
    table, head, _ = embeddings(model)
    names = {table[0]} | ({head[0]} if head else set())
    tables = sum(nbytes for name, nbytes in sizes.items() if name.rpartition(".")[0] in names)
    tensors = sum(sizes.values())
    return {
        "linears": linears,
        "embeddings": tables,
        "other_tensors": tensors - linears - tables,
        "other_files": folder_bytes(path) - tensors,
    }


# ---- for people


def inspect_text(facts: Mapping[str, Any]) -> str:
    """Lay out what `inspect` returns."""
    parts = facts["bytes_by_part"]
    total = sum(facts["widths"].values())
    tables = ", ".join(f"{t['bits_per_weight']:.4f}" for t in facts["tables"])
    shares = (f"{_width(w, ' bit')}: {n:,} ({n / total:.1%})" for w, n in facts["widths"].items())
    lines = [
        f"{facts['path']}: {facts['model_type']}, format {facts['format_version']}",
        f"bits per weight  {facts['bits_per_weight']:.4f}, everything counted,"
        f" over {len(facts['linears'])} linears of {facts['weights']:,} weights",
        f"bytes            {facts['bytes']:,} in all: linears {parts['linears']:,}, embeddings"
        f" ({tables or facts['embed_bits']} bit) {parts['embeddings']:,}, other tensors"
        f" {parts['other_tensors']:,}, headers, config and tokenizer {parts['other_files']:,}",
        f"rows by width    {', '.join(shares)}",
        *(f"{key:<16} {_short(value)}" for key, value in facts["provenance"].items()),
        "",
    ]
    header = ["linear", "shape", "bits", "bytes", "rows by width"]
    rows = [
        [
            layer["name"],
            f"{layer['rows']}x{layer['cols']}",
            f"{layer['bits_per_weight']:.3f}",
            f"{layer['nbytes']:,}",
            " ".join(f"{_width(w)}:{n}" for w, n in layer["widths"].items())
            + (" scaled" if layer["in_scale"] else "")
            + _parts_text(layer),
        ]
        for layer in [*facts["tables"], *facts["linears"]]
    ]
    return "\n".join(lines) + "\n" + table([header, *rows])


def _width(stored: str, unit: str = "") -> str:
    """A width as people read it, `t` before the bits of trellis rows."""
    width = int(stored)
    return f"{'t' if width > TRELLIS else ''}{code_bits(width)}{unit}"


def _parts_text(layer: Mapping[str, Any]) -> str:
    """Sparsity, grid and adapter of a linear, such as ` 2:4 group 128 rank 64 of 4 bit`."""
    text = ""
    if layer["sparsity"]:
        text += f" {layer['sparsity']}"
    if layer["sparsity"] == "bitmap":
        text += f" {layer['kept'] / layer['cols']:.0%}"
    if layer["group"]:
        text += f" group {layer['group']}"
    if layer["rank"]:
        text += f" rank {layer['rank']} of {layer['adapter_bits']} bit"
    return text


def facts_text(facts: Mapping[str, Any]) -> str:
    """Lay out a flat report, one line per fact."""
    lines = []
    for key, value in facts.items():
        if key == "seconds" and isinstance(value, Mapping):
            value = ", ".join(f"{phase} {spent:.1f}" for phase, spent in value.items())
        elif key in ("bits_per_weight", "bits_per_parameter"):
            value = f"{value:.4f}"
        lines.append(f"{key.replace('_', ' '):<18} {_short(value)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | list | dict):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def evaluation_text(facts: Mapping[str, Any]) -> str:
    """Lay out what `eval` measured."""
    lines = []
    if "perplexity" in facts:
        lines = [
            f"perplexity         {with_error(facts['perplexity'], facts['perplexity_stderr'])}",
            f"text               {facts['text']}, {facts['tokens']:,} tokens",
            f"windows            {facts['windows']} of {facts['seq_len']} tokens, not overlapping;"
            f" {facts['predicted_tokens']:,} tokens predicted",
            f"BOS                {facts['bos']}",
            f"tokens per second  {facts['tokens_per_second']:.0f}",
        ]
    for name, task in facts.get("tasks", {}).items():
        score = with_error(task["acc"], task["stderr"])
        lines.append(f"{name:<18} accuracy {score}, {task['n']:,} rows")
    return "\n".join([*lines, f"peak RSS           {facts['peak_rss_bytes'] / 1e6:,.0f} MB"])


def with_error(value: float, stderr: float | None) -> str:
    """Format a value with its standard error."""
    return f"{value:.3f}" + (" (one window)" if stderr is None else f" ± {stderr:.3f}")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of a table whose first row is its header: numbers right, names left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    body = rows[1:] or rows
    right = [all(_numeric(row[i]) for row in body) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip())
    return "\n".join(lines)


def _numeric(cell: str) -> bool:
    return bool(re.fullmatch(r"[\d,.]+( ± [\d.]+)?|-", cell))


def cache_facts(
    place: Path, entries: Sequence[tuple[str, int, float]], freed: int
) -> dict[str, Any]:
    """Describe the analysis cache; an entry is (name, bytes, time of last use)."""
    kept = [
        {"name": name, "bytes": nbytes, "used": time.strftime("%F %H:%M", time.localtime(used))}
        for name, nbytes, used in entries
    ]
    total = sum(nbytes for _, nbytes, _ in entries)
    return {"path": str(place), "bytes": total, "freed_bytes": freed, "entries": kept}


def cache_text(facts: Mapping[str, Any]) -> str:
    """Lay out what `cache_facts` says."""
    rows = [[e["name"], f"{e['bytes']:,}", e["used"]] for e in facts["entries"]]
    total = f"{facts['path']}: {facts['bytes']:,} bytes in {len(rows)} analyses"
    if facts["freed_bytes"]:
        total += f", {facts['freed_bytes']:,} bytes freed"
    return total + ("\n" + table([["analysis", "bytes", "last used"], *rows]) if rows else "")


def environment() -> dict[str, Any]:
    """Return versions, threads and which native code runs on this machine."""
    try:
        why, isa = native.missing(), "none"
        library = why or str(native.file(isa := native.isa()))
    except SkimError as error:  # `info` is what one runs to find out why
        library = str(error)
    import transformers

    import skimlm

    return {
        "skimlm": skimlm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "isa": isa,
        "kernels": "none" if isa == "none" else native.path(),
        "library": library,
    }
