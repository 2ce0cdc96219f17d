"""What a compiled program moves between devices, read from its text: XLA's own counts take a loop's body once.

The text is that of `compiled.as_text()`, after partitioning and scheduling: every shape is one device's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b(" + "|".join(sorted(_BYTES, key=len, reverse=True)) + r"|f8\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(")
_LAYOUT = re.compile(r"(?<=\])\{[^{}]*\}")  # in braces behind a shape; it may hold parentheses and letters
_OPCODE = re.compile(r" ([a-z][\w-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation|async_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_INDEX = re.compile(r"\bindex=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}")
_MESH_PART = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_COMMENT = re.compile(r"/\*.*?\*/")  # which element of a long tuple comes next

# What hands on what it takes; get-tuple-element one of the arrays that are summed together.
_SAME_NUMBERS = ("bitcast", "reshape", "convert", "all-reduce-done", "get-tuple-element")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return _BYTES.get(self.dtype, 1) * math.prod(self.dims)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.dims)}"


def shapes_in(text: str) -> list[Shape]:
    """All array shapes that a piece of text names, in its order."""
    return [Shape(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _SHAPE.findall(text)]


@dataclass
class Instruction:
    name: str
    opcode: str
    result: str  # the text of its shape
    operands: list[str]
    text: str  # what follows the opcode
    root: bool

    @property
    def op_name(self) -> str:
        """The operation of the model that it belongs to, as JAX names it; empty where the compiler made it."""
        match = _OP_NAME.search(self.text)
        return match.group(1) if match else ""

    @property
    def called(self) -> list[str]:
        """Computations that it runs."""
        return _CALLED.findall(self.text)


@dataclass
class Program:
    """The computations of a module.

    Attributes:
        entry: the name of the first one to run.
        computations: instructions by name, in order, of every computation.
    """

    entry: str = ""
    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)


@dataclass(frozen=True)
class Collective:
    """One exchange between devices, as often as a step does it.

    Attributes:
        kind: one of KINDS.
        bytes: of the larger of what a device gives and gets, once.
        sent: bytes that a device sends each time, if the exchange goes round a ring.
        group: the devices that take part in one of them, the first one's; empty where all do.
        times: how often a step does it.
        in_loop: whether a loop is around it.
        bounded: whether that loop runs as often as the data needs, and `times` takes the most that it can.
        shape: of its largest array.
        where: the operation of the model that it belongs to, as JAX names it.
        ring: the exchange that a loop of permutes stands for: all-gather or reduce-scatter.
    """

    kind: str
    bytes: int
    sent: float
    group: tuple[int, ...]
    times: int
    in_loop: bool
    bounded: bool
    shape: Shape
    where: str
    ring: str | None


def parse(text: str) -> Program:
    program, current = Program(), None
    for line in text.splitlines():
        if not line.startswith(" "):
            if line.endswith("{") and (header := _HEADER.match(line)):
                current = program.computations[header.group(2)] = {}
                if header.group(1):
                    program.entry = header.group(2)
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, rest = match.groups()
            # A kernel's whole code stands behind this; of the rest, only the trip count is wanted.
            rest, _, settings = rest.partition("backend_config=")
            trips = _TRIPS.search(settings)
            clean = " " + _LAYOUT.sub("", _COMMENT.sub("", rest)) + (trips.group(0) if trips else "")
            opcode = _OPCODE.search(clean)
            if opcode is None:
                continue
            inside, after = _arguments(clean[opcode.end() :])
            operands = re.findall(r"%([\w.-]+)", inside) or [part.strip().split(" ")[-1] for part in inside.split(",")]
            current[name] = Instruction(
                name, opcode.group(1), clean[: opcode.start()], operands, f"({inside}){after}", bool(root)
            )
    return program


def _arguments(text: str) -> tuple[str, str]:
    """The text up to the parenthesis that closes the one before it, and what follows."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def collectives(text: str, most_trips: int) -> list[Collective]:
    """Every exchange of a step.

    Args:
        most_trips: for loops that run as often as the data needs, the most that it can be.
    """
    program = parse(text)
    by_channel: dict[tuple[str, str], Collective] = {}
    for computation, instruction, runs in _walk(program, program.entry, _Runs(1, False, False), most_trips):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        channel = _CHANNEL.search(instruction.text)
        # An exchange that runs beside other work is cut into several fusions with one channel.
        key = (kind, channel.group(1) if channel else f"{computation}/{instruction.name}")
        if kind == "all-reduce" and _is_scattered(program.computations[computation], instruction):
            kind = "reduce-scatter"
        exchange = _collective(program, computation, instruction, kind, runs)
        if key not in by_channel or by_channel[key].times < exchange.times:
            by_channel[key] = exchange
    return list(by_channel.values())


def _is_scattered(computation: dict[str, Instruction], instruction: Instruction) -> bool:
    """Whether each device keeps no more of a sum than a slice: what a TPU's program calls an all-reduce-scatter."""
    users = [other for other in computation.values() if instruction.name in other.operands]
    return bool(users) and all(
        other.opcode == "dynamic-slice" or (other.opcode in _SAME_NUMBERS and _is_scattered(computation, other))
        for other in users
    )


