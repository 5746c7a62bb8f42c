"""Command lines and streams that no one means: one line, never a traceback, never a hang."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from skimlm.cli import main
from skimlm.pipeline import DEFAULTS, OPTIONS, default_text

SKIMLM = [sys.executable, "-m", "skimlm"]


def skimlm(*args, **options):
    options = {"capture_output": True, "timeout": 120} | options
    return subprocess.run([*SKIMLM, *args], **options)


def shell(line):
    return subprocess.run(
        ["bash", "-c", line.replace("skimlm", " ".join(SKIMLM), 1)],
        capture_output=True,
        timeout=120,
    )


def is_one_line(done, status=1):
    assert (done.returncode, done.stdout) == (status, b""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(b"error: "), done.stderr


# ---- what is loaded, what is said


@pytest.mark.parametrize("args", [["--help"], ["compress", "--help"], ["--version"]])
def test_help_loads_neither_torch_nor_transformers(args):
    code = f"""
import sys
from skimlm.cli.main import main
main({args!r}, standalone_mode=False)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_help_says_every_default_and_choice_of_the_config():
    text = " ".join(CliRunner().invoke(main.main, ["compress", "--help"]).stdout.split())
    for name, option in OPTIONS.items():
        assert f"--{name.replace('_', '-')} " in text
        assert " ".join(option.help.split()) in text
        if default := default_text(name):
            assert f"[default: {default}]" in text
        if option.choices:
            assert "[" + "|".join(str(choice) for choice in option.choices) + "]" in text
    assert set(DEFAULTS) == set(OPTIONS)


# ---- arguments


@pytest.mark.parametrize(
    "args",
    [
        ["a\0b"],
        ["compress", "model", "o\0ut"],
        ["compress", "m", "o", "--text", "a\0"],
        ["inspect", "\0"],
        ["skill", "eval", "a\0", "--model", "m"],
    ],
)
def test_a_nul_byte_is_wrong_usage(args):
    result = CliRunner().invoke(main.main, args)
    assert result.exit_code == 2 and "NUL byte" in result.stderr


def test_a_name_that_is_no_text_is_one_line(tmp_path):
    model, out = os.fsdecode(b"mod\xffel"), os.fsdecode(b"o\xffut")
    lines = [
        ["compress", model, out],
        ["eval", model],
        ["generate", model, out],
        ["export", model, out],
        ["skill", "compress", out + ".md", "x.skim", "--model", model],
    ]
    code = f"""
from skimlm.cli.main import main
for args in {lines!r}:
    try:
        main(args)
    except SystemExit as end:
        assert end.code == 1
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    said = done.stderr.splitlines()
    assert len(said) == len(lines) and all(line.startswith(b"error: ") for line in said), said


def test_a_cache_folder_that_is_no_text_is_printed_and_still_json(tmp_path):
    done = skimlm("cache", "--json", "--cache-dir", os.fsencode(tmp_path) + b"/\xff")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"].endswith("\udcff")


@pytest.mark.parametrize("count", [0, 1025, 10**9, 2**63, 10**30])
def test_threads_that_no_machine_has_are_wrong_usage(count):
    result = CliRunner().invoke(main.main, ["info", "--threads", str(count)])
    assert result.exit_code == 2
    result = CliRunner().invoke(main.main, ["bench", "--threads", str(count)])
    assert result.exit_code == 2 and "1<=x<=1024" in result.stderr


# ---- streams

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


@FULL
@pytest.mark.parametrize("args", ["--help", "compress --help", "cache --json"])
def test_a_full_disk_under_stdout_is_one_line(args):
    done = shell(f"skimlm {args} >/dev/full")
    is_one_line(done)
    assert b"No space left on device" in done.stderr


@FULL
@pytest.mark.parametrize("args", ["inspect absent", "compress", "eval /absent --seq-len 0"])
def test_a_full_disk_under_stderr_is_an_exit_status(args):
    done = shell(f"skimlm {args} 2>/dev/full")
    assert (done.returncode in (1, 2), done.stdout) == (True, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("args", ["--help", "inspect absent"])
def test_a_closed_stream_is_no_traceback(args, closed):
    done = shell(f"skimlm {args} {closed}")
    assert b"Traceback" not in done.stdout + done.stderr and b"Exception" not in done.stderr
    assert done.returncode in (0, 1, 2)


def test_a_closed_stdin_is_an_empty_prompt():
    done = shell("skimlm generate /absent - <&-")
    is_one_line(done)


def test_a_prompt_that_is_no_text_is_one_line():
    done = skimlm(
        "generate", "/absent", "-", input=b"\xff\xfe", env=os.environ | {"PYTHONUTF8": "1"}
    )
    is_one_line(done)
    assert b"stdin is not UTF-8" in done.stderr


@pytest.mark.parametrize("args", ["--help", "cache"])
def test_a_broken_pipe_is_quiet(args):
    done = shell(f"skimlm {args} | true; exit ${{PIPESTATUS[0]}}")
    assert done.stderr == b"" and done.returncode in (0, 1)


def test_ctrl_c_is_one_line():
    process = subprocess.Popen(
        [*SKIMLM, "generate", "/absent", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until it reads its prompt
        with open(f"/proc/{process.pid}/syscall") as file:
            call = file.read().split()
        waits = call[0] in ("0", "63") and call[1] == "0x0"  # read(0, ...) on x86-64, on ARM
        if waits:
            break
        time.sleep(0.1)
    time.sleep(0 if waits else 5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    done = subprocess.CompletedProcess([], process.returncode, out, err)
    is_one_line(done)
    assert err.startswith(b"error: interrupted")
