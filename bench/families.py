"""docs/families.md from a run over every family: one line each, `NAME VERDICT SECONDS s REASONS`.

    python bench/families.py RUN [RUN ...] > docs/families.md

Lines of a later RUN replace those of an earlier one. A run compresses a tiny random model of each
family by skim, slim and streamed, and judges what comes out.
"""

import re
import sys
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

{counts}. {provenance}

| family | | why |
|---|---|---|
"""

OTHERS = """
Other causal language models of this transformers were not run: most are encoders, models of several
parts, or the wrapper of a family above.

{names}
"""


def main() -> None:
    found: dict[str, tuple[str, str]] = {}
    for run in sys.argv[1:]:
        for line in Path(run).read_text().splitlines():
            if match := LINE.match(line):
                found[match[1]] = match[2], re.sub(r"/\S*/M\S*: ", "", match[3])
    verdicts = [verdict for verdict, _ in found.values()]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts)[::-1]))
    made_by = dict(version=transformers.__version__, provenance=provenance())
    print(HEAD.format(counts=f"{len(found)} families: {counts}", **made_by), end="")
    for name, (verdict, why) in sorted(found.items()):
        print(f"| {name} | {verdict} | {why.replace('|', ' ')} |")
    others = ", ".join(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - found.keys()))
    print(OTHERS.format(names=fill(others, 120, break_on_hyphens=False)), end="")


if __name__ == "__main__":
    main()
