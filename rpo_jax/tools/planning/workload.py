"""Which model and which batch a plan is for, without reading a model's weights or, unless asked to, any data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rpo_jax import models
from rpo_jax.config import Config, DataConfig, resolve
from rpo_jax.core.files import refuse_gguf
from rpo_jax.core.jsonl import parse_json
from rpo_jax.core.records import KINDS, REFINED, PreferenceData, TokenizedExample, TokenizedResponse
from rpo_jax.core.shards import row_multiple
from rpo_jax.data.loader import PreferenceBatches
from rpo_jax.models import ModelConfig
from rpo_jax.models.huggingface.configuration import described
from rpo_jax.models.quantization import bytes_per_weight
from rpo_jax.tools.planning.arithmetic import StepSizes, necessary_flops, visible_pairs
from rpo_jax.tools.planning.chips import TABLES

_SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
# The sizes in each model's own config.json on the hub.
_HUB_NAMES = {row["hub_name"]: name for name, row in TABLES["models"].items()}
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    name: {key: value for key, value in row.items() if key != "hub_name"} for name, row in TABLES["models"].items()
}
EMBEDDING_WIDTH = 384  # all-MiniLM-L6-v2's, the default encoder's
REFINING_TOKENS = 64  # assumed of the text before a refined prompt: 43 words unless told otherwise
MOST_STEPS = 64  # of an epoch that are packed to see the shapes of batches


@dataclass(frozen=True)
class Lengths:
    """Tokens of [prompt, chosen, rejected] of the examples that a plan assumes, and one line that says which."""

    tokens: Sequence[Sequence[int]]
    source: str


@dataclass(frozen=True)
class BatchShape:
    """The largest batch that the assumed examples give, and what is in an average one.

    Attributes:
        rows: of R x T positions.
        row_tokens: T.
        filled_tokens: positions that hold a token, on average over batches.
        scored_tokens: tokens of responses, likewise.
        visible: (query, key) pairs that see each other, likewise.
        source: one line on where this comes from.
    """

    rows: int
    row_tokens: int
    filled_tokens: float
    scored_tokens: float
    visible: float
    source: str


def known_model(name: str) -> ModelConfig:
    """A known architecture: of its sizes, or as its published config.json says."""
    sizes = KNOWN_MODELS[name]
    return described(sizes["config"]) if "config" in sizes else models.new_config(**sizes)


def planned_model(config: Config, name: str | None) -> ModelConfig:
    """The policy's architecture: by name, from its folder, or of the configured sizes.

    Raises ValueError for a name or a folder that is not there.
    """
    path = config.model.path
    if name is None and path in _HUB_NAMES:
        name = _HUB_NAMES[path]
    if name is not None:
        if name not in KNOWN_MODELS:
            raise ValueError(f"--model {name} is not known; use one of {', '.join(KNOWN_MODELS)}.")
        return known_model(name)
    if path is None:
        return models.configured(config.model, config.model.vocab_size, config.data.max_tokens)
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        refuse_gguf(folder)
        raise ValueError(
            f"model.path={path} is no folder with a config.json here; give --model with one of "
            f"{', '.join(KNOWN_MODELS)}, or sizes with --model.path null --model.hidden_size ..."
        )
    return models.read_config(folder)


def assumed_lengths(
    config: Config, prompt_tokens: int | None, response_tokens: int | None, file: Path | None
) -> Lengths:
    """Lengths from a file, or of examples that are all alike: by default as long as the configuration lets them be.

    Those of a file are cut as training cuts. Raises ValueError for a file that holds none, and for lengths that are
    given and that the configuration would cut.
    """
    data = config.data
    if file is not None:
        try:
            content = parse_json(file.read_bytes())
            rows = [[int(n) for n in row] for row in (content["lengths"] if isinstance(content, dict) else content)]
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(
                f"--lengths {file}: {type(error).__name__}: {error}; give a JSON file with rows of "
                "[prompt, chosen, rejected] tokens, as benchmarks/hh_lengths.json."
            ) from None
        if not rows or any(len(row) != 3 or min(row) < 1 for row in rows):
            raise ValueError(f"--lengths {file} must hold rows of three positive numbers, prompt, chosen, rejected.")
        rows, whole = [_cut(data, *row) for row in rows], rows
        cut, mean = sum(map(list.__ne__, rows, whole)), np.mean(rows, axis=0)
        note = f", {cut:,} of them cut to data.max_tokens={data.max_tokens}" if cut else ""
        return Lengths(
            rows,
            f"{len(rows):,} pairs of {file}{note}, prompt {mean[0]:.0f}, responses {mean[1]:.0f} and {mean[2]:.0f}",
        )
    prompt = data.max_prompt_tokens if prompt_tokens is None else prompt_tokens
    response = data.max_tokens - prompt if response_tokens is None else response_tokens
    if min(prompt, response) < 1 or prompt + response > data.max_tokens:
        raise ValueError(
            f"--prompt-tokens {prompt} and --response-tokens {response} must be positive and together at most "
            f"data.max_tokens={data.max_tokens}."
        )
    alike = [[prompt, response, response]] * config.batch.pairs
    most = ", as long as the configuration lets them be" if prompt_tokens is None and response_tokens is None else ""
    return Lengths(alike, f"every prompt {prompt} and every response {response} tokens{most}")


def _cut(data: DataConfig, prompt: int, *responses: int) -> list[int]:
    """An example's lengths as tokenising leaves them."""
    if prompt + max(responses) > data.max_tokens:
        prompt = min(prompt, data.max_prompt_tokens)
    return [prompt, *(min(response, data.max_tokens - prompt) for response in responses)]


