"""Models that are no causal language model are refused by name, before any work."""

import json

import pytest
import torch
import transformers

from conftest import GATED, SIZE, tiny_model
from skimlm.errors import SkimError
from skimlm.models.blocks import decoder_blocks, decoder_linears
from skimlm.models.checkpoint import open_checkpoint


def saved(folder, auto, family="LlamaConfig", **options):
    """A folder of a model with this head, as transformers saves it."""
    config = getattr(transformers, family)(**(GATED | options))
    getattr(transformers, auto).from_config(config).save_pretrained(folder)
    return folder


def edit(folder, **changes):
    file = folder / "config.json"
    facts = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: v for key, v in facts.items() if v is not None}))


def refused(folder, match):
    with pytest.raises(SkimError, match=match) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "auto",
    ["SequenceClassification", "TokenClassification", "QuestionAnswering"],
)
def test_a_model_with_another_head_is_refused_by_its_class(tmp_path, auto):
    folder = saved(tmp_path, f"AutoModelFor{auto}")
    refused(folder, f"config.json: LlamaFor{auto} is not a causal .* read as LlamaForCausalLM")


def test_a_model_without_a_head_is_refused(tmp_path):
    refused(saved(tmp_path, "AutoModel"), "LlamaModel is not a causal language model")


@pytest.mark.parametrize(
    "names", [None, [], ["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["ExaoneForCausalLM"]]
)
def test_a_causal_model_under_any_of_its_names_is_opened(tmp_path, names):
    edit(saved(tmp_path, "AutoModelForCausalLM"), architectures=names)
    open_checkpoint(tmp_path)


def test_encoders_are_refused_whatever_class_their_config_names(tmp_path):
    bert = dict(SIZE, intermediate_size=48, hidden_size=32)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**bert))
    model.save_pretrained(tmp_path)
    refused(tmp_path, "BertForMaskedLM is not a causal language model")
    edit(tmp_path, architectures=["BertLMHeadModel"])
    refused(tmp_path, r"'bert' is an encoder: every token sees .* \(is_decoder is false\)")


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    config = transformers.BartConfig(
        vocab_size=259, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    refused(tmp_path, "BartForConditionalGeneration is not a causal language model")
    edit(tmp_path, architectures=None)
    refused(tmp_path, "'bart' is an encoder with a decoder")


def test_an_adapter_is_not_a_model_and_not_silently_merged(tmp_path):
    saved(tmp_path, "AutoModelForCausalLM")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "adapter_config.json: an adapter beside a model: merge it")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "adapter_config.json: an adapter alone: merge it")


# ---- blocks


def test_a_large_vision_tower_is_not_taken_for_the_decoder():
    text = dict(GATED, head_dim=16, num_hidden_layers=2)
    vision = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=5)
    vision |= dict(num_attention_heads=2, image_size=28, patch_size=14)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = [name for name, _ in decoder_blocks(model)]
    assert names == [f"model.language_model.layers.{i}" for i in range(2)]


def test_a_tower_inside_the_decoder_is_passed_over_too():
    vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=5)
    vision |= dict(num_attention_heads=2, image_size=28, patch_size=14)
    model = tiny_model()
    model.model.vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
    assert [name for name, _ in decoder_blocks(model)] == ["model.layers.0", "model.layers.1"]


def test_a_model_without_a_list_of_blocks_says_what_it_has():
    model = tiny_model()
    model.model.layers = torch.nn.Identity()
    with pytest.raises(SkimError, match=r"no list of decoder blocks .*: .* layers \(Identity\)"):
        decoder_blocks(model)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_named(option):
    patterns = ["*.mlp.*", "*.no_such_linear"]
    with pytest.raises(SkimError, match=rf"{option} '\*.no_such_linear' matches none of the 14"):
        decoder_linears(tiny_model(), **{option: patterns})


def test_a_config_that_is_wrong_names_the_file(tmp_path):
    saved(tmp_path, "AutoModelForCausalLM")
    edit(tmp_path, num_attention_heads=0)
    with pytest.raises(SkimError, match="config.json"):
        open_checkpoint(tmp_path)
