"""Perplexity of a causal language model on a text, with its standard error.

The text is tokenised once, as it is, and cut into windows that do not overlap; what is left at the
end is dropped. Each window of `seq_len` tokens is read on its own and all but its first are
predicted:

    nll_w = mean_t -log p(x_t | x_0 .. x_{t-1})          one number per window
    nll   = mean_w nll_w                                 = mean over all predicted tokens
    perplexity = exp(nll)
    stderr     = perplexity * std(nll_w, ddof=1) / sqrt(windows)          (delta method)

Where the tokenizer puts a BOS token before a text, that is what every window begins with, in place
of its first token: so it is never predicted, and every token of the text in the window is.

The model's body runs once per window. Its head runs over parts of the window, through the model's
own forward: so soft-capping, logit scales and biases are the model's, whatever its family. At most
MAX_LOGITS logits stand in the model's dtype, and CHUNK tokens of them in fp32, in one buffer.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimlm.errors import SkimError
from skimlm.models.architecture import check_positions
from skimlm.models.head import final_hidden, head_logits
from skimlm.models.tokenizer import check_ids, prefix_ids
from skimlm.pipeline import text as text_files

CHUNK = 256  # tokens of logits in fp32 at once: 50 MB at a vocabulary of 49,152
MAX_LOGITS = 2**27  # 256 MB in bf16: all of 2048 tokens at 49,152, 512 at a time at 262,144


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` measured; `nll` has one mean per window, for paired comparisons."""

    perplexity: float
    perplexity_stderr: float | None  # None with a single window
    nll: list[float]
    windows: int
    seq_len: int
    tokens: int  # in the whole text
    predicted_tokens: int
    bos: str
    seconds: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict, JSON-ready."""
        return asdict(self)


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    seq_len: int = 2048,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Perplexity:
    """Score `text` in windows of `seq_len` tokens, the first `limit` of them if given."""
    check_positions(model.config, seq_len)
    prefix = torch.tensor(prefix_ids(tokenizer), dtype=torch.long)
    size = seq_len - len(prefix)  # tokens of text in a window
    if size < 1:
        raise SkimError(f"seq-len must be more than {len(prefix)} for this model, got {seq_len}")
    given = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(given, dtype=torch.long)
    windows = len(ids) // size
    if not windows:
        raise SkimError(
            f"text too short: {len(ids)} tokens, one window needs {size};"
            " give a longer text or a smaller --seq-len"
        )
    windows = min(windows, limit or windows)
    check_ids(model, ids[: windows * size], tokenizer)
    unpredicted = max(len(prefix), 1)
    model.eval()
    nll = []
    start = time.perf_counter()
    with torch.inference_mode():
        for window in range(windows):
            piece = torch.cat([prefix, ids[window * size : (window + 1) * size]])
            losses = token_nll(model, piece[None].to(model.device))[unpredicted - 1 :]
            nll.append(float(losses.mean(dtype=torch.float64)))
            if not math.isfinite(nll[-1]):
                raise SkimError(f"window {window + 1}: the model's output is not finite")
            if progress:
                progress("perplexity", window + 1, windows)
    seconds = time.perf_counter() - start
    value, stderr = summarise(nll)
    return Perplexity(
        perplexity=value,
        perplexity_stderr=stderr,
        nll=nll,
        windows=windows,
        seq_len=seq_len,
        tokens=len(ids),
        predicted_tokens=windows * (seq_len - unpredicted),
        bos=bos_rule(tokenizer),
        seconds=seconds,
        tokens_per_second=windows * seq_len / seconds,
    )


def summarise(nll: list[float]) -> tuple[float, float | None]:
    """Return perplexity and its standard error from the windows' mean negative log-likelihoods."""
    value = math.exp(statistics.fmean(nll))
    if len(nll) < 2:
        return value, None
    return value, value * statistics.stdev(nll) / math.sqrt(len(nll))


def bos_rule(tokenizer: Any) -> str:
    """Say what every window begins with."""
    prefix = prefix_ids(tokenizer)
    if not prefix:
        return "none (the tokenizer adds none)"
    names = "".join(tokenizer.convert_ids_to_tokens(prefix))
    return f"{names} begins every window, not counted (the tokenizer adds it)"


def token_nll(model: Any, ids: Tensor) -> Tensor:
    """Return the negative log-likelihood of `ids[0, 1:]` in fp32, `[t - 1]`."""
    result = torch.empty(ids.shape[1] - 1, device=ids.device)
    buffer: Tensor | None = None
    for start, logits in _logits(model, ids[:, :-1]):
        if buffer is None:
            buffer = torch.empty(min(CHUNK, len(logits)), logits.shape[1], device=ids.device)
        for a in range(0, len(logits), CHUNK):
            b = min(a + CHUNK, len(logits))
            chunk = buffer[: b - a].copy_(logits[a:b])
            target = ids[0, start + a + 1 : start + b + 1, None]
            nll = -chunk.gather(1, target)[:, 0]
            # In place: fresh memory of this size costs more in page faults than the arithmetic.
            top = chunk.amax(1, keepdim=True)
            result[start + a : start + b] = nll + chunk.sub_(top).exp_().sum(1).log_() + top[:, 0]
    return result


def _logits(model: Any, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first position, logits `[n, vocab]` in the model's dtype) over `ids[1, t]`."""
    hidden = final_hidden(model, ids)[0]
    step = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    for a in range(0, ids.shape[1], step):
        yield a, head_logits(model, hidden[a : a + step])


def read_text(path: str | Path) -> str:
    """Return the characters of a UTF-8 file as they are: no newline is translated."""
    if Path(path).suffix.lower() in (*text_files.ROWS, *text_files.TABLES):
        raise SkimError(f"{path}: rows are not scored one by one; give a text file")
    return text_files.read_text(path)


def wikitext(path: str | Path) -> str:
    r"""Return the customary text of a raw WikiText file: ' \n' rows empty, joined by "\n\n"."""
    rows = read_text(path).removesuffix("\n").split("\n")
    return "\n\n".join("" if row == " " else row + "\n" for row in rows)


def held_out_text() -> tuple[str, str]:
    """Return (text, name) of an evaluation text that every Python carries: its language reference.

    Disjoint from the built-in calibration text, which is the library's sources and docstrings.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text, f"language reference of Python {platform.python_version()} (pydoc_data.topics)"
