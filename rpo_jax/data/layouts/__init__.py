"""The table of dataset layouts: every module of this folder that declares `LAYOUT` is in it, by the module's name."""

from __future__ import annotations

from rpo_jax.core.discovery import discovered
from rpo_jax.data.layouts.layout import Layout

LAYOUTS: dict[str, Layout] = discovered(__name__, "LAYOUT")
