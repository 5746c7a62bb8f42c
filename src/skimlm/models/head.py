"""A model's body and head apart: final hidden states, and logits of a part of them at a time.

Logits of a whole window (2048 x 49152 in float32: 400 MB) never need to stand at once. The head is
run by the model's own forward, with its body replaced by one that returns the given hidden states,
so that soft caps, scalings and multipliers of any family apply.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from skimlm.errors import SkimError, first_line
from skimlm.models.blocks import decoder_of
from skimlm.models.hooks import forward_replaced


class BodyOutput(BaseModelOutputWithPast):
    """What a body returns: hidden states, and None for whatever else a family's head looks for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def final_hidden(model: Any, ids: Tensor) -> Tensor:
    """Hidden states [n, t, d] that the body of `model` hands to its head for `ids` [n, t]."""
    with _of_its_own(model):
        return decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [..., vocab] of hidden states [..., d], in the model's dtype and differentiable."""
    states = hidden.reshape(1, -1, hidden.shape[-1])
    ids = states.new_zeros(states.shape[:2]).long()  # only their shape is looked at
    output = BodyOutput(last_hidden_state=states)
    calls = []  # the replaced body notes that it was asked

    def body(*_args: Any, **_kwargs: Any) -> Any:
        calls.append(1)
        return output

    with forward_replaced(decoder_of(model), body), _of_its_own(model):
        logits = model(input_ids=ids, use_cache=False).logits
    if not calls:  # its logits would be those of the made-up ids
        raise SkimError(f"{type(model).__name__} does not call its decoder: it cannot be scored")
    return logits.view(*hidden.shape[:-1], logits.shape[-1])


def behind_head(model: Any, outputs: Tensor) -> Tensor:
    """Logits [n, vocab] that the model makes of what its head puts out [n, vocab], differentiable.

    They are the same but for soft caps, scales and biases of a family.
    """
    head = model.get_output_embeddings()
    with forward_replaced(head, lambda _x: outputs[None]):
        return head_logits(model, outputs.new_zeros(len(outputs), head.weight.shape[1]))


@contextmanager
def _of_its_own(model: Any) -> Iterator[None]:
    """Turn what transformers' code of a family raises into one line (xlstm, in bfloat16)."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        place = e.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        raised_in = "" if place is None else place.tb_frame.f_globals.get("__name__", "")
        if not raised_in.startswith("transformers."):
            raise
        raise SkimError(
            f"{type(model).__name__} of transformers {transformers.__version__} in {model.dtype} "
            f"does not run: {first_line(e)}"
        ) from e
