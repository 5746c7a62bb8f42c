"""The installed wheel from another directory: compress a tiny model, inspect and score the result.

Run by `make test`; pytest does not collect it. Only what lies in the current directory may be
imported as `skimlm`, never the checkout.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import skimlm

sys.path.insert(0, str(Path(__file__).parent))

from conftest import byte_tokenizer, tiny_model


def command(*args: object) -> dict:
    """Run a skimlm command with --json and return its object."""
    run = [sys.executable, "-m", "skimlm", *map(str, args), "--json"]
    return json.loads(subprocess.run(run, check=True, stdout=subprocess.PIPE).stdout)


assert Path(skimlm.__file__).is_relative_to(Path.cwd()), f"{skimlm.__file__} is not the wheel's"
facts = command("info")
assert Path(facts["library"]).is_relative_to(Path.cwd()), facts
with tempfile.TemporaryDirectory() as folder:
    model, out = Path(folder, "model"), Path(folder, "out")
    tiny_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    options = "--recipe fast --bits 4 --samples 8 --seq-len 128".split()
    report = command("compress", model, out, *options, "--cache-dir", Path(folder, "cache"))
    seen = command("inspect", out)
    assert seen["bytes"] == report["bytes"] and 3.99 < seen["bits_per_weight"] <= 4, (report, seen)
    score = command("eval", out, "--seq-len", 64, "--limit", 2)
    assert score["windows"] == 2 and score["perplexity"] > 1, score
print(f"smoke test passed: the wheel works elsewhere ({facts['isa']})")
