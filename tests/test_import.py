"""`import skimlm` is light, and transformers reads compressed folders whichever comes first."""

import subprocess
import sys

import pytest
import torch

import skimlm
from conftest import quantized_linears, tiny_model
from skimlm.models.write import save

LOAD = """
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
# what our integration needs of transformers, and what is most often imported first
FIRST = [
    "transformers.quantizers.auto",
    "transformers.modeling_utils",
    "skimlm.runtime.experts",
    "skimlm.integrations.transformers",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed") / "small"
    model = tiny_model(dtype=torch.bfloat16)
    save(out, model, None, quantized_linears(model), embed_bits=8, bits=3.2)
    return str(out)


def python(code: str) -> str:
    """What a fresh Python prints; a warning there is an error."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_skimlm_loads_neither_torch_nor_transformers():
    code = "import sys, skimlm; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert python(code) == "[]"
    assert python(code.replace("; print", "; dir(skimlm), skimlm.SkimError; print")) == "[]"


@pytest.mark.parametrize("order", ["skimlm, transformers", "transformers, skimlm"])
def test_a_compressed_folder_loads_in_either_order_of_imports(order, folder):
    assert python(f"import {order}" + LOAD.format(folder=folder)) == "CompressedLinear"


def test_a_compressed_folder_loads_where_transformers_was_used_before(folder):
    code = "import transformers; transformers.AutoModelForCausalLM; import skimlm"
    assert python(code + LOAD.format(folder=folder)) == "CompressedLinear"


def test_without_skimlm_transformers_refuses_the_folder(folder):
    done = subprocess.run(
        [sys.executable, "-c", "import transformers" + LOAD.format(folder=folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode and "CompressedLinear" not in done.stdout


def test_any_module_may_be_imported_first(folder):
    """Each in a fork of one process that has torch: nothing may meet a half-imported module."""
    code = f"""
import os, sys, torch, skimlm
from importlib import import_module
for name in {FIRST!r}:
    if not (child := os.fork()):
        import_module(name)
        import transformers
        {LOAD.strip().format(folder=folder).replace(chr(10), chr(10) + "        ")}
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(name)
"""
    assert python(code) == "\n".join(["CompressedLinear"] * len(FIRST))


def test_transformers_stays_usable_where_skimlm_cannot_enter_its_method():
    code = """
import sys, warnings, skimlm
sys.modules["skimlm.integrations.transformers"] = None  # its import fails
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from transformers import LlamaConfig, LlamaForCausalLM
print([str(w.message) for w in told if "skimlm" in str(w.message)])
"""
    (line,) = eval(python(code))
    assert line.startswith("transformers cannot read folders that skimlm compressed: ")


def test_every_name_of_the_api_is_given_and_a_wrong_one_is_an_attribute_error():
    for name in skimlm.__all__:
        assert getattr(skimlm, name) is not None and name in dir(skimlm)
    with pytest.raises(AttributeError, match="'skimlm' has no attribute 'compres'"):
        skimlm.compres  # noqa: B018


def test_functions_stay_functions_when_modules_of_a_like_name_are_imported():
    code = """
import skimlm.pipeline.compress, skimlm.pipeline.export, skimlm.pipeline.finetune
import skimlm.api, skimlm.generate, skimlm.evaluate.report
print(all(type(getattr(skimlm, name)).__name__ == "function"
          for name in ("compress", "load", "export", "finetune", "inspect")))
"""
    assert python(code) == "True"
