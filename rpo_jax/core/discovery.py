"""Registries that are folders: whatever a module of the folder declares under an agreed name is in the table."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def discovered(package: str, attribute: str) -> dict[str, Any]:
    """What every module of a package that declares `attribute` has there, by the module's name, in order of names."""
    path = importlib.import_module(package).__path__
    modules = {entry.name: importlib.import_module(f"{package}.{entry.name}") for entry in pkgutil.iter_modules(path)}
    return {name: getattr(module, attribute) for name, module in modules.items() if hasattr(module, attribute)}
