"""Tiny random models of every family and a byte-level tokenizer, all made in code."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from skimlm import native
from skimlm.format.pack import QuantizedWeight
from skimlm.models.blocks import decoder_linears
from skimlm.models.source import BlockSource
from skimlm.pipeline.states import StateStore
from skimlm.pipeline.walk import Walk, statistics
from skimlm.runtime import decode

VOCAB = 259  # 256 bytes, <pad>, <s>, </s>
SIZE = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
SIZE |= dict(pad_token_id=256, bos_token_id=257, eos_token_id=258)
GATED = SIZE | dict(intermediate_size=72, num_key_value_heads=2, max_position_embeddings=256)
CONFIGS = {
    "llama": ("LlamaConfig", GATED | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", GATED | dict(head_dim=16)),
    "gemma3": ("Gemma3TextConfig", GATED | dict(head_dim=16, sliding_window=32)),
    "mistral": ("MistralConfig", GATED),
    "phi3": ("Phi3Config", GATED),
    "qwen2": ("Qwen2Config", GATED),
    "opt": ("OPTConfig", SIZE | dict(ffn_dim=72, word_embed_proj_dim=64)),
    "gpt_neox": ("GPTNeoXConfig", SIZE | dict(intermediate_size=72)),
    "mixtral": ("MixtralConfig", GATED | dict(num_local_experts=4)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        GATED
        | dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40, head_dim=16)
        | dict(mlp_only_layers=[1], norm_topk_prob=True),
    ),
    "gpt_oss": (
        "GptOssConfig",
        GATED | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    ),
    "llama4": (
        "Llama4TextConfig",
        GATED
        | dict(num_local_experts=4, intermediate_size_mlp=72, head_dim=16)
        | dict(interleave_moe_layer_step=1),
    ),
    "jetmoe": ("JetMoeConfig", GATED | dict(num_local_experts=4, kv_channels=16)),
    "falcon": ("FalconConfig", SIZE | dict(alibi=False, new_decoder_architecture=False)),
    "gemma4": (  # the last two layers have keys and values of those before
        "Gemma4TextConfig",
        GATED
        | dict(num_hidden_layers=4, num_kv_shared_layers=2, head_dim=16, global_head_dim=32)
        | dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16)
        | dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCAB)
        | dict(num_experts=None, top_k_experts=None, moe_intermediate_size=None),
    ),
    "hy_v4": (  # layers attend to the tokens that another chose
        "HYV4Config",
        GATED
        | dict(num_hidden_layers=4, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=32)
        | dict(qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, moe_intermediate_size=48)
        | dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1)
        | dict(topk_group=1, first_k_dense_replace=1, index_topk=16, index_head_dim=16)
        | dict(index_n_heads=4),
    ),
    "youtu": (
        "YoutuConfig",
        GATED
        | dict(num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=32, v_head_dim=16)
        | dict(qk_rope_head_dim=8, qk_nope_head_dim=16),
    ),
    "gpt2": ("GPT2Config", dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4)),
}
FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "phi3", "opt", "gpt_neox")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=native.ISAS)
def isa(request, monkeypatch):
    """Every native library this processor can run, in turn."""
    return take(request.param, monkeypatch)


@pytest.fixture(params=[*native.ISAS, "none"])
def isa_or_none(request, monkeypatch):
    """The same, and then the torch references that run where there is no library."""
    if request.param != "none":
        return take(request.param, monkeypatch)
    monkeypatch.setattr(native, "missing", lambda: "hidden")
    monkeypatch.setattr(native, "library", None)


def take(isa, monkeypatch):
    """Let a library run until the end of a test."""
    if native.ISAS.index(isa) > native._open("portable").skimlm_best_isa():
        pytest.skip(f"this processor has no {isa}")
    library = native._open(isa)
    monkeypatch.setattr(native, "library", lambda: library)
    return isa


@pytest.fixture
def slow(monkeypatch):
    """A server's model of fifty tokens a second."""
    real = decode.together
    monkeypatch.setattr(decode, "together", lambda *a: time.sleep(0.02) or real(*a))


def at_once(count, call):
    """Run `call` on so many threads at the same time."""
    workers = [threading.Thread(target=call) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    """A random model of a family: 2 layers, hidden 64, the same numbers at every call."""
    name, options = CONFIGS[family]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, name)(**(options | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():  # the usual tiny initialisation makes all logits alike
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    vocab |= {token: 256 + i for i, token in enumerate(special.values())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def bos_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The same, with a BOS in front of every text, as llama, mistral and gemma have it."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


LINE = "Read every note. Run notes scan --all in <the> folder, then (move) 10 of them."
CORPUS = [f"{LINE} </b> </c> </d>\n"] * 9
SPECIAL = ["<unk>", "<s>", "</s>"]


def sentencepiece(kind: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer as llama (bpe) and T5 (unigram) have it: a text begins with an added space."""
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        words = SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=words, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    spaces = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def random_quantized(
    rows: int, cols: int, seed: int = 0, in_scale: bool = False, widths: list[int] | None = None
) -> QuantizedWeight:
    """A valid random compressed weight of about unit variance.

    Widths are mixed unless given, those of a trellis left out.
    """
    g = torch.Generator().manual_seed(seed)
    width = torch.randint(1, 9, (rows,), generator=g)
    if widths is not None:
        width = torch.tensor(widths)[torch.arange(rows) % len(widths)]
    bits = width % 16
    levels = 2**bits
    codes = (torch.rand(rows, cols, generator=g) * levels[:, None]).long()
    codebook = torch.zeros(rows, 32, dtype=torch.int8)
    zero = torch.zeros(rows, dtype=torch.int16)
    for i, b in enumerate(width.tolist()):
        if b > 16:
            continue
        if b <= 5:
            table = torch.randint(-127, 128, (2**b,), generator=g)
            codebook[i, : 2**b] = table.sort().values.to(torch.int8)
        else:
            zero[i] = int(torch.randint(0, 2**b, (1,), generator=g))
    spread = torch.where(bits <= 5, 64.0, levels.float() / 4)
    scale = (torch.rand(rows, generator=g) + 0.5) / spread / cols**0.5
    shift = (torch.rand(cols, generator=g) + 0.5).half() if in_scale else None
    used = len({b for b in width.tolist() if b > 16})
    trellis = torch.randint(-128, 128, (used, 128), dtype=torch.int8, generator=g)
    codes, width = codes.to(torch.uint8), width.to(torch.uint8)
    return QuantizedWeight(codes, width, codebook, scale.bfloat16(), zero, shift, trellis=trellis)


def quantized_linears(model, in_scale: bool = False, **kwargs) -> dict[str, QuantizedWeight]:
    """A random compressed weight for every linear in the blocks of a model."""
    return {
        name: random_quantized(*module.weight.shape, seed=i, in_scale=in_scale, **kwargs)
        for i, (name, module) in enumerate(decoder_linears(model).items())
    }


def walk_of(model, ids=None, linears=None, store=None, **options) -> Walk:
    """The walk over a model in memory."""
    chosen = decoder_linears(model) if linears is None else linears
    return Walk(BlockSource(model), chosen, ids, store or StateStore(None), **options)


def statistics_of(model, ids, linears=None, progress=lambda *_: None, **options):
    """Statistics of the linears of a model in memory."""
    walk = walk_of(model, ids, linears, progress=progress)
    return statistics(walk, 0, **options)[0]


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, tokenizer):
    """A tied tiny llama as a Hugging Face folder, bf16. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model(dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
