"""HTML from nested elements: every element is closed, and every text is escaped.

An `Html` is markup; any other string is text, which `element` escapes. So a text that a model wrote
can become markup only where somebody writes `Html(text)`, and nothing outside this file does.
"""

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from jaxrl_reason.report.tables import visible

_VOID = ("img", "meta")  # elements that have no end
_STYLE = Path(__file__).with_name("page.css")


class Html(str):
    """Markup."""


Child: TypeAlias = "str | Iterable[Child] | None"


def element(
    tag: str, /, *children: Child, class_: str | None = None, **attributes: str | bool
) -> Html:
    """The element `tag` with its children in order.

    Args:
        tag: its name, such as `p`.
        children: markup, or text to be escaped, or lists of both; None is left out.
        class_: attribute `class`; none where it is None.
        attributes: others; True has no value, False is left out.
    """
    given = {"class": class_, **attributes} if class_ is not None else attributes
    words = [tag]
    for key, value in given.items():
        if value is True:
            words.append(key)
        elif value is not False:
            words.append(f'{key}="{_escape(str(value))}"')
    opening = f"<{' '.join(words)}>"
    if tag in _VOID:
        return Html(opening)
    return Html(f"{opening}{join(*children)}</{tag}>")


def join(*children: Child) -> Html:
    """Children one after the other without an element about them."""
    return Html("".join(map(_markup, children)))


def image(png: bytes, text: str) -> Html:
    """A picture within the page; `text` is what readers of a screen hear."""
    data = base64.b64encode(png).decode("ascii")
    return element("img", src=f"data:image/png;base64,{data}", alt=text)


def table(headers: Iterable[Child], rows: Iterable[Iterable[Child]], words: int) -> Html:
    """A table whose first `words` columns are words and the others numbers."""
    align = lambda index: None if index < words else "number"
    head = [element("th", cell, class_=align(i), scope="col") for i, cell in enumerate(headers)]
    body = [
        element("tr", [element("td", cell, class_=align(i)) for i, cell in enumerate(cells)])
        for cells in rows
    ]
    made = element("table", element("thead", element("tr", head)), element("tbody", body))
    return element("div", made, class_="scroll")


def document(title: str, *body: Child) -> str:
    """A whole page; it needs nothing but itself."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', *body), lang='en')}\n"


def _markup(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return _escape(child)
    return "".join(map(_markup, child))


def _escape(text: str) -> str:
    return html.escape(visible(text), quote=True)
