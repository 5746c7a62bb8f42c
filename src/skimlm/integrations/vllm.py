"""The vLLM plug-in: `vllm serve OUT` reads compressed folders, by `quant_method` in config.json.

vLLM finds `register` by its entry point (`vllm.general_plugins`), in spawned workers too. It fuses
q, k and v, and gate and up: every part keeps its own layer here, of widths of its own. Stored
tensors go by name to placeholders that keep them as they come, and are checked when all are there.
Products are those of runtime/ops.py: in integers for few tokens, in bfloat16 for more.

With `tensor_parallel_size` every rank keeps a share of the rows, whatever vLLM would cut: the codes
of a row belong together. Where a rank has some of the inputs only, it gets the others' first, and
gives its rows of the sum, zeros elsewhere.

vLLM is no dependency of skimlm: whoever imports this has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from skimlm.errors import FormatError
from skimlm.format.check import check_stored
from skimlm.format.layer import METHOD, TENSORS, Layer, LayerSpec
from skimlm.format.pack import cut
from skimlm.integrations.transformers import CONFIG, SkimlmConfig
from skimlm.runtime import ops
from skimlm.runtime.tables import (
    CompressedEmbedding,
    CompressedHead,
    PackedEmbedding,
    PackedHead,
)

SHARDS = {"q": 0, "k": 1, "v": 2}
_known: dict[int, Linear] = {}  # by number: what a compiled graph can name


def register() -> None:
    """What vLLM calls in every process; more than once changes nothing."""


@register_quantization_config(METHOD)
class VllmConfig(QuantizationConfig):
    """What config.json says of a compressed model, for vLLM."""

    def __init__(self, stored: SkimlmConfig) -> None:
        super().__init__()
        self.stored = stored

    def get_name(self) -> str:
        """The `quant_method`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What a model may run in."""
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU: any."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Nothing beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmConfig:
        """Read the `quantization_config` of config.json."""
        return cls(SkimlmConfig(**{k: v for k, v in config.items() if k != "quant_method"}))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call linears and tables as vLLM calls them."""
        stored = self.stored
        stored.linears = hf_to_vllm_mapper.apply_dict(dict(stored.linears))
        if stored.tables:
            stored.tables = hf_to_vllm_mapper.apply_dict(dict(stored.tables))

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """How a layer of vLLM's is stored; None for what is left dense."""
        if isinstance(layer, LinearBase):
            head, _, leaf = prefix.rpartition(".")
            parts = [f"{head}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
            known = [name for name in parts if name in self.stored.linears]
            if known and len(known) < len(parts):
                missing = ", ".join(set(parts) - set(known))
                raise ValueError(f"{prefix}: {missing} is dense, which vLLM fuses with the others")
            return LinearMethod(self.stored, parts) if known else UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            raise ValueError(f"{prefix}: experts are not served by vLLM yet: use transformers")
        if isinstance(layer, VocabParallelEmbedding):
            name = self._table(isinstance(layer, ParallelLMHead), prefix)
            if name in self.stored.tables or self.stored.embed_bits < 16:
                return TableMethod(self.stored, name)
        return None

    def _table(self, head: bool, prefix: str) -> str:
        """What a table is called in config.json; vLLM does not always say where an embedding is."""
        model = get_current_vllm_config().model_config
        tied = model is not None and model.hf_text_config.tie_word_embeddings
        others = [name for name in self.stored.tables if name.rpartition(".")[2] != "lm_head"]
        return others[0] if others and (tied or not head) else prefix


@dataclass(frozen=True)
class Linear:
    """The stored parts of one of vLLM's linears, one after the other in its output."""

    parts: Sequence[Layer]
    rows: int  # of the output
    first: int | None = None  # of its rows, those of the parts; None: they are the output

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., c] times all of them, [..., rows]."""
        if self.first is None:
            return ops.matmul_beside(x, self.parts, bias)
        own = ops.matmul_beside(tensor_model_parallel_all_gather(x), self.parts)
        out = own.new_zeros(*own.shape[:-1], self.rows)
        out[..., self.first : self.first + own.shape[-1]] = own
        return out if bias is None else out + bias


class LinearMethod(LinearMethodBase):
    """Parts of a fused linear, each a stored layer of its own."""

    def __init__(self, stored: SkimlmConfig, names: Sequence[str]) -> None:
        self.stored, self.names = stored, names

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Placeholders that keep what comes."""
        self.rows = sum(output_partition_sizes)
        sizes = output_partition_sizes if len(self.names) > 1 else [self.rows]
        self.gathers = input_size_per_partition != input_size
        self.specs, self.own = [], []
        for name, size in zip(self.names, sizes, strict=True):
            rows = size if self.gathers else self.stored.rows(name, size)
            self.specs.append(self.stored.spec(name, rows, input_size))
            self.own.append(share(rows) if self.gathers else share(rows, size))
        layer.arrived = keep_by_name(layer, dtypes(self.specs[0]))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what came; from here on it is multiplied by."""
        arrived = layer.__dict__.pop("arrived", None)
        if arrived is None:
            return
        parts = [
            cut_to(checked(spec, arrived.get(i, {}), name), *own)
            for i, (spec, name, own) in enumerate(
                zip(self.specs, self.names, self.own, strict=True)
            )
        ]
        first = self.own[0][0] if self.gathers else None
        layer.number = len(_known)
        _known[layer.number] = layer.linear = Linear(parts, self.rows, first)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x times the layer."""
        if torch.compiler.is_compiling():
            return torch.ops.skimlm.vllm_linear(x, bias, layer.number, layer.linear.rows)
        return layer.linear.product(x, bias)


