"""A streamed run gives the folder that a run in memory gives, whenever it is stopped in between."""

import dataclasses
import filecmp
import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import FAMILIES, byte_tokenizer, tiny_model
from skimlm.errors import SkimError
from skimlm.models import source as sources
from skimlm.models.checkpoint import load
from skimlm.pipeline import compress, sensitivity, steps, walk, widths
from skimlm.pipeline import plan as resources
from skimlm.pipeline.calibrate import BATCH
from skimlm.pipeline.config import RECIPES, SLIM_RECIPES, CompressConfig
from skimlm.pipeline.workers import pool
from skimlm.storage import folder as outputs
from skimlm.storage import journal
from skimlm.storage import safetensors as shards
from skimlm.storage.safetensors import save_file

OPTIONS = dict(recipe="fast", bits=3.2, samples=5, seq_len=24)


def started(model, out, progress=None, **options):
    """`compress` with the fields of its config as arguments."""
    return compress.compress(model, out, CompressConfig(**options), progress=progress)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny bfloat16 model of a family as a folder."""

    @functools.cache
    def make(family: str, **changes):
        folder = tmp_path_factory.mktemp(family)
        tiny_model(family, dtype=torch.bfloat16, **changes).save_pretrained(
            folder, max_shard_size="60KB"
        )
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def _few_windows_and_steps(monkeypatch):
    monkeypatch.setitem(RECIPES, "fast", dataclasses.replace(RECIPES["fast"], fisher_windows=3))
    few = dataclasses.replace(SLIM_RECIPES["best"], steps=2)
    monkeypatch.setitem(SLIM_RECIPES, "best", few)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{i} times {i} is {i * i}; " for i in range(60)))
    return file


@pytest.fixture
def run(folders, text, tmp_path, monkeypatch):
    """`compress` with an empty cache of its own; streamed unless `whole`."""

    def make(name, whole=False, family="llama", changes=(), **options):
        if not whole:
            monkeypatch.setattr(resources, "streams", lambda *_: True)
        else:
            monkeypatch.setattr(resources, "streams", lambda *_: False)
        out = tmp_path / name
        options = {"cache_dir": tmp_path / f"{name}-cache"} | OPTIONS | options
        return started(folders(family, **dict(changes)), out, text=text, **options)

    return make


# what goes beyond codebooks and codes
METHODS = {
    "slim-paper": dict(method="slim", recipe="paper", bits=4),
    "slim-fast": dict(method="slim", recipe="fast", bits=3),
    "slim-best": dict(method="slim", recipe="best", bits=3, sparsity="0.5"),
    "sparse": dict(recipe="best", sparsity="0.5", bits=3.2),
    "adapters": dict(rank=0.2, adapter_bits=16, index_bits=3, bits=None),
    "sparse-adapters": dict(sparsity="2:4", rank=0.1, bits=4.4),
}


def same(a, b):
    """Whether two folders hold the same files, byte by byte."""
    names = sorted(f.name for f in a.iterdir())
    assert names == sorted(f.name for f in b.iterdir())
    return filecmp.cmpfiles(a, b, names, shallow=False) == (names, [], [])


HANDING = ("gemma4", "hy_v4")  # blocks that need more of each other than hidden states


@pytest.mark.parametrize("family", [*FAMILIES, *HANDING])
def test_the_same_folder_as_in_memory(run, tmp_path, family):
    assert not run("whole", whole=True, family=family).streamed
    assert run("parts", family=family).streamed
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert sorted(f.name for f in tmp_path.iterdir() if "partial" in f.name) == []


OTHERS = ("qwen3", "gemma3", "phi3", "opt")  # in turn: every family, every method
PAIRS = [(n, f) for i, n in enumerate(METHODS) for f in ("llama", OTHERS[i % len(OTHERS)])]
PAIRS += [("slim-fast", "gemma4"), ("slim-best", "hy_v4")]


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_sparsity_adapters_and_slim_give_the_same_folder_as_in_memory(run, tmp_path, name, family):
    options = METHODS[name]
    assert not run("whole", whole=True, family=family, **options).streamed
    assert run("parts", family=family, **options).streamed
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert not journal.place(tmp_path / "parts").exists()


@pytest.mark.parametrize(
    "options",
    [
        dict(recipe="paper"),
        dict(embed_bits=16),
        dict(exclude=["*.1.mlp.*"]),
        dict(size=53_000, bits=None),
        dict(changes=(("num_hidden_layers", 3), ("tie_word_embeddings", False))),
    ],
    ids=str,
)
def test_the_same_folder_with_other_options(run, tmp_path, options):
    run("whole", whole=True, **options)
    run("parts", **options)
    assert same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_statistics_are_those_of_the_whole_model(run, tmp_path, family):
    run("whole", whole=True, family=family)
    run("parts", family=family)
    (a,), (b,) = ((tmp_path / f"{n}-cache").iterdir() for n in ("whole", "parts"))
    assert a.name == b.name and same(a, b)


@pytest.mark.parametrize("options", [dict(), *METHODS.values()], ids=["fast", *METHODS])
def test_blocks_are_loaded_one_at_a_time(run, monkeypatch, options):
    held = []
    usual = sources._put

    def put(model, names, tensors):
        usual(model, names, tensors)
        real = [n for n, p in model.named_parameters() if not p.is_meta]
        # norms are there together while the whole is trained
        held.append({n.split(".")[2] for n in real if n.endswith("_proj.weight")})

    monkeypatch.setattr(sources, "_put", put)
    run("parts", **options)
    assert {len(blocks) for blocks in held} == {0, 1}  # none: what stands outside
    assert set.union(*held) == {"0", "1"}


class Killed(BaseException):
    """As if the process had died: nothing catches it."""


def kill_at(monkeypatch, number):
    """Die in the `number`th write of a file that is kept; how many there were."""
    seen = []
    usual = os.replace

    def replace(source, target):
        seen.append(target)
        if len(seen) == number:
            raise Killed
        usual(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return seen


def check_kills(run, tmp_path, monkeypatch, again, step):
    """Kill a run in every `step`th write, go on: the same folder, at most `again` files more.

    `run(name)` gives the folder `tmp_path / "whole"` if nothing stops it.
    """
    with monkeypatch.context() as patch:
        seen = kill_at(patch, 0)
        run("parts")
    kept = [str(file).endswith(".safetensors") for file in seen]
    assert sum(kept) >= 3
    for number in (*range(1, len(kept), step), len(kept)):
        name = f"killed-{number}"
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(Killed):
                run(name)
        assert not (tmp_path / name).exists()
        with monkeypatch.context() as patch:
            seen = kill_at(patch, 0)
            run(name, resume=True)
        more = sum(str(file).endswith(".safetensors") for file in seen)
        assert more <= sum(kept) - sum(kept[: number - 1]) + again
        assert same(tmp_path / "whole", tmp_path / name)
        assert not journal.place(tmp_path / name).exists()


def test_resume_wherever_it_was_killed(run, tmp_path, monkeypatch):
    run("whole", whole=True)
    # at most the block at work is done again: 7 linears and what goes with them
    check_kills(run, tmp_path, monkeypatch, again=9, step=11)


@pytest.mark.parametrize("name", ["slim-paper", "slim-best", "sparse-adapters"])
def test_sparsity_adapters_and_slim_resume_wherever_killed(run, tmp_path, monkeypatch, name):
    how = METHODS[name] | dict(cache_dir=tmp_path / "cache")
    run("whole", whole=True, **how)  # the analysis is at hand from here on
    # of a block: states before and after, inputs of the original's linears by batch, what is packed
    check_kills(functools.partial(run, **how), tmp_path, monkeypatch, again=6, step=20)


# ---- trained against the loss at the end


@pytest.fixture
def best(run, monkeypatch):
    """The recipe with training."""
    few = dataclasses.replace(RECIPES["best"], fisher_windows=3, steps=6)
    monkeypatch.setitem(RECIPES, "best", few)
    return functools.partial(run, recipe="best", samples=8, bits=2.5)


@pytest.mark.parametrize("family", [*FAMILIES, *HANDING, "qwen3_moe"])
def test_a_trained_folder_is_the_same_as_in_memory(best, tmp_path, family):
    whole, parts = best("whole", whole=True, family=family), best("parts", family=family)
    assert parts.streamed and whole.held_out_kl == parts.held_out_kl
    assert len(whole.held_out_kl) == 4
    # a mixture's tokens may go to other experts, whichever way it is trained
    assert min(whole.held_out_kl) < whole.held_out_kl[0] or family == "qwen3_moe"
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_no_weight_of_a_linear_is_there_while_a_streamed_model_is_trained(best, monkeypatch):
    real, usual = set(), steps.train

    def train(student, *args, **options):
        real.update(n for n, p in student.model.named_parameters() if not p.is_meta)
        assert set(student.recomputed) == {"model.layers.0", "model.layers.1"}
        return usual(student, *args, **options)

    monkeypatch.setattr(steps, "train", train)
    best("o")
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in real} == {
        *("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm")
    }


def test_what_is_aimed_at_is_what_the_original_gives_its_head(best, folders, monkeypatch):
    known, usual = [], steps.train

    def train(student, ids, final, **options):
        known.append((ids, final.clone()))
        return usual(student, ids, final, **options)

    monkeypatch.setattr(steps, "train", train)
    best("o")
    ids, final = known[0]
    body = load(folders("llama"))[0].model
    with torch.no_grad():
        want = torch.cat([body(part).last_hidden_state for part in ids.split(BATCH)])
    assert torch.equal(final, want)


def test_a_trained_run_resumes_wherever_it_was_killed(best, tmp_path, monkeypatch):
    how = dict(cache_dir=tmp_path / "cache")
    best("whole", **how)
    check_kills(functools.partial(best, **how), tmp_path, monkeypatch, again=3, step=4)


SCRIPT = """
import dataclasses, sys, torch
torch.set_num_threads(1)
from skimlm.pipeline import compress, plan as resources
from skimlm.pipeline.config import RECIPES, CompressConfig
RECIPES["fast"] = dataclasses.replace(RECIPES["fast"], fisher_windows=3)
resources.streams = lambda *_: True
config = CompressConfig(text=sys.argv[3], cache_dir=sys.argv[4], recipe="fast", bits=3.2, samples=5,
                        seq_len=24, resume=True)
