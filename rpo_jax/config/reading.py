"""Configurations from YAML files and command lines, strictly: an unknown key is refused and the nearest one named."""

from __future__ import annotations

import difflib
import functools
import math
import re
import reprlib
from argparse import SUPPRESS
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_loader

from rpo_jax.config import Config, ConfigError
from rpo_jax.config.presets import config_file, packaged
from rpo_jax.config.resolve import check_unread
from rpo_jax.config.synonyms import meant, named_elsewhere
from rpo_jax.core.yaml_text import MAX_INTEGER, parse_yaml, read_yaml

MAX_WORD = 64  # characters of a word that a number's key may have instead
_SECTIONS: dict[str, type] = get_type_hints(Config)


def known_keys() -> dict[str, Any]:
    """Every configuration key, dotted, with its default as YAML has it."""
    return {
        f"{section}.{name}": list(value) if isinstance(value, tuple) else value
        for section, values in asdict(Config()).items()
        for name, value in values.items()
    }


@functools.cache
def _known() -> dict[str, None]:
    """All keys, then all sections."""
    return dict.fromkeys([*known_keys(), *_SECTIONS])


@functools.cache
def _mappings() -> tuple[str, ...]:
    """Keys below which the user's own names stand."""
    return tuple(key for key, default in known_keys().items() if isinstance(default, dict))


def _reject_unknown(keys: Iterable[str], where: str) -> None:
    known = list(_known())
    for key in keys:
        if key in _known() or key.rpartition(".")[0] in _mappings():
            continue
        section = key.partition(".")[0]
        # In a section that exists, another section's likely spelling is no help: its own keys are.
        choices = [name for name in known if name.startswith(f"{section}.")] if section in _SECTIONS else known
        named, alike = named_elsewhere(key), difflib.get_close_matches(key, choices, n=1, cutoff=0.8)
        near = named if named and (named[0] in choices or not alike) else alike
        near = near or meant(key, (name for name in known if "." in name))
        near = near or difflib.get_close_matches(key, choices, n=1, cutoff=0.8 if section in _SECTIONS else 0.7)
        if near:
            hint = f"did you mean {' or '.join(near)}?"
        elif section in _SECTIONS:
            hint = f"there are {', '.join(choices)}."
        else:
            hint = f"the sections are {', '.join(_SECTIONS)}."
        raise ValueError(f"{where}: unknown configuration key '{key}'; {hint}")


def _refuse_section(name: str) -> None:
    if name in _SECTIONS:
        keys = list(get_type_hints(_SECTIONS[name]))
        first = next((key for key in ("name", "path", "rank") if key in keys), keys[0])
        raise ValueError(f"command line: '--{name}' is a section, not a key; did you mean --{name}.{first}?")


def _read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold sections such as 'data:' with keys below them.")
    for section, values in content.items():
        # Another trainer's section is answered by the keys in it, a misspelt one by its own name.
        foreign = isinstance(values, dict) and not difflib.get_close_matches(str(section), _SECTIONS, n=1, cutoff=0.8)
        _reject_unknown([f"{section}.{name}" for name in values] if foreign and values else [str(section)], str(path))
        if not isinstance(values, dict):
            raise ValueError(f"{path}: '{section}' is a section and needs keys below it, got {reprlib.repr(values)}.")
        _reject_unknown([f"{section}.{name}" for name in values], str(path))
        for name, value in values.items():
            _check_text(f"{section}.{name}", value, str(path))
    return content


def _value(text: str) -> Any:
    """A file, or a value of the command line, as jsonargparse wants it: `{a, b}` and `a:` may be texts."""
    parsed = parse_yaml(text)
    bare = isinstance(parsed, dict) and parsed and all(value is None for value in parsed.values())
    return text if bare and ":" not in text.strip().removesuffix(":") else parsed


def _check_value(name: str, text: str) -> None:
    """ValueError for a value of the command line beyond any bound; what is no YAML may be a text."""
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        value = text
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if text.strip():
        _check_text(name.removeprefix("--"), value, "command line")


@functools.cache
def _types() -> dict[str, Any]:
    """Every key's type."""
    return {
        f"{name}.{key}": kind for name, section in _SECTIONS.items() for key, kind in get_type_hints(section).items()
    }


@functools.cache
def _numbers() -> frozenset[str]:
    """Keys that hold a number, or yes or no."""
    held = {
        key: {kind, *get_args(kind), *(inner for part in get_args(kind) for inner in get_args(part))}
        for key, kind in _types().items()
    }
    return frozenset(key for key, kinds in held.items() if kinds & {int, float, bool} and str not in kinds)


def _check_text(key: str, value: Any, where: str) -> None:
    """ValueError for null where there must be a value, and for a text that is no number.

    jsonargparse takes null for anything, reads a text as YAML once more, and 1:30 as a number to the base 60, whatever
    its length.
    """
    kind = _types().get(key)
    if value is None and kind is not None and NoneType not in get_args(kind):
        raise ValueError(f"{where}: {key} is null, and must be {in_words(kind)}; leave it out for the default.")
    if isinstance(value, str) and key in _numbers() and (":" in value or len(value) > MAX_WORD):
        raise ValueError(f"{where}: {key} is {reprlib.repr(value)}, which is no number.")


