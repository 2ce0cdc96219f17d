"""Text of others on its way to a terminal, a file or another program."""

from __future__ import annotations


def printable(text: str) -> str:
    """A text that moves no cursor and hides nothing on a terminal: what is not printable stands as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def table_cell(value: object) -> str:
    """A text in a Markdown table, where a bar or the end of a line would end the cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def well_formed(text: str) -> str:
    """A text that UTF-8 can hold: pairs of surrogates are the character that they mean, lone ones U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
