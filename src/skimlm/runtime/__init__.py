"""Compressed layers at work: operations by device, modules, decoding of one token."""

from skimlm.runtime import cpu  # noqa: F401  native code enters the table of operations
