"""The same folders as before: every recipe, method and option on tiny models of eight families.

    python bench/same.py models MODELS            the models and a text, made once
    PYTHON bench/same.py run MODELS OUT           compresses them all with the skimlm of PYTHON
    python bench/same.py compare OUT OUT          every tensor of both, and what the configs say

`run` goes through the command line alone, so PYTHON may have another version of skimlm. `--model
FILE` adds a model of your own, by the cases named with `--only`.
"""

import argparse
import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "opt", "gpt_neox")
CASES = {
    "paper": "--recipe paper",
    "fast": "--recipe fast",
    "best": "--recipe best",
    "fast-2": "--recipe fast --bits 2",
    "fast-4.5": "--recipe fast --bits 4.5",
    "fast-6.5": "--recipe fast --bits 6.5",
    "paper-4": "--recipe paper --bits 4",
    "index-3": "--recipe fast --index-bits 3",
    "index-7": "--recipe fast --index-bits 7",
    "size": "--recipe fast --size 85KB",
    "tables-16": "--recipe fast --embed-bits 16",
    "tables-4": "--recipe fast --embed-bits 4",
    "exclude": "--recipe fast --exclude *.0.*",
    "seed": "--recipe fast --seed 3 --samples 6 --seq-len 24",
    "2:4": "--recipe fast --sparsity 2:4 --bits 3",
    "half": "--recipe fast --sparsity 0.5 --bits 3",
    "adapters": "--recipe fast --rank 0.1 --bits 6",
    "best-2:4": "--recipe best --sparsity 2:4 --rank 0.1 --bits 6.5",
    "slim-paper": "--method slim --recipe paper",
    "slim-fast": "--method slim --recipe fast",
    "slim-best": "--method slim --recipe best",
    "slim-dense": "--method slim --recipe fast --sparsity none --rank 0 --bits 3",
    "slim-half": "--method slim --recipe best --sparsity 0.5 --adapter-bits 16 --bits 3",
    "streamed-paper": "--recipe paper --workers 1",
    "streamed-fast": "--recipe fast --workers 1",
    "streamed-best": "--recipe best --workers 1",
}
USUAL = {"--bits": "3.2", "--samples": "10", "--seq-len": "32"}


def make_models(place: Path) -> None:
    """Tiny random models, and a text of 30 KB."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from conftest import bos_tokenizer, byte_tokenizer, tiny_model

    for family in FAMILIES:
        tiny_model(family, dtype=torch.bfloat16).save_pretrained(place / family)
        byte_tokenizer().save_pretrained(place / family)
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(place / "llama-bos")
    bos_tokenizer().save_pretrained(place / "llama-bos")
    lines = (f"{i} times {i + 3} is {i * (i + 3)}, the last digit {i % 7}" for i in range(700))
    (place / "text.txt").write_text(". ".join(lines))


def arguments(case: str, whole: bool) -> list[str]:
    """The options of a case; `whole` models keep the recipe's own windows."""
    options = CASES[case].split()
    usual = {} if whole else USUAL
    if "--method" in options:
        usual = {k: v for k, v in usual.items() if k != "--bits"}
    given = "--size" in options or "--index-bits" in options
    for name, value in usual.items():
        if name not in options and not (given and name == "--bits"):
            options += [name, value]
    return options


def command(*args: object) -> tuple[int, str]:
    """Run skimlm in this process: its exit status and the last line of stderr."""
    error, sys.argv = io.StringIO(), ["skimlm", *map(str, args)]
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_module("skimlm", run_name="__main__", alter_sys=False)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    lines = [line for line in error.getvalue().splitlines() if line.startswith("error")]
    return status, lines[-1] if lines else ""


def run(models: Path, out: Path, only: list[str], extra: list[Path], text: Path | None) -> None:
    """Every case of every model into OUT/MODEL/CASE; what was refused into refused.json."""
    import torch

    torch.set_num_threads(int(torch.get_num_threads()) if extra else 1)
    refused = {}
    for model in extra or sorted(p for p in models.iterdir() if p.is_dir()):
        for case in only or CASES:
            place = out / model.stem / case
            if place.exists():
                continue
            how = [*arguments(case, bool(extra)), "--text", text or models / "text.txt"]
            status, line = command("compress", model, place, *how, "--cache-dir", out / "cache")
            if status:
                refused[f"{model.stem}/{case}"] = line.replace(str(out), "OUT")
            print(model.stem, case, line or "done", flush=True)
    (out / "refused.json").write_text(json.dumps(refused, indent=1))


def compare(a: Path, b: Path) -> int:
    """Print what differs, by case; the number of cases that do."""
    import torch
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        found = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stream:
                found |= {name: stream.get_tensor(name) for name in stream.keys()}
        return found

    names = {str(p.parent.relative_to(x)) for x in (a, b) for p in x.glob("*/*/config.json")}
    count, different = 0, []
    for name in sorted(names):
        if not (a / name).exists() or not (b / name).exists():
            different.append(f"{name}: only in {a if (a / name).exists() else b}")
            continue
        x, y = tensors(a / name), tensors(b / name)
        count += len(x)
        wrong = [n for n in sorted(x.keys() | y.keys()) if not _equal(x.get(n), y.get(n))]
        if wrong:
            different.append(f"{name}: {len(wrong)} of {len(x)} tensors, first {wrong[0]}")
        configs = [json.loads((p / name / "config.json").read_text()) for p in (a, b)]
        for config in configs:
            config.get("quantization_config", {}).pop("provenance", None)
        if configs[0] != configs[1]:
            both = configs[0] | configs[1]
            keys = sorted(k for k in both if configs[0].get(k) != configs[1].get(k))
            different.append(f"{name}: config.json differs in {', '.join(keys)}")
    refused = [json.loads((p / "refused.json").read_text()) for p in (a, b)]
    for name in sorted(refused[0] | refused[1]):
        if refused[0].get(name) != refused[1].get(name):
            different.append(f"{name}: {refused[0].get(name)} -> {refused[1].get(name)}")
    print("\n".join(different))
    print(f"{len(names)} folders, {count} tensors compared, {len(different)} differences")
    return len(different)


def _equal(x, y) -> bool:
    return x is not None and y is not None and x.dtype == y.dtype and x.equal(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=["models", "run", "compare"])
    parser.add_argument("places", nargs="+", type=Path)
    parser.add_argument("--only", nargs="*", default=[], choices=CASES)
    parser.add_argument("--model", nargs="*", default=[], type=Path)
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    if args.step == "models":
        args.places[0].mkdir(parents=True)
        make_models(args.places[0])
    elif args.step == "run":
        args.places[1].mkdir(parents=True, exist_ok=True)
        run(*args.places, args.only, args.model, args.text)
    else:
        sys.exit(compare(*args.places) > 0)


if __name__ == "__main__":
    main()
