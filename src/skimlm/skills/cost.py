"""What a folder of skills costs: tokens of every request, and of a month.

An agent reads names and descriptions of all its skills in every request (the catalogue), and the
whole text of a skill in those that use it. Tokens are counted by a model's tokenizer; without one a
token is taken to be BYTES bytes, and the numbers are said to be estimates.

A compressed skill stands in place of its text: a .skim beside a SKILL.md is looked at; of others it
is said what is usual, SHARES of the text (docs/results.md).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skimlm.errors import FormatError, SkimError
from skimlm.evaluate.report import table
from skimlm.skills import store
from skimlm.skills.document import catalogue_line, find_some
from skimlm.skills.document import read as read_document
from skimlm.skills.splice import token_ids

BYTES = 4  # of a token, where there is no tokenizer
SHARES = {"kv": 0.12, "soft": 0.42}  # of a text's tokens, that usually stand for it


def cost(
    places: Sequence[str | Path], tokenizer: Any = None, requests: int = 10_000, used: float = 1.0
) -> dict[str, Any]:
    """Count a folder's skills, in `requests` a month, of which a share `used` reads one skill."""
    files = find_some(places)
    packed = compressed(files)
    rows: list[dict[str, Any]] = []
    unread = []
    for file in files:
        try:
            document = read_document(file)
        except SkimError as error:
            unread.append(str(error))
            continue
        row = {
            "name": document.name,
            "file": str(file),
            "catalogue": count(tokenizer, catalogue_line(document)),
            "text": count(tokenizer, document.text),
        }
        rows.append(row | {"compressed": packed.get(document.sha256)})
    if not rows:
        raise SkimError(unread[0])
    catalogue = sum(row["catalogue"] for row in rows)
    text = statistics.fmean(row["text"] for row in rows)
    month = {"catalogue": requests * catalogue, "text": round(requests * used * text)}
    month |= {kind: round(share * month["text"]) for kind, share in SHARES.items()}
    return {
        "estimated": tokenizer is None,
        "skills": rows,
        "unread": unread,
        "catalogue": catalogue,
        "text": sum(row["text"] for row in rows),
        "request": catalogue + round(used * text),
        "requests": requests,
        "used": used,
        "month": month,
    }


def count(tokenizer: Any, text: str) -> int:
    """Tokens of a text."""
    if tokenizer is None:
        return -(-len(text.encode()) // BYTES)
    return len(token_ids(tokenizer, text))


def compressed(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The .skim files in the folders of some skills, by their text's hash."""
    found = {}
    for folder in sorted({file.parent for file in files}):
        for path in sorted(folder.glob(f"*{store.SUFFIX}")):
            try:
                facts = store.inspect(path)
            except FormatError:
                continue
            found[facts["text_sha256"]] = {
                "file": str(path),
                "kind": facts["kind"] if facts["k"] is not None else "text",
                "tokens": facts["k"],
                "bytes": facts["bytes"],
            }
    return found


def text(facts: Mapping[str, Any]) -> str:
    """Lay out what `cost` returns."""
    about = "about " if facts["estimated"] else ""
    rows = [["skill", "in the catalogue", "text", "compressed"]]
    for row in sorted(facts["skills"], key=lambda row: -row["text"]):
        made = row["compressed"]
        shown = f"{made['kind']}, {made['tokens'] or row['text']:,}" if made else "-"
        rows.append([row["name"], f"{row['catalogue']:,}", f"{row['text']:,}", shown])
    rows.append(["all", f"{facts['catalogue']:,}", f"{facts['text']:,}", ""])
    month = facts["month"]
    lines = [
        table(rows),
        "",
        f"{len(facts['skills']):,} skills, "
        + ("tokens estimated by bytes: --model counts them" if about else "tokens of the model"),
        f"every request: {about}{facts['catalogue']:,} for names and descriptions; with one skill"
        f" read {about}{facts['request']:,}",
        f"a month of {facts['requests']:,} requests, {facts['used']:.0%} of which read a skill:",
        table(
            [
                ["", "million tokens"],
                ["names and descriptions", f"{month['catalogue'] / 1e6:.1f}"],
                ["skills, as text", f"{month['text'] / 1e6:.1f}"],
                [f"as soft tokens (usually {SHARES['soft']:.0%})", f"{month['soft'] / 1e6:.1f}"],
                [f"as keys and values ({SHARES['kv']:.0%}, none read)", f"{month['kv'] / 1e6:.1f}"],
            ]
        ),
    ]
    lines += [f"not read: {line}" for line in facts["unread"]]
    return "\n".join(lines)
