"""The declaration of a stored layer, and what is generated from it."""

from pathlib import Path

from skimlm.format.abi import header

ROOT = Path(__file__).parents[2]


def test_the_header_of_native_code_is_current():
    text = (ROOT / "src/skimlm/native/layer.h").read_text(encoding="utf-8")
    assert text == header(), "run `python -m skimlm.format`"
