"""What --help says of the commands that read a configuration: names on one screen, keys by section, or all of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from textwrap import fill

WIDTH = 100
ALL = "all"


def help_topic(arguments: Sequence[str]) -> str | None:
    """What help is asked about: a word after --help, '' for the command itself, None where it is not asked."""
    for position, argument in enumerate(arguments):
        name, _, topic = argument.partition("=")
        if name in ("-h", "--help"):
            return topic or next((word for word in arguments[position + 1 :] if not word.startswith("-")), "")
    return None


def help_text(command: str, about: str, topic: str, options: Sequence[tuple[str, str]] = ()) -> str:
    """The help of a command.

    Args:
        command: its name.
        about: the docstring of its module.
        topic: '' for one screen, a section's name for its keys, `all` for every key.
        options: of the command besides --config and keys, each with what it does.

    Raises ValueError for another topic, naming the nearest section.
    """
    if topic:
        return _keys(topic)
    from rpo_jax.config.presets import preset_names
    from rpo_jax.data.layouts import LAYOUTS
    from rpo_jax.models import FAMILIES
    from rpo_jax.objectives.losses import OBJECTIVES

    title, _, rest = about.partition("\n\n")
    lines = [
        ("--config FILE", "YAML of sections and keys, or a preset; several are merged in order"),
        ("--section.key VALUE", "one key, after the files: what comes later wins; VALUE as in YAML"),
        *options,
        ("--help SECTION", f"a section's keys with default and meaning; --help {ALL}: of every section"),
    ]
    names = {
        "sections": _sections(),
        "presets": preset_names(),
        "objective.name": OBJECTIVES,
        "data.layout": ["auto", *LAYOUTS],
        "model.family": FAMILIES,
    }
    return "\n".join(
        [
            f"usage: rpo-jax {command} [--config FILE] [--section.key VALUE ...]",
            "",
            title.partition(": `")[0] + ".",
            *(fill(paragraph, WIDTH) for paragraph in rest.strip().split("\n\n") if paragraph),
            "",
            *(f"  {name:<22}{meaning}" for name, meaning in lines),
            "",
            *(
                fill(", ".join(values), WIDTH, initial_indent=f"{name:<16}", subsequent_indent=" " * 16)
                for name, values in names.items()
            ),
        ]
    )


def _sections() -> list[str]:
    from rpo_jax.config import Config

    return [section.name for section in fields(Config)]


def _keys(topic: str) -> str:
    from rpo_jax.config.reading import describe_keys

    sections = _sections()
    if topic not in (ALL, *sections):
        near = difflib.get_close_matches(topic.partition(".")[0], [*sections, ALL], n=1, cutoff=0.0)[0]
        raise ValueError(f"--help {topic}: there is no section of that name; did you mean --help {near}?")
    return describe_keys(sections if topic == ALL else [topic])
