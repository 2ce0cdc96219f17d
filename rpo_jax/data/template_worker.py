"""Renders chat templates of others: run as a process of its own, which can be stopped and may not grow.

Reads JSON lines: first [template, values], then lists of [messages, add_generation_prompt, arguments]; answers each
line with a list, for each ["ok", text] or ["error", reason].
The environment has what transformers gives to chat templates, and no more. Standard library and jinja2 only.
"""

import json
import resource
import sys
from contextlib import suppress
from datetime import datetime

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BYTES = 1 << 30  # of this process's address space
MAX_CHARACTERS = 1 << 26  # of a rendered prompt


class _Generation(Extension):
    """{% generation %} marks what the assistant said, for those who train on that alone; the text is as without."""

    tags = {"generation"}  # noqa: RUF012  (jinja's name for it)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """No name with an underscore in front can be set, so none of Python's own."""

    def __setitem__(self, name, value):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"chat templates cannot set {name!r}")
        super().__setitem__(name, value)


def _refuse(message):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _compiled(template):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _Namespace,
        "dict": lambda *arguments, **named: dict(*arguments, **named),  # the class would give its attributes away
    }
    return environment.from_string(template)


def _render(template, values, messages, add_generation_prompt, arguments):
    own = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    pieces, length = [], 0
    for piece in template.generate({"tools": None, "documents": None, **values, **arguments, **own}):
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise ValueError(f"it writes more than {MAX_CHARACTERS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def main():
    with suppress(ValueError, OSError):  # not every system can limit it
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    template, values = None, {}
    for line in sys.stdin:
        request = json.loads(line)
        if template is None:
            outcome, template = _attempt(_compiled, request[0])
            values = request[1]
            answers = [[outcome, "" if outcome == "ok" else template]]
        else:
            answers = [_attempt(_render, template, values, *wanted) for wanted in request]
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


def _attempt(function, *arguments):
    try:
        return ["ok", function(*arguments)]
    except Exception as error:  # a template is a program: it may fail in any way
        # What the template itself says needs no name before it.
        kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
        return ["error", f"{kind}{error}"[:2000]]


if __name__ == "__main__":
    main()
