"""What stands beside the answers in a row: it is used as it is meant, or the row is refused by the column's name."""

import json
import re
from pathlib import Path

import pytest

from rpo_jax.core.records import Message, Row
from rpo_jax.data.examples import LAYOUTS, detect_layout, embedding_text, make_examples, prompt_text

LONG = {"chosen": "The capital is Paris.", "rejected": "The capital is Lyon, I think."}
SHORT = {"chosen": "Bleu.", "rejected": "Blue."}
SYSTEM, ASKED = Message("system", "Be brief."), Message("user", "Why?")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def rows_of(*records):
    return [Row(record, "rows.jsonl", line) for line, record in enumerate(records, start=1)]


def example_of(record, **options):
    (example,) = make_examples(rows_of(record), **options).examples
    return example


def reason_of(record, **options):
    with pytest.raises(ValueError, match=r"^rows\.jsonl:1: ") as caught:
        make_examples(rows_of(record), **options)
    return str(caught.value).removeprefix("rows.jsonl:1: ")


def test_the_rows_of_the_documentation_are_read():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    found = {
        make_examples(rows_of(json.loads(line))).layout
        for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    }
    assert found == set(LAYOUTS) - {"oasst1"}, "which takes several rows"


def test_a_row_of_one_answer_is_for_fine_tuning_unless_it_says_how_good_it_is():
    talk = [user("Why?"), assistant("So.")]
    for row in ({"messages": talk, "id": 7}, {"instruction": "Why?", "input": "", "output": "So.", "source": "a book"}):
        example = example_of(row)
        assert (prompt_text(example), [one.text for one in example.responses]) == ("user: Why?", ["So."])
    for more in ({"reward": 1.0}, {"bad_output": "No."}, {"win": "a"}):
        with pytest.raises(ValueError, match="fit no layout"):
            detect_layout(rows_of({"prompt": "Why?", "output": "So.", **more}))
    assert make_examples(rows_of({"messages": talk, "label": True})).layout == "unpaired"


@pytest.mark.parametrize("name", ["model_input", "judge_prompt", "chosen_prompt", "scoreInput"])
def test_a_column_that_asks_is_no_metadata_whatever_else_its_name_says(name):
    assert f"column '{name}' may belong to the prompt" in reason_of({name: "What is the capital?", **LONG})
    assert example_of({"prompt": "What?", "prompt_id": "a1", **LONG}).prompt == "What?"


@pytest.mark.parametrize("blank", ["", " ", []])
def test_a_blank_prompt_beside_whole_conversations_says_nothing(blank):
    whole = {"chosen": [user("Why?"), assistant("So.")], "rejected": [user("Why?"), assistant("No.")]}
    assert example_of({"prompt": blank, **whole}) == example_of(whole)
    asked = {"messages": whole["chosen"], "label": True}
    assert example_of({"instruction": blank, **asked}) == example_of(asked)


# The prompt's column


@pytest.mark.parametrize("name", ["question", "instruction", "query", "input"])
def test_a_prompt_under_another_name_is_what_a_user_says(name):
    found = make_examples(rows_of({name: "Capital of France?", **LONG}))
    assert found.examples[0].prompt == (Message("user", "Capital of France?"),)
    assert [response.text for response in found.examples[0].responses] == list(LONG.values())
    assert (found.layout, found.prompt_columns) == ("preference", (name,))


@pytest.mark.parametrize("rest", [{}, {"chosen_response": "So.", "rejected_response": "No."}])
def test_known_data_sets_with_other_names(rest):
    orca = {"system": "Be brief.", "question": "Why?", **(rest or LONG)}
    found = example_of(orca)
    assert (found.prompt, len(found.responses)) == ((SYSTEM, ASKED), 2)
    alpaca = {"instruction": "Say why:", "input": "rain", "system": "", "history": [["a", "b"]], **(rest or LONG)}
    said = (Message("user", "a"), Message("assistant", "b"), Message("user", "Say why:\n\nrain"))
    assert example_of(alpaca).prompt == said
    assert example_of(alpaca | {"input": "", "history": []}).prompt == (Message("user", "Say why:"),)


