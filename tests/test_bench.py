"""What `skimlm bench` reports; no test asks how fast a machine is."""

import json

import pytest
from click.testing import CliRunner

from skimlm import bench
from skimlm.cli.main import main
from skimlm.format import check_stored

SMALL = dict(shapes=((64, 96), (30, 65)), widths=(None, 3, 7), batches=(1, 40))
KEYS = {"rows", "cols", "bits", "batch", "seconds", "torch_bf16_seconds", "torch_fp32_seconds"}


def small(**options):
    return bench.run(**(SMALL | options), seconds=0.001, footprint=100_000, read=10**6)


@pytest.mark.parametrize("width", [None, 1, 5, 6, 8])
def test_the_weights_that_are_timed_are_valid(width):
    check_stored(bench.random_layer(100, 65, width))


def test_mixed_rows_take_about_3_2_bits_in_a_large_layer():
    bits = 8 * bench.random_layer(4096, 4096, None).nbytes / 4096**2
    assert 3.15 < bits < 3.25


def test_every_shape_width_and_batch_is_reported():
    calls = []
    facts = small(progress=lambda *a: calls.append(a))
    assert len(facts["rows"]) == 2 * 3 * 2 and calls[-1][1:] == (len(calls), len(calls))
    assert facts["bandwidth_bytes_per_second"] > 1e6 and facts["threads"] >= 1
    for row in facts["rows"]:
        assert KEYS <= set(row) and min(row[k] for k in KEYS) > 0
        stored = row["bits"] * row["rows"] * row["cols"] / 8
        share = stored / row["seconds"] / facts["bandwidth_bytes_per_second"]
        assert row["of_bandwidth"] == pytest.approx(share)
        assert row["of_bf16_bound"] == pytest.approx(share * 16 / row["bits"])
    assert len(bench.text(facts).splitlines()) > 12


def test_the_command_prints_one_json_object(monkeypatch):
    facts = small()
    monkeypatch.setattr(bench, "run", lambda progress: facts)
    result = CliRunner().invoke(main, ["bench", "--json"])
    assert result.exit_code == 0
    assert {"bandwidth_bytes_per_second", "threads", "rows"} <= set(json.loads(result.stdout))
