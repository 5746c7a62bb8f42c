"""Compressed folders as tests look at them: what they hold, and what the model in them says."""

import json

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

IDS = torch.arange(40).view(2, 20)


def open_folder(path, dtype=torch.float32, cls=AutoModelForCausalLM):
    """from_pretrained, with nothing missing, surplus or random."""
    model, info = cls.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_same_logits(got, want):
    """The same numbers summed in another order; in bfloat16 dense weights are rounded besides."""
    most = 4e-2 if got.dtype == torch.bfloat16 else 2e-5
    assert float((got - want).float().norm() / want.float().norm()) < most


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def stored(folder):
    """Every tensor of a folder as comparable bytes."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