@pytest.mark.parametrize(
    "value", ["What is the capital of France?", "法国的首都是哪里？", "France", [user("Where?")], {"text": "a b"}]
)
def test_no_prompt_is_invented_beside_a_column_that_may_be_it(value):
    reason = reason_of({"words": value, **LONG})
    assert reason.startswith("column 'words' may belong to the prompt")
    assert "data.columns.prompt" in reason
    assert "data.ignore_columns" in reason
    assert reason_of({"words": value, **SHORT}).startswith("column 'words' may"), "also where the answers share nothing"
    talk = {name: [user("Hi"), assistant(text)] for name, text in SHORT.items()}
    assert reason_of({"words": value, **talk}).startswith("column 'words' may belong to the prompt")
    transcripts = {name: f"\n\nHuman: Hi\n\nAssistant: {text}" for name, text in SHORT.items()}
    assert reason_of({"words": value, **transcripts}).startswith("column 'words' may belong to the prompt")


@pytest.mark.parametrize(
    "beside",
    [
        {"id": "an id of words", "source": "hh-rlhf", "lang": "en", "chosen_model": "model a", "score": 3, "ok": True},
        {"words": None},
        {"words": " "},
        {"numbers": [1, 2]},
        {"promptId": "one two", "annotator_note": "good"},
        {"words": "The capital is"},
    ],
)
def test_an_implicit_prompt_stands_beside_what_says_nothing_of_it(beside):
    assert example_of({**beside, **LONG}).prompt == "The capital is"


def test_a_source_of_several_words_is_text_beside_texts_and_a_name_beside_conversations():
    assert reason_of({"source": "Der Himmel ist blau.", **LONG}).startswith("column 'source' may belong")
    talk = {name: [user("Hi"), assistant(text)] for name, text in SHORT.items()}
    assert example_of({"source": "a book of mine", **talk}).prompt == (Message("user", "Hi"),)


def test_words_that_answers_share_are_no_prompt_under_a_system_text():
    assert reason_of({"system": "Be brief.", **LONG}).startswith(
        "column 'system' stands beside answers without a prompt"
    )


def test_two_columns_of_a_prompt_are_one_or_are_refused():
    assert example_of({"prompt": "Q: Why? A:", "question": "Why?", **SHORT}).prompt == "Q: Why? A:"
    assert example_of({"prompt": "", "question": "Why?", **SHORT}).prompt == (ASKED,)
    assert example_of({"prompt": None, "query": "Why?", **SHORT}).prompt == (ASKED,)
    reason = reason_of({"prompt": "Answer.", "question": "Why?", **SHORT})
    assert reason.startswith("column 'question' may belong to the prompt: that is taken from 'prompt'")
    beside_talk = {"conversations": [user("Hi")], "prompt": "Why?", **SHORT}
    assert reason_of(beside_talk).startswith("column 'prompt' may belong to the prompt: that is taken from the conv")


# data.columns and data.ignore_columns


def test_columns_are_named_by_the_user_for_any_layout():
    renamed = {"text": "Why?", "good": "So.", "bad": "No."}
    names = {"prompt": "text", "chosen": "good", "rejected": "bad"}
    found = make_examples(rows_of(renamed), columns=names)
    assert found.examples == make_examples(rows_of({"prompt": "Why?", "chosen": "So.", "rejected": "No."})).examples
    assert (found.columns, found.prompt_columns) == ({"text": "prompt", "good": "chosen", "bad": "rejected"}, ("text",))
    shp = {"post": "Why?", "human_ref_A": "So.", "human_ref_B": "No.", "best": 1}
    found = make_examples(rows_of(shp), columns={"history": "post", "labels": "best"})
    assert (found.layout, found.examples[0].prompt) == ("shp", (ASKED,))
    assert example_of({"question": "Why?", **SHORT}, columns={"prompt": "question"}).prompt == "Why?"


def test_a_named_prompt_settles_which_column_it_is():
    record = {"prompt": "Answer.", "question": "Why?", **SHORT}
    assert example_of(record, columns={"prompt": "question"}).prompt == "Why?"
    assert example_of(record, columns={"prompt": "prompt"}).prompt == "Answer."
    assert example_of(record, ignore_columns=["question"]).prompt == "Answer."
    assert example_of({"words": "a b", **LONG}, ignore_columns=["words"]).prompt == "The capital is"


