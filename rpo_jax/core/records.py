"""The records passed between packages.

No jax here: `data/` fills these with NumPy arrays, the step receives the same tuples as device arrays.

Letters: R rows and T tokens of a packed batch; S response slots of one kind, P of all kinds together; E embedding
width; r responses of a data set, those of an example one after another, in the order of the examples.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Bool, Float, Int

Array = Any  # np.ndarray on the host, jax.Array on devices


class Row(NamedTuple):
    """One record of a source, before any layout is known."""

    values: Mapping[str, Any]
    file: str
    line: int  # 1-based: the line of a JSONL file, the element of a JSON list, the record of a table

    @property
    def row_id(self) -> str:
        """File and line, as messages name the row."""
        return f"{self.file}:{self.line}"


class Message(NamedTuple):
    """A turn of a conversation.

    `more` is what else of it a chat template may read (tool_calls, reasoning_content, name, ...), a JSON object as
    text, so that messages can be compared and hashed; empty where there is nothing.
    """

    role: str  # system, user, assistant, tool, or another that the tokenizer's template knows
    content: str
    more: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The message as chat templates and JSON files have it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.more) if self.more else {})}


class Kind(NamedTuple):
    """What a kind of response is to the others.

    `slot_of` is the kind that it goes with: slot i of both is of one example, and of one chosen or rejected response
    where the example has several. `refines` is the kind that it is once more, after a refined prompt. `made_by` is
    what gives it to examples; None for what the data itself holds, which alone is contrasted: it has an embedding, a
    text id and a score.
    """

    slot_of: str
    refines: str | None = None
    made_by: str | None = None


_REFINING = "refine the data's prompts"

# In the order of their slots in a batch. All that is particular to a kind is said here.
KINDS: dict[str, Kind] = {
    "chosen": Kind("chosen"),
    "rejected": Kind("rejected"),
    # Another example's response, for KTO's KL estimate.
    "mismatched": Kind("chosen", made_by="tokenise the data with mismatched=True"),
    "refined_chosen": Kind("chosen", refines="chosen", made_by=_REFINING),
    "refined_rejected": Kind("rejected", refines="rejected", made_by=_REFINING),
}
REFINED = tuple(name for name, kind in KINDS.items() if kind.refines)
_KIND_NAMES = tuple(KINDS)


class Response(NamedTuple):
    """A response as the data holds it."""

    kind: str  # a name in KINDS
    text: str
    score: float | None = None  # how good the data says it is; None where that was not asked
    turns: tuple[Message, ...] = ()  # what it is where that is more than an assistant's turn of `text`


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt and any number of responses to it, several of one kind too.

    prompt: a string is used as it is; messages go through the chat template, which opens the assistant's turn. Where
    they end with a turn of the assistant, responses continue that turn.
    template_arguments: what the template is given beside the messages (tools, ...), a JSON object as text; empty where
    there is nothing. values: numbers of the row by name, where they were asked for.
    """

    row_id: str
    prompt: str | tuple[Message, ...]
    responses: tuple[Response, ...]
    template_arguments: str = ""
    values: tuple[tuple[str, float], ...] = ()

    def first(self, kind: str) -> Response | None:
        """The first response of this kind; None where there is none."""
        return next((response for response in self.responses if response.kind == kind), None)


class TokenizedResponse(NamedTuple):
    """Token ids of a response, which end with EOS unless it was cut.

    text_id numbers distinct responses over a whole data set; -1 for a response that is not contrasted.
    """

    kind: str
    ids: Int[np.ndarray, "_"]
    text_id: int = -1
    prompt: int = 0  # which of its example's prompts it follows


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of one example; a prompt is cut once, so that all responses that follow it share it.

    prompts: the example's own prompt first; a refined one is another. They start with BOS where the tokenizer has one.
    prompt_id numbers distinct prompts over a whole data set: two responses are the same text to the same prompt exactly
    if their prompt ids and text ids are equal.
    """

    row_id: str
    prompt_id: int
    prompts: tuple[Int[np.ndarray, "_"], ...]
    responses: tuple[TokenizedResponse, ...]

    @property
    def prompt_ids(self) -> Int[np.ndarray, "_"]:
        """The example's own prompt."""
        return self.prompts[0]


