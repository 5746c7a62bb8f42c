"""Checkpoints in MXFP4 and FP8: the numbers that their formats say, in memory and streamed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from conftest import byte_tokenizer, tiny_model
from skimlm.errors import SkimError
from skimlm.models.checkpoint import load, open_checkpoint
from skimlm.models.source import open_source
from skimlm.models.structure import separate

pytestmark = pytest.mark.skipif(
    not hasattr(HfQuantizer, "get_new_dtype"), reason="transformers is too old to undo it"
)
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK = 32


def mxfp4(weight):
    """Codes and exponents of weights [e, in, out], two codes a byte, 32 along `in` (OCP MX)."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    power = torch.ceil(torch.log2(groups.abs().amax(-1) / 6))
    codes = (groups / 2 ** power[..., None])[..., None].sub(FP4).abs().argmin(-1)
    values = (FP4[codes] * 2 ** power[..., None]).flatten(-2).transpose(1, 2)
    codes = codes.to(torch.uint8)
    stored = {"_blocks": codes[..., 0::2] | codes[..., 1::2] << 4}
    return stored | {"_scales": (power + 127).to(torch.uint8)}, values


def fp8(weight):
    """Codes and scales of a weight, a scale for every 32 x 32."""
    r, c = weight.shape
    wide = torch.zeros(-(-r // BLOCK) * BLOCK, -(-c // BLOCK) * BLOCK)
    wide[:r, :c] = weight.float()
    tiles = wide.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale = tiles.abs().amax((1, 3)).clamp(min=1e-6) / 448
    codes = (tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:r, :c]
    codes = codes.to(torch.float8_e4m3fn).contiguous()
    every = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:r, :c]
    return {"": codes, "_scale_inv": scale}, codes.float() * every


@pytest.fixture(params=["gpt_oss", "qwen3_moe", "llama"])
def quantized(request, tmp_path):
    """A folder with codes, and what they stand for by the names of the file."""
    sizes = dict.fromkeys(["intermediate_size", "moe_intermediate_size"], 64)
    tiny_model(request.param, torch.bfloat16, **sizes).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tensors, values = {}, {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        coded = {"": tensor}
        if request.param == "gpt_oss" and tensor.ndim == 3:
            coded, values[name] = mxfp4(tensor)
        elif request.param != "gpt_oss" and "_proj" in name:
            coded, values[name] = fp8(tensor)
        tensors |= {f"{name}{end}": part.contiguous() for end, part in coded.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    how = {"quant_method": "mxfp4"}
    if request.param != "gpt_oss":
        how = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        how["weight_block_size"] = [BLOCK, BLOCK]
    write_config(tmp_path, how)
    return tmp_path, values


def write_config(folder, how):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))


def test_codes_become_the_numbers_they_stand_for(quantized):
    folder, values = quantized
    model, _ = load(folder)
    assert not hasattr(model.config, "quantization_config") and len(values) > 3
    own = dict(model.named_parameters())
    for name, want in values.items():
        if ".experts." in name and name not in own:  # qwen3_moe: transformers stacks them
            parent, number, kind, _ = name.rsplit(".", 3)
            stacked = "gate_up_proj" if kind in ("gate_proj", "up_proj") else kind
            got = own[f"{parent}.{stacked}"][int(number)]
            got = got.chunk(2)[kind == "up_proj"] if kind != "down_proj" else got
        else:
            got = own[name]
        assert torch.equal(got, want.bfloat16()), name


def test_a_streamed_model_has_the_same_numbers(quantized):
    folder, _ = quantized
    opened = open_checkpoint(folder)
    source, (whole, _) = open_source(opened, streamed=True), load(opened)
    separate(whole, opened.structure.layout)
    want = whole.state_dict()
    for i, prefix in enumerate(source.blocks):
        with source.loaded(range(i, i + 1)):
            for name, tensor in source.module(i).state_dict().items():
                assert torch.equal(tensor, want[f"{prefix}.{name}"]), name
                assert tensor.dtype == torch.bfloat16


def test_a_quantization_that_makes_no_sense_is_one_line(quantized):
    write_config(quantized[0], {"quant_method": "fp8", "weight_block_size": "wide"})
    with pytest.raises(SkimError, match="config.json: its quantization cannot be undone: "):
        open_checkpoint(quantized[0])


def test_blocks_that_do_not_divide_a_matrix_are_refused(tmp_path):
    tiny_model("llama", torch.bfloat16, intermediate_size=80).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"  # 80 rows in three blocks of 32
    coded, _ = fp8(tensors[name])
    tensors |= {f"{name}{end}": part.contiguous() for end, part in coded.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    write_config(tmp_path, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    with pytest.raises(
        SkimError, match="up_proj.weight: 80 in 3 blocks of 32, which do not divide"
    ):
        open_checkpoint(tmp_path)


def test_a_transformers_that_cannot_undo_it_is_named(quantized, monkeypatch):
    monkeypatch.setattr(AutoHfQuantizer, "from_config", lambda *_, **__: object())
    with pytest.raises(SkimError, match="transformers .* is too old to undo it"):
        open_checkpoint(quantized[0])
