"""Arithmetic expressions in answers: a small parser, so that no answer is ever executed."""

import re

_MAX_PIECES = 100  # pieces of an expression; bounds the parser's recursion
_PIECE = re.compile(r"[0-9]{1,9}|[-+*/()]")


class ExpressionError(ValueError):
    """An answer that is no arithmetic expression with exact divisions."""


def evaluate(text: str) -> tuple[int, list[int]]:
    """Value of an expression of whole numbers, + - * / and parentheses, and the numbers in it.

    Raises:
        ExpressionError: when it cannot be parsed or a division has a remainder.
    """
    pieces = _PIECE.findall(text)
    if "".join(pieces) != re.sub(r"\s", "", text) or not 0 < len(pieces) <= _MAX_PIECES:
        raise ExpressionError("not an expression of numbers, + - * / and parentheses")
    value, end = _sum(pieces, 0)
    if end != len(pieces):
        raise ExpressionError(f"unexpected {pieces[end]!r}")
    return value, [int(piece) for piece in pieces if piece.isdigit()]


def _sum(pieces: list[str], at: int) -> tuple[int, int]:
    value, at = _product(pieces, at)
    while at < len(pieces) and pieces[at] in "+-":
        right, after = _product(pieces, at + 1)
        value = value + right if pieces[at] == "+" else value - right
        at = after
    return value, at


def _product(pieces: list[str], at: int) -> tuple[int, int]:
    value, at = _atom(pieces, at)
    while at < len(pieces) and pieces[at] in "*/":
        right, after = _atom(pieces, at + 1)
        if pieces[at] == "*":
            value *= right
        elif right == 0 or value % right:
            raise ExpressionError(f"{value} / {right} is not exact")
        else:
            value //= right
        at = after
    return value, at


def _atom(pieces: list[str], at: int) -> tuple[int, int]:
    if at == len(pieces):
        raise ExpressionError("the expression breaks off")
    if pieces[at] == "(":
        value, at = _sum(pieces, at + 1)
        if at == len(pieces) or pieces[at] != ")":
            raise ExpressionError("a parenthesis is not closed")
        return value, at + 1
    if not pieces[at].isdigit():
        raise ExpressionError(f"unexpected {pieces[at]!r}")
    return int(pieces[at]), at + 1
