"""What a dataset layout is: how rows become examples, and the columns by which it is known.

A layout's function of a row raises `Unusable` with a reason whose words before the first colon name the kind of fault.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from rpo_jax.core.records import PreferenceExample, Row
from rpo_jax.data.faults import BadRow
from rpo_jax.data.layouts import conditions
from rpo_jax.data.layouts.fields import Fields, Unusable
from rpo_jax.data.layouts.parts import Parts, finish

Reader = Callable[[Iterable[Row]], Iterable[PreferenceExample | BadRow]]


@dataclass(frozen=True)
class Layout:
    """One way of storing preferences.

    Args:
        read: every row of the source, its values in `Fields`, to examples, or to the reasons why not.
        columns: columns that a row must have.
        description: the data sets that use it, in one line.
        prompt: columns that the prompt may be in.
        truncation_side: which end of a long prompt survives unless the configuration says otherwise.
        aliases: what else its columns are called, the first that a row has taken.
        recognise: tells it, by a row's values, from another layout with the same columns.
        joins_rows: an example is made of several rows, so whoever makes one reads all.
        also: columns that it reads where they are.
        ranks: its responses have scores, and whoever reads it says by which rule they are chosen or rejected.
    """

    read: Reader
    columns: tuple[str, ...]
    description: str
    prompt: tuple[str, ...] = ()
    truncation_side: Literal["keep_start", "keep_end"] = "keep_end"
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    recognise: Callable[[Fields], bool] | None = None
    joins_rows: bool = False
    also: tuple[str, ...] = ()
    ranks: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All columns that it reads."""
        return tuple(dict.fromkeys((*self.columns, *self.also, *self.prompt, *conditions.USED)))

    @cached_property
    def _other_names(self) -> frozenset[str]:
        return frozenset(chain(*self.aliases.values(), *conditions.ALIASES.values()))

    def fields(
        self, values: Mapping[str, Any], columns: Mapping[str, str] | None = None, ignored: Collection[str] = ()
    ) -> Fields:
        """A row's columns by this layout's names; `columns` and `ignored` as make_examples has them."""
        kept = {name: value for name, value in values.items() if name not in ignored} if ignored else values
        names = dict(columns or {})
        if self._other_names.isdisjoint(kept):
            return Fields(kept, names)
        taken = set(names.values())
        for name, others in (*self.aliases.items(), *conditions.ALIASES.items()):
            present = [one for one in (name, *others) if one in kept and one not in taken]
            called = next((one for one in present if kept[one] is not None), next(iter(present), name))
            if name not in names and called != name:
                names[name] = called
        return Fields(kept, names)


def per_row(parse: Callable[[Fields], Parts]) -> Reader:
    """A layout's reader from a function of one row's columns."""

    def read(rows: Iterable[Row]) -> Iterator[PreferenceExample | BadRow]:
        for row in rows:
            values = row.values
            assert isinstance(values, Fields)
            try:
                yield finish(row.row_id, conditions.conditioned(parse(values), values))
            except Unusable as reason:
                yield BadRow(row.row_id, values.told(str(reason)))

    return read
