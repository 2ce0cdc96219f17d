"""The Python packages at hand against those that rpo_jax asks for. Imports none of them: one may be broken."""

from __future__ import annotations

import platform
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from rpo_jax.runs.versions import DISTRIBUTION, SHOWN, installed
from rpo_jax.tools.checkup.finding import Finding, failed, ok, warning

INSTALL = "pip install rpo-jax, or in a clone pip install -c constraints.txt -e ."


def check_environment() -> list[Finding]:
    """Versions of everything, and each requirement that is not met."""
    shown = [f"Python {platform.python_version()}"]
    shown += [f"{name} {version}" for name in SHOWN if (version := installed(name)) is not None]
    try:
        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        note = warning("packages", f"{DISTRIBUTION} itself is not installed: {', '.join(shown)}", INSTALL)
        return [note, *_known_conflicts()]
    wrong = [
        f"{need.name} {current or 'is missing'}" + (f", needs {need.specifier}" if current else "")
        for need in requirements
        if need.marker is None or need.marker.evaluate({"extra": ""})
        if (current := installed(need.name)) is None or not need.specifier.contains(current, prereleases=True)
    ]
    bad = [failed("packages", f"{'; '.join(wrong)}", INSTALL)] if wrong else []
    return bad + _known_conflicts() or [ok("packages", ", ".join(shown))]


def _known_conflicts() -> list[Finding]:
    flax, jax = installed("flax"), installed("jax")
    if flax and jax and Version(flax) < Version("0.12.10") and Version(jax) >= Version("0.11.1"):
        return [failed("packages", f"flax {flax} cannot be imported beside jax {jax}", "pip install -U flax")]
    return []