@functools.cache  # a comparison reads hundreds of configurations
def _parser() -> ArgumentParser:
    set_loader("bounded yaml", _value, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(
        prog="rpo_jax", parser_mode="bounded yaml", exit_on_error=False, default_env=False, add_help=False
    )
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def describe_keys(sections: Sequence[str]) -> str:
    """The keys of these sections, each with its type, default and meaning."""
    parser = ArgumentParser(prog="rpo-jax", usage=SUPPRESS, add_help=False)
    for name in sections:
        parser.add_class_arguments(_SECTIONS[name], name)
    whole_sections = r"^  --\w+ CONFIG +Path to a configuration file\.\n"  # which parse_config does not take
    return re.sub(whole_sections, "", parser.format_help(), flags=re.MULTILINE).strip()


# Short forms on the command line for what is typed most often.
_FLAGS = {"--resume": "--run.resume", "--overwrite": "--run.overwrite", "--force": "--run.force"}


def parse_config(arguments: Sequence[str]) -> Config:
    """Configuration from command-line arguments: `--config FILE` and `--section.key value` or `=value`.

    FILE is a path, or the name of a preset that comes with the package.

    Raises ValueError for an unknown key (naming the nearest known one) or a value of the wrong type or range, with the
    file that it stands in.
    """
    expanded: list[str] = []
    files: list[Path] = []
    origins: dict[str, _Given] = {}
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            previous = arguments[position - 1] if position else ""
            if not previous.startswith("--") or "=" in previous:
                raise ValueError(f"unexpected argument '{argument}'; options are written --section.key value.")
            if previous != "--config":
                previous = _FLAGS.get(previous, previous)
                _check_value(previous, argument)
                origins[previous.removeprefix("--")] = _Given("command line", argument)
                expanded.append(argument)
            continue
        name = _FLAGS.get(name, name)
        following = arguments[position + 1] if position + 1 < len(arguments) else "--"
        if name == "--config":
            if not equals and following.startswith("--"):
                raise ValueError("--config needs a file after it, or a preset's name, such as quickstart.")
            file = config_file(value if equals else following)
            files.append(file)
            sections = _read_yaml(file)
            for section, values in sections.items():
                origins |= {f"{section}.{key}": _Given(str(file), one) for key, one in values.items()}
            if not sections:  # comments alone
                continue
            value, equals = str(file), "="
        else:
            _reject_unknown([name.removeprefix("--")], "command line")
            _refuse_section(name.removeprefix("--"))
            _check_value(name, value)
            origins[name.removeprefix("--")] = _Given("command line", value)
        if name in ("--run.overwrite", "--run.force") and not equals and following.startswith("--"):
            value, equals = "true", "="
        expanded.append(name + equals + value)
    parser = _parser()
    try:
        read = parser.parse_args(expanded)
        _check_numbers(read.as_dict(), "")
        parsed = parser.instantiate(read)
        config = Config(**{section: parsed[section] for section in _SECTIONS})
        if not any((file.parent / "run_id").is_file() for file in files):  # a run's own is as it was accepted
            check_unread(config)
    except ConfigError as error:
        raise ValueError(_with_its_file(str(error), origins)) from None
    except ArgumentError as error:
        raise ValueError(_readable(error, origins)) from None
    return _with_packaged_data(config)


def _with_packaged_data(config: Config) -> Config:
    """A preset's data is found outside a checkout too."""
    data = config.data
    mix = {packaged(path): weight for path, weight in data.mix.items()}
    return replace(
        config,
        data=replace(
            data, path=data.path and packaged(data.path), eval_path=data.eval_path and packaged(data.eval_path), mix=mix
        ),
    )


def _check_numbers(values: Mapping[str, Any], prefix: str) -> None:
    """ValueError for the first number that is none to compute with; no range of a single key would say so."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{name}={value} is not a finite number.")
        elif isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise ValueError(f"{prefix}{name} is a number of more than 64 bits.")


class _Given(NamedTuple):
    """Where a key was given, and what."""

    where: str
    value: Any


def _readable(error: Exception, origins: Mapping[str, _Given]) -> str:
    """A section's own reason where there is one: jsonargparse wraps it in a report of every type it tried."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return _with_its_file(str(cause), origins)
        cause = cause.__cause__ or cause.__context__
    named = re.match(r'(?:Parser )?key "([\w.]+)"', str(error), re.IGNORECASE)
    key = named[1] if named else ""
    if key in origins and key in _known():
        where, value = origins[key]
        return f"{where}: {key} is {reprlib.repr(value)}, and must be {in_words(_types()[key])}."
    return " ".join(str(error).removeprefix("Parser ").split())


def _with_its_file(reason: str, origins: Mapping[str, _Given]) -> str:
    """A section's reason, after the file that the first key in it stands in."""
    named = next((origins[key] for key in re.findall(r"[a-z_]+\.\w+", reason) if key in origins), None)
    return reason if named is None or named.where == "command line" else f"{named.where}: {reason}"


def in_words(kind: Any) -> str:
    """What a value of a key's type is, in words: `a whole number or null`."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(
            [*(in_words(part) for part in parts if part is not NoneType), *["null"] * (NoneType in parts)]
        )
    if get_origin(kind) is Literal:
        return " or ".join(parts) if len(parts) < 3 else f"one of {', '.join(parts)}"
    if get_origin(kind) is tuple:
        return f"a list, each {in_words(parts[0])}"
    if get_origin(kind) is dict:
        return "names with values, as {name: value}"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a text")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Configuration from a YAML file or preset, and `section.key=value` overrides; errors as `parse_config`."""
    files = [] if path is None else [f"--config={path}"]
    return parse_config(files + [f"--{override}" for override in overrides])


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
