"""Calibration text: files -> documents -> token windows, and the built-in text."""

import inspect
import json
import os
import random
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimlm.errors import SkimError, first_line, naming
from skimlm.models.tokenizer import prefix_ids, well_formed

TEXT_KEYS = ("text", "prefix,gold_completion")
CHAT_KEYS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
ROWS = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".arrow", ".feather", ".csv", ".tsv", ".xlsx")
OTHER_KINDS = {  # by their first bytes
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "PDF",
}


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


def read_text(path: str | os.PathLike[str]) -> str:
    """The characters of a UTF-8 file as they are, without the mark that may stand before them."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SkimError(
            f"{path}: {str(error.strerror).lower()}; --text takes a text or .jsonl file"
        ) from None
    for mark, kind in OTHER_KINDS.items():
        if data.startswith(mark):
            raise SkimError(f"{path}: {kind}, not text; convert it to UTF-8 text or .jsonl")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SkimError(f"{path}: not UTF-8 (byte {error.start}); convert it first") from None


def read_documents(
    path: str | os.PathLike[str], text_key: str | None = None, tokenizer: Any = None
) -> list[str]:
    """Documents of a calibration file: rows of JSON, or a text file as one document.

    .jsonl and .ndjson have a row in each line, .json has those lines or one array of rows. The
    value of `text_key` is the text of a row; several keys, comma separated, are joined without a
    separator. Chats (`messages`, `conversations`) go through the template of `tokenizer`. Special
    tokens that are written out count as those tokens. Raises SkimError naming the line.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in TABLES:
        raise SkimError(f"{path}: a table is not read; convert it to text or .jsonl")
    text = read_text(path)
    if kind not in ROWS:
        return [text]
    documents: list[str] = []
    for place, row in _rows(path, text, kind):
        if isinstance(row, dict) and text_key is None:
            text_key = next((k for k in TEXT_KEYS if all(p in row for p in k.split(","))), None)
        with naming(place):
            documents.append(well_formed(_document(row, text_key, tokenizer)))
    return documents


def _rows(path: Path, text: str, kind: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of every row of a JSON file."""
    if kind == ".json":
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            pass  # a row in each line, then; a line that is none is named below
        else:
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"{path}, row {n}", row) for n, row in enumerate(rows, 1))
            return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SkimError(f"{place}: not JSON ({first_line(error)})") from None


def _document(row: Any, text_key: str | None, tokenizer: Any) -> str:
    """The text of a row."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise SkimError(f"expected an object, got {type(row).__name__}")
    keys = text_key.split(",") if text_key else []
    if keys and all(isinstance(row.get(k), str) for k in keys):
        return "".join(row[k] for k in keys)
    chat = text_key if text_key in row else next((k for k in CHAT_KEYS if k in row), None)
    if chat is not None and text_key in (None, chat) and isinstance(row[chat], list):
        return _chat(row[chat], tokenizer)
    raise SkimError(
        f"no text under {text_key or 'text'!r}; it has {', '.join(row) or 'no keys'}: "
        "name the right one with --text-key"
    )


def _chat(messages: list[Any], tokenizer: Any) -> str:
    """A chat as the model reads it."""
    if not getattr(tokenizer, "chat_template", None):
        raise SkimError("a chat, but the tokenizer has no chat template; give rows with a text")
    turns = []
    for message in messages:
        role, content = None, None
        if isinstance(message, dict):
            role = message.get("role", message.get("from"))
            content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise SkimError("a message is a role and a text, in words; this chat has another kind")
        turns.append({"role": ROLES.get(role, role), "content": content})
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # whatever a template raises
        raise SkimError(f"the chat template refuses this chat: {first_line(error)}") from None


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
