"""Calibration text: files -> documents -> token windows, and the built-in text."""

import inspect
import json
import os
import random
import types
from pathlib import Path

import torch
from torch import Tensor

from skimlm.errors import SkimError
from skimlm.models.tokenizer import prefix_ids

TEXT_KEYS = ("text", "prefix,gold_completion")


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
