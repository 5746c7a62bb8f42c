"""The declaration of a stored layer, and what is generated from it."""

import ctypes
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from layer_sample import OPTIONS, options, options_id, oracle_window
from skimlm.format import LayerSpec, layout
from skimlm.format.abi import LayerStruct, header
from skimlm.format.document import with_tables
from skimlm.format.layer import OPTIONAL, TENSORS
from skimlm.format.row_codes import ROW_CODES

ROOT = Path(__file__).parents[2]
FORMAT_MD = (ROOT / "FORMAT.md").read_text(encoding="utf-8")
COUNTS = {1: 2, 3: 4, 5: 1, 6: 3, 8: 1}
TRELLIS = {2: 3, 7: 1, 17: 2, 19: 5}


def test_the_header_of_native_code_is_current():
    text = (ROOT / "src/skimlm/native/layer.h").read_text(encoding="utf-8")
    assert text == header(), "run `python -m skimlm.format`"


def test_the_tables_of_format_md_are_current():
    assert with_tables(FORMAT_MD) == FORMAT_MD, "run `python -m skimlm.format`"


def test_the_struct_has_the_fields_of_the_header_in_their_order():
    body = re.search(r"struct SkimlmLayer \{(.*?)\n\};", header(), re.S)[1]
    lines = [line.split("//")[0].strip() for line in body.splitlines()]
    names = [n for line in lines for n in re.findall(r"(\w+)(?=[,;])", line)]
    assert names == [name for name, _ in LayerStruct._fields_]
    assert ctypes.sizeof(LayerStruct) == 8 * len(names)  # pointers and int64 alone


def evaluate(formula: str, **letters: int) -> int:
    """What a formula in FORMAT.md's letters comes to."""
    return eval(formula.replace("^", "**"), {"ceil": lambda x: math.ceil(x), **letters})


def extent(text: str, spec: LayerSpec, letters: dict[str, int]) -> int:
    """One number of a shape in words: `c`, `sum of 2^b over table rows`, `affine rows`."""
    found = re.fullmatch(r"(?:sum of (.*) over )?(\w+ )?rows", text)
    if not found:
        return evaluate(text, **letters)
    code = (found[2] or "").strip()
    widths = [w for w in spec.counts if not code or spec.code_of(w).name == code]
    total = 0
    for w in widths:
        each = (found[1] or "1").replace("bytes", spec.packing(w).bytes_text)
        total += evaluate(each, b=w % 16, **letters) * spec.counts[w]
    return total


PARTS = [(chosen, COUNTS) for chosen in [options(), *OPTIONS]]
PARTS += [(chosen, TRELLIS) for chosen, _ in PARTS if not chosen["group"]]


@pytest.mark.parametrize("chosen, counts", PARTS, ids=lambda part: options_id(part))
def test_shapes_in_words_are_the_shapes(chosen, counts):
    spec = LayerSpec(11, 140, counts, in_scale=True, **chosen)
    places = {None: 0, "2:4": math.ceil(3 * 35 / 8), "bitmap": math.ceil(140 / 8)}[spec.sparsity]
    letters = dict(r=11, c=140, n=spec.kept or 140, p=places, g=spec.group, k=spec.rank)
    letters["t"] = sum(width > 16 for width in counts)
    shapes = layout(spec)
    for tensor in TENSORS:
        if tensor.name not in shapes:
            continue
        words = re.findall(r"\[(.*?)\](?= |,|$)", tensor.shape_text)
        second = spec.group if tensor.name == "row_scale" else spec.adapter_bits == 16
        text = words[1 if second and len(words) > 1 else 0]
        want = tuple(extent(part, spec, letters) for part in text.split(", "))
        assert shapes[tensor.name][1] == want, tensor.name


def test_a_tensor_is_there_only_with_the_key_that_is_named():
    for tensor in TENSORS:
        for chosen in OPTIONS:
            spec = LayerSpec(11, 140, COUNTS, in_scale=False, **chosen)
            if tensor.key and not getattr(spec, tensor.key):
                assert tensor.name not in layout(spec)


@pytest.mark.parametrize("code", ROW_CODES, ids=lambda code: code.name)
def test_levels_are_what_the_formula_says(code):
    rng = np.random.default_rng(0)
    for b in (width % 16 for width in code.widths):
        codes = rng.integers(0, 2**b, (3, 7))
        stored = {n: rng.integers(-99, 99, (3, size(b))) for n, size in code.adds.items()}
        stored |= {
            n: rng.integers(-99, 99, (1, size)).repeat(3, 0) for n, size in code.shares.items()
        }
        tensors = {n: torch.from_numpy(v).to(torch.int16) for n, v in stored.items()}
        levels = code.levels(torch.from_numpy(codes).to(torch.uint8), b, tensors)
        names = {n: v if f"{n}[i][" in code.formula else v[:, 0] for n, v in stored.items()}
        names |= {n: {b: stored[n][0]} for n in code.shares}
        places = [[oracle_window(row, b, j) for j in range(7)] for row in codes.tolist()]
        names["window"] = np.array(places)
        for i in range(3):
            for j in range(7):
                want = eval(code.formula.replace("^", "**"), dict(names, code=codes, i=i, j=j, b=b))
                assert float(levels[i, j]) == want


def test_every_width_has_one_code_whatever_a_layer_has():
    for chosen in [options(), *OPTIONS]:
        spec = LayerSpec(11, 140, COUNTS, **chosen)
        for width in (*range(1, 9), *(() if spec.group else range(17, 21))):
            fitting = [code for code in ROW_CODES if width in code.widths and code.used(spec)]
            assert fitting == [spec.code_of(width)]


def test_format_md_names_every_key_of_an_entry():
    keys = ("widths", "in_scale", *OPTIONAL)
    assert all(f'"{key}"' in FORMAT_MD for key in keys)


def test_a_spec_is_a_value():
    spec = LayerSpec(3, 4, {3: 1, 2: 2})
    same = LayerSpec(3, 4, {2: 2, 3: 1})
    assert spec == same and hash(spec) == hash(same) and list(spec.counts) == [2, 3]
    assert spec != LayerSpec(3, 4, {2: 1, 3: 2})
    assert spec.facts() == {
        **dict(rows=3, cols=4, widths={"2": 2, "3": 1}, in_scale=False, sparsity=None),
        **dict(kept=0, group=None, rank=0, adapter_bits=0),
    }
