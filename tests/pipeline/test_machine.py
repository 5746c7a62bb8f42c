"""Limits of containers, in made-up trees of control groups of both versions."""

import os

import pytest

from skimlm.pipeline import machine

GB = 10**9


@pytest.fixture(autouse=True)
def _a_large_machine(monkeypatch):
    memory = type("memory", (), {"available": 64 * GB})
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


@pytest.fixture
def tree(tmp_path):
    """Write files of control groups, and the line that says which group this process is in."""

    def make(line, **files):
        own = tmp_path / "own"
        own.write_text(line + "\n")
        for name, text in files.items():
            file = tmp_path / "groups" / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_name(file.name.replace("_", ".", 1)).write_text(text)
        return tmp_path / "groups", own

    return make


def test_without_groups_the_machine_is_the_limit(tmp_path):
    assert machine.available_memory(tmp_path, tmp_path / "absent") == 64 * GB
    assert machine.processors(tmp_path, tmp_path / "absent") == 16


def test_version_2_counts_every_group_up_to_the_top(tree):
    groups = tree(
        "0::/pod/box",
        pod__memory_max=str(8 * GB),
        pod__memory_current=str(3 * GB),
        pod__memory_stat=f"anon 5\ninactive_file {GB}\n",
        pod__box__memory_max="max",
        pod__box__memory_current=str(2 * GB),
        pod__box__cpu_max="250000 100000",
        pod__cpu_max="max 100000",
    )
    assert machine.available_memory(*groups) == 6 * GB  # 8 less 3, of which 1 is cache
    assert machine.processors(*groups) == 3


def test_memory_high_is_a_limit_too(tree):
    groups = tree(
        "0::/a", a__memory_max="max", a__memory_high=str(2 * GB), a__memory_current=str(GB)
    )
    assert machine.available_memory(*groups) == GB


def test_version_1_is_read(tree):
    groups = tree(
        "4:memory:/a\n3:cpu,cpuacct:/a\n2:freezer:/b",
        memory__a__memory_limit_in_bytes=str(4 * GB),
        memory__a__memory_usage_in_bytes=str(GB),
    )
    (groups[0] / "cpu/a").mkdir(parents=True)
    (groups[0] / "cpu/a/cpu.cfs_quota_us").write_text("50000")
    (groups[0] / "cpu/a/cpu.cfs_period_us").write_text("100000")
    assert machine.available_memory(*groups) == 3 * GB
    assert machine.processors(*groups) == 1


def test_a_group_of_the_host_s_path_is_looked_for_at_the_top(tree):
    groups = tree(
        "0::/system.slice/docker-12.scope", memory_max=str(2 * GB), memory_current=str(GB // 2)
    )
    assert machine.available_memory(*groups) == 3 * GB // 2


@pytest.mark.parametrize("text", ["", "nonsense", "-1", "9223372036854771712"])
def test_what_is_no_limit_is_none(tree, text):
    groups = tree("0::/a", a__memory_max=text, a__memory_current="5", a__cpu_max="0 0")
    assert machine.available_memory(*groups) == 64 * GB
    assert machine.processors(*groups) == 16
