"""A model's answers to a file of prompts, in a file that is completed where an earlier start was stopped.

An answer depends on the model, its prompt, the settings and the seed, not on the prompts beside it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rpo_jax import models
from rpo_jax.config import MeshConfig, RunConfig
from rpo_jax.core.files import atomic_write, check_writable
from rpo_jax.core.jsonl import GrowingFile, complete_lines, parse_json, write_jsonl
from rpo_jax.core.locks import one_writer
from rpo_jax.core.memory import explaining_memory
from rpo_jax.core.records import Message
from rpo_jax.data.hub import newest_file
from rpo_jax.data.prompts import PromptRow, PromptSet, read_prompts
from rpo_jax.data.tokenize import TEMPLATES, PromptEncoder
from rpo_jax.hosts import sharding
from rpo_jax.hosts.compiled import keeping_compiled
from rpo_jax.hosts.devices import unused_card
from rpo_jax.runs.tracking import Reporter
from rpo_jax.sampling.answers import Answer, Answerer, batch_rows, prompt_seeds
from rpo_jax.sampling.engine import Engine, Sampling
from rpo_jax.sampling.kv_cache import to_decode_layout
from rpo_jax.sampling.policy import DTYPES, StoredPolicy, find_policy

ALPACA_EVAL = "tatsu-lab/alpaca_eval"
ALPACA_EVAL_FILE = "alpaca_eval_gpt4_baseline.json"
_LESS_MEMORY = "try a smaller --batch-size or --max-tokens, --dtype bfloat16, or more devices and --mesh.fsdp to match"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to ask of which model.

    Args:
        model: a run folder, a Hugging Face folder, or a hub name.
        prompts: a .txt file with a prompt a line, or rows with `prompt`, `messages` or `instruction`, or preferences.
        out: JSONL file of the answers; with alpaca_eval the .json file, beside which the JSONL file lies.
        checkpoint: of a run: `last`, `best` or a step.
        sampling: greedy where not given.
        samples: answers to each prompt; with more than one every row has its number as `sample`.
        max_tokens: most tokens of an answer.
        stop: texts that end an answer.
        seed: of all answers; each prompt's own follows from it and the prompt.
        batch_size: prompts at a time.
        template: `auto` gives messages to the chat template and leaves text as it is, `chat` makes text a user's
            message; that of the run where not given, otherwise auto.
        template_arguments: what the chat template gets besides the messages, such as enable_thinking; those of the run
            where not given.
        columns: what the prompts' rows call `prompt` and other columns, as data.columns; those of the run's that they
            have where not given.
        ignore_columns: columns that are read as if they were not there; the run's where not given.
        max_prompt_tokens: longer prompts are cut as in training; where not given, those that do not fit are refused.
        compute_dtype: float32 or bfloat16; the run's where not given, float32 for folders.
        principle: what answers are to keep to, for Linear Alignment: it is read as a system turn, or before a text, and
            outweighs the same prompt without it by sampling.principle_weight.
        base: of a LoRA run: where the model that it started from is now, if it has moved.
        overwrite: start anew rather than complete `out`.
        alpaca_eval: write what the alpaca_eval package reads; prompts are AlpacaEval's where not given.
        generator: the model's name there; that of its folder where not given.
    """

    model: str
    prompts: str | None = None
    out: str | None = None
    checkpoint: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 32
    template: str | None = None
    template_arguments: Mapping[str, Any] | None = None
    columns: Mapping[str, str] | None = None
    ignore_columns: tuple[str, ...] | None = None
    max_prompt_tokens: int | None = None
    compute_dtype: str | None = None
    principle: str | None = None
    base: str | None = None
    overwrite: bool = False
    alpaca_eval: bool = False
    generator: str | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    cache_dir: str = RunConfig().cache_dir

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "batch_size", "max_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be at least 0 and less than 2^32.")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(f"samples={self.samples} greedy answers are all the same; give a --temperature.")
        if self.samples > 1 and self.alpaca_eval:
            raise ValueError(f"samples={self.samples} are more than AlpacaEval reads; leave it out.")
        if (self.principle is None) != (self.sampling.principle_weight == 0):
            raise ValueError(
                f"principle={self.principle!r} and principle_weight={self.sampling.principle_weight} go together: give "
                "a text and a weight greater than 0, or neither."
            )
        if self.principle is not None and self.max_prompt_tokens is not None:
            raise ValueError(
                f"max_prompt_tokens={self.max_prompt_tokens} would cut a prompt otherwise with the principle than "
                "without, and the difference would count as the principle's; leave one of the two out."
            )
        if "" in self.stop:
            raise ValueError("stop='' would end every answer at once; leave it out.")
        if self.template not in (None, *TEMPLATES):
            raise ValueError(f"template={self.template} is not known; use one of {', '.join(TEMPLATES)}.")
        if self.compute_dtype not in (None, *DTYPES):
            raise ValueError(f"dtype={self.compute_dtype} is not known; use one of {', '.join(DTYPES)}.")
        if self.generator is not None and not self.alpaca_eval:
            raise ValueError(f"generator={self.generator} is written for AlpacaEval only; add --alpaca-eval.")
        if not self.alpaca_eval and (self.prompts is None or self.out is None):
            raise ValueError("Say what is asked and where the answers go: --prompts FILE --out FILE.jsonl.")
        if self.alpaca_eval and self.out is not None and Path(self.out).suffix != ".json":
            raise ValueError(f"out={self.out} must end in .json: AlpacaEval reads no other lists of rows.")

    @property
    def answers_file(self) -> Path:
        path = Path(self.out or "model_outputs.json").expanduser()
        return path.with_suffix(".jsonl") if self.alpaca_eval else path


