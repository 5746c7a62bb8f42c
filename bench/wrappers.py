"""Models that see: tiny random ones of each kind, compressed, then shown an image.

    python bench/wrappers.py [NAME ...]

A line each, as families.py reads it: NAME VERDICT SECONDS s REASONS. Whole: skim, slim and streamed
runs succeed, streamed gives the same bytes; everything but the language model is bit for bit what
it was; with an image the folder gives the logits and the tokens of its own dense export.
"""

import filecmp
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import skimlm

IMAGE, START, END, VIDEO = 300, 301, 302, 303  # tokens
TEXT = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
TEXT |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256)
TEXT |= dict(pad_token_id=256, bos_token_id=257, eos_token_id=258)
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2)
EXPERTS |= dict(moe_intermediate_size=48, n_group=1, topk_group=1, n_shared_experts=1)
MLA = dict(kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
ROPE = dict(rope_type="default", rope_theta=1e4, llama_4_scaling_beta=0.1)
ROPE |= dict(original_max_position_embeddings=64)
WHOLE = dict(num_key_value_heads=4, head_dim=8, rope_parameters=ROPE)
SIGHT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SIGHT |= dict(image_size=28, patch_size=14)
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
QWEN = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
QWEN |= dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
QWEN_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO)
QWEN_IDS |= dict(vision_start_token_id=START, vision_end_token_id=END)


def grid(places):
    """Inputs of a model that takes patches and how many of them there are each way."""
    pixels = torch.randn(16, 3 * 2 * 14 * 14)
    return dict(pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]])), places


def picture(places, size=28, *more, **others):
    """Inputs of a model that takes an image, and its places among the tokens."""
    return dict(pixel_values=torch.randn(1, *more, 3, size, size)) | others, places


def qwen(kind, text, text_more=None, **vision):
    text = dict(model_type=text) | TEXT | dict(rope_parameters=MROPE) | (text_more or {})
    return kind, dict(text_config=text, vision_config=QWEN | vision) | QWEN_IDS, lambda: grid(4)


def plain(kind, text, vision, image, text_more=None, **config):
    """A wrapper of two configs: one of text, one of sight."""
    text, sight = dict(model_type=text) | TEXT | (text_more or {}), SIGHT | vision
    return kind, dict(text_config=text, vision_config=sight) | config, image


CLIP = dict(model_type="clip_vision_model")
SIGLIP = dict(model_type="siglip_vision_model", vision_use_head=False)
PIXTRAL = dict(model_type="pixtral", image_size=56, head_dim=16)
SIZES = dict(image_sizes=torch.tensor([[56, 56]]))
KINDS = {
    "llava": plain("llava", "llama", CLIP, lambda: picture(4), image_token_index=IMAGE),
    "gemma3": plain(
        "gemma3", "gemma3_text", SIGLIP | dict(image_size=56), lambda: picture(4, 56),
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
    ),
    "mistral3": plain(
        "mistral3", "mistral", PIXTRAL, lambda: picture(4, 56, **SIZES), image_token_index=IMAGE
    ),
    "mistral4": plain(
        "mistral3", "mistral4", PIXTRAL, lambda: picture(4, 56, **SIZES), MLA | EXPERTS | WHOLE,
        image_token_index=IMAGE,
    ),
    "internvl": plain(
        "internvl", "qwen2", dict(image_size=[28, 28], patch_size=[14, 14]), lambda: picture(1),
        image_token_id=IMAGE,
    ),
    "smolvlm": plain(
        "smolvlm", "llama", {}, lambda: picture(1, 28, 1), image_token_id=IMAGE, scale_factor=2
    ),
    "idefics3": plain(
        "idefics3", "llama", {}, lambda: picture(1, 28, 1), image_token_id=IMAGE, scale_factor=2
    ),
    "paligemma": plain(
        "paligemma", "gemma", SIGLIP | dict(projection_dim=64), lambda: picture(4),
        image_token_index=IMAGE, projection_dim=64,
    ),
    "aya_vision": plain(
        "aya_vision", "cohere2", SIGLIP, lambda: picture(1), image_token_index=IMAGE
    ),
    "cohere2_vision": plain(
        "cohere2_vision", "cohere2", SIGLIP, lambda: picture(1), image_token_id=IMAGE,
        alignment_intermediate_size=64,
    ),
    "glm4v": qwen("glm4v", "glm4v_text", num_hidden_layers=2, image_size=56),
    "qwen2_vl": qwen("qwen2_vl", "qwen2_vl_text", hidden_size=64, embed_dim=32, mlp_ratio=2),
    "qwen2_5_vl": qwen("qwen2_5_vl", "qwen2_5_vl_text", fullatt_block_indexes=[1], window_size=56),
    "qwen3_vl": qwen(
        "qwen3_vl", "qwen3_vl_text", num_position_embeddings=16, deepstack_visual_indexes=[0]
    ),
    "qwen3_vl_moe": qwen(
        "qwen3_vl_moe", "qwen3_vl_moe_text", EXPERTS, num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    ),
}  # fmt: skip


