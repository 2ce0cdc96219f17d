"""How the tensors of a folder relate to parameters: one table, read both ways, and by parts.

Letters: a file's tensor has up to three axes, each of which joins one or more axes of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np
from flax.traverse_util import flatten_dict

from rpo_jax.models.architecture import ModelConfig
from rpo_jax.models.decoder import Params, abstract_params
from rpo_jax.models.families import FAMILIES
from rpo_jax.models.families.family import WeightRule

Shape = tuple[int, ...]
Index = tuple[slice, ...]
Groups = tuple[tuple[int, ...], ...]

# From the number of a parameter's axes to those that each axis of the file's tensor joins, in the file's order. torch
# stores a projection as [out, in]; here it is [*in axes, *out axes], heads apart from head_dim.
LAYOUTS: dict[str, Callable[[int], Groups]] = {
    "table": lambda rank: tuple((axis,) for axis in range(rank)),
    "vector": lambda rank: (tuple(range(rank)),),
    "linear": lambda rank: (tuple(range(1, rank)), (0,)),
    "joined_linear": lambda rank: ((rank - 1,), tuple(range(rank - 1))),
    # Of all experts of a layer in one tensor, [experts, in, out].
    "experts": lambda rank: ((0,), (1,), tuple(range(2, rank))),
    "vectors": lambda rank: ((0,), tuple(range(1, rank))),
}


class TensorLayout(NamedTuple):
    """One tensor of a folder: its rule, its layer and expert if it belongs to one, and the parameter's shape there."""

    rule: WeightRule
    place: tuple[int, ...]
    shape: Shape

    @property
    def groups(self) -> Groups:
        return LAYOUTS[self.rule.layout](len(self.shape))

    @property
    def order(self) -> tuple[int, ...]:
        """The parameter's axes in the file's order."""
        return tuple(axis for group in self.groups for axis in group)

    @property
    def file_shape(self) -> Shape:
        return tuple(prod(self.shape[axis] for axis in group) for group in self.groups)

    def to_file(self, parameter: np.ndarray) -> np.ndarray:
        """The parameter at this place as the file has it; a view where it can be one."""
        return parameter.transpose(self.order).reshape(self.file_shape)

    def file_index(self, index: Index) -> Index:
        """The smallest block of the file's tensor that holds a block of the parameter.

        Only the first of several joined axes narrows it: a block of the others is no slice of the file's axis.
        """
        blocks = []
        for first, *others in self.groups:
            inner = prod(self.shape[axis] for axis in others)
            start, stop, _ = index[first].indices(self.shape[first])
            blocks.append(slice(start * inner, stop * inner))
        return tuple(blocks)

    def from_file(self, stored: np.ndarray, index: Index) -> np.ndarray:
        """What `file_index` of a block names as that block of the parameter; a view."""
        sizes = [len(range(self.shape[axis])[index[axis]]) for axis in range(len(self.shape))]
        first = {group[0] for group in self.groups}
        split = [sizes[axis] if axis in first else self.shape[axis] for axis in self.order]
        cut = tuple(slice(None) if axis in first else index[axis] for axis in self.order)
        return stored.reshape(split)[cut].transpose(np.argsort(self.order))


def flat_params(params: Params) -> dict[tuple[str, ...], Any]:
    return dict(cast(Any, flatten_dict(params)))


def tensors_of(model_config: ModelConfig) -> dict[str, TensorLayout]:
    """Every tensor that a folder of this architecture must hold, in the order in which it is written."""
    parameters = flat_params(abstract_params(model_config))
    rules = [rule for rule in FAMILIES[model_config.family].weights if rule.path in parameters]
    assert {rule.path for rule in rules} == set(parameters), "a parameter without a rule, or one with two"
    assert len(rules) == len(parameters), "two rules fill one parameter"
    layered = [rule for rule in rules if "{layer}" in rule.key]
    first, *rest = (rule for rule in rules if rule not in layered)
    tensors = {first.key: TensorLayout(first, (), parameters[first.path].shape)}
    for layer in range(model_config.num_layers):
        for rule in layered:
            shape = parameters[rule.path].shape[1:]
            if "{expert}" not in rule.key:
                tensors[rule.key.format(layer=layer)] = TensorLayout(rule, (layer,), shape)
                continue
            for expert in range(shape[0]):
                tensors[rule.key.format(layer=layer, expert=expert)] = TensorLayout(rule, (layer, expert), shape[1:])
    return tensors | {rule.key: TensorLayout(rule, (), parameters[rule.path].shape) for rule in rest}
