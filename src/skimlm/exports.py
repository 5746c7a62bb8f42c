"""What a folder gives under its own name, loaded when it is first used."""

import importlib
from collections.abc import Mapping
from typing import Any


def exported(package: str, homes: Mapping[str, str], name: str) -> Any:
    """An attribute of a package (PEP 562) that one of its modules, `homes[name]`, defines."""
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