def test_reasons_have_the_rows_own_names():
    assert reason_of({"text": 3, **SHORT}, columns={"prompt": "text"}).startswith(
        "column 'text' does not hold messages"
    )
    labelled = {"instruction": "Why?", "output": "So.", "kto_tag": "maybe"}
    assert reason_of(labelled).startswith("column 'kto_tag' is neither true nor false: got 'maybe'")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "wrods"},
            "rows.jsonl: data.columns.prompt is 'wrods', but the columns are words, chosen, rejected",
        ),
        ({"promt": "words"}, "data.columns.promt: the layout 'preference' has no .* did you mean 'prompt'"),
    ],
)
def test_a_name_that_is_not_there_is_one_line(columns, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_examples(rows_of({"words": "Why?", **LONG}), columns=columns)
    assert str(caught.value).isprintable()


# What conditions the answers


def test_a_system_text_opens_the_conversation_whatever_the_layout():
    for record in (
        {"prompt": "Why?", **SHORT},
        {"prompt": [user("Why?")], **SHORT},
        {"prompt": "Why?", "completion": "So.", "label": True},
        {"history": "Why?", "human_ref_A": "So.", "human_ref_B": "No.", "labels": 1},
        {name: f"\n\nHuman: Why?\n\nAssistant: {text}" for name, text in SHORT.items()},
    ):
        for name in ("system", "system_prompt"):
            assert example_of(record | {name: "Be brief."}).prompt == (SYSTEM, ASKED)
        assert example_of(record | {"system": None}) == example_of(record)
    assert example_of({"prompt": "Why?", "system": "", **SHORT}).prompt == (ASKED,), "a conversation without the text"
    repeated = {"prompt": [{"role": "system", "content": "Be brief."}, user("Why?")], **SHORT}
    assert example_of(repeated | {"system": "Be brief."}).prompt == (SYSTEM, ASKED)
    assert reason_of(repeated | {"system": "Be long."}).startswith("two system prompts: one in the column 'system'")


def test_tools_documents_and_template_arguments_reach_the_template():
    record = {"prompt": "Why?", **SHORT}
    for tools in ([TOOL], json.dumps([TOOL])):
        found = example_of(record | {"tools": tools, "documents": [{"text": "a"}]})
        assert found.prompt == (ASKED,)
        assert json.loads(found.template_arguments) == {"tools": [TOOL], "documents": [{"text": "a"}]}
    own = {"chat_template_kwargs": {"enable_thinking": False, "mode": None}}
    assert json.loads(example_of(record | own).template_arguments) == {"enable_thinking": False}
    assert example_of(record | {"tools": [], "documents": None}) == example_of(record)
    for name, value, reason in (
        ("tools", "weather", "column 'tools' does not hold a list: got str"),
        ("tools", ["weather"], "column 'tools' does not hold a list of objects"),
        ("documents", [{"a": float("nan")}], "column 'documents' holds what is no JSON"),
        ("chat_template_kwargs", {"a": float("inf")}, "column 'chat_template_kwargs' holds what is no JSON"),
        ("documents", [{"a": "\0"}], "null character"),
        ("documents", [{"a": "\ud800"}], "not valid unicode text"),
        ("chat_template_kwargs", {"messages": []}, "column 'chat_template_kwargs' cannot set 'messages'"),
    ):
        assert reason_of(record | {name: value}).startswith(reason)


@pytest.mark.parametrize("name", ["images", "image", "videos", "audio", "functions", "context", "document", "passage"])
def test_what_cannot_be_used_is_refused_by_name_unless_it_is_empty(name):
    record = {"prompt": "Why?", **SHORT}
    assert reason_of(record | {name: ["a.png"]}).startswith(f"column '{name}' conditions the answers")
    assert example_of(record | {name: []}) == example_of(record | {name: None}) == example_of(record)
    assert example_of(record | {name: "x"}, ignore_columns=[name]) == example_of(record)


def test_history_comes_before_the_last_turn_and_only_once():
    earlier = (Message("user", "a"), Message("assistant", "b"))
    for history in ([["a", "b"]], [user("a"), assistant("b")]):
        assert example_of({"prompt": "Why?", "history": history, **SHORT}).prompt == (*earlier, ASKED)
    brief = [{"role": "system", "content": "Be brief."}, user("Why?")]
    assert example_of({"prompt": brief, "history": [["a", "b"]], **SHORT}).prompt == (SYSTEM, *earlier, ASKED)
    whole = [user("a"), assistant("b"), user("Why?")]
    assert example_of({"prompt": whole, "history": [["a", "b"]], **SHORT}).prompt == (*earlier, ASKED)
    assert reason_of({"prompt": whole, "history": [["c", "d"]], **SHORT}).startswith("column 'history' stands beside")


# Turns


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "developer", "content": "Hm."}, Message("developer", "Hm.")),
        ({"from": "Human", "value": "Hm."}, Message("user", "Hm.")),
        ({"role": "model", "content": "Hm."}, Message("assistant", "Hm.")),
        ({"from": "observation", "value": "3"}, Message("tool", "3")),
        ({"role": "ipython", "content": "3"}, Message("tool", "3")),
        ({"role": "function", "content": "3", "name": "f"}, Message("tool", "3", '{"name": "f"}')),
        (
            {"role": "tool", "content": "3", "tool_call_id": "a1", "id": 7, "time": "now", "tool_calls": None},
            Message("tool", "3", '{"tool_call_id": "a1"}'),
        ),
        (assistant(None, tool_calls=[CALL]), Message("assistant", "", json.dumps({"tool_calls": [CALL]}))),
        (
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            Message("assistant", "", json.dumps({"tool_calls": [CALL]})),
        ),
        (
            assistant("So.", thinking="Hm.", reasoning_content="Ah."),
            Message("assistant", "So.", '{"reasoning_content": "Ah.", "thinking": "Hm."}'),
        ),
    ],
)
def test_a_turn_has_the_role_and_the_fields_that_templates_know(turn, message):
    example = example_of({"prompt": [user("a"), turn, user("b")], **SHORT})
    assert example.prompt[1] == message
    assert message.content in prompt_text(example)
    assert message.more in prompt_text(example)


