"""How a compressed layer is stored: FORMAT.md in code."""

from skimlm.format.check import check_sizes, check_stored
from skimlm.format.layer import (
    ADAPTER_GROUP,
    FORMAT_VERSION,
    METHOD,
    NAMES,
    Layer,
    LayerSpec,
    histogram,
    layout,
    row_bits,
    shared_bits,
    stored_groups,
)
from skimlm.format.pack import (
    Adapter,
    QuantizedWeight,
    check_values,
    dequantize,
    effective,
    pack,
    unpack,
    unpack_adapter,
)
from skimlm.format.row_codes import MAX_TABLE_WIDTH, MAX_WIDTH, TABLE
from skimlm.format.table import table_layout, table_values

__all__ = [
    "ADAPTER_GROUP",
    "FORMAT_VERSION",
    "MAX_TABLE_WIDTH",
    "MAX_WIDTH",
    "METHOD",
    "NAMES",
    "TABLE",
    "Adapter",
    "Layer",
    "LayerSpec",
    "QuantizedWeight",
    "check_sizes",
    "check_stored",
    "check_values",
    "dequantize",
    "effective",
    "histogram",
    "layout",
    "pack",
    "row_bits",
    "shared_bits",
    "stored_groups",
    "table_layout",
    "table_values",
    "unpack",
    "unpack_adapter",
]
