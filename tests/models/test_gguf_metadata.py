"""What a GGUF says beyond its weights is in the config, or the file is refused by its name."""

import sys

import pytest
import torch
import transformers

from conftest import GATED, byte_tokenizer, tiny_model
from gguf_sample import write_gguf
from skimlm.errors import FormatError, SkimError
from skimlm.models import gguf_metadata
from skimlm.models.checkpoint import load, open_checkpoint
from skimlm.models.gguf_metadata import Metadata, apply_metadata, read_metadata

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 10000.0}


@pytest.fixture
def written(tmp_path, tokenizer):
    """A function that writes a GGUF which says more."""
    pytest.importorskip("gguf")
    return lambda **more: write_gguf(tmp_path / "m.gguf", tiny_model(), tokenizer, **more)


def refused(file, match, call=open_checkpoint):
    with pytest.raises(SkimError, match=match) as caught:
        call(file)
    assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)


# ---- a file


@pytest.mark.parametrize(
    "facts, name",
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rope.scaling.type is 'yarn'"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "rope.scaling.type"),
        ({"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.2}, "rope.scaling"),
        ({"attention.sliding_window": 64}, "attention.sliding_window is 64"),
        ({"attention.causal": False}, "attention.causal is False"),
        ({"pooling_type": 3}, "pooling_type is 3"),
        ({"expert_count": 8, "expert_used_count": 2}, "expert_count is 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"attention.scale": 0.5}, "attention.scale is 0.5"),
        ({"embedding_scale": 12.0}, "embedding_scale is 12.0"),
        ({"logit_scale": 0.0625}, "logit_scale is 0.0625"),
        ({"something_new": 1}, "something_new is 1"),
        ({"rope.dimension_sections": [16, 24, 24]}, r"rope.dimension_sections is \[16, 24, 24\]"),
    ],
)
def test_what_the_config_has_no_word_for_is_refused_by_name(written, facts, name):
    refused(written(facts={f"llama.{n}": v for n, v in facts.items()}), rf"m.gguf: llama.{name}")


@pytest.mark.parametrize(
    "facts",
    [
        {"llama.rope.scaling.type": "none"},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.original_context_length": 256},
        {"llama.attention.sliding_window": 256},
        {"llama.attention.causal": True},
        {"llama.expert_count": 0, "llama.expert_used_count": 0},
        {"llama.attention.key_length": 16, "llama.attention.value_length": 16},
        {"llama.attention.scale": 0.25},
        {"llama.tensor_data_layout": "Meta AI original pth"},
        {"general.finetune": "Instruct", "general.type": "model", "general.tags": ["a", "b"]},
        {"split.no": 0, "split.count": 1},
        {"quantize.imatrix.file": "x", "someone.else": 3},
    ],
)
def test_what_changes_nothing_is_opened(written, facts):
    model, _ = load(written(facts=facts), torch.float32)
    want = tiny_model().state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


def test_a_shard_is_refused_whichever_it_is(written):
    for number in (0, 1):
        facts = {"split.no": number, "split.count": 2}
        refused(written(facts=facts), f"is shard {number + 1} of 2: merge them")


def test_what_is_no_model_is_refused(written):
    refused(written(facts={"general.type": "adapter"}), "holds 'adapter', not a model")


def test_tensors_without_a_place_are_refused_by_name(written):
    bias = {f"blk.{i}.attn_q.bias": torch.ones(64) for i in range(2)}
    refused(written(tensors=bias), r"blk.0.attn_q.bias: is stored, .* no place .* 1 more")
    refused(written(tensors={"rope_factors_long.weight": torch.ones(8)}), "rope_factors_long")
    refused(written(tensors={"v.patch_embd.weight": torch.ones(4, 4)}), "v.patch_embd.weight")


def llama3_factors(rope):
    """Frequencies of the plain model over those of llama 3's, as transformers makes them."""
    plain = tiny_model().model.rotary_emb.inv_freq
    return plain / tiny_model(rope_parameters=dict(rope)).model.rotary_emb.inv_freq


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_frequencies_are_used(written, factor):
    factors = llama3_factors(LLAMA3 | {"factor": factor})
    assert factors.max() == factor and factors.min() == 1
    model, _ = load(written(tensors={"rope_freqs.weight": factors}), torch.float32)
    want = tiny_model(rope_parameters=LLAMA3 | {"factor": factor})
    ids = torch.arange(200)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want(ids).logits)
        assert not torch.equal(model(ids).logits, tiny_model()(ids).logits)
    assert model.config.rope_parameters == LLAMA3 | {"factor": factor}


def test_frequencies_of_one_change_nothing_and_others_are_refused(written):
    ones = written(tensors={"rope_freqs.weight": torch.ones(8)})
    assert open_checkpoint(ones).config.rope_parameters["rope_type"] == "default"
    for factors in (torch.linspace(1, 8, 8), torch.full((8,), 2.0), torch.ones(4) * 8):
        file = written(tensors={"rope_freqs.weight": factors})
        refused(file, "rope_freqs.weight: rotates by frequencies that are not llama 3's")


def test_gguf_s_own_reader_says_the_same(written, monkeypatch):
    facts = {"llama.expert_count": 0, "llama.x": [1, 2], "general.tags": ["a", "b"]}
    file = written(facts=facts, tensors={"rope_freqs.weight": torch.ones(8)})
    want = read_metadata(file)
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf", None)
    got = gguf_metadata.read_metadata(file)
    assert got.facts == want.facts and set(got.tensors) == set(want.tensors)
    assert torch.equal(got.rope_factors, want.rope_factors)


# ---- a config


def applied(family, architecture, facts, **options):
    """The config after it was told some facts."""
    config = getattr(transformers, f"{family}Config")(**(GATED | options))
    apply_metadata("m.gguf", Metadata(architecture, facts, (), None), config)
    return config


def test_norms_caps_heads_and_thetas_that_transformers_drops_are_set():
    eps = {"attention.layer_norm_epsilon": 1e-3}
    assert applied("Nemotron", "nemotron", eps).norm_eps == 1e-3
    assert applied("Falcon", "falcon", eps).layer_norm_epsilon == 1e-3
    caps = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
    config = applied("Gemma2", "gemma2", caps)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (20.0, 10.0)
    assert applied("Qwen3", "qwen3", {"attention.key_length": 32}).head_dim == 32
    theta = {"rope.freq_base": 999999.4375}
    assert applied("Starcoder2", "starcoder2", theta).rope_parameters["rope_theta"] == 999999.4375
    assert not applied(
        "StableLm", "stablelm", {"use_parallel_residual": False}, use_parallel_residual=True
    ).use_parallel_residual


def test_a_decimal_of_a_config_is_not_replaced_by_its_float32():
    stored = 9.999999747378752e-06
    config = applied(
        "Llama", "llama", {"attention.layer_norm_rms_epsilon": stored}, rms_norm_eps=1e-5
    )
    assert config.rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    "family, architecture, facts, options",
    [
        ("Phi3", "phi3", {"rope.dimension_count": 12}, {}),
        ("Phi3", "phi3", {"attention.sliding_window": 64, "context_length": 256}, {}),
        ("Qwen2", "qwen2", {"attention.key_length": 24}, {}),
        ("Gemma3Text", "gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {}),
        ("Gemma3Text", "gemma3", {"attention.sliding_window_pattern": 2}, {"num_hidden_layers": 6}),
        ("Llama", "llama", {"rope.freq_base_swa": 2e4}, {}),
        ("StableLm", "stablelm", {"rope.dimension_count": 16}, {}),
    ],
)
def test_what_cannot_be_set_safely_is_refused(family, architecture, facts, options):
    with pytest.raises(FormatError, match=f"m.gguf: {architecture}.{next(iter(facts))} is"):
        applied(family, architecture, facts, **options)


def test_a_pattern_of_windows_may_be_a_number_or_a_list():
    for pattern in (6, [True] * 5 + [False]):
        applied(
            "Gemma3Text", "gemma3", {"attention.sliding_window_pattern": pattern},
            num_hidden_layers=6,
        )  # fmt: skip


def test_gemmas_two_thetas_are_those_of_their_layers():
    facts = {"rope.freq_base": 5e5, "rope.freq_base_swa": 2e4}
    rope = applied("Gemma3Text", "gemma3", facts).rope_parameters
    assert rope["full_attention"]["rope_theta"] == 5e5
    assert rope["sliding_attention"]["rope_theta"] == 2e4


def test_what_lies_beside_a_gguf_is_not_read(written, tmp_path):
    file = written()
    alone = load(file)[1]
    other = byte_tokenizer()
    other.chat_template, other.eos_token = "not this one", "<pad>"
    other.add_tokens(["zzz"])
    other.save_pretrained(tmp_path)
    tiny_model("qwen2").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    model, beside = load(file)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert beside.get_vocab() == alone.get_vocab() and beside.chat_template is None
    assert beside.special_tokens_map == alone.special_tokens_map
