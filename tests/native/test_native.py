"""Which native library is taken, what is refused, and what happens where there is none."""

import _ctypes
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import quantized_linears, tiny_model
from layer_sample import mixed, with_options
from skimlm import native
from skimlm.errors import SkimError
from skimlm.format import pack
from skimlm.format.abi import LayerStruct
from skimlm.models.write import save
from skimlm.native.structs import STRUCTS, layer_struct


class Library:
    """Stands for a loaded library that states `answers`."""

    def __init__(self, *answers):
        def skimlm_abi(what):
            return answers[what]

        self.skimlm_abi = skimlm_abi


RIGHT = [native.ABI, *map(native.ctypes.sizeof, STRUCTS.values())]


@pytest.fixture
def forget():
    """What was found out about libraries is found out again, before and after."""

    def clear():
        for function in (native.isa, native.library, native.missing):
            function.cache_clear()

    clear()
    yield
    clear()


def test_a_library_of_this_interface_is_taken(tmp_path):
    native._check_abi(Library(*RIGHT), tmp_path / "lib.so")


@pytest.mark.parametrize("index", range(4))
def test_a_library_of_another_version_or_with_other_structs_is_refused(tmp_path, index):
    wrong = [answer + (i == index) for i, answer in enumerate(RIGHT)]
    name = ["interface", *STRUCTS][index]
    said = rf"lib\.so has {name} {wrong[index]}\b.*, {RIGHT[index]}\b.* is expected: reinstall"
    with pytest.raises(ImportError, match=said) as caught:
        native._check_abi(Library(*wrong), tmp_path / "lib.so")
    assert "\n" not in str(caught.value)


def test_a_library_that_is_none_of_ours_is_refused_and_told_once(tmp_path, monkeypatch, forget):
    monkeypatch.delenv("SKIMLM_ISA", raising=False)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    shutil.copy(_ctypes.__file__, native.file("portable"))
    with pytest.warns(
        UserWarning, match=f"states no interface, {native.ABI} is expected"
    ) as warned:
        assert native.missing() and native.missing()
    assert len(warned) == 1
    with pytest.raises(ImportError, match="states no interface"):
        native.library()


def test_a_file_that_is_no_library_is_refused(tmp_path, monkeypatch, forget):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.file("portable").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="cannot be loaded"):
        native._open("portable")


def test_an_instruction_set_that_was_asked_for_and_is_missing_is_an_error(
    tmp_path, monkeypatch, forget
):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setenv("SKIMLM_ISA", "portable")
    with pytest.raises(SkimError, match="SKIMLM_ISA=portable cannot run: .*missing"):
        native.missing()
    monkeypatch.undo()
    monkeypatch.setenv("SKIMLM_ISA", "mmx")
    with pytest.raises(SkimError, match="SKIMLM_ISA=mmx is not one of portable"):
        native.missing()


def test_libraries_have_the_names_of_the_platform():
    names = [native.file("avx2", platform).name for platform in ("linux", "darwin", "win32")]
    assert names == ["_native_avx2.so", "_native_avx2.dylib", "_native_avx2.dll"]


def test_the_struct_of_a_layer_says_what_it_has():
    q = quantized_linears(tiny_model())
    layer = pack(with_options(next(iter(q.values())), "2:4", 32, 64, 16, 4))
    fields, spec = LayerStruct.from_buffer_copy(layer_struct(layer, None)), layer.spec
    for name, _ in LayerStruct._fields_:
        tensor = layer.tensors.get(name.removesuffix("_size"))
        if name.endswith("_size"):
            assert getattr(fields, name) == (0 if tensor is None else tensor.numel()), name
        elif tensor is not None:
            assert getattr(fields, name) == tensor.data_ptr(), name
    assert (fields.rows, fields.cols, fields.sparsity) == (spec.rows, spec.cols, 1)
    assert (fields.kept, fields.group, fields.rank, fields.adapter_bits) == (32, 64, 16, 4)
    assert not fields.bias and not fields.in_scale and not fields.order and not fields.counts


def run(code, *args, **environment):
    command = [sys.executable, "-c", code, *map(str, args)]
    changed = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, env=changed)
    assert done.returncode == 0, done.stderr
    return done


OPENMP = """
import ctypes, sys, torch
from skimlm import native
fork = native._openmp()[0].value
for line in open("/proc/self/maps"):
    begin, end = (int(at, 16) for at in line.split()[0].split("-"))
    if begin <= fork < end:
        print(line.split(maxsplit=5)[5])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
def test_work_is_split_by_the_openmp_that_torch_runs_on(tmp_path):
    first = run(OPENMP).stdout.strip()
    assert "gomp" in first
    other = shutil.copy(first, tmp_path / "preloaded.so")  # torch's calls go there
    assert run(OPENMP, LD_PRELOAD=str(other)).stdout.strip() == str(other)


LITTLE_MEMORY = """
import os, resource, sys, torch
from skimlm import native
from skimlm.quantize.kmeans import kmeans_rows, nearest
threads, own = int(sys.argv[1]), sys.argv[2] == "own"
torch.set_num_threads(threads)
if own:
    native.library().skimlm_use_openmp(None, None)
small = torch.randn(40, 50), torch.rand(40, 50)
before = kmeans_rows(*small, 3)[1]
w, f = torch.randn(4, 1 << 22), torch.rand(4, 1 << 22)
pages = int(open("/proc/self/statm").read().split()[0])
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (16 << 20), limit[1]))
for _ in range(3):
    try:
        kmeans_rows(w, f, 2, 64)
        print("done")
    except MemoryError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_AS, limit)
print("same" if torch.equal(kmeans_rows(*small, 3)[1], before) else "other")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pool", ["torch", "own"])
def test_running_out_of_memory_in_any_thread_is_a_memory_error(pool, threads):
    lines = run(LITTLE_MEMORY, threads, pool).stdout.split("\n")
    assert lines == [*["out of memory in native code (kmeans_rows)"] * 3, "same", ""]


def test_other_failures_are_runtime_errors(monkeypatch):
    class Failing:
        def skimlm_read(self, *args):
            return 3

    monkeypatch.setattr(native, "library", Failing)
    with pytest.raises(RuntimeError, match=r"native code failed \(read, status 3\)"):
        native.call("read", torch.zeros(8), 32, torch.zeros(1))


GENERATE = """
import sys, pathlib, torch, json
from skimlm import native
if sys.argv[2] == "hidden":
    native.FOLDER = pathlib.Path(sys.argv[1])
from skimlm.evaluate.report import environment
from skimlm.models.checkpoint import load
from transformers import AutoModelForCausalLM
import skimlm.integrations.transformers
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokens = model.generate(torch.arange(40, 50)[None], max_new_tokens=20, do_sample=False)
facts = environment()
print(json.dumps([tokens.tolist(), facts["kernels"], facts["library"]]))
"""


def test_without_libraries_a_compressed_model_generates_the_same_tokens(tmp_path):
    model = tiny_model()
    save(tmp_path / "m", model, None, mixed(quantized_linears(model)), embed_bits=8, bits=3.2)
    tokens, kernels, _ = json.loads(run(GENERATE, tmp_path / "m", "there").stdout)
    without = run(GENERATE, tmp_path / "m", "hidden")
    got, none, why = json.loads(without.stdout)
    assert got == tokens and kernels != "none"
    assert none == "none" and "is missing: reinstall" in why
    assert len(re.findall("everything runs in torch", without.stderr)) == 1
