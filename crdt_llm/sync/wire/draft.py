"""What a draft says, and what is said of a change of it.

This module owns a draft's text at one moment and the way from one to the next. It must not know
whose it is, or how often it is passed on.

A client says how many bytes of the draft before stay, and what follows; the relay may pass on less
often, so what it says to a node is measured against what that node was told last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from crdt_llm.errors import MalformedMessage


@dataclass(frozen=True, slots=True)
class Said:
    """A draft at one moment.

    Attributes:
        after: The entry that it will be written after; ``None`` if there is no draft (any more).
        text: What it says, as UTF-8.
    """

    after: str | None = None
    text: bytes = field(default=b"", repr=False)

    def then(self, after: str | None, keep: int, text: str) -> Said:
        """The draft after a change of it.

        Raises:
            MalformedMessage: It keeps more than there is, or half a character.
        """
        if after is None:
            return NOTHING
        if keep > len(self.text) or not _is_boundary(self.text, keep):
            raise MalformedMessage("a draft keeps what is there, in whole characters")
        return Said(after, self.text[:keep] + text.encode())


NOTHING: Final = Said()


def _is_boundary(text: bytes, at: int) -> bool:
    return at == len(text) or text[at] & 0xC0 != 0x80  # noqa: PLR2004 - a continuation byte


def common(one: bytes, other: bytes) -> int:
    """How many bytes two UTF-8 texts share at their beginnings, in whole characters."""
    at = next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    while at > 0 and not (_is_boundary(one, at) and _is_boundary(other, at)):
        at -= 1
    return at
