"""What the policy in training answers to a few held-out prompts, at every evaluation: samples.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from rpo_jax.config import Config
from rpo_jax.core.jsonl import read_jsonl, write_jsonl
from rpo_jax.core.records import TokenizedExample
from rpo_jax.hosts import sharding
from rpo_jax.models import ModelConfig, lora
from rpo_jax.sampling.answers import Answering, batch_rows, prompt_seeds
from rpo_jax.sampling.engine import Decoder, Sampling
from rpo_jax.sampling.kv_cache import unstack_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Params = Any
SAMPLES = "samples.jsonl"
BATCH_PROMPTS = 32


class Sampler:
    """Greedy answers to the first prompts, each prompt once.

    Args:
        base: the frozen weights beside which LoRA's adapters are trained.
    """

    def __init__(
        self,
        config: Config,
        model_config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[TokenizedExample],
        mesh: Mesh,
        base: Params | None,
    ) -> None:
        if jax.process_count() > 1:
            raise ValueError(
                f"train.sample_prompts={config.train.sample_prompts} samples on one process only so far; set it to 0, "
                "and sample the checkpoints with rpo_jax.generate."
            )
        self._file = Path(config.run.dir).expanduser() / SAMPLES
        self._tokenizer = tokenizer
        once: dict[int, TokenizedExample] = {}
        for example in examples:
            once.setdefault(example.prompt_id, example)
        self._examples = list(once.values())[: config.train.sample_prompts]
        self._prompts = [example.prompt_ids for example in self._examples]
        room = (model_config.max_position_embeddings - len(ids) for ids in self._prompts)
        self._limits = [max(0, min(config.train.sample_tokens, left)) for left in room]
        eos = model_config.eos_token_id
        ends = [tokenizer.eos_token_id, *(eos if isinstance(eos, tuple) else (eos,))]
        dtype = config.model.compute_dtype
        self._ends = frozenset(token for token in ends if isinstance(token, int))
        self._decoder = Decoder(
            model_config, mesh, sampling=Sampling(), end_ids=sorted(self._ends), compute_dtype=dtype
        )
        self._rows = batch_rows(BATCH_PROMPTS, len(self._prompts), sharding.row_shards(mesh))
        self._base = base

        def readable(trained: Params, base: Params | None) -> Params:
            whole = trained if base is None else lora.combine(base, trained, config.lora)
            return unstack_layers(whole, dtype, mesh.devices.flat[0].platform)

        self._readable = jax.jit(readable)

    def __call__(self, trained: Params, step: int) -> None:
        """Sample, and write the rows in place of those that an earlier part of the run wrote from this step on."""
        answering = Answering(
            self._decoder, self._readable(trained, self._base), self._tokenizer, self._ends, (), self._rows
        )
        seeds = prompt_seeds(self._prompts, 0)
        wanted = range(len(self._prompts))
        found = [answer for batch in answering.answers(self._prompts, seeds, self._limits, wanted) for answer in batch]
        rows = [row for row in read_jsonl(self._file) if row["step"] < step]
        for answer in sorted(found, key=lambda answer: answer.index):
            example = self._examples[answer.index]
            row = {
                "step": step,
                "row_id": example.row_id,
                "prompt": self._shown(example.prompt_ids.tolist()),
                "response": answer.text,
                "finish_reason": answer.finish_reason,
                "tokens": answer.tokens,
            }
            rows.append(row)
        write_jsonl(self._file, rows)

    def _shown(self, prompt_ids: list[int]) -> str:
        """A prompt as text, with the tags that tell whose turn is whose, but without BOS."""
        return str(self._tokenizer.decode(prompt_ids[prompt_ids[:1] == [self._tokenizer.bos_token_id] :]))
