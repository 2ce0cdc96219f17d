"""What the policy in training answers to a few held-out prompts, at every evaluation: samples.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from rpo_jax import models
from rpo_jax.config import Config
from rpo_jax.core.files import check_there
from rpo_jax.core.jsonl import read_jsonl, write_jsonl
from rpo_jax.core.records import TokenizedExample
from rpo_jax.core.store import ByProduct
from rpo_jax.data.control_tokens import TextEncoder
from rpo_jax.data.limited_tokenizer import TokenIds
from rpo_jax.data.tokenizer import decode
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig
from rpo_jax.objectives import heads
from rpo_jax.runs.tracking import METRICS
from rpo_jax.sampling.answers import Answerer, batch_rows, prompt_seeds
from rpo_jax.sampling.engine import Engine, Sampling
from rpo_jax.sampling.kv_cache import to_decode_layout
from rpo_jax.training.hooks.hook import Hook, Training

if TYPE_CHECKING:
    from rpo_jax.training.prepare import Prepared

Params = Any
SAMPLES = "samples.jsonl"
BATCH_PROMPTS = 32


def make_readable(policy: models.Policy, dtype: str, mesh: Mesh) -> Callable[[Params, Params], Params]:
    """Compiled function from what is trained and what is frozen to the parameters that sampling reads."""

    def readable(trained: Params, frozen: Params) -> Params:
        return to_decode_layout(policy.combine(heads.split(trained)[0], frozen), dtype, mesh.devices.flat[0].platform)

    return jax.jit(readable)


class Sampler(Hook):
    """Greedy answers to the first prompts, each prompt once; held-out ones where there are any.

    Args:
        end_ids: tokens that end an answer.
        frozen: the policy's frozen weights; an empty tree where all are trained.
        say: is told where the file cannot be written.
    """

    def __init__(
        self,
        config: Config,
        model_config: ModelConfig,
        prepared: Prepared,
        end_ids: frozenset[int],
        mesh: Mesh,
        frozen: Params,
        say: Callable[[str], None],
    ) -> None:
        self._file, self._kept = Path(config.run.dir).expanduser() / SAMPLES, ByProduct("Samples", say)
        self._tokenizer, self._end_ids = prepared.tokenizer, end_ids
        self._encoder = TextEncoder(prepared.tokenizer)
        once: dict[int, TokenizedExample] = {}
        held_out = prepared.prompts["held_out"].data if "held_out" in prepared.prompts else prepared.held_out
        for example in (held_out or prepared.train).examples:
            once.setdefault(example.prompt_id, example)
        self._examples = list(once.values())[: config.train.sample_prompts]
        self._prompts = [example.prompt_ids for example in self._examples]
        room = (model_config.positions - len(ids) for ids in self._prompts)
        self._limits = [max(0, min(config.train.sample_tokens, left)) for left in room]
        dtype = config.model.compute_dtype
        self._engine = Engine(model_config, mesh, sampling=Sampling(), end_ids=sorted(end_ids), compute_dtype=dtype)
        self._rows = batch_rows(BATCH_PROMPTS, len(self._prompts), sharding.row_shards(mesh))
        self._frozen = frozen
        self._readable = make_readable(models.Policy(model_config, config.lora), dtype, mesh)

    def before_evaluation(self, run: Training) -> None:
        """Sample, and write the rows in place of those that an earlier part of the run wrote from this step on."""
        params = self._readable(run.state.params, self._frozen)
        answerer = Answerer(self._engine, params, self._tokenizer, self._end_ids, (), self._rows)
        batches = answerer.answers(
            self._prompts, prompt_seeds(self._prompts, 0), self._limits, range(len(self._prompts))
        )
        rows = []
        for answer in sorted((answer for batch in batches for answer in batch), key=lambda answer: answer.index):
            example = self._examples[answer.index]
            row = {
                "step": run.step,
                "row_id": example.row_id,
                "prompt": self._shown(example.prompt_ids),
                "response": answer.text,
                "finish_reason": answer.finish_reason,
                "tokens": answer.tokens,
            }
            rows.append(row)

        def write() -> None:
            check_there(self._file.with_name(METRICS))
            write_jsonl(self._file, [*(row for row in read_jsonl(self._file) if row["step"] < run.step), *rows])

        self._kept.write(write)

    def _shown(self, prompt_ids: TokenIds) -> str:
        """A prompt as text, with the tags that tell whose turn is whose, but without the BOS before it."""
        return decode(self._tokenizer, prompt_ids[self._encoder.num_leading(prompt_ids) :].tolist())
