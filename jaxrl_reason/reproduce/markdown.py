"""Markdown that says what it is given to say: tables, code, and text of models."""

from collections.abc import Iterable, Sequence

from jaxrl_reason.report.tables import visible


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table whose first columns are words, and the rest numbers aligned at the right."""
    rules = ["---"] * words + ["---:"] * (len(header) - words)
    lines = [header, rules, *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def code(text: str) -> str:
    """A name in the type of code."""
    return f"`{text.replace('`', chr(39))}`"


def block(text: str, language: str = "text") -> str:
    """A block of code, whatever it holds."""
    return f"```{language}\n{visible(text).replace('```', chr(39) * 3)}\n```\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