class TokenizedExamples(Sequence[TokenizedExample]):
    """Examples whose token ids lie in one array; an element is made when it is asked for.

    As objects, a short pair takes a kilobyte more than its tokens do.

    Letters: e examples.

    Attributes:
        row_ids, prompt_id: of each example.
        kind, prompt, text_id: of each response, as TokenizedResponse has them; kinds by their number in KINDS.
        response_tokens: of each response.
        example_index: the example of each response.
    """

    def __init__(self, examples: Iterable[TokenizedExample]) -> None:
        # Arrays that grow: a list of small NumPy arrays would be what is to be avoided.
        tokens, ends, self.row_ids = array("i"), array("q"), list[str]()
        prompt_id, num_prompts, num_responses = array("i"), array("i"), array("i")
        kind, prompt, text_id = array("b"), array("b"), array("i")
        code = {name: number for number, name in enumerate(KINDS)}
        for example in examples:
            self.row_ids.append(example.row_id)
            prompt_id.append(example.prompt_id)
            num_prompts.append(len(example.prompts))
            num_responses.append(len(example.responses))
            for response in example.responses:
                kind.append(code[response.kind])
                prompt.append(response.prompt)
                text_id.append(response.text_id)
            for ids in (*example.prompts, *(response.ids for response in example.responses)):
                tokens.frombytes(np.ascontiguousarray(ids, np.int32).tobytes())
                ends.append(len(tokens))
        self._tokens = np.frombuffer(tokens, np.int32) if tokens else np.zeros(0, np.int32)
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.array(ends, np.int64)])
        self.prompt_id = np.array(prompt_id, np.int32)
        self.kind, self.prompt = np.array(kind, np.int8), np.array(prompt, np.int8)
        self.text_id = np.array(text_id, np.int32)
        prompts, responses = np.array(num_prompts, np.int64), np.array(num_responses, np.int64)
        self.example_index = np.repeat(np.arange(len(prompts)), responses)
        self._first_response = np.cumsum(responses) - responses
        self._num_responses = responses
        # Pieces are the prompts of an example and then its responses, one example after another.
        self._first_piece = np.cumsum(prompts + responses) - prompts - responses
        self._num_prompts = prompts
        self._piece = np.arange(len(self.kind)) + np.cumsum(prompts)[self.example_index]
        self.response_tokens = np.diff(self._bounds)[self._piece]

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def num_bytes(self) -> int:
        """Of memory, the rows' names included."""
        arrays = (value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))
        return sum(arrays) + sys.getsizeof(self.row_ids) + sum(map(sys.getsizeof, self.row_ids))

    def __len__(self) -> int:
        return len(self.row_ids)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        first, first_response = int(self._first_piece[number]), int(self._first_response[number])
        return TokenizedExample(
            self.row_ids[number],
            int(self.prompt_id[number]),
            tuple(self._ids(first + i) for i in range(self._num_prompts[number])),
            tuple(self.response(first_response + i) for i in range(self._num_responses[number])),
        )

    def numbered(self, prompt_id: Int[np.ndarray, "e"], text_id: Int[np.ndarray, "r"]) -> TokenizedExamples:
        """The same with other numbers of prompts and of responses' texts."""
        made = copy(self)
        made.prompt_id, made.text_id = prompt_id, text_id
        return made

    def response(self, number: int) -> TokenizedResponse:
        """The response of this number, counted over all examples."""
        kind = _KIND_NAMES[self.kind[number]]
        ids = self._ids(int(self._piece[number]))
        return TokenizedResponse(kind, ids, int(self.text_id[number]), int(self.prompt[number]))

    def prompt_of(self, response: int) -> Int[np.ndarray, "_"]:
        """The prompt that this response follows."""
        return self._ids(int(self._first_piece[self.example_index[response]] + self.prompt[response]))

    def prompt_tokens(self, examples: Int[np.ndarray, "_"], prompt: Int[np.ndarray, "_"] | int) -> Int[np.ndarray, "_"]:
        """Tokens of the examples' prompts of these numbers."""
        return np.diff(self._bounds)[self._first_piece[examples] + prompt]

    def _ids(self, piece: int) -> Int[np.ndarray, "_"]:
        return self._tokens[self._bounds[piece] : self._bounds[piece + 1]]