def generate(config: GenerateConfig) -> Path:
    """Answer all prompts; returns the file, with one row for each of them.

    Raises ValueError for what a user can correct, before anything is loaded or compiled.
    """
    reporter = Reporter()
    out = config.answers_file
    if out.is_dir():
        raise ValueError(f"out={out} cannot be written; give a file in a folder that can be.")
    check_writable(out.parent)
    with one_writer(out, "out"):
        return _generate(config, out, reporter)


def _generate(config: GenerateConfig, out: Path, reporter: Reporter) -> Path:
    mesh = sharding.make_mesh(config.mesh)
    if (note := unused_card()) is not None:
        reporter.say(note)
    if config.prompts is not None:
        check_not_replaced(config.prompts, out, *([out.with_suffix(".json")] if config.alpaca_eval else []))
    policy = find_policy(config.model, checkpoint=config.checkpoint, base=config.base)
    ignored = policy.data.ignore_columns if config.ignore_columns is None else config.ignore_columns
    asked = read_prompts(
        config.prompts or _alpaca_eval_set(),
        columns=config.columns,
        usual_columns=policy.data.columns,
        ignore_columns=ignored,
    )
    template = config.template or policy.data.template
    arguments = policy.data.template_arguments if config.template_arguments is None else config.template_arguments
    encoded = _encoded(asked, policy, template, arguments, config.max_prompt_tokens)
    prompts, without = [ids for ids in encoded for _ in range(config.samples)], None
    if config.principle is not None:
        principled = replace(asked, rows=tuple(_with_principle(row, config.principle) for row in asked.rows))
        encoded = _encoded(principled, policy, template, arguments, None)
        prompts, without = [ids for ids in encoded for _ in range(config.samples)], prompts
    seeds = prompt_seeds(prompts, config.seed)
    dtype, weight = config.compute_dtype or policy.compute_dtype, config.sampling.principle_weight
    settings = {
        # Files of before there were principles have none of their keys.
        **{key: value for key, value in dataclasses.asdict(config.sampling).items() if key != "principle_weight"},
        **({"principle": config.principle, "principle_weight": weight} if weight else {}),
        "max_tokens": config.max_tokens,
        "stop": list(config.stop),
        "seed": config.seed,
        "template": template,
        **({"template_arguments": dict(arguments)} if arguments else {}),
        "max_prompt_tokens": config.max_prompt_tokens,
        "compute_dtype": dtype,
    }
    rows = [
        {
            "row_id": row.row_id,
            "prompt": row.prompt if isinstance(row.prompt, str) else [turn.to_dict() for turn in row.prompt],
            **({"sample": number} if config.samples > 1 else {}),
            "model": policy.name,
            "weights": policy.weights_id,
            "settings": settings,
        }
        for row in asked.rows
        for number in range(config.samples)
    ]
    for row, seed in zip(rows, seeds, strict=True):
        row["seed"] = seed
    done = {} if config.overwrite else _already(out, rows)
    if done:
        reporter.say(f"{out} has {len(done)} of {len(rows)} answers already")
    wanted = [index for index in range(len(rows)) if index not in done]
    if wanted:
        # As in training: an accelerator may multiply float32 at less than float32's precision unless told otherwise.
        precise = jax.default_matmul_precision("float32" if dtype == "float32" else None)
        kept = keeping_compiled(Path(config.cache_dir).expanduser() / "compiled", reporter.say)
        with jax.set_mesh(mesh), precise, kept, explaining_memory(lambda: _LESS_MEMORY):
            limits = [min(config.max_tokens, policy.model_config.positions - len(ids)) for ids in prompts]
            with reporter.phase("load model"):
                params = policy.load(mesh)
                platform = mesh.devices.flat[0].platform
                readable = jax.jit(to_decode_layout, static_argnums=(1, 2))
                params = jax.block_until_ready(readable(params, dtype, platform))
            engine = Engine(
                policy.model_config,
                mesh,
                sampling=config.sampling,
                end_ids=sorted(policy.end_ids),
                compute_dtype=dtype,
            )
            size = batch_rows(config.batch_size, len(rows), sharding.row_shards(mesh))
            answerer = Answerer(engine, params, policy.tokenizer, policy.end_ids, config.stop, size)
            _write_answers(out, rows, done, answerer.answers(prompts, seeds, limits, wanted, without), reporter)
    write_jsonl(out, [done[index] for index in range(len(rows))], ascii_only=False)
    if config.alpaca_eval:
        generator = config.generator or Path(policy.name).name
        return _write_alpaca_eval(out.with_suffix(".json"), asked.rows, done, generator)
    return out