compress.compress(sys.argv[1], sys.argv[2], config, progress=lambda *p: print(*p, flush=True))
"""


def test_kill_9_and_resume(run, folders, text, tmp_path):
    run("whole", whole=True)
    command = [sys.executable, "-c", SCRIPT, folders("llama"), tmp_path / "out", text]
    command = [str(c) for c in (*command, tmp_path / "cache")]
    for phase in ("forward 1", "calibrate 1", "fit 1", None):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for line in process.stdout:
            if phase and line.decode().startswith(phase):
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.read()
        assert process.wait() == (0 if phase is None else -signal.SIGKILL)
        assert (tmp_path / "out").exists() == (phase is None)
    assert same(tmp_path / "whole", tmp_path / "out")
    assert not journal.place(tmp_path / "out").exists()


def interrupted(run, name, monkeypatch, number=12):
    """Leave an unfinished run."""
    with monkeypatch.context() as patch:
        kill_at(patch, number)
        with pytest.raises(Killed):
            run(name)


def test_the_seconds_of_all_processes_that_worked_on_a_run_are_reported(run, tmp_path, monkeypatch):
    interrupted(run, "o", monkeypatch)
    file = journal.place(tmp_path / "o") / journal.SECONDS
    before = json.loads(file.read_text())
    assert before["analyse"] > 0 and set(before) <= {"load", "analyse"}
    file.write_text(json.dumps(before | {"analyse": 1000.0}))
    report = run("o", resume=True)
    assert 1000 < report.seconds["analyse"] < 1100
    assert report.seconds["load"] > before["load"]
    assert list(report.seconds) == ["load", "analyse", "allocate", "fit", "write"]
    interrupted(run, "p", monkeypatch)
    assert run("p", force=True).seconds["analyse"] < 100  # begun anew


def test_killed_around_the_replacement_and_before_tidying_up(run, tmp_path, monkeypatch):
    run("whole", whole=True)
    old = {"quantization_config": {"quant_method": "skimlm"}}
    exchange = outputs._exchange

    def killed_after(*both):
        exchange(*both)
        raise Killed

    def killed_before(*both):
        raise Killed

    for killed in (killed_before, killed_after):
        with monkeypatch.context() as patch:
            (tmp_path / "o").mkdir(exist_ok=True)
            (tmp_path / "o/config.json").write_text(json.dumps(old))
            patch.setattr(outputs, "_exchange", killed)
            with pytest.raises(Killed):
                run("o", force=True)
        report = run("o", resume=True, force=True)
        assert same(tmp_path / "whole", tmp_path / "o") and report.bytes
        assert not journal.place(tmp_path / "o").exists()
    with monkeypatch.context() as patch:
        patch.setattr(compress, "shutil", None)  # the tidying up fails
        with pytest.raises(AttributeError):
            run("p")
    assert same(tmp_path / "whole", tmp_path / "p") and journal.finished(tmp_path / "p")
    assert run("p", resume=True).rows_by_width == report.rows_by_width
    assert not journal.place(tmp_path / "p").exists()


def test_an_unfinished_run_is_not_begun_anew_unasked(run, tmp_path, monkeypatch):
    interrupted(run, "o", monkeypatch)
    with pytest.raises(SkimError, match="unfinished run; --resume goes on .* --force begins"):
        run("o")
    run("o", force=True)
    assert not journal.place(tmp_path / "o").exists()


@pytest.mark.parametrize(
    "change", [dict(bits=3.0), dict(samples=4), dict(seed=1), dict(recipe="paper"), "model", "text"]
)
def test_what_changed_is_named_on_resume(run, tmp_path, monkeypatch, change, folders, text):
    interrupted(run, "o", monkeypatch)
    changed = {}
    if change == "text":
        text.write_text(text.read_text().replace("times", "plus"))
    elif change == "model":
        file = next(folders("llama").glob("*.safetensors"))
        os.utime(file, (1, file.stat().st_mtime + 1))
    else:
        changed = change
    name = change if isinstance(change, str) else next(iter(change))
    if name in ("samples", "seed"):
        name = f"text|{name}"
    with pytest.raises(SkimError, match=f"begun with ({name}) .* now it is .* --force"):
        run("o", resume=True, **changed)
    assert journal.place(tmp_path / "o").exists()


def test_a_finished_folder_is_not_taken_for_an_unfinished_run(run, tmp_path):
    (tmp_path / "o").mkdir()
    with pytest.raises(SkimError, match=r"o: is there, with no unfinished run beside it; --force"):
        run("o", resume=True)
    assert not list((tmp_path / "o").iterdir()) and not journal.place(tmp_path / "o").exists()


def test_an_edited_journal_is_refused(run, tmp_path, monkeypatch):
    interrupted(run, "o", monkeypatch)
    file = journal.place(tmp_path / "o") / journal.JOURNAL
    file.write_text(file.read_text().replace('"fast"', '"slow"'))
    with pytest.raises(SkimError, match="begun with recipe slow, now it is fast"):
        run("o", resume=True)
    file.write_text("{")
    with pytest.raises(SkimError, match="journal.json: not valid JSON"):
        run("o", resume=True)


def test_deleted_scratch_is_made_again(run, tmp_path, monkeypatch):
    run("whole", whole=True)
    for kind, number in (("inputs", 5), ("gradient", 14), ("cache", 14), ("packed", 24)):
        name = f"o-{kind}"
        interrupted(run, name, monkeypatch, number)
        if kind == "cache":
            assert sensitivity.prune(tmp_path / f"{name}-cache") > 0
        for file in journal.place(tmp_path / name).glob(f"{kind}-*"):
            file.unlink()
        run(name, resume=True)
        assert same(tmp_path / "whole", tmp_path / name)


def test_damaged_scratch_is_named(run, tmp_path, monkeypatch):
    interrupted(run, "o", monkeypatch, 5)
    file = max(journal.place(tmp_path / "o").glob("inputs-*"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(SkimError, match=f"{file.name}: cannot be read .* --force begins anew"):
        run("o", resume=True)


def test_two_runs_on_one_folder(run, tmp_path):
    with journal.unfinished(tmp_path / "o", resume=False, force=False) as work:
        journal.begin(work, {})
        with pytest.raises(SkimError, match="o: another run is at work on it"):
            run("o")
    run("o")


def test_a_full_disk_is_one_line_and_work_is_kept(run, tmp_path, monkeypatch):
    run("whole", whole=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    for number in (3, 9, 16):
        seen = []
        with monkeypatch.context() as patch:
            usual = save_file

            def save(*a, seen=seen, stop=number, usual=usual):
                seen.append(1)
                return full() if len(seen) == stop else usual(*a)

            patch.setattr(shards, "save_file", save)
            with pytest.raises(SkimError, match="could not be written: .*No space left"):
                run(f"o{number}")
        assert journal.place(tmp_path / f"o{number}").exists()
        run(f"o{number}", resume=True)
        assert same(tmp_path / "whole", tmp_path / f"o{number}")
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "sync", full)
        with pytest.raises(SkimError, match="could not be written: .*No space left"):
            run("last")
    assert not (tmp_path / "last").exists() and not journal.finished(tmp_path / "last")
    run("last", resume=True)
    assert same(tmp_path / "whole", tmp_path / "last")


def test_another_budget_needs_no_calibration(run, tmp_path, monkeypatch):
    run("a", cache_dir=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(walk, "_forward", lambda *_: pytest.fail("calibrated again"))
        report = run("b", cache_dir=tmp_path / "cache", bits=2.8)
    assert report.analysis_kept and report.bits_per_weight <= 2.8
    run("c", whole=True, bits=2.8)
    assert same(tmp_path / "b", tmp_path / "c")


@pytest.mark.parametrize(
    "options", [dict(), METHODS["slim-best"], METHODS["sparse-adapters"]], ids=str
)
def test_processes_give_the_same_folder(run, tmp_path, options):
    run("whole", whole=True, **options)
    run("parts", workers=2, **options)
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_shared_work_is_streamed(folders, text, tmp_path):
    how = OPTIONS | dict(text=text, cache_dir=tmp_path / "cache")
    assert started(folders("llama"), tmp_path / "a", workers=1, **how).streamed


@pytest.mark.parametrize(
    "options", [dict(), dict(size=53_000, bits=None), METHODS["sparse-adapters"]], ids=str
)
def test_a_dry_run_tells_size_and_plan_without_work(run, tmp_path, monkeypatch, options):
    done = run("o", **options)
    monkeypatch.setattr(widths, "analyse", lambda *_: pytest.fail("calibrated"))
    planned = run("p", dry_run=True, **options)
    # what config.json says of widths is a good part of so small a folder
    assert abs(planned.bytes - done.bytes) < 0.03 * done.bytes
    # of a size, what embedding and head get of it is known only once the model is analysed
    assert "size" in options or abs(planned.bits_per_weight - done.bits_per_weight) < 0.2
    assert planned.streamed and planned.planned["scratch"] > 0
    assert not (tmp_path / "p").exists() and not journal.place(tmp_path / "p").exists()


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(SkimError, match="a worker process died, .* --resume and fewer --workers"):
        with pool(workers=2) as submit:
            submit(die)()


def test_a_cluster_that_does_not_answer_is_one_line():
    pytest.importorskip("ray")
    started = time.monotonic()
    with pytest.raises(SkimError, match="no Ray cluster at 127.0.0.1:1: .*refused"):
        with pool(ray="127.0.0.1:1"):
            pass
    assert time.monotonic() - started < 20


# ---- what is planned


def test_a_model_that_fits_is_not_streamed(folders, text, tmp_path):
    free = resources.IMPORTED
    how = OPTIONS | dict(text=text, cache_dir=tmp_path / "cache")
    report = started(folders("llama"), tmp_path / "a", max_memory=2 * free, **how)
    assert not report.streamed and report.planned["memory"] < 2 * free
    need = int(report.planned["memory"])
    kept = started(folders("llama"), tmp_path / "a", max_memory=need - 1, force=True, **how)
    assert kept.analysis_kept and not kept.streamed and kept.planned["memory"] < need
    how["cache_dir"] = tmp_path / "other-cache"
    report = started(folders("llama"), tmp_path / "b", max_memory=need - 1, **how)
    assert report.streamed and report.planned["memory"] < need
    least = int(report.planned["memory"])
    how["cache_dir"] = tmp_path / "cache-of-none"
    with pytest.raises(SkimError, match=r"0.8 GB of memory are needed block by block, --max-mem"):
        started(folders("llama"), tmp_path / "d", max_memory=least - 1, **how)
    sparse = how | dict(method="slim", bits=4)
    slim = started(folders("llama"), tmp_path / "c", max_memory=2 * free, dry_run=True, **sparse)
    assert not slim.streamed
    report = started(folders("llama"), tmp_path / "c", max_memory=3 * free, workers=1, **sparse)
    assert report.streamed and report.planned["memory"] < 3 * free
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == ["a", "b", "c", "cache", "other-cache", "text.txt"]


def test_too_little_disk_is_refused_before_work(run, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(resources.psutil, "disk_usage", lambda _: usage)
    with pytest.raises(SkimError, match="GB of scratch are needed, 0.0 GB are free"):
        run("o")
    assert not journal.place(tmp_path / "o").exists()


def test_scratch_that_is_there_already_needs_no_room(run, tmp_path, monkeypatch):
    planned = run("o", dry_run=True).planned["scratch"]
    usage = type("Usage", (), {"free": planned - 5000})
    monkeypatch.setattr(resources.psutil, "disk_usage", lambda _: usage)
    with pytest.raises(SkimError, match="of scratch are needed"):
        run("o")
    left = journal.place(tmp_path / "o")
    left.mkdir()
    (left / "left.safetensors").write_bytes(bytes(6000))
    assert run("o", resume=True).streamed