@dataclass(frozen=True)
class PreferenceData:
    """A data set ready to be packed; what is known of each response lies in arrays of length r.

    Attributes:
        embeddings: what the contrast weights compare, float32; of width 0 where the objective needs none.
        embedding_row: row of `embeddings` that goes with each response; -1 where none does. None without embeddings.
        reference_log_probs: nats, NaN where there is none yet; None until computed.
        scores: NaN where the data gives none; None where the objective needs none.
        row_values: numbers of the responses' rows, by name.
        source: of a mixture the number of each example's source, ascending; None where all are of one.
    """

    examples: Sequence[TokenizedExample]
    embeddings: Float[np.ndarray, "n E"] | None = None
    embedding_row: Int[np.ndarray, "r"] | None = None
    reference_log_probs: Float[np.ndarray, "r"] | None = None
    scores: Float[np.ndarray, "r"] | None = None
    row_values: Mapping[str, Float[np.ndarray, "r"]] = field(default_factory=dict)
    source: Int[np.ndarray, "e"] | None = None

    def __post_init__(self) -> None:
        for facts in (self.embedding_row, self.reference_log_probs, self.scores, *self.row_values.values()):
            assert facts is None or len(facts) == self.num_responses, "one fact for each response"

    @cached_property
    def flat(self) -> TokenizedExamples:
        """The examples in arrays."""
        return self.examples if isinstance(self.examples, TokenizedExamples) else TokenizedExamples(self.examples)

    @property
    def num_responses(self) -> int:
        """r."""
        return len(self.flat.kind)

    @property
    def example_index(self) -> Int[np.ndarray, "r"]:
        """The example of each response."""
        return self.flat.example_index

    def of_kind(self, kind: str) -> Int[np.ndarray, "_"]:
        """Numbers of the responses of this kind."""
        return np.flatnonzero(self.flat.kind == _KIND_NAMES.index(kind))

    def response(self, number: int) -> TokenizedResponse:
        """The response with this number."""
        return self.flat.response(number)

    def example_of(self, response: int) -> TokenizedExample:
        """The example of the response with this number."""
        return self.flat[int(self.example_index[response])]


class Side(NamedTuple):
    """The responses of one kind in a batch. Slots that are not valid hold zeros, ids -1."""

    valid: Bool[Array, "S"]
    reference_log_prob: Float[Array, "S"]  # summed over scored tokens, nats
    embedding: Float[Array, "S E"]
    prompt_id: Int[Array, "S"]
    text_id: Int[Array, "S"]
    example_index: Int[Array, "S"]  # which example of the data set: for reports and caches
    score: Float[Array, "S"] | None = None  # of the response, by the data; None where nothing needs it
    row_values: dict[str, Float[Array, "S"]] | None = None  # of the response's row, by name; None where there are none


class Batch(NamedTuple):
    """A packed batch of fixed shape.

    A row holds segments one after another; a segment is a prompt (branch 0) followed by its responses (branches
    1, 2, ...). A token attends to earlier tokens of its own segment that are prompt or of its own branch.
    Positions count along a token's own sequence, so every branch continues where the prompt ended.
    """

    tokens: Int[Array, "R T"]
    positions: Int[Array, "R T"]
    segment_ids: Int[Array, "R T"]  # 1, 2, ... within a row; 0 is padding
    branch_ids: Int[Array, "R T"]
    previous: Int[Array, "R T"]  # index in the row of the token before it in its own sequence: its predictor
    response_ids: Int[Array, "R T"]  # slot of the response that a scored token belongs to; -1 elsewhere
    sides: dict[str, Side]  # by kind, those that the run needs; jax sorts the keys, so their order says nothing

    def slots(self) -> dict[str, slice]:
        """Which of the P slots each kind has, in the order of KINDS: what `response_ids` and log-probs count."""
        kinds = [kind for kind in KINDS if kind in self.sides]
        ends = [0, *accumulate(self.sides[kind].valid.shape[0] for kind in kinds)]
        return {kind: slice(*bounds) for kind, *bounds in zip(kinds, ends, ends[1:], strict=False)}

    @property
    def num_responses(self) -> int:
        """P."""
        return sum(side.valid.shape[0] for side in self.sides.values())

    def joined(self, name: str) -> list[Array]:
        """A field of all sides, in the order of their slots."""
        return [getattr(self.sides[kind], name) for kind in self.slots()]
