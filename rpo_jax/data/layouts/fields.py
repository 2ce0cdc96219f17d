"""A row's columns by the names that its layout has for them, and the readers of single values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from rpo_jax.data.csv_rows import Cell
from rpo_jax.data.faults import shown

LARGEST = float(np.finfo(np.float32).max)  # scores are trained on in float32
MAX_NESTING = 100  # of what templates get: functions that call themselves work on it
_LABELS = {"true": True, "false": False, "1": True, "0": False}

# Words of the names of columns and of fields of messages that say something about a text and are none of it.
_METADATA = frozenset(
    re.findall(
        r"\w+",
        "annotator avg chosen confidence config count created critique date difficulty explanation feedback hash id "
        "ids idx index judge judgement judgment label labels len length license locale margin md5 meta metadata model "
        "models num policy probability quality rank ranking ranks rating ratings rationale reason rejected reward "
        "rewards row safety score scores sha split status subset tag tags time timestamp tokens toxicity uid updated "
        "url uuid verdict version winner worker",
    )
)
_ASKED = ("prompt", "question", "query", "input", "instruction", "request")
# These too, unless a text without roles is to be told from them: a source may be a book's name, or what to translate.
_KINDS = frozenset(re.findall(r"\w+", "category dataset domain lang language origin source style task topic type"))


class Unusable(Exception):
    """Why a row cannot become an example; the words before the first colon name the kind of fault."""


class Fields(Mapping[str, Any]):
    """The columns of a row, and which of them were read.

    Args:
        values: by the row's own names, which are those it iterates over.
        names: from a layout's name to the row's, where they differ.
    """

    def __init__(self, values: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self._values, self._names = values, names
        self._taken = set(names.values())
        self.read: dict[str, str] = {}  # from the row's name to the layout's

    def _column(self, name: str) -> str | None:
        """The row's name; a column that stands for another has none of its own."""
        if name in self._names:
            name = self._names[name]
        elif name in self._taken:
            return None
        return name if name in self._values else None

    def __getitem__(self, name: str) -> Any:
        column = self._column(name)
        if column is None:
            raise KeyError(name)
        self.read[column] = name
        return self._values[column]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._column(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def is_named(self, name: str) -> bool:
        """Whether a column of another name stands for this one."""
        return name in self._names

    def rest(self) -> dict[str, Any]:
        """What no one has read, by the row's names."""
        return {column: value for column, value in self._values.items() if column not in self.read}

    def unread(self) -> set[str]:
        """The layout's names of what no one has read and is not null."""
        own = {column: name for name, column in self._names.items()}
        return {own.get(column, column) for column, value in self.rest().items() if value is not None}

    def told(self, reason: str) -> str:
        """A reason with the row's names of columns."""
        for name, column in self._names.items():
            reason = reason.replace(f"column '{name}'", f"column '{column}'")
        return reason


def field(values: Mapping[str, Any], name: str) -> Any:
    """A column's value; Unusable where it is missing or null."""
    if name not in values:
        columns = ", ".join(map(str, values)) or "none"
        raise Unusable(f"column '{name}' is missing: the row has {columns}")
    value = values[name]
    if value is None:
        raise Unusable(f"column '{name}' is null")
    return value


def number_field(values: Mapping[str, Any], name: str) -> float:
    """A column's finite number, as float32 can hold it."""
    value = field(values, name)
    if isinstance(value, Cell):
        try:
            value = float(value)
        except ValueError:
            raise wrong_type(name, "a number", value) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(name, "a number", value)
    if not abs(value) <= LARGEST:  # NaN too; an integer may be beyond any float
        raise Unusable(f"column '{name}' does not hold a finite number: got {shown(value)}")
    return float(value)


def label_field(values: Mapping[str, Any], name: str, expected: str = "true nor false") -> bool:
    """A column's yes or no: a boolean, 1 or 0, or one of them as text."""
    value = field(values, name)
    known = _LABELS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(known, int | float) or known not in (0, 1):
        raise Unusable(f"column '{name}' is neither {expected}: got {shown(value)}")
    return bool(known)


def wrong_type(name: str, expected: str, value: Any) -> Unusable:
    kind = "str" if isinstance(value, str) else type(value).__name__
    return Unusable(f"column '{name}' does not hold {expected}: got {kind}")


def text_field(values: Mapping[str, Any], name: str) -> str:
    """A column's text, as it is."""
    value = field(values, name)
    if not isinstance(value, str):
        raise wrong_type(name, "text", value)
    return str(value)


def object_field(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A column that holds an object."""
    value = parsed(field(values, name))
    if not isinstance(value, Mapping):
        raise wrong_type(name, "an object", value)
    return value


def list_field(values: Mapping[str, Any], name: str) -> list[Any]:
    """A column that holds a list."""
    value = parsed(field(values, name))
    if not isinstance(value, list):
        raise wrong_type(name, "a list", value)
    return value


def parsed(value: Any) -> Any:
    """The list or the object that a text is in JSON; any other text, or value, as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def json_text(value: Any, name: str) -> str:
    """A value as JSON; Unusable for what JSON does not have, or a template must not get."""
    level, depth = [value], 0
    while level := [inner for one in level for inner in _inner(one)]:
        depth += 1
        if depth > MAX_NESTING:
            raise Unusable(f"column '{name}' is nested too deep: more than {MAX_NESTING} lists or objects")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Unusable(f"column '{name}' holds what is no JSON: {error}") from None
    if any("\0" in piece for piece in texts_in(value)):
        raise Unusable("null character: a text holds U+0000")
    return text


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, however deep, but for the roles of messages and the types of their parts."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            waiting.extend(inner for key, inner in item.items() if key not in ("role", "from", "type"))
        elif isinstance(item, list | tuple):
            waiting.extend(item)


def is_blank(value: Any) -> bool:
    """Null, an empty list or object, or a text of nothing but space."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | Mapping) and not value)


def is_metadata(name: str, value: Any, most_words: float = math.inf) -> bool:
    """Whether a column or a field of a message says something about a text, by its name, or holds no text at all.

    Args:
        most_words: so many words of a name that may be a text's too may have.
    """
    parts = re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    words, texts = set(parts), [text.split() for text in texts_in(value)]
    if any(texts) and parts[-1:] and parts[-1] in _ASKED:  # `model_input`, unlike `prompt_id`
        return False
    return not any(texts) or bool(words & _METADATA) or (bool(words & _KINDS) and max(map(len, texts)) <= most_words)


def stand_in(texts: Iterable[str], others: Iterable[str]) -> bool:
    """Whether all texts are parts of the others, space aside."""
    wholes = [" ".join(other.split()) for other in others]
    return all(any(" ".join(text.split()) in whole for whole in wholes) for text in texts)