def check_not_replaced(prompts: str | Path, *targets: Path) -> None:
    """ValueError where one of the files to be written is the one that the prompts are read from."""
    for target in targets:
        if target.resolve() == Path(prompts).expanduser().resolve():
            raise ValueError(f"{target} holds the prompts and would be replaced; give another --out.")


def _with_principle(row: PromptRow, principle: str) -> PromptRow:
    """The prompt with the principle in its system turn, or before its text."""
    if isinstance(row.prompt, str):
        return replace(row, prompt=f"{principle}\n\n{row.prompt}")
    first, *others = row.prompt
    if first.role != "system":
        return replace(row, prompt=(Message("system", principle), *row.prompt))
    return replace(row, prompt=(first._replace(content=f"{first.content}\n\n{principle}"), *others))


def _encoded(
    asked: PromptSet,
    policy: StoredPolicy,
    template: Any,
    arguments: Mapping[str, Any],
    max_prompt_tokens: int | None,
) -> list[np.ndarray]:
    """Token ids of the prompts as training would have made them."""
    encoder = PromptEncoder(policy.tokenizer, template, arguments, max_prompt_tokens, asked.truncation_side)
    encoded, positions = [], policy.model_config.positions
    for row in asked.rows:
        try:
            ids = encoder.encode(row.prompt, row.template_arguments)
        except ValueError as error:
            raise ValueError(f"{row.row_id}: {error}; mend the row, or leave it out.") from None
        if not len(ids):
            raise ValueError(f"{row.row_id}: the prompt is empty, and the tokenizer has no BOS to stand for it.")
        if len(ids) >= positions:
            raise ValueError(
                f"{row.row_id}: the prompt has {len(ids)} tokens, and {policy.name} has {positions} positions for "
                "prompt and answer; leave it out, or cut long prompts with --max-prompt-tokens."
            )
        encoded.append(ids)
    texts = ((row.row_id, ids) for row, ids in zip(asked.rows, encoded, strict=True))
    models.check_ids(policy.tokenizer, policy.model_config, texts)
    return encoded


