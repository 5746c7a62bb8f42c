"""The tables of FORMAT.md, from the declaration in layer.py."""

from __future__ import annotations

import re

import torch

from skimlm.format.layer import TENSORS
from skimlm.format.row_codes import ROW_CODES, code_bits

SHORT = {  # names of dtypes in safetensors
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
ORDERS = {"stored": "; stored order", "model": "; the model's order", None: ""}


def tensors() -> str:
    """Every tensor of a layer."""
    lines = ["| tensor | dtype | shape | content |", "|---|---|---|---|"]
    for tensor in TENSORS:
        kinds = tensor.dtype if not isinstance(tensor.dtype, torch.dtype) else {0: tensor.dtype}
        dtype = ", ".join(SHORT[kind] for kind in kinds.values())
        content = tensor.content + ORDERS[tensor.order]
        content += f'; only with "{tensor.key}"' if tensor.key else ""
        lines.append(f"| `NAME.{tensor.name}` | {dtype} | {tensor.shape_text} | {content} |")
    lines.append("| `NAME.bias` | the model's | [r] | untouched, if the layer has one |")
    return "\n".join(lines)


def row_codes() -> str:
    """Every way of coding a row."""
    lines = ["| code of a row | width | b | bytes | level[i, j] | used |", "|---" * 6 + "|"]
    for code in ROW_CODES:
        ends = (code.widths[0], code.widths[-1])
        widths, bits = ("..".join(map(str, pair)) for pair in (ends, map(code_bits, ends)))
        cells = (code.name, widths, bits, f"`{code.packing.bytes_text}`", f"`{code.formula}`")
        lines.append(f"| {' | '.join(cells)} | {code.used_text} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """FORMAT.md with its tables made again."""
    for name, table in (("tensors", tensors()), ("row codes", row_codes())):
        pattern = rf"(<!-- {name}: generated .*?-->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)  # type: ignore[misc]
        assert found == 1, name
    return text
