"""A checkpoint at several budgets: perplexity, seconds, peak memory against the plan, a sample.

    python bench/models.py MODEL --data DIR --scratch DIR --out results [--bits 4 3.2]

MODEL is a folder or a GGUF file, taken as it is. DIR holds calib/c4_1480docs.jsonl and
wikitext2/test.txt. The first budget calibrates; later ones find the analysis, as a user's would.
Memory is the most the processes of a command held together, read five times a second.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from provenance import provenance
from stream_7b import measured

PROMPT = "def fibonacci(n):\n"


def sample(model, log):
    """What a model makes of a prompt, greedily."""
    how = ["--raw", "--temperature", "0", "--max-new-tokens", "60"]
    command = [sys.executable, "-m", "skimlm", "generate", model, PROMPT, *how, "--json"]
    with log.open("w") as errors:
        done = subprocess.run(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    return json.loads(done.stdout) if not done.returncode else sys.exit(log.read_text()[-2000:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", nargs="+", default=["4", "3.2"])
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--samples", default="128")
    parser.add_argument("--seq-len", default="512")
    parser.add_argument("--windows", default="8", help="of 2048 tokens for the perplexity")
    parser.add_argument("--max-memory", default=None)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    log = args.scratch / "models.log"
    text = ["--text", args.data / "wikitext2/test.txt", "--limit", args.windows]
    found = {"provenance": provenance(), "model": args.model.name, "runs": []}
    for bits in (None, *args.bits):
        run = {"bits": bits}
        model = args.model
        if bits is not None:
            model = args.scratch / f"{args.model.stem}-{bits}"
            command = ["compress", args.model, model, "--bits", bits, "--force"]
            command += ["--recipe", args.recipe]
            command += ["--samples", args.samples, "--seq-len", args.seq_len]
            command += ["--text", args.data / "calib/c4_1480docs.jsonl"]
            command += ["--cache-dir", args.scratch / "cache"]
            command += ["--max-memory", args.max_memory] if args.max_memory else []
            report, run["seconds"], run["peak"] = measured(command, log)
            kept = ("bits_per_weight", "bytes", "streamed", "analysis_kept", "planned", "coverage")
            run |= {name: report[name] for name in kept} | {"phases": report["seconds"]}
            run["peak_of_plan"] = run["peak"] / report["planned"]["memory"]
        facts, run["eval_seconds"], run["eval_peak"] = measured(["eval", model, *text], log)
        run |= {"perplexity": facts["perplexity"]}
        run["sample"] = sample(model, log)
        found["runs"].append(run)
        print(json.dumps(run), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"models-{args.model.stem}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