def _collective(program: Program, computation: str, instruction: Instruction, kind: str, runs: _Runs) -> Collective:
    own = program.computations[computation]
    operands = [shape for name in instruction.operands if name in own for shape in shapes_in(own[name].result)]
    result = instruction.result
    if instruction.opcode.endswith("-start"):
        # A tuple of what is given, what is got, and flags; either is a tuple where one exchange is made of several
        # arrays. A started all-reduce has what is got alone, in jax 0.10.
        parts = _elements(result)
        if kind != "all-reduce" or parts[0].startswith("("):
            result = parts[1]
    results = shapes_in(result)
    got, gave = sum(shape.bytes for shape in results), sum(shape.bytes for shape in operands)
    size = max(got, gave) if kind in ("all-gather", "reduce-scatter") else got
    group = _first_group(instruction.text)
    share = (len(group) - 1) / len(group) if group else 1.0
    sent = size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    windowed = re.search(r"windowed_dot_general_body_(ag|rs)", computation)
    ring = {"ag": "all-gather", "rs": "reduce-scatter"}[windowed.group(1)] if windowed else None
    shape = max(results + operands, key=lambda shape: shape.bytes)
    where = instruction.op_name or computation
    return Collective(kind, size, sent, group, runs.times, runs.in_loop, runs.bounded, shape, where, ring)


def _elements(shape: str) -> list[str]:
    """What a tuple's shape holds, one text an element."""
    parts, depth = [""], 0
    for letter in shape.strip()[1:-1]:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _first_group(text: str) -> tuple[int, ...]:
    """The devices of the first replica group; of a permute, the pair that is furthest apart.

    Groups stand as {{0,1},{2,3}}, as [groups,size]<=[axes]T(order) or as mesh['a'=4,'b'=2], device_ids=([axes]T(order))
    {'a'}.
    """
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(_numbers(match.group(1)))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return tuple(_device_order(match.group(3), match.group(4))[: int(match.group(2))].tolist())
    if match := _MESH.search(text):
        # A part of an axis is named 'a':(size before it)its size.
        parts = {name: (before, size) for name, before, size in _MESH_PART.findall(match.group(4))}
        axes, chosen = [], []
        for name, size in re.findall(r"'(\w+)'=(\d+)", match.group(1)):
            before, part = parts.get(name, ("1", "1"))
            before, part = (1, int(size)) if not part else (int(before), int(part))
            axes += [before, part, int(size) // before // part]
            chosen += [0, slice(None), 0] if name in parts else [0, 0, 0]
        ids = _device_order(match.group(2) or str(math.prod(axes)), match.group(3))
        return tuple(ids.reshape(axes)[tuple(chosen)].ravel().tolist())
    pairs = [_numbers(pair) for pair in re.findall(r"[{,]\{(\d+,\d+)\}", text.partition("source_target_pairs=")[2])]
    return tuple(max(pairs, key=lambda pair: abs(pair[0] - pair[1]), default=()))


def _device_order(axes: str, order: str | None) -> np.ndarray:
    """The numbers of all devices in the order that [axes]T(order) says."""
    sizes = _numbers(axes)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else None).ravel()


class _Runs(NamedTuple):
    """How often a computation runs in a step, and whether by a loop, by one whose turns the data decides."""

    times: int
    in_loop: bool
    bounded: bool


def _walk(program: Program, computation: str, runs: _Runs, most_trips: int) -> Iterator[tuple[str, Instruction, _Runs]]:
    """All instructions that run, with how often; loops within loops multiply."""
    for instruction in program.computations.get(computation, {}).values():
        yield computation, instruction, runs
        called = instruction.called
        for branches in _BRANCHES.findall(instruction.text):
            called += re.findall(r"%?([\w.-]+)", branches)
        inner = runs
        if instruction.opcode == "while":
            trips = _trip_count(program, computation, instruction)
            inner = _Runs(runs.times * (most_trips if trips is None else trips), True, runs.bounded or trips is None)
        for name in called:
            yield from _walk(program, name, inner, most_trips)


def _trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
    """How often a loop runs; None where its end is not a constant of the program."""
    if match := _TRIPS.search(loop.text):
        return int(match.group(1))
    condition, body = _CONDITION.search(loop.text), re.search(r"\bbody=%?([\w.-]+)", loop.text)
    assert condition is not None
    assert body is not None
    inside = program.computations[condition.group(1)]
    test = next(instruction for instruction in inside.values() if instruction.root)
    if test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    counter, end = (_behind(inside, name) for name in test.operands)
    if counter is None:
        return None
    last, index = _constant(end), _INDEX.search(counter.text)
    if last is None or counter.opcode != "get-tuple-element" or index is None:
        return None
    place = int(index.group(1))
    first = _constant(_element(program.computations[computation], loop.operands[0], place))
    step = _step(program.computations[body.group(1)], place)
    return None if first is None or not step else max(0, -(-(last - first) // step))


def _behind(computation: dict[str, Instruction], name: str) -> Instruction | None:
    """The instruction of that name, or what it is a copy of."""
    made = computation.get(name)
    while made is not None and made.opcode in ("copy", "bitcast", "optimization-barrier"):
        made = computation.get(made.operands[0])
    return made


def _element(computation: dict[str, Instruction], name: str, place: int) -> Instruction | None:
    made = _behind(computation, name)
    return _behind(computation, made.operands[place]) if made is not None and made.opcode == "tuple" else None


def _step(body: dict[str, Instruction], place: int) -> int | None:
    """What a loop's body adds to its counter; a body that the compiler doubled adds twice."""
    root = next(instruction for instruction in body.values() if instruction.root)
    last, total = _element(body, root.name, place), 0
    while last is not None and last.opcode == "add":
        parts = [_behind(body, name) for name in last.operands]
        total += sum(amount for part in parts if (amount := _constant(part)) is not None)
        last = next((part for part in parts if part is not None and part.opcode != "constant"), None)
    return total or None


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    match = re.match(r"\((-?\d+)\)", instruction.text)
    return int(match.group(1)) if match else None


def buffers(text: str) -> set[Shape]:
    """The shapes of all values of a program, those inside a fusion too: an upper bound of what is in memory."""
    program = parse(text)
    return {
        shape
        for computation in program.computations.values()
        for instruction in computation.values()
        for shape in shapes_in(instruction.result)
    }
