"""Calibration text -> token windows -> what the fit needs to know about every linear.

With x_t the input of a linear at token t and g_t = d loss / d z_t the gradient at its output
z = x W^T (loss = sum over tokens of the cross entropy, so that layers and windows compare):
    hessian        H  = sum_t x_t x_t^T                           layer-wise (GPTQ)
    end_hessian    H~ = sum_t (mean_i g_ti^2) x_t x_t^T           end loss (GuidedQuant, 2505.07004)
    fisher         F_ij = sum_windows (sum_t g_ti x_tj)^2         SqueezeLLM, 2306.07629
    row_weight     rho_i = sum_t g_ti^2 / sum_t mean_i g_ti^2     what the mean over rows hides
Products run in bfloat16 (2-5x faster on CPUs with AMX), sums over windows in float32. A few windows
at a time go through the blocks in order, so nothing here needs more than their activations. The
Fisher diagonal settles on far fewer windows than H~ does (SqueezeLLM: 10 sequences), so only the
first `fisher_windows` pay for it.
"""

import inspect
import json
import os
import random
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skimlm.errors import SkimError
from skimlm.models.head import final_hidden
from skimlm.models.hooks import forwards_replaced, frozen
from skimlm.models.tokenizer import prefix_ids
from skimlm.storage.safetensors import finite
from skimlm.train.losses import backward_from_loss, cross_entropy_gradient, next_tokens

TEXT_KEYS = ("text", "prefix,gold_completion")
BATCH = 2  # windows that go through the model together
Observe = Callable[[str, Tensor, Tensor], None]


@dataclass
class Statistics:
    """Sums over the calibration tokens of one linear [r, c]; see the module docstring."""

    end_hessian: Tensor  # [c, c] float32
    fisher: Tensor  # [r, c] float32
    row_weight: Tensor  # [r] float32, mean 1
    hessian: Tensor | None = None  # [c, c] float32, shared by linears that read the same input
    tokens: int = 0

    @property
    def input_rms(self) -> Tensor:
        """Root mean square of every input channel [c] (needs `hessian`)."""
        if self.hessian is None:
            raise ValueError("input_rms needs the layer-wise hessian, which was not collected")
        return (self.hessian.diagonal() / max(self.tokens, 1)).clamp(min=0).sqrt()


def default_text() -> list[str]:
    """The built-in calibration documents: docstrings of Python's standard library, no download.

    A weak substitute for text like the model's own use; pass `--text` for quality.
    """
    names = (
        "argparse asyncio collections csv datetime decimal email functools http.server inspect "
        "ipaddress itertools json logging math os pathlib pickle random re shutil smtplib socket "
        "sqlite3 statistics string subprocess tarfile tempfile textwrap threading tkinter "
        "urllib.request zipfile"
    ).split()
    documents = []
    for name in names:
        try:
            module = __import__(name, fromlist=["_"])
        except ImportError:  # e.g. tkinter is left out of some distributions
            continue
        parts = [inspect.getdoc(module) or ""]
        for _, item in sorted(vars(module).items()):
            home = getattr(item, "__module__", None) or ""  # None: made by exec
            if isinstance(item, type | types.FunctionType) and home.startswith(name):
                parts.append(inspect.getdoc(item) or "")
                members = vars(item).values() if isinstance(item, type) else ()
                parts += [inspect.getdoc(m) or "" for m in members if inspect.isfunction(m)]
        text = "\n\n".join(dict.fromkeys(p for p in parts if len(p) > 40))
        if text:
            documents.append(text)
    return documents


