"""OUT is whole or absent, and never something that skimlm did not write."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skimlm.errors import SkimError
from skimlm.storage import folder as folders
from skimlm.storage.folder import (
    MARK,
    check_apart,
    check_out,
    mark,
    recover,
    replace,
    whole_folder,
)
from skimlm.storage.safetensors import write_file


def make(path, text="new", method="skimlm"):
    path.mkdir(parents=True)
    config = {"text": text, "quantization_config": {"quant_method": method}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def text_of(path):
    return json.loads((path / "config.json").read_text())["text"]


# ---- what --force may replace


def test_force_replaces_what_skimlm_wrote(tmp_path):
    check_out(make(tmp_path / "compressed"), force=True)
    exported = make(tmp_path / "exported", method=None)
    mark(exported, "export to dense")
    check_out(exported, force=True)


def other_model(path):
    make(path, method=None)


def other_method(path):
    make(path, method="gptq")


def file_of_others(path):
    path.write_text("precious")


def notes(path):
    path.mkdir()
    (path / "notes.txt").write_text("precious")


def list_in_place_of_a_config(path):
    path.mkdir()
    (path / "config.json").write_text("[1]")


def foreign_mark(path):
    path.mkdir()
    (path / MARK).write_text("{}")


@pytest.mark.parametrize(
    "other",
    [other_model, other_method, file_of_others, notes, list_in_place_of_a_config, foreign_mark],
)
def test_force_does_not_replace_anything_else(tmp_path, other):
    other(tmp_path / "out")
    with pytest.raises(SkimError, match="not written by skimlm, --force does not replace it"):
        check_out(tmp_path / "out", force=True)
    with pytest.raises(SkimError, match="exists, use --force"):
        check_out(tmp_path / "out")


def test_an_empty_folder_and_a_new_name_are_free(tmp_path):
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")
    check_out(tmp_path / "absent")


# ---- where OUT may be


@pytest.mark.parametrize("out", ["m", "m/", "m/.", "x/../m", "link", "m/in/it", ".", "link/in"])
def test_an_out_that_is_contains_or_lies_in_the_model_is_refused(tmp_path, monkeypatch, out):
    make(tmp_path / "m")
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    for model in ("m", "./m/", "link", tmp_path / "m"):
        with pytest.raises(SkimError, match="is the model itself|contains|lies in"):
            check_apart(out, model)


@pytest.mark.parametrize("out", ["out", "out/", "x/../out", "../out2", "m2"])
def test_an_out_beside_the_model_is_not(tmp_path, monkeypatch, out):
    make(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    check_apart(out, "m")
    monkeypatch.chdir(tmp_path / "m")
    check_apart("../" + out, ".")
    check_apart("out", "some/hub-id")


def test_out_may_be_the_folder_one_stands_in(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    check_out(".")
    with whole_folder(Path(".")) as folder:
        (folder / "config.json").write_text('{"text": "new"}')
        (folder / "weights").write_text("w")
    assert sorted(os.listdir(".")) == ["config.json", "weights"]  # not of a deleted folder
    assert os.listdir(tmp_path) == ["here"]


def test_out_may_be_a_link_which_stays_one(tmp_path):
    make(tmp_path / "target", "old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    check_out(tmp_path / "link", force=True)
    with whole_folder(tmp_path / "link") as folder:
        (folder / "config.json").write_text('{"text": "new"}')
    assert (tmp_path / "link").is_symlink() and text_of(tmp_path / "target") == "new"


# ---- one step


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *a: False)
    replace(make(tmp_path / "new"), make(tmp_path / "out", "old"))
    assert text_of(tmp_path / "out") == "new" and os.listdir(tmp_path) == ["out"]


def test_there_is_no_moment_without_an_out(tmp_path):
    try:
        possible = folders._exchange(make(tmp_path / "a"), make(tmp_path / "b"))
    except OSError:
        possible = False
    if not possible:
        pytest.skip("this system cannot exchange two folders")
    out, missing, stop = make(tmp_path / "out", "0"), [], threading.Event()

    def watch():
        while not stop.is_set():
            try:
                os.stat(out / "config.json")
            except FileNotFoundError:
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(200):
        replace(make(tmp_path / f"new{i}", str(i)), out)
    stop.set()
    watcher.join()
    assert not missing


def test_a_failure_between_two_renames_brings_the_old_out_back(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda *a: False)
    out = make(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError):
        replace(tmp_path / "nothing", out)
    assert text_of(out) == "old"


def test_a_kill_between_two_renames_is_undone_by_the_next_run(tmp_path):
    make(tmp_path / ".out.before", "old")
    check_out(tmp_path / "other")
    with pytest.raises(SkimError, match="exists"):
        check_out(tmp_path / "out")
    assert text_of(tmp_path / "out") == "old" and os.listdir(tmp_path) == ["out"]


def test_what_was_put_aside_is_not_brought_over_a_new_out(tmp_path):
    make(tmp_path / ".out.before", "old")
    make(tmp_path / "out", "new")
    recover(tmp_path / "out")
    assert text_of(tmp_path / "out") == "new" and os.listdir(tmp_path) == ["out"]


# ---- kills

CHILD = """
import sys, time
from pathlib import Path
from skimlm.storage.folder import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def worker(tmp_path):
    """A process at work on OUT."""
    command = [sys.executable, "-c", CHILD, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "at work\n"
    yield process
    process.kill()
    process.wait()


def test_the_next_run_removes_what_a_killed_one_left(tmp_path, worker):
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert (tmp_path / ".out.skimlm" / "new" / "half").exists()
    with whole_folder(tmp_path / "out") as folder:
        make(folder / "x")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["x"]


def test_a_living_run_is_not_disturbed(tmp_path, worker):
    with pytest.raises(SkimError, match="another run is at work"), whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.skimlm" / "new" / "half").exists()


def test_a_failed_body_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


def _die_writing(file):
    (file.parent / f".{file.name}.{os.getpid()}-1.part").write_text("half")
    os._exit(0)


def test_a_file_loses_what_dead_processes_left_of_it(tmp_path):
    file = tmp_path / "a.skim"
    process = multiprocessing.get_context("fork").Process(target=_die_writing, args=(file,))
    process.start()
    process.join()
    living = tmp_path / f".a.skim.{os.getppid()}-1.part"
    living.write_text("of a living process")
    assert len(os.listdir(tmp_path)) == 2
    write_file(file, {"x": torch.ones(2)}, {"k": "v"})
    assert sorted(os.listdir(tmp_path)) == sorted([living.name, "a.skim"])
    assert torch.equal(load_file(file)["x"], torch.ones(2))
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
