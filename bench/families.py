"""docs/families.md from a run over every family: one line each, `NAME VERDICT SECONDS s REASONS`.

    python bench/families.py RUN [RUN ...] --images RUN > docs/families.md

Lines of a later RUN replace those of an earlier one. A run compresses a tiny random model of each
family by skim, slim and streamed, and judges what comes out; that of `--images` is wrappers.py's.
"""

import argparse
import re
from pathlib import Path
from textwrap import fill

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from provenance import provenance

LINE = re.compile(r"^(\S+)\s+(whole|partial|refused|crash)\s+\d+ s\s*(.*)$")
HEAD = """# Families

What comes out of a tiny random model of each architecture of transformers {version}, through
`skimlm compress` (skim, slim, and streamed):

- **whole**: the folder loads with nothing missing, gives the logits of its own dense export, and
  decodes with a cache as without; streamed it is the same byte for byte; no large matrix is dense.
- **partial**: it runs, but some of that does not hold: the reason follows.
- **refused**: one line says why. **crash**: a traceback, or wrong numbers.
- **alone**: transformers fails, or contradicts itself, on the tiny original, with nothing of ours
  in the process.

{counts}. {provenance}

| family | | why |
|---|---|---|
"""

IMAGES = """
## Models that see

Tiny random ones, compressed, then shown an image (`bench/wrappers.py`). Whole: everything but the
language model is bit for bit what it was, and with an image the folder gives the logits and the
tokens of its own dense export; streamed it is the same byte for byte.

| wrapper | | why |
|---|---|---|
"""

# what a tiny model meets in transformers alone, with nothing of ours in the process
ALONE = {
    "bailing_hybrid": "transformers refuses a cache of linear attention alone; with a layer of "
    "full attention, as published, the family is whole",
    "kimi_linear": "transformers refuses a cache of linear attention alone; with a layer of "
    "full attention, as published, the family is whole",
    "longcat_flash": "transformers' rotation has another width than these heads; with heads of 8 "
    "the family is whole",
    "llama4_multimodal": "transformers' own forward fails without an image",
    "xlstm": "transformers' own forward fails at this width; at 256 it runs in float32 only, and "
    "bfloat16 is refused in one line",
    "dots3_note_text": "the originals differ as much: 6 of 6 seeds, by 0.15 to 1.8",
}

OTHERS = """
Other causal language models of this transformers were not run: most are encoders, models of several
parts, or the wrapper of a family above.

{names}
"""


def read(runs: list[str]) -> dict[str, tuple[str, str]]:
    """Verdict and reasons by family."""
    found: dict[str, tuple[str, str]] = {}
    for run in runs:
        for line in Path(run).read_text().splitlines():
            if match := LINE.match(line):
                name, verdict, why = match.groups()
                if verdict == "crash" and name in ALONE:
                    verdict, why = "alone", f"{ALONE[name]} ({why})"
                found[name] = verdict, re.sub(r"/\S*/M\S*: ", "", why)
    return found


def print_rows(found: dict[str, tuple[str, str]]) -> None:
    for name, (verdict, why) in sorted(found.items()):
        print(f"| {name} | {verdict} | {why.replace('|', ' ')} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--images", required=True)
    args = parser.parse_args()
    found = read(args.runs)
    verdicts = [verdict for verdict, _ in found.values()]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts)[::-1]))
    made_by = dict(version=transformers.__version__, provenance=provenance())
    print(HEAD.format(counts=f"{len(found)} families: {counts}", **made_by), end="")
    print_rows(found)
    print(IMAGES, end="")
    print_rows(read([args.images]))
    others = ", ".join(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - found.keys()))
    print(OTHERS.format(names=fill(others, 120, break_on_hyphens=False)), end="")


if __name__ == "__main__":
    main()