def tiny(name):
    """The model and its inputs: bytes of text with places for an image in them."""
    kind, values, image = KINDS[name]
    config = CONFIG_MAPPING[kind](**values)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    given, places = image()
    ids = torch.tensor([[70, 71, START, *[IMAGE] * places, END, 72, 101, 108, 108, 111]])
    given |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if kind in ("gemma3", "paligemma"):
        given["token_type_ids"] = (ids == IMAGE).long()
    if "image_grid_thw" in given:
        given["mm_token_type_ids"] = (ids == IMAGE).long()
    return model.to(torch.bfloat16), given


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    vocab = {c: i for i, c in enumerate([*alphabet, *special.values()])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@torch.inference_mode()
def shown(folder, given):
    """Logits and tokens with the image."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    given = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    logits = model(**given).logits
    blind = model(**{k: given[k] for k in ("input_ids", "attention_mask")}).logits
    tokens = model.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=256)
    return logits, tokens, blind


def judge(name, work):
    model, given = tiny(name)
    model.save_pretrained(work / "M")
    tokenizer().save_pretrained(work / "M")
    original, _, blind = shown(work / "M", given)
    assert not torch.equal(original, blind), "the image changes nothing"
    text = work / "text.txt"
    text.write_text("".join(f"Line {i}: the square of {i} is {i * i}.\n" for i in range(400)))
    common = dict(recipe="fast", bits=4, samples=4, seq_len=64, text=text, cache_dir=work / "cache")
    skimlm.compress(work / "M", work / "skim", **common)
    skimlm.compress(work / "M", work / "parts", workers=1, **common)
    skimlm.compress(work / "M", work / "slim", method="slim", **common)
    why = []
    names = sorted(f.name for f in (work / "skim").iterdir())
    _, wrong, lost = filecmp.cmpfiles(work / "skim", work / "parts", names, shallow=False)
    if wrong or lost:
        why.append(f"streamed differs: {wrong + lost}")
    before = AutoModelForImageTextToText.from_pretrained(work / "M").state_dict()
    for made in ("skim", "slim"):
        after = AutoModelForImageTextToText.from_pretrained(work / made).state_dict()
        sight = [n for n in before if "language_model" not in n and "text_model" not in n]
        sight = [n for n in sight if not n.startswith("lm_head")]
        changed = [n for n in sight if n not in after or not torch.equal(after[n], before[n])]
        if changed or not sight:
            why.append(f"{made}: not as they were: {changed[:3]}")
        skimlm.export(work / made, work / f"{made}-dense", dtype="float32")
        got, tokens, _ = shown(work / made, given)
        want, expected, _ = shown(work / f"{made}-dense", given)
        difference = float((got - want).abs().max() / want.std())
        if not difference < 2e-3:
            why.append(f"{made}: logits with an image differ from its export by {difference:.2g}")
        if not torch.equal(tokens, expected):
            why.append(f"{made}: other tokens with an image than its export")
        far = float((got - original).norm() / original.norm())
        if not far < (1.0 if made == "skim" else 1.3):
            why.append(f"{made}: logits with an image are {far:.2f} away from the original's")
    return why


def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in sys.argv[1:] or KINDS:
        start, verdict = time.perf_counter(), "partial"
        with tempfile.TemporaryDirectory() as work:
            try:
                why = judge(name, Path(work))
                verdict = "partial" if why else "whole"
            except skimlm.SkimError as error:
                verdict, why = "refused", [str(error)]
        seconds = time.perf_counter() - start
        print(f"{name:24} {verdict:8} {seconds:4.0f} s  {'; '.join(why)}", flush=True)


if __name__ == "__main__":
    main()
