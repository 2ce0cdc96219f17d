"""The paper's two questions to a judge (arXiv 2402.10958, Appendix H), and how its free answer is read."""

from __future__ import annotations

import re
from typing import Literal

from rpo_jax.core.templates import render
from rpo_jax.tools.judging.comparisons import Choice, Prompt, turns

Task = Literal["dialogue", "summarization"]

# The words are the paper's. `conversation` begins with the user's mark and message, as there; a prompt of several turns
# goes on in the same form, for which the paper shows none.
TEMPLATES: dict[Task, str] = {"dialogue": "judge_dialogue.txt", "summarization": "judge_summarization.txt"}


def question(task: Task, prompt: Prompt, first: str, second: str) -> str:
    """The whole text that a judge is asked, responses in the order given.

    A summarization prompt loses the "TL;DR:" at its end: it asks for a summary and is no part of the post.
    """
    conversation = "\n\n".join(f"<|{turn.role}|>\n\n{turn.content.strip()}" for turn in turns(prompt))
    if task == "summarization":
        conversation = conversation.removesuffix("TL;DR:").rstrip()
    parts = {"conversation": conversation, "first": first.strip(), "second": second.strip()}
    return render(TEMPLATES[task], **parts).removesuffix("\n")


_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_KIND = r"(?:response|summary|option|answer)"
_LABEL = rf"(?:the\s+)?(?:{_KIND}\s*(?:number\s*|#\s*)?([12]|one|two)\b|(first|second)\s+(?:one|{_KIND})\b)"
_NUMBER = r"([12])(?=\W*(?:\n|$))"  # alone at the end of a line
_BETTER = (
    r"(?:better|best|superior|preferable|preferred|stronger|(?:the\s+)?winner|(?:more|most)\s+(?:accurate|appropriate|clear|complete|"
    r"comprehensive|concise|detailed|direct|effective|empathetic|harmless|helpful|honest|informative|polite|precise|relevant|"
    r"respectful|safe|specific|suitable|thorough|useful))"
)
_IS = r"(?:\s+(?:is|would\s+be|goes\s+to)\s*:?|\s*:)\s+"
_ALONE = re.compile(rf"^\W*(?:{_LABEL}|([12]))\W*$")
_PICKS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?<!not )(?<!never )\b(?:pick|choose|chose|select|prefer|vote\s+for|go\s+with|going\s+with|opt\s+for)\s*:?\s+"
        rf"(?:{_LABEL}|{_NUMBER})",
        rf"\b(?:pick|choice|answer|verdict|winner|selection|preference|conclusion){_IS}(?:{_LABEL}|{_NUMBER})",
        rf"\b{_BETTER}\b[^.\n]{{0,60}}?\b(?:one|choice|{_KIND}){_IS}(?:{_LABEL}|{_NUMBER})",
    )
)
_OPENING = re.compile(rf"^[^\w\n]*{_LABEL}\s*(?:[.;!)—–-]|$)", re.MULTILINE)
_COMPARISONS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\b{_LABEL}\s+(?:is|seems|appears|would\s+be|does|provides|gives|offers)\b"
        rf"(?:(?!\bnot\b|\bless\b|[.;,\n]).){{0,60}}?\b{_BETTER}\b",
        rf"\b{_LABEL}\s+(?:wins|better)\b",
    )
)
_CONTRACTED = re.compile(r"n['’]t\b")  # wouldn't, isn't
_NEXT = rf"but|so|yet|though|although|however|while|whereas|because|and(?!\s+{_LABEL}\s+(?:are|differ|have|were)\b)"
_CLAUSE = rf"(?:(?!\b(?:{_NEXT})\b)[^.,;:()—–\n]){{0,300}}"  # up to where another may begin
_DENIED = re.compile(  # what is said not to be so
    r"\b(?:not|never)\s+(?:agree|argue|believe|certain|claim|consider|convinced|feel|find|say|see|sure|think)\b"
    + _CLAUSE
)
_NEITHER = re.compile(rf"\bneither\b{_CLAUSE}\bnor\b{_CLAUSE}")  # what is said of both picks none
_TIE = re.compile(
    r"\b(?:a\s+tie|tied?|equally\s+\w+|neither|no\s+(?:clear\s+)?(?:preference|difference)|both\s+are\s+the\s+same)\b"
)
_READ_CHARACTERS = 1 << 16  # of an answer, its end: far more than one that means to answer has
_NUMBERS = {"1": 0, "one": 0, "first": 0, "2": 1, "two": 1, "second": 1}


def read_answer(answer: str) -> Choice | None:
    """Which of the two a free answer picks; "tie" where it says that there is none; None where it does not say.

    The first of these that it holds decides, if all of that kind agree: the label alone; "I pick Response 1", "the
    better one is Response 1"; the label opening a line; "Response 1 is more helpful". Thoughts in <think> do not count.
    """
    text = _THOUGHTS.sub("", answer)[-_READ_CHARACTERS:].lower()
    text = _CONTRACTED.sub(" not", text)
    text = re.sub(r"[*_`\"'“”\[\]]", "", text).strip()
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text))  # patterns of `\s+` are slow on much of it
    text = _DENIED.sub(" ", text)
    said = _NEITHER.sub(" ", text)
    for patterns in ((_ALONE,), _PICKS, (_OPENING,), _COMPARISONS):
        matches = [match.groups() for pattern in patterns for match in pattern.finditer(said)]
        picked = {_NUMBERS[group] for groups in matches for group in groups if group}
        if len(picked) == 1:
            return "second" if picked.pop() else "first"
        if picked:
            return None
    return "tie" if _TIE.search(text) else None