class TableMethod(QuantizeMethodBase):
    """An embedding or head, as a table or as a layer."""

    def __init__(self, stored: SkimlmConfig, name: str) -> None:
        self.stored, self.name = stored, name

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Placeholders that keep what comes."""
        layer.dtype = params_dtype
        self.spec: LayerSpec | None = None
        if self.name in self.stored.tables:
            self.spec = self.stored.spec(self.name, layer.org_vocab_size, layer.embedding_dim)
            kinds = dtypes(self.spec)
        else:
            codes = torch.int8 if self.stored.embed_bits == 8 else torch.uint8
            kinds = {"weight": codes, "scale": torch.bfloat16}
        layer.arrived = keep_by_name(layer, kinds)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what came; a tied head has the embedding's."""
        arrived = layer.__dict__.pop("arrived", None)
        if arrived is None or getattr(layer, "tied_to", None) is not None:
            return
        layer.table = self._table(layer, arrived.get(0, {}))

    def _table(self, layer: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
        cols, shard = layer.embedding_dim, layer.shard_indices
        own = shard.org_vocab_start_index, shard.org_vocab_end_index
        head = isinstance(layer, ParallelLMHead)
        how: dict[str, Any] = {"dtype": layer.dtype}
        if self.spec is not None:
            kept = cut_to(checked(self.spec, tensors, self.name), *own)
            table: nn.Module = (PackedHead if head else PackedEmbedding)(kept.spec, **how)
            held = dict(kept.tensors)
        else:
            kind = CompressedHead if head else CompressedEmbedding
            table = kind(own[1] - own[0], cols, self.stored.embed_bits, **how)
            held = {name: tensor[slice(*own)] for name, tensor in tensors.items()}
        wrong = table.load_state_dict(held, strict=False)
        missing = [
            name for name in wrong.missing_keys if name in held or name in ("weight", "scale")
        ]
        if missing or wrong.unexpected_keys:
            raise FormatError(f"lacks {', '.join(missing)}", tensor=self.name)
        return table

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let a head use the embedding's table."""
        layer.tied_to = [embed_tokens]  # in a list: it is no part of this module
        return layer

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """Rows by their ids."""
        return layer.table(ids)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits."""
        tied = getattr(layer, "tied_to", None)
        if tied is not None and not hasattr(layer, "table"):
            layer.table = _head_of(tied[0].table)
        out = layer.table(x)
        out = out if bias is None else out + bias[: out.shape[-1]]
        if layer.tp_size == 1:
            return out
        return nn.functional.pad(out, (0, layer.num_embeddings_per_partition - out.shape[-1]))


def _head_of(embedding: Any) -> nn.Module:
    """A head that uses an embedding's table."""
    dtype = embedding.like.dtype
    if isinstance(embedding, PackedEmbedding):
        packed = PackedHead(embedding.spec, tied=True, dtype=dtype)
        packed.tie(embedding)
        return packed
    head = CompressedHead(embedding.rows, embedding.cols, embedding.bits, tied=True, dtype=dtype)
    head.tie(embedding)
    return head


def share(rows: int, size: int | None = None) -> tuple[int, int]:
    """This rank's of the rows of a part: evenly, or as vLLM cuts them, `size` each.

    There may be fewer shares than ranks: of key-value heads, which several ranks then have alike.
    """
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    if size is None:
        return rows * rank // ranks, rows * (rank + 1) // ranks
    if rows % size or ranks % (rows // size):
        raise ValueError(f"{rows} rows cannot be cut into {size} for each of {ranks} ranks")
    begin = rank * (rows // size) // ranks * size
    return begin, begin + size


def cut_to(layer: Layer, begin: int, end: int) -> Layer:
    """Some rows of a layer, itself if they are all."""
    return layer if (begin, end) == (0, layer.spec.rows) else cut(layer, begin, end)


def dtypes(spec: LayerSpec) -> dict[str, torch.dtype]:
    """Of all tensors that such a layer may have."""
    return {tensor.name: tensor.dtype_in(spec) for tensor in TENSORS}


def keep_by_name(
    layer: nn.Module, kinds: Mapping[str, torch.dtype]
) -> dict[int, dict[str, Tensor]]:
    """Placeholders for stored tensors; what comes is kept by part and name."""
    arrived: dict[int, dict[str, Tensor]] = {}

    def placeholder(name: str, dtype: torch.dtype) -> nn.Parameter:
        def keep(_: Any, tensor: Tensor, part: str | int | None = None) -> None:
            at = SHARDS.get(part, part) if isinstance(part, str) else part or 0
            arrived.setdefault(at, {})[name] = tensor.clone()  # type: ignore[arg-type]

        # of the right dtype, or vLLM warns
        made = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        made.weight_loader = keep  # type: ignore[attr-defined]
        return made

    for name, dtype in kinds.items():
        layer.register_parameter(name, placeholder(name, dtype))
    return arrived


def checked(spec: LayerSpec, tensors: Mapping[str, Tensor], name: str) -> Layer:
    """A stored layer; FormatError if it is not whole."""
    layer = Layer(spec, dict(tensors))
    try:
        check_stored(layer, name=name)
    except FormatError as error:
        raise error.at(CONFIG) from None
    return layer


def _vllm_linear(x: Tensor, bias: Tensor | None, number: int, rows: int) -> Tensor:
    return _known[number].product(x, bias)


_library = torch.library.Library("skimlm", "FRAGMENT")
_library.define("vllm_linear(Tensor x, Tensor? bias, int number, int rows) -> Tensor")
_library.impl("vllm_linear", _vllm_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("skimlm::vllm_linear")
def _(x: Tensor, bias: Tensor | None, number: int, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)