def test_turns_that_cannot_be_rendered_are_refused():
    for turn, reason in (
        (user("a", images=["b.png"]), "column 'prompt' has a message part that is not text: 'images'"),
        ({"from": "function_call", "value": "weather()"}, "column 'prompt' has a function_call that is no JSON object"),
        (assistant(None), "column 'prompt' has a message without text"),
        (user("a", note=["\0 in a field"]), "null character"),
    ):
        assert reason_of({"prompt": [turn, user("b")], **SHORT}).startswith(reason)


def test_a_prompt_may_end_with_a_tools_result_or_the_start_of_an_answer():
    called = [user("Why?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": ""}]
    assert [turn.role for turn in example_of({"prompt": called, **SHORT}).prompt] == ["user", "assistant", "tool"]
    started = example_of(
        {"prompt": [user("Why?"), assistant("Sure,")], "chosen": " so.", "rejected": [assistant(" no.")]}
    )
    assert started.prompt == (ASKED, Message("assistant", "Sure,"))
    assert [response.text for response in started.responses] == [" so.", " no."]
    assert embedding_text(started, "prompt_response", " so.") == "user: Why?\n\nassistant: Sure, so."
    assert embedding_text(started, "last_turn", " so.") == "Why?"


# Answers


def test_answers_that_differ_in_their_reasoning_alone_differ():
    record = {"prompt": [user("Why?")], "chosen": [assistant("So.", reasoning_content="Good.")]}
    example = example_of(record | {"rejected": [assistant("So.", reasoning_content="Bad.")]})
    chosen, rejected = example.responses
    assert chosen.text != rejected.text
    assert chosen.turns == (Message("assistant", "So.", '{"reasoning_content": "Good."}'),)
    assert reason_of(record | {"rejected": record["chosen"]}).startswith("chosen equals rejected")
    assert example_of(record | {"rejected": "So."}).responses[1].turns == ()


