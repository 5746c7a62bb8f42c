"""The same compression in one process, on a Ray cluster of one node and of two: time, and bytes.

    python bench/ray_nodes.py --model DIR --data DIR --scratch DIR --out results [--recipe fast]

DIR of --data holds calib/c4_1480docs.jsonl. Nodes are processes of this machine with one processor
each (`ray.cluster_utils.Cluster`), the work itself runs with one thread everywhere: what two nodes
gain is what a second processor gains. Analyses are not kept from one run to the next.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from kill import same
from provenance import provenance

SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "OMP_NUM_THREADS": "1",
}
os.environ.update(SETTINGS)
NODE = {"num_cpus": 1, "object_store_memory": 400 * 2**20, "node_ip_address": "127.0.0.1"}


def run(args, name, **options):
    """One compression into a folder of its own; seconds and phases."""
    import torch

    import skimlm

    torch.set_num_threads(1)
    out, cache = args.scratch / name, args.scratch / f"{name}-cache"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    config = skimlm.CompressConfig(
        recipe=args.recipe,
        text=args.data / "calib/c4_1480docs.jsonl",
        samples=args.samples,
        cache_dir=cache,
        **options,
    )
    report = skimlm.compress(args.model, out, config)
    seconds = time.perf_counter() - started
    shutil.rmtree(cache)
    return {"seconds": seconds, "phases": report.seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    from ray.cluster_utils import Cluster

    facts = {"provenance": provenance(), "alone": run(args, "alone", workers=1)}
    for count in (1, 2):
        cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        for _ in range(count - 1):
            cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        facts[f"nodes {count}"] = run(args, f"nodes{count}", ray=cluster.address)
        cluster.shutdown()
    for name in ("nodes1", "nodes2"):
        facts[f"{name} identical"] = same(args.scratch / "alone", args.scratch / name)
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    one, two = facts["nodes 1"]["seconds"], facts["nodes 2"]["seconds"]
    print(json.dumps(facts, indent=1))
    print(f"two nodes over one: {one / two:.2f} times as fast")


if __name__ == "__main__":
    main()
