"""A body and its head: what a family's own code raises is one line, what ours raises is not."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from conftest import tiny_model
from skimlm.errors import SkimError
from skimlm.models.head import final_hidden, head_logits
from skimlm.models.hooks import forward_replaced

IDS = torch.tensor([[5, 6, 7]])


def test_a_body_and_its_head_make_the_logits_of_the_model():
    model = tiny_model("gemma3", final_logit_softcapping=3.0)
    with torch.no_grad():
        want = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(head_logits(model, final_hidden(model, IDS)), want)


def test_a_model_whose_own_code_fails_is_one_line(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(modeling_llama, "rotate_half", None)
    with pytest.raises(SkimError) as caught:
        final_hidden(model, IDS)
    assert str(caught.value).startswith("LlamaForCausalLM of transformers ")
    assert str(caught.value).endswith(
        " in torch.float32 does not run: 'NoneType' object is not callable"
    )


def test_what_else_fails_within_is_not_hidden():
    def forward(*_, **__):
        raise RuntimeError("ours")

    model = tiny_model()
    with forward_replaced(model.model.layers[1].mlp, forward), pytest.raises(RuntimeError) as e:
        final_hidden(model, IDS)
    assert not isinstance(e.value, SkimError)
