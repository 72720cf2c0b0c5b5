"""Other people's text on our user's terminal: without control, and no wider than it should be.

This module owns what may reach a terminal. Conversations are written by models and by other people,
and a terminal obeys what it is sent: titles, colours, the clipboard. It must not know where a text
comes from.
"""

from __future__ import annotations

import unicodedata
from typing import Final

_ELLIPSIS: Final = "…"
_KEPT: Final = frozenset("\n\t")
# Control, surrogate; and the format characters that reverse the reading direction of what follows.
_CONTROL: Final = frozenset({"Cc", "Cs"})
_DIRECTION: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """``text`` with every character that a terminal could obey replaced by U+FFFD."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        "\ufffd"
        if character not in _KEPT
        and (unicodedata.category(character) in _CONTROL or character in _DIRECTION)
        else character
        for character in text
    )


def one_line(text: str, characters_max: int | None = None) -> str:
    """``text`` as one printable line, cut with an ellipsis if it is longer than that."""
    line = printable(" ".join(text.split()))
    if characters_max is not None and len(line) > characters_max:
        return line[: characters_max - 1] + _ELLIPSIS
    return line