def read_documents(path: str | os.PathLike[str], text_key: str | None = None) -> list[str]:
    """Documents of a calibration file: each row of a .jsonl, or a text file as one document.

    The value of `text_key` is the text of a row; several keys, comma separated, are joined without
    a separator. Raises SkimError naming the line.
    """
    path = Path(path)
    try:
        raw = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise SkimError(
            f"{path}: {str(error.strerror).lower()}; --text takes a text or .jsonl file"
        ) from None
    except UnicodeDecodeError as error:
        raise SkimError(f"{path}: not UTF-8 (byte {error.start}); convert it first") from None
    if path.suffix != ".jsonl":
        return [raw]
    documents = []
    for number, line in enumerate(raw.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SkimError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise SkimError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        if text_key is None:
            text_key = next((k for k in TEXT_KEYS if all(p in row for p in k.split(","))), None)
        keys = text_key.split(",") if text_key else []
        if not keys or not all(isinstance(row.get(k), str) for k in keys):
            raise SkimError(
                f"{path}, line {number}: no text under {text_key or 'text'!r}; it has "
                f"{', '.join(row)}: name the right one with --text-key"
            )
        documents.append("".join(row[k] for k in keys))
    return documents


def windows(
    documents: list[str], tokenizer, samples: int, seq_len: int, seed: int, origin: str = "text"
) -> Tensor:
    """Token windows int64 [n, seq_len], n <= samples: documents shuffled, joined by EOS, cut.

    Every window begins with what the tokenizer puts before a text (BOS). A single document is cut
    into windows first and those are shuffled. Raises SkimError when there is not one window.
    """
    prefix = prefix_ids(tokenizer)
    size = seq_len - len(prefix)  # tokens of text in a window
    if size < 1:
        raise SkimError(
            f"seq-len must be more than the {len(prefix)} tokens that begin every window of this "
            f"model, got {seq_len}"
        )
    order = random.Random(seed)
    if len(documents) > 1:
        documents = documents[:]
        order.shuffle(documents)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(documents) > 1 and len(ids) >= samples * size:
            break
    count = len(ids) // size
    if count == 0:
        raise SkimError(
            f"{origin}: {len(ids)} tokens are fewer than one window of {size}; "
            "give more text or a smaller --seq-len"
        )
    cut = torch.tensor(ids[: count * size]).view(count, size)
    if len(documents) == 1:
        cut = cut[torch.tensor(order.sample(range(count), count))]
    cut = cut[:samples]
    return torch.cat([torch.tensor(prefix, dtype=torch.long).expand(len(cut), -1), cut], 1)


class _Observe(torch.autograd.Function):
    """z = x W^T + b whose backward also feeds x and dz to `observe`; W needs no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, observe):
        ctx.save_for_backward(x, weight)
        ctx.observe = observe
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        ctx.observe(x, gradient)
        return gradient @ weight, None, None, None


@contextmanager
def observed(linears: Mapping[str, nn.Linear], observe: Observe) -> Iterator[None]:
    """Within the block, every backward pass calls observe(name, x [n, t, c], dz [n, t, r])."""

    def watch(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: _Observe.apply(x, linear.weight, linear.bias, partial(observe, name))

    with forwards_replaced(linears, watch):
        yield


class Sums:
    """The sums of `Statistics` for some linears while they are taken, a batch of windows at a time.

    The same windows in the same batches give the same bits, whichever linears are taken together.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], layerwise: bool, fisher_windows: int
    ) -> None:
        self.of: dict[str, Statistics] = {}
        self.fisher_windows = fisher_windows
        self.first, self.count = 0, 0
        for name, linear in linears.items():
            r, c = linear.weight.shape
            sums = torch.zeros(c, c), torch.zeros(r, c), torch.zeros(r)
            self.of[name] = Statistics(*sums, torch.zeros(c, c) if layerwise else None)

    def begin(self, first: int, count: int) -> None:
        """What is observed next belongs to `count` windows from number `first` on."""
        self.first, self.count = first, count

    def observe(self, name: str, x: Tensor, g: Tensor) -> None:
        """Add the inputs x [n, t, c] and the gradients g [n, t, r] of a linear's outputs."""
        s = self.of[name]
        # Some families (opt) flatten windows and tokens before a linear.
        x, g = x.reshape(self.count, -1, x.shape[-1]), g.reshape(self.count, -1, g.shape[-1])
        for window in range(min(self.count, self.fisher_windows - self.first)):
            s.fisher += (g[window].T @ x[window]).float().square_().cpu()
        x, g = x.flatten(0, 1), g.flatten(0, 1)
        squares = g.float().square()
        weighted = (x * squares.mean(1, keepdim=True).sqrt()).to(x.dtype)
        s.end_hessian += (weighted.T @ weighted).float().cpu()
        s.row_weight += squares.sum(0).cpu()
        if s.hessian is not None:
            s.hessian += (x.T @ x).float().cpu()
        s.tokens += len(x)

    def finished(self, dtype: torch.dtype) -> dict[str, Statistics]:
        """The sums, row weights with mean 1; SkimError where the model overflowed its `dtype`."""
        for name, s in self.of.items():
            mean = s.row_weight.mean()
            s.row_weight = s.row_weight / mean if mean > 0 else torch.ones_like(s.row_weight)
            for matrix in (s.end_hessian, s.fisher, s.hessian):
                if matrix is not None and not finite(matrix):
                    raise SkimError(
                        f"{name}: calibration overflowed (not finite): the model's activations do "
                        f"not fit {dtype}; use other text"
                    )
        return self.of


def statistics(
    model: Any,
    linears: dict[str, nn.Linear],
    ids: Tensor,
    *,
    layerwise: bool = False,
    fisher_windows: int = 64,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Statistics]:
    """Statistics of every linear over the token windows `ids` [n, t], `batch` windows at a time.

    A linear that saw no token (an expert never routed to) keeps zero sums. `layerwise` also
    collects H.
    """
    device = next(model.parameters()).device
    sums = Sums(linears, layerwise, fisher_windows)
    table = model.get_input_embeddings()
    entry = table.register_forward_hook(lambda *a: a[2].requires_grad_())
    try:
        with frozen(model), observed(linears, sums.observe):
            for i in range(0, len(ids), batch):
                part = ids[i : i + batch].to(device)
                sums.begin(i, len(part))
                hidden = final_hidden(model, part)
                backward_from_loss(hidden, cross_entropy_gradient(model, next_tokens(part)))
                if progress:
                    progress(min(i + batch, len(ids)), len(ids))
    finally:
        entry.remove()
    return sums.finished(next(model.parameters()).dtype)
