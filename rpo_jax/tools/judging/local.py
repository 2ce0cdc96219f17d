"""Judges without a network: a reward model that scores each response, and a rule from a Python file."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rpo_jax.core.files import read_json, refuse_gguf
from rpo_jax.core.records import Message, PreferenceExample, Response
from rpo_jax.core.torch_extra import check_torch
from rpo_jax.data.chat_template import ChatTemplate
from rpo_jax.data.control_tokens import TextEncoder
from rpo_jax.data.conversations import hidden
from rpo_jax.data.layouts.messages import turns_text
from rpo_jax.data.tokenize import TokenLimits, tokenize_examples
from rpo_jax.data.tokenizer import load_tokenizer
from rpo_jax.models import RENDERING
from rpo_jax.tools.judging.comparisons import Choice, Comparison, JudgingFailed, Prompt, Verdict, as_json, turns

_BATCH = 8
_MOST_TOKENS = 32_768  # of tokenizers that name no limit, or a number that means none


def higher(first: float, second: float) -> Choice:
    return "tie" if first == second else "first" if first > second else "second"


class RewardJudge:
    """A sequence-classification model of one label, its higher score wins.

    One that this package exported reads the tokens that it was trained on. For others conversations are rendered by the
    tokenizer's chat template, in a sandbox as in training; without one, prompt and response are encoded as two texts.
    What is longer than the model loses its beginning and is counted.

    Raises ValueError for a folder that holds no such model, whole and as safetensors, and for a chat template that
    cannot be used.
    """

    sees_order = False

    def __init__(self, folder: str, say: Callable[[str], None] = lambda text: None) -> None:
        path = Path(folder).expanduser()
        if not (path / "config.json").is_file():
            refuse_gguf(path)
            raise ValueError(f"--judge reward:{folder} is no model folder: it has no config.json.")
        check_torch(f"--judge reward:{folder}")
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification

        try:
            self._tokenizer: Any = load_tokenizer(path)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
        except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"--judge reward:{folder} cannot be loaded: {reason}") from None
        if loading["missing_keys"]:
            # transformers would fill these at random, and the rewards with them.
            missing = ", ".join(sorted(loading["missing_keys"])[:3])
            raise ValueError(f"--judge reward:{folder} is no reward model: it has no weights for {missing}.")
        if model.config.num_labels != 1:
            raise ValueError(
                f"--judge reward:{folder} has {model.config.num_labels} labels; a reward model gives one score."
            )
        self.name, self._model, self._say = path.resolve().name, model.eval(), say
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = self._tokenizer.pad_token_id
        limits = (self._tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
        self._limit = min((int(limit) for limit in limits if limit and limit < _MOST_TOKENS), default=_MOST_TOKENS)
        self._tokenizer.truncation_side = "left"
        self._template = ChatTemplate(self._tokenizer) if self._tokenizer.chat_template else None
        self._encoder = TextEncoder(self._tokenizer)
        self._limits = _trained_limits(path)

    def verdicts(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        wanted = {(one.pair.prompt, response): None for one in comparisons for response in one.responses}
        scores: dict[tuple[Prompt, str], float] = {}
        judged: set[int] = set()
        for some in self.scores(list(wanted)):
            scores |= some
            for index, comparison in enumerate(comparisons):
                keys = [(comparison.pair.prompt, response) for response in comparison.responses]
                if index not in judged and all(key in scores for key in keys):
                    judged.add(index)
                    first, second = (scores[key] for key in keys)
                    yield index, Verdict(higher(first, second), f"rewards {first:.6g} and {second:.6g}")

    def scores(self, answers: Sequence[tuple[Prompt, str]]) -> Iterator[dict[tuple[Prompt, str], float]]:
        """Rewards of responses to prompts, a batch at a time; those of about one length are together.

        Raises JudgingFailed for a text that the model's tokenizer or template refuses, and for rewards not finite.
        """
        try:
            if self._limits is None:
                encoded = [(key, self._encode(*key)) for key in answers]
            else:
                encoded = self._encode_as_trained(answers, self._limits)
        except ValueError as error:
            raise JudgingFailed(f"the reward model {self.name} cannot be asked: {error}") from error
        cut = sum(was_cut for _, (_, was_cut) in encoded)
        if cut:
            self._say(
                f"{cut} of {len(encoded)} texts are longer than the reward model's {self._limit} tokens; cut there"
            )
        encoded.sort(key=lambda pair: len(pair[1][0]["input_ids"]))  # equal lengths together, for less padding
        for start in range(0, len(encoded), _BATCH):
            batch = encoded[start : start + _BATCH]
            values = self._scores([ids for _, (ids, _) in batch])
            yield {key: value for (key, _), value in zip(batch, values, strict=True)}

    def _encode(self, prompt: Prompt, response: str) -> tuple[dict[str, list[int]], bool]:
        if self._template is None:
            texts = prompt if isinstance(prompt, str) else turns_text(prompt), response
            self._encoder.encode(texts)  # where it can be stopped: what passes there is safe here
            whole = self._tokenizer(*texts, truncation=False, verbose=False)
            if len(whole["input_ids"]) <= self._limit:
                return dict(whole), False
            return dict(self._tokenizer(*texts, truncation=True, max_length=self._limit)), True
        encoder = self._template.encoder
        conversation = [hidden(turn, encoder) for turn in (*turns(prompt), Message("assistant", response))]
        (text,) = self._template.render([(conversation, False)])
        if isinstance(text, ValueError):
            raise text
        ids = encoder.encode([text])[0].tolist()
        return {"input_ids": ids[-self._limit :]}, len(ids) > self._limit

    def _encode_as_trained(
        self, answers: Sequence[tuple[Prompt, str]], limits: TokenLimits
    ) -> list[tuple[tuple[Prompt, str], tuple[dict[str, list[int]], bool]]]:
        examples = [
            PreferenceExample(str(number), prompt, (Response("chosen", response),))
            for number, (prompt, response) in enumerate(answers)
        ]
        tokenized, faults = tokenize_examples(examples, self._tokenizer, limits)
        if faults:
            raise ValueError(faults.first.reason)
        token_ids = ([*one.prompt_ids.tolist(), *one.responses[0].ids.tolist()] for one in tokenized)
        return [
            (key, ({"input_ids": ids[-self._limit :]}, len(ids) > self._limit))
            for key, ids in zip(answers, token_ids, strict=True)
        ]

    def _scores(self, encoded: list[dict[str, list[int]]]) -> list[float]:
        import torch

        with torch.inference_mode():
            inputs = self._tokenizer.pad(encoded, return_tensors="pt")
            scores = self._model(**inputs).logits[:, 0].float().tolist()
        if not all(math.isfinite(score) for score in scores):
            raise JudgingFailed(
                f"the reward model {self.name} gave a reward that is no finite number; check its weights."
            )
        return scores


def _trained_limits(folder: Path) -> TokenLimits | None:
    """How texts become tokens for a reward model that this package exported; None for others."""
    if not (folder / RENDERING).is_file():
        return None
    rendering = read_json(folder, RENDERING)
    try:
        side = "keep_end" if rendering["truncation_side"] == "auto" else rendering["truncation_side"]
        return TokenLimits(**{**rendering, "truncation_side": side})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / RENDERING} is damaged ({error}); export the model again.") from None


class RuleJudge:
    """A function from a Python file, given as MODULE.py:FUNCTION.

    `FUNCTION(prompt, response)` scores one response, and the higher score wins; `FUNCTION(prompt, first, second)`
    returns 1 or 2 for the better one, 0 for a tie, None where it cannot tell. `prompt` is a string, or a list of
    messages with role and content.

    Raises ValueError where there is no such function, or it fails or returns something else.
    """

    def __init__(self, spec: str) -> None:
        file, colon, name = spec.rpartition(":")
        if not colon or not file.endswith(".py"):
            raise ValueError(f"--judge rule:{spec} is not of the form rule:MODULE.py:FUNCTION.")
        path = Path(file).expanduser()
        if not path.is_file():
            raise ValueError(f"--judge rule:{spec}: there is no file {path}.")
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        assert module_spec is not None, "a .py file has a spec"
        assert module_spec.loader is not None, "and a loader"
        module = importlib.util.module_from_spec(module_spec)
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:  # whatever a user's file raises
            raise ValueError(f"--judge rule:{spec}: {path} fails: {type(error).__name__}: {error}") from None
        function = getattr(module, name, None)
        count = len(inspect.signature(function).parameters) if inspect.isfunction(function) else None
        if function is None or count not in (2, 3):
            raise ValueError(
                f"--judge rule:{spec}: {path} has no function {name}(prompt, response) or "
                f"{name}(prompt, first, second)."
            )
        self.name, self.sees_order = f"{path.name}:{name}", count == 3
        self._function: Callable[..., Any] = function

    def verdicts(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        for index, comparison in enumerate(comparisons):
            prompt = as_json(comparison.pair.prompt)
            try:
                verdict = self._compare(prompt, *comparison.responses)
            except Exception as error:  # whatever a user's function raises
                raise JudgingFailed(
                    f"{self.name} fails on {comparison.pair.row_id}: {type(error).__name__}: {error}"
                ) from None
            yield index, verdict

    def score(self, prompt: Prompt, response: str) -> float:
        """What the function gives for one response. Raises JudgingFailed where that is no finite number."""
        try:
            score = float(self._function(as_json(prompt), response))
        except Exception as error:  # whatever a user's function raises
            raise JudgingFailed(f"{self.name} fails: {type(error).__name__}: {error}") from None
        if not math.isfinite(score):
            raise JudgingFailed(f"{self.name} gives {score:g}, which is no finite number")
        return score

    def _compare(self, prompt: Any, first: str, second: str) -> Verdict:
        if not self.sees_order:
            scores = float(self._function(prompt, first)), float(self._function(prompt, second))
            if not all(math.isfinite(score) for score in scores):
                return Verdict(None, f"scores {scores[0]:g} and {scores[1]:g}")
            return Verdict(higher(*scores), f"scores {scores[0]:g} and {scores[1]:g}")
        choices: dict[int | None, Choice | None] = {1: "first", 2: "second", 0: "tie", None: None}
        result = self._function(prompt, first, second)
        if result not in choices:
            raise ValueError(f"returned {result!r}, not 1, 2, 0 or None")
        return Verdict(choices[result], str(result))
