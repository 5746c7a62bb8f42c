"""Progress where stderr is no terminal: plain lines, in time, with the time left."""

import io
import sys

import pytest

from skimlm.progress import Lines, progress_bars


@pytest.fixture
def lines():
    """What is said, the clock, and the thing itself."""
    said, clock = [], [0.0]
    return said, clock, Lines(said.append, lambda: clock[0])


def test_a_line_every_thirty_seconds_with_the_time_left(lines):
    said, clock, made = lines
    for done in range(1, 41):
        clock[0] += 3.0
        made.update("calibrate", done, 40)
    assert said == [
        "calibrate    10/40, 0:27, about 1:21 left",
        "calibrate    20/40, 0:57, about 0:57 left",
        "calibrate    30/40, 1:27, about 0:29 left",
        "calibrate    40/40, 1:57",
    ]


def test_a_step_that_takes_long_is_told_of_meanwhile(lines):
    said, clock, made = lines
    made.update("train", 1, 64)
    for _ in range(100):
        clock[0] += 1
        made.tick()
    assert [line.split(",")[1].strip() for line in said] == ["0:30", "1:00", "1:30"]


def test_a_short_phase_is_not_worth_a_line(lines):
    said, clock, made = lines
    made.update("write", 0, 1)
    clock[0] += 0.5
    made.update("write", 1, 1)
    made.tick()
    assert said == []


def test_hours_are_hours(lines):
    said, clock, made = lines
    made.update("fit", 0, 4)
    clock[0] += 3600
    made.update("fit", 1, 4)
    assert said == ["fit          1/4, 1:00:00, about 3:00:00 left"]


def test_without_a_terminal_there_are_no_control_codes(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # colours are asked for: still no terminal
    error = io.StringIO()
    monkeypatch.setattr(sys, "stderr", error)
    monkeypatch.setattr("skimlm.progress.WORTH", 0.0)
    with progress_bars() as update:
        for done in range(3):
            update("fit", done + 1, 3)
    assert error.getvalue() == "fit          3/3, 0:00\n"
    assert capsys.readouterr().out == ""
