"""What only an encoder of prompts or a reward model needs: torch, which is no requirement of the package.

On Linux an index gives torch's CUDA build, gigabytes that are of no use here, to whoever asks for no particular one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


def check_torch(what: str, otherwise: str = "", also: Sequence[str] = ()) -> None:
    """ValueError that says how to install them, where `what` needs torch, and modules besides, and one is missing.

    Args:
        otherwise: what to do instead.
    """
    missing = [name.replace("_", "-") for name in ("torch", *also) if importlib.util.find_spec(name) is None]
    if missing:
        others = [name for name in missing if name != "torch"]
        rest = f", and then `pip install {' '.join(others)}` the rest" if others else ""
        raise ValueError(
            f"{what} needs {' and '.join(missing)}: `uv pip install --torch-backend cpu torch` brings torch without "
            f"CUDA{rest}{otherwise}."
        )
