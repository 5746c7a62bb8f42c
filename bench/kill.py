"""Kill a streamed run again and again, at random moments, and compare with one left alone.

    python bench/kill.py MODEL [--kills 20] [--seed 0] [--text FILE]

Each kill is a SIGKILL to `skimlm compress ... --resume`, a uniformly random share of the time into
what an uninterrupted run takes; then the command is given again. Kills go on, in runs begun anew
where one got through, until there were so many. Every folder that is finished is compared with the
first, byte by byte, and nothing may lie beside it.
"""

import argparse
import filecmp
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from provenance import provenance


def command(model, place, extra):
    out, cache = place / "out", place / "cache"
    how = ["--recipe", "fast", "--bits", "3", "--resume", "--workers", "1", "--json", *extra]
    return [sys.executable, "-m", "skimlm", "compress", str(model), str(out), *how] + [
        "--cache-dir",
        str(cache),
    ]


def phase(place):
    """What was going on, from what lies in the folder of the unfinished run."""
    work = place / "out.partial"
    if not work.exists():
        return "loading" if not (place / "out").exists() else "finished"
    names = {re.split(r"[-.]", f.name)[0] for f in work.iterdir()}
    for mark, what in (("model", "write"), ("packed", "fit"), ("gradient", "backward")):
        if mark in names:
            return what
    return "forward" if "inputs" in names else "loading"


def same(a, b):
    names = sorted(f.name for f in a.iterdir())
    equal = filecmp.cmpfiles(a, b, names, shallow=False)[0]
    return names == sorted(f.name for f in b.iterdir()) and equal == names


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text")
    parser.add_argument("--samples", default="8")
    parser.add_argument("--seq-len", default="128")
    args = parser.parse_args()
    extra = ["--samples", args.samples, "--seq-len", args.seq_len]
    extra += ["--text", args.text] if args.text else []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    root, order = Path(tempfile.mkdtemp(prefix="kill-")), random.Random(args.seed)
    alone = root / "alone"
    alone.mkdir()
    started = time.perf_counter()
    subprocess.run(command(args.model, alone, extra), check=True, **quiet)
    whole = time.perf_counter() - started
    phases, kills, finished = Counter(), 0, 0
    place = root / "killed"
    while True:
        place.mkdir(exist_ok=True)
        process = subprocess.Popen(command(args.model, place, extra), **quiet)
        try:
            process.wait(order.random() * whole if kills < args.kills else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            phases[phase(place)] += 1
            kills += 1
            if phase(place) != "finished":
                continue
        if process.returncode not in (0, -signal.SIGKILL):
            sys.exit(f"a resumed run failed with {process.returncode}; see {place}")
        left = sorted(f.name for f in place.iterdir())
        if left != ["cache", "out"] or not same(alone / "out", place / "out"):
            sys.exit(f"not the same after {kills} kills: {left} in {place}")
        finished += 1
        shutil.rmtree(place)
        if kills >= args.kills:  # all were followed by a run that got through
            break
    shutil.rmtree(root)
    print(f"{kills} kills of runs of {whole:.1f} s in {dict(phases)}: {finished} folders, all the")
    print(f"same as the one left alone, byte by byte, nothing beside them\n{provenance()}")


if __name__ == "__main__":
    main()
