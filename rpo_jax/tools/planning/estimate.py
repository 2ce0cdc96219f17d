"""From a compiled step to what a user wants to know: whether it fits, how long it takes, and on what that rests."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

from rpo_jax.config import Config, resolve
from rpo_jax.core.shards import row_multiple
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.objectives.logprobs import CHUNK_TOKENS, REST_SHARE
from rpo_jax.tools.planning import hlo
from rpo_jax.tools.planning.arithmetic import body_parameters, head_parameters, step_bytes, step_flops
from rpo_jax.tools.planning.compiled import Compiled
from rpo_jax.tools.planning.targets import Target
from rpo_jax.tools.planning.workload import BatchShape, Lengths, necessary, planned_batch, step_sizes


@dataclass(frozen=True)
class Exchange:
    """The collectives of a step of one kind and place.

    Attributes:
        kind: as rpo_jax.tools.planning.hlo; a ring of permutes is named by what it stands for.
        place: `loops` over layers and micro-batches, `chunks` that run as often as the data needs, `outside` of both.
        count: in a step.
        largest: bytes of the largest one.
        shape: and its largest array.
        sent: bytes that a device sends in a step.
        bounded: whether they run as often as the data needs, and the most is counted.
    """

    kind: str
    place: str
    count: int
    largest: int
    shape: str
    sent: float
    bounded: bool


@dataclass(frozen=True)
class Estimate:
    """One plan, per device unless said otherwise.

    Attributes:
        mesh: sizes of data, fsdp, tensor, and of expert and context where there are such.
        fits: whether its peak is within the limit; a TPU's compiler says so itself, a GPU's refuses nothing.
        flops: operations that the step does, padding and recomputation included.
        necessary_flops: those that it cannot do without.
        peak_flops: a second, of the chip in the dtype that the step computes in.
        moved_bytes: between memory and arithmetic.
        sent_bytes: to other devices.
        seconds_overlapped: if arithmetic, memory and links all work at their peak at the same time.
        seconds_serial: if one waits for the other.
        utilisation: necessary operations over the peak, at these two times.
        surprises: what the program does and should not.
    """

    target: str
    mesh: dict[str, int]
    remat: str
    micro_rows: int | None
    rows: int
    row_tokens: int
    fits: bool
    memory: dict[str, int]
    peak_bytes: int
    memory_limit: float
    flops: float
    necessary_flops: float
    peak_flops: float
    moved_bytes: float
    sent_bytes: float
    compute_seconds: float
    memory_seconds: float
    link_seconds: float
    exchanges: tuple[Exchange, ...]
    surprises: tuple[str, ...]
    compile_seconds: float

    @property
    def seconds_overlapped(self) -> float:
        return max(self.compute_seconds, self.memory_seconds, self.link_seconds)

    @property
    def seconds_serial(self) -> float:
        return self.compute_seconds + self.memory_seconds + self.link_seconds

    def utilisation(self, seconds: float) -> float:
        return self.necessary_flops / (seconds * self.peak_flops)

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "seconds_overlapped": self.seconds_overlapped,
            "seconds_serial": self.seconds_serial,
        }


def shape_of(config: Config, lengths: Lengths, target: Target, fixed: tuple[int, int] | None) -> BatchShape:
    """The batch's shape on the target's mesh; `fixed` rows and row tokens where the user gave them."""
    mesh = sharding.make_mesh(config.mesh, target.devices)
    sharding.check_batch(config.batch.pairs, config.batch.micro_rows, mesh)
    responses = resolve(config).objective.responses
    shape = planned_batch(config, lengths, responses, sharding.row_shards(mesh), target.platform)
    if fixed is None:
        return shape
    multiple = config.batch.micro_rows or sharding.row_shards(mesh)
    if fixed[0] % multiple:
        raise ValueError(f"--rows {fixed[0]} must be a multiple of {multiple}: micro-batches and devices share rows.")
    if config.mesh.context > 1 and fixed[1] % (multiple := row_multiple(config.mesh.context)):
        raise ValueError(f"--row-tokens {fixed[1]} must be a multiple of {multiple}: devices share stripes of a row.")
    return replace(shape, rows=fixed[0], row_tokens=fixed[1], source=f"{fixed[0]} rows of {fixed[1]} tokens, as given")


def counted(
    config: Config, model: ModelConfig, target: Target, lengths: Lengths, batch: BatchShape, done: Compiled
) -> Estimate:
    mesh = sharding.make_mesh(config.mesh, target.devices)
    fsdp, tensor, shards = mesh.shape["fsdp"], mesh.shape["tensor"], sharding.shards_of(mesh)
    step = step_sizes(config, model, batch, target.platform)
    flops = step_flops(model, step) / mesh.size
    moved = step_bytes(
        model,
        step,
        fsdp=fsdp,
        tensor=tensor,
        row_shards=shards.rows,
        optimizer_slots=round(done.memory.optimizer / max(1, done.memory.params)),
        head_chunk=CHUNK_TOKENS,
        expert=mesh.shape.get(sharding.EXPERT, 1),
        context=shards.context,
    )
    local_tokens = batch.rows * batch.row_tokens // shards.count // step.micro_batches
    chunks = -(-local_tokens // CHUNK_TOKENS) + REST_SHARE
    exchanges = hlo.collectives(done.text, most_trips=chunks)
    sent = sum(exchange.sent * exchange.times for exchange in exchanges)
    chip, peak = target.chip, target.chip.rate(config.model.compute_dtype)
    return Estimate(
        target=target.name,
        mesh=dict(mesh.shape),
        remat=config.model.remat,
        micro_rows=config.batch.micro_rows,
        rows=batch.rows,
        row_tokens=batch.row_tokens,
        fits=done.memory.peak <= target.memory,
        memory=asdict(done.memory),
        peak_bytes=done.memory.peak,
        memory_limit=target.memory,
        flops=flops,
        necessary_flops=necessary(model, config, lengths, resolve(config).objective.responses) / mesh.size,
        moved_bytes=moved,
        sent_bytes=sent,
        compute_seconds=flops / peak,
        peak_flops=peak,
        memory_seconds=moved / chip.memory_rate,
        link_seconds=sum(one.sent * one.times / target.link_rate(one.group) for one in exchanges),
        exchanges=_summed(exchanges),
        surprises=_surprises(exchanges, done.text, model, tensor, local_tokens, shards.context),
        compile_seconds=done.seconds,
    )


def _summed(exchanges: list[hlo.Collective]) -> tuple[Exchange, ...]:
    groups: dict[tuple[str, str], list[hlo.Collective]] = defaultdict(list)
    for one in exchanges:
        kind = f"{one.ring} (ring of permutes)" if one.ring else one.kind
        groups[kind, "chunks" if one.bounded else "loops" if one.in_loop else "outside"].append(one)
    rows = []
    for (kind, place), members in groups.items():
        largest = max(members, key=lambda one: one.bytes)
        rows.append(
            Exchange(
                kind,
                place,
                sum(one.times for one in members),
                largest.bytes,
                str(largest.shape),
                sum(one.sent * one.times for one in members),
                any(one.bounded for one in members),
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.sent))


def _surprises(
    exchanges: list[hlo.Collective], text: str, model: ModelConfig, tensor: int, local_tokens: int, context: int
) -> tuple[str, ...]:
    """What a sharded step should never do, in words; empty where it does none of it."""
    surprises = []
    layer, table = body_parameters(model, stored=True) // model.num_layers, head_parameters(model)
    keys = local_tokens * context * model.num_kv_heads * model.head_dim // tensor  # or values: of rows that are shared
    for one in exchanges:
        numbers = one.shape.bytes // max(1, hlo.Shape(one.shape.dtype, ()).bytes)
        if one.kind == "all-gather" and numbers > max(layer, table) and (context == 1 or numbers != keys):
            surprises.append(f"all-gather of {one.shape}, more than a layer or the vocabulary's table ({one.where})")
        activations = local_tokens * model.hidden_size  # which devices that share a matrix product add up
        if one.kind == "all-reduce" and numbers >= table // tensor and numbers > 2**20 and numbers != activations:
            surprises.append(f"all-reduce of {one.shape}, whole on every device ({one.where})")
    least = 2 * CHUNK_TOKENS  # a chunk of logits is meant to be there
    if local_tokens >= least:
        logits = {
            shape
            for shape in hlo.buffers(text)
            if shape.dims
            and shape.dims[-1] in (model.vocab_size, model.vocab_size // tensor)
            and math.prod(shape.dims[:-1]) >= local_tokens
            and shape.dims[-2:-1] != (model.hidden_size,)
        }
        surprises += [f"a buffer of {shape}: logits of all tokens" for shape in sorted(logits)]
    return tuple(dict.fromkeys(surprises))