def test_an_answer_may_be_several_turns():
    turns = [assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "Sun."}, assistant("It is sunny.")]
    chosen = example_of({"prompt": "Why?", "chosen": turns, "rejected": [assistant("No.")]}).responses[0]
    assert [turn.role for turn in chosen.turns] == ["assistant", "tool", "assistant"]
    assert chosen.text == chosen.turns[0].more + "\n\ntool: Sun.\n\nassistant: It is sunny."
    cut = {"prompt": "Why?", "chosen": turns[:2], "rejected": "No."}
    assert reason_of(cut).startswith("column 'chosen' is not one assistant turn: its roles are assistant, tool")
    blank = {"prompt": "Why?", "chosen": [*turns[:2], assistant(" ")], "rejected": "No."}
    assert reason_of(blank).startswith("empty chosen response")


@pytest.mark.parametrize(
    ("chosen", "rejected", "cut"),
    [
        ("uAuB", "uCuD", 1),  # they part at the assistant's first turn
        ("uAuB", "uAuC", 3),
        ("uAuB", "uAvB", 1),  # at the user's: both answers begin with the turn before
        ("uAuB", "uA", 1),  # one goes on where the other ends
        ("uAB", "uAC", 1),  # the assistant's turns in a row belong together
    ],
)
def test_conversations_part_where_answers_can_begin(chosen, rejected, cut):
    def turns(letters):
        return [(assistant if letter.isupper() else user)(letter) for letter in letters]

    example = example_of({"chosen": turns(chosen), "rejected": turns(rejected)})
    assert "".join(turn.content for turn in example.prompt) == chosen[:cut]
    for letters, response in zip((chosen, rejected), example.responses, strict=True):
        assert "".join(turn.content for turn in response.turns) or response.text == letters[cut:]


# Unpaired


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "completion": [assistant("So.")]},
        {"prompt": [user("Why?")], "completion": [assistant("So.")]},
        {"prompt": "Why?", "completion": [user("Why?"), assistant("So.")]},
        {"completion": [user("Why?"), assistant("So.")]},
        {"messages": [user("Why?"), assistant("So.")]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"instruction": "Why?", "input": "", "output": "So."},
        {"question": "Why?", "response": "So."},
    ],
)
@pytest.mark.parametrize("label", ["label", "kto_tag"])
def test_labelled_answers_in_the_forms_that_files_have(record, label):
    for value, kind in (
        *((value, "chosen") for value in (True, 1, 1.0, "true", "True", "1")),
        *((value, "rejected") for value in (False, 0, 0.0, "false", "0")),
    ):
        found = make_examples(rows_of(record | {label: value}))
        assert found.layout == "unpaired"
        (response,) = found.examples[0].responses
        assert (found.examples[0].prompt, response.kind, response.text) == ((ASKED,), kind, "So.")
    for value in (-1, 2, 0.5, float("nan"), 10**400, "yes", [], ""):
        assert reason_of(record | {label: value}).startswith(f"column '{label}' is neither true nor false")


def test_a_labelled_conversation_is_answered_by_its_last_turn():
    example = example_of({"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "label": 1})
    assert ([turn.content for turn in example.prompt], example.responses[0].text) == (["a", "b", "c"], "d")
    assert reason_of({"messages": [user("a")], "label": 1}).startswith("column 'messages' does not end with an")
    assert reason_of({"messages": [assistant("a")], "label": 1}).startswith("column 'prompt' is missing")
    other = {"prompt": "b", "completion": [user("a"), assistant("b")], "label": 1}
    assert reason_of(other).startswith("no shared prompt: the column 'prompt' is not what")


# Numbers


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e39, float("nan"), float("inf")], ids=lambda v: str(v)[:5])
def test_a_score_that_no_float_can_hold_is_a_row_that_can_be_skipped(value):
    columns = {"chosen": "up", "rejected": "down"}
    rows = rows_of({"prompt": "q", **SHORT, "up": 1, "down": 0}, {"prompt": "q", **SHORT, "up": value, "down": 0})
    found = make_examples(rows, on_bad_row="skip", scores=columns)
    assert len(found.examples) == 1
    assert found.faults.first.reason.startswith("column 'up' does not hold a finite number: got ")
    assert found.columns["up"] == "up"