def planned_batch(
    config: Config, lengths: Lengths, responses: tuple[str, ...], row_shards: int, platform: str
) -> BatchShape:
    """The shape that the loader gives batches of such lengths on these devices."""
    examples = []
    for number, example in enumerate(lengths.tokens):
        prompts = tuple(np.full(example[0] + more, number, np.int32) for more in (0, REFINING_TOKENS))
        of = {
            name: np.zeros(tokens, np.int32)
            for name, tokens in _response_tokens(config.data.max_tokens, example).items()
        }
        present = dict.fromkeys(("chosen", "rejected", *responses))  # unpaired pools are as large as they will be
        kinds = [TokenizedResponse(name, of[name], prompt=int(name in REFINED)) for name in KINDS if name in present]
        examples.append(TokenizedExample(f"assumed {number}", number, prompts, tuple(kinds)))
    asked = models.Asked(row_tokens=config.batch.row_tokens)
    skips = models.attention_kind(config.model.attention, platform, asked).skips
    batches = PreferenceBatches(
        PreferenceData(examples),
        pairs=config.batch.pairs,
        pairing=config.data.pairing,
        responses=responses,
        seed=config.run.seed,
        row_tokens=config.batch.row_tokens,
        tokens_multiple=row_multiple(config.mesh.context),
        row_segments=2 if skips and config.batch.micro_rows is None else 1,  # as training.prepare chooses
        rows_multiple=config.batch.micro_rows or row_shards,
    )
    steps = range(min(MOST_STEPS, batches.steps_per_epoch))
    shapes = [batches.batch_at(step).tokens.shape for step in steps]
    rows, tokens = max(shapes, key=lambda shape: shape[0] * shape[1])
    return BatchShape(rows, tokens, *_contents(config, lengths, responses), lengths.source)


def _contents(config: Config, lengths: Lengths, responses: tuple[str, ...]) -> tuple[float, float, float]:
    """Tokens, scored tokens and visible pairs of an average batch."""
    totals = np.zeros(3)
    for example in lengths.tokens:
        for prompt, segment in _segments(config.data, example, responses):
            totals += prompt + sum(segment), sum(segment), visible_pairs(prompt, segment)
    tokens, scored, visible = totals / len(lengths.tokens) * config.batch.pairs
    return float(tokens), float(scored), float(visible)


def _response_tokens(max_tokens: int, example: Sequence[int]) -> dict[str, int]:
    """Tokens of an example's response of each kind."""
    prompt, chosen, rejected = example
    room = max(1, max_tokens - prompt - REFINING_TOKENS)  # after a refined prompt
    plain = {"chosen": chosen, "rejected": rejected, "mismatched": rejected}
    return {**plain, "refined_chosen": min(chosen, room), "refined_rejected": min(rejected, room)}


def _segments(data: DataConfig, example: Sequence[int], responses: tuple[str, ...]) -> list[tuple[int, list[int]]]:
    """Tokens of the prompt and of its responses, for each segment that an example has in a batch."""
    prompt, of = example[0], _response_tokens(data.max_tokens, example)
    if data.pairing != "paired":
        return [(prompt + REFINING_TOKENS * (name in REFINED), [of[name]]) for name in responses]
    plain, refined = ([of[name] for name in responses if (name in REFINED) == kind] for kind in (False, True))
    return [(prompt, plain), (prompt + REFINING_TOKENS, refined)] if refined else [(prompt, plain)]


def necessary(model: ModelConfig, config: Config, lengths: Lengths, responses: tuple[str, ...]) -> float:
    """Operations that a step cannot do without, on average over batches; see necessary_flops."""
    total = 0
    for example in lengths.tokens:
        for prompt, segment in _segments(config.data, example, responses):
            total += necessary_flops(model, prompt, segment, frozen=config.lora.rank > 0)
    return total / len(lengths.tokens) * config.batch.pairs


def step_sizes(config: Config, model: ModelConfig, batch: BatchShape, platform: str) -> StepSizes:
    """What a step works on, for rpo_jax.tools.planning.arithmetic."""
    asked = models.Asked.of(model, config.model.compute_dtype, batch.row_tokens)
    attention = models.attention_kind(config.model.attention, platform, asked)
    micro = min(config.batch.micro_rows or batch.rows, batch.rows)
    return StepSizes(
        rows=batch.rows,
        row_tokens=batch.row_tokens,
        scored_tokens=batch.scored_tokens,
        seen_pairs=batch.visible if attention.skips else batch.rows * batch.row_tokens**2,
        micro_batches=batch.rows // micro,
        remat=config.model.remat,
        fused_attention=attention.fused,
        reference_passes=int(resolve(config).reference in ("live", "adapter")),
        frozen=config.lora.rank > 0,
        compute_bytes=2 if config.model.compute_dtype == "bfloat16" else 4,
        stored_bytes=bytes_per_weight(config.lora.base_dtype),
        backward_products=attention.backward_products,
    )
