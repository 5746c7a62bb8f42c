"""`python -m skimlm.format`: write what is generated from layer.py, in a checkout of the source.

That is the C header native/layer.h and, in FORMAT.md, the tables between the markers.
"""

from pathlib import Path

from skimlm.format.abi import header
from skimlm.format.document import with_tables

if __name__ == "__main__":
    package = Path(__file__).parents[1]
    (package / "native" / "layer.h").write_text(header(), encoding="utf-8")
    document = package.parents[1] / "FORMAT.md"
    document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
