"""YAML that others wrote: plain data only, no key twice, no more of it than a person would write."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 64  # of nesting, aliases resolved
MAX_NODES = 20_000  # aliases resolved: nine of ten each make a thousand million
MAX_INTEGER = 2**63
_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}

_FASTEST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_FASTEST):
    """YAML 1.1 as PyYAML reads it, but 12:30 and 2001-12-14 are text, and 1e-5 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) in ("bool", "null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}int", re.compile(r"[-+]?(?:0b[0-1_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)\Z"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """What a YAML file says, as parse_yaml has it; ValueError for all that this refuses, with the file's name."""
    try:
        return parse_yaml(read_text(path))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def read_text(path: Path) -> str:
    """A text file; ValueError for one that is no UTF-8, or is larger than any that YAML is read from."""
    if (size := path.stat().st_size) > 4 * MAX_CHARACTERS:  # UTF-8's most for a character
        raise ValueError(f"it has {size:,} bytes; no more than {4 * MAX_CHARACTERS:,} are read.")
    return path.read_text(encoding="utf-8-sig")


def parse_yaml(text: str) -> Any:
    """What a YAML text says, in dicts, lists, texts and finite numbers; None where it says nothing.

    Raises yaml.YAMLError for what is no YAML, or of other kinds, ValueError for a number that is not finite or takes
    more than 64 bits, a key that stands twice in a mapping, an alias within what it stands for, and for more or
    deeper nested values than any configuration has.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; no more than {MAX_CHARACTERS:,} are read.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise yaml.YAMLError(f"it holds a lone surrogate ({error.reason})") from None
    _check_nesting(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_bounds(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_nesting(text: str) -> None:
    """By events, which are read one after another: nodes are made by functions that call themselves."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, _Loader), start=1):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if count > 2 * MAX_NODES:
            raise _refusal(event, f"is beyond the first {MAX_NODES:,} values")
        if depth > MAX_DEPTH:
            raise _refusal(event, f"nests more than {MAX_DEPTH} lists or mappings")


def _check_bounds(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Values and depth of a node, which is looked at once, however many aliases stand for it.

    Args:
        known: of nodes by their id; None while one is looked at.
    """
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise _refusal(node, "has an alias within what it stands for")
        return found
    known[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    else:
        _check_scalar(node)
    if node.tag not in _PLAIN:
        kind = node.tag.removeprefix(_TAG)[:40]
        reason = _refusal(node, f"holds a {kind!r}; only text, numbers, lists and mappings are read")
        raise yaml.YAMLError(str(reason))  # on a command line it may be a text
    sizes = [_check_bounds(child, known) for child in children]
    size, depth = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    if size > MAX_NODES or depth > MAX_DEPTH:
        raise _refusal(node, f"stands for more than {MAX_NODES:,} values or {MAX_DEPTH} levels, aliases resolved")
    known[id(node)] = size, depth
    return size, depth


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise _refusal(key, f"names {key.value[:60]!r} a second time")
            seen.add(key.value)


def _check_scalar(node: yaml.Node) -> None:
    kind, value = node.tag.removeprefix(_TAG), node.value.replace("_", "")
    if kind not in ("int", "float"):
        return
    if ":" in value:  # to the base 60, and of any length
        raise _refusal(node, f"holds {node.value[:60]!r}, which is no number")
    try:
        if kind == "float":
            number = float(value.lower().replace(".inf", "inf").replace(".nan", "nan"))
        else:
            number = int(value, 0) if not re.fullmatch(r"[-+]?0[0-7]+", value) else int(value, 8)
    except ValueError:  # also for thousands of digits
        raise _refusal(node, f"holds {node.value[:60]!r}, which is no number") from None
    if abs(number) > MAX_INTEGER if kind == "int" else not math.isfinite(number):
        raise _refusal(node, f"holds {node.value[:60]!r}, which is no number that can be used")


def _refusal(where: Any, what: str) -> ValueError:
    return ValueError(f"line {where.start_mark.line + 1} {what}.")