def _already(out: Path, rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Answers of an earlier start by the index of their prompts; a last line that was cut short is none.

    Raises ValueError for a file of another model, other settings or other prompts.
    """
    index_of = {(row["row_id"], row.get("sample")): index for index, row in enumerate(rows)}
    done = {}
    for number, line in enumerate(complete_lines(out), start=1):
        try:
            answer = parse_json(line)
            index = index_of.get((answer["row_id"], answer.get("sample")))
            recorded = {key: answer[key] for key in ("model", "settings", "prompt", "seed")}
            assert {"response", "finish_reason", "tokens"} <= set(answer)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise ValueError(f"{out}:{number} is no answer of this command; give another --out.") from None
        where = f"{out} is of an earlier start with other"
        mend = "repeat it as it was, or give another --out, or --overwrite."
        expected = rows[0 if index is None else index]
        # A principle is a setting only where there is one.
        settings = {**dict.fromkeys(recorded["settings"]), **expected["settings"]}
        for key, value in {"model": expected["model"], **settings}.items():
            before = recorded["model"] if key == "model" else recorded["settings"].get(key)
            if before != value:
                raise ValueError(f"{where} settings: {key} was {before!r} and is {value!r} now; {mend}")
        if answer.get("weights", expected["weights"]) != expected["weights"]:  # older files do not say
            raise ValueError(f"{out} has answers of other weights that were in {expected['model']} before; {mend}")
        if index is None or recorded["prompt"] != expected["prompt"] or recorded["seed"] != expected["seed"]:
            raise ValueError(f"{where} prompts: {answer['row_id']} was {recorded['prompt']!r:.60}; {mend}")
        done[index] = answer
    return done


def _write_answers(
    out: Path, rows: Sequence[dict[str, Any]], done: dict[int, dict[str, Any]], batches: Any, reporter: Reporter
) -> None:
    """Append every batch's answers as they come, so that whatever stops this loses one batch at most."""
    write_jsonl(out, done.values(), ascii_only=False)
    file = GrowingFile(out, reporter.say, ascii_only=False)
    began, tokens, before = time.perf_counter(), 0, len(done)
    with reporter.progress("generate", len(rows), before) as progress:
        for batch in batches:
            answered = {answer.index: rows[answer.index] | _answer_fields(answer) for answer in batch}
            done |= answered
            tokens += sum(answer.tokens for answer in batch)
            file.add(*answered.values())
            progress(len(done), {"generated_per_second": tokens / (time.perf_counter() - began)})
    seconds = time.perf_counter() - began
    reporter.say(f"{len(done) - before} answers, {tokens} tokens, {seconds:.1f} s, compilation included")


def _answer_fields(answer: Answer) -> dict[str, Any]:
    return {"response": answer.text, "finish_reason": answer.finish_reason, "tokens": answer.tokens}


def _alpaca_eval_set() -> str:
    """AlpacaEval's instructions, from the hub."""
    try:
        return str(newest_file(ALPACA_EVAL, ALPACA_EVAL_FILE))
    except Exception as error:  # whatever keeps the hub from answering, the user can do the same about it
        raise ValueError(
            f"The hub did not give {ALPACA_EVAL_FILE} of the data set {ALPACA_EVAL} ({type(error).__name__}); fetch "
            "that file where the hub can be reached, and give it as --prompts."
        ) from None


def _write_alpaca_eval(out: Path, asked: Sequence[PromptRow], done: dict[int, dict[str, Any]], generator: str) -> Path:
    """The file that `alpaca_eval --model_outputs` reads."""
    rows = [
        {
            # As it stands in the set: the annotator lines answers up by it.
            "instruction": row.values.get("instruction") or _last_turn(row),
            "output": done[index]["response"],
            "generator": generator,
            "dataset": row.values.get("dataset", "unknown"),
        }
        for index, row in enumerate(asked)
    ]
    atomic_write(out, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
    return out


def _last_turn(row: PromptRow) -> str:
    return row.prompt if isinstance(row.prompt, str) else row.prompt[-1].content
