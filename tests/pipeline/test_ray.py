"""A real cluster of two nodes on this machine: the same folder, also when one node is lost."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from test_walk import OPTIONS, same

from conftest import byte_tokenizer, tiny_model
from skimlm.errors import SkimError
from skimlm.pipeline import compress
from skimlm.pipeline import plan as resources
from skimlm.pipeline.config import CompressConfig
from skimlm.pipeline.workers import pool

SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else 127.0.0.1 becomes the network's address
    "OMP_NUM_THREADS": "1",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
ray = pytest.importorskip("ray")
NODE = {"num_cpus": 1, "object_store_memory": 150 * 2**20, "node_ip_address": "127.0.0.1"}


@pytest.fixture(scope="module")
def cluster():
    """A head and a second node, a processor each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # workers import the functions of this file by its name, wherever pytest was started
        for place in (Path(__file__).parents[1], Path(__file__).parent):
            patch.setenv("PYTHONPATH", str(place), prepend=os.pathsep)
        made = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        made.add_node(**NODE)
        made.wait_for_nodes()
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").bfloat16().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}; " for i in range(90)))
    return folder


def run(model, out, progress=None, **options):
    how = OPTIONS | {"text": model / "text.txt", "cache_dir": out.with_suffix(".cache")} | options
    return compress.compress(model, out, CompressConfig(**how), progress=progress)


def where(_):
    return ray.get_runtime_context().get_node_id()


def wait_for(path):
    path.parent.joinpath(f"{path.name}-{os.getpid()}").write_text(where(0))
    while not path.exists():
        time.sleep(0.05)
    return where(0)


def test_both_nodes_work_and_one_is_lost(cluster, model, tmp_path, monkeypatch):
    run(model, tmp_path / "alone")
    monkeypatch.setattr(resources, "streams", lambda *_: True)
    run(model, tmp_path / "both", ray=cluster.address)
    assert same(tmp_path / "alone", tmp_path / "both")

    with pool(ray=cluster.address) as submit:
        gate = tmp_path / "gate"
        results = [submit(wait_for, gate) for _ in range(2)]

        def begun():
            return {f.read_text(): int(f.name.split("-")[1]) for f in tmp_path.glob("gate-*")}

        assert wait_until(lambda: len(begun()) == 2)  # a task on each node
        node = next(iter(cluster.worker_nodes))
        process = begun()[node.node_id]
        cluster.remove_node(node, allow_graceful=False)
        assert wait_until(lambda: not alive(process))
        gate.write_text("")
        # the lost one ran again on the other
        assert {result() for result in results} == {cluster.head_node.node_id}
    cluster.add_node(**NODE)
    cluster.wait_for_nodes()


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return condition()


def test_a_node_dies_in_the_middle_of_a_run(cluster, model, tmp_path, monkeypatch):
    run(model, tmp_path / "alone")
    monkeypatch.setattr(resources, "streams", lambda *_: True)
    lost = []

    def progress(phase, done, _total):
        if phase == "calibrate" and not lost:
            lost.append(next(iter(cluster.worker_nodes)))
            threading.Thread(target=cluster.remove_node, args=(lost[0], False)).start()

    run(model, tmp_path / "out", ray=cluster.address, progress=progress)
    assert lost and same(tmp_path / "alone", tmp_path / "out")


def fail(_):
    raise SkimError("w: what is wrong")


def end(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_errors_are_one_line(cluster):
    with pool(ray=cluster.address) as submit:
        with pytest.raises(SkimError, match="^w: what is wrong$"):
            submit(fail, 0)()
        with pytest.raises(SkimError, match="lost on Ray after 3 tries more: .*--resume"):
            submit(end, 0)()
