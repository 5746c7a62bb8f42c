"""The vLLM plug-in against transformers: the same greedy tokens from one folder."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm")

from transformers import AutoModelForCausalLM

from conftest import byte_tokenizer, quantized_linears, tiny_model
from layer_sample import options, with_options
from skimlm.models.probe import structure_of
from skimlm.models.structure import separate
from skimlm.models.write import save

PROMPTS = [[72, 101, 108, 108, 111], [7, 33, 90], list(range(40, 80))]
SIZES = dict(hidden_size=128, intermediate_size=192, num_attention_heads=2, num_key_value_heads=1)
TABLES = {
    "dense tables": dict(embed_bits=16),
    "tables of 8 bits": dict(embed_bits=8),
    "tables of 4 bits": dict(embed_bits=4),
}
KINDS = {
    "plain": [lambda c: options()],
    "2:4 with adapters and others": [
        lambda c: options("2:4", c // 2, 32, 5, 4),
        lambda c: options("bitmap", c // 3, None, 3, 16),
        lambda c: options(group=64),
        lambda c: options(),
    ],
}


def folder(out, family, kinds="plain", tables="tables of 8 bits", widths=None, **changes):
    """A compressed folder of a tiny model, with its tokenizer."""
    dense = tiny_model(family, torch.float32, **SIZES | changes)
    layout = structure_of(dense).layout
    separate(dense, layout)
    quantized = quantized_linears(dense, widths=widths)
    makers = KINDS[kinds]
    for i, (name, q) in enumerate(quantized.items()):
        quantized[name] = with_options(q, **makers[i % len(makers)](q.shape[1]))
    save(out, dense, None, quantized, bits=3.2, layout=layout, **TABLES[tables])
    byte_tokenizer().save_pretrained(out)
    return out


def greedy(out, count=12):
    """What transformers says."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    found = []
    for ids in PROMPTS:
        made = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        found.append(made[0, len(ids) :].tolist())
    return found


VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip
TWO_RANKS = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=256, dtype="float32",
              tensor_parallel_size=2, distributed_executor_backend="mp")
    some = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    made = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, some)]
    print("MADE", json.dumps(made), flush=True)
"""


@pytest.fixture
def served(monkeypatch):
    """What vLLM says, in this process."""
    for name, value in (VLLM | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}).items():
        monkeypatch.setenv(name, value)

    def run(out, count=12, **how):
        from vllm import LLM, SamplingParams

        llm = LLM(str(out), enforce_eager=True, max_model_len=256, dtype="float32", **how)
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        made = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params)
        return [list(one.outputs[0].token_ids) for one in made]

    yield run
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_families_with_parts_fused_and_apart(served, tmp_path, family):
    changes = {"qwen3": {"head_dim": 64}, "mistral": {"sliding_window": None}}
    out = folder(tmp_path / "out", family, **changes.get(family, {}))
    assert served(out) == greedy(out)


@pytest.mark.parametrize("tables", [*TABLES])
@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_every_kind(served, tmp_path, tables, tied):
    out = folder(tmp_path / "out", "llama", tables=tables, tie_word_embeddings=tied)
    assert served(out) == greedy(out)


@pytest.mark.parametrize("widths", [[19, 3, 18, 20, 7, 17], [1, 2, 4, 5, 6, 8]], ids=str)
def test_rows_of_every_width(served, tmp_path, widths):
    out = folder(tmp_path / "out", "llama", widths=widths)
    assert served(out) == greedy(out)


def test_sparse_layers_and_adapters(served, tmp_path):
    out = folder(tmp_path / "out", "llama", kinds="2:4 with adapters and others")
    assert served(out) == greedy(out)


@pytest.mark.parametrize("tables", [*TABLES])
@pytest.mark.parametrize("kinds", [*KINDS])
def test_two_ranks_have_half_of_the_rows_each(tmp_path, kinds, tables):
    """One key-value head: both have it. In a process of its own: ranks are processes."""
    sizes = dict(
        vocab_size=300, tie_word_embeddings=tables == "tables of 4 bits", hidden_size=256,
        intermediate_size=512, num_attention_heads=4,
    )  # fmt: skip
    out = folder(tmp_path / "out", "llama", kinds, tables, **sizes)
    done = subprocess.run(
        [sys.executable, "-c", TWO_RANKS, str(out), json.dumps(PROMPTS)],
        capture_output=True, text=True, env=os.environ | VLLM,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = re.findall("MADE (.*)", done.stdout)
    assert json.loads(made) == greedy(out)


def test_what_is_damaged_is_told(served, tmp_path):
    from safetensors.torch import load_file, save_file

    out = folder(tmp_path / "out", "llama")
    file = out / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("down_proj.row_scale"))
    broken = copy.deepcopy(tensors)
    broken[name][0] = float("nan")
    save_file(broken, file, {"format": "pt"})
    with pytest.raises(Exception, match="NaN"):
        served(out)


def test_experts_are_refused_in_one_line(served, tmp_path):
    dense = tiny_model("mixtral", torch.float32, **SIZES)
    layout = structure_of(dense).layout
    separate(dense, layout)
    out = tmp_path / "out"
    save(out, dense, None, quantized_linears(dense), embed_bits=8, bits=3.2, layout=layout)
    byte_tokenizer().save_pretrained(out)
    with pytest.raises(Exception, match="experts are not served by vLLM yet"):
        served(out)
