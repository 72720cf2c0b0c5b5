"""What somebody may do in a conversation: the one place where a right and a token meet.

A right is the principal's, and a token may allow less than that. What is asked may be a document,
the register's row of it, or a summary that was made of either. This module must not know rooms,
stores of rows, frames or sockets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import Grant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crdt_llm.document.rules import Author
    from crdt_llm.store.register import Row

WRITERS: Final = (Grant.OWNER, Grant.WRITER)
"""The rights that allow writing."""


def right_of(source: Conversation | Row, author: Author) -> Grant | None:
    """What is left of somebody's right under its token, as a document or a row says.

    A node has no right: what it may do follows from its lease.
    """
    if isinstance(source, Conversation):
        return author.bounded(source.grant_of(author.principal))
    return author.bounded(granted(source.owner, source.access, author.principal))


def granted(owner: str, access: Mapping[str, str], principal: str) -> Grant | None:
    """What a principal may do; whatever is no right counts as none."""
    if principal == owner:
        return Grant.OWNER
    given = access.get(principal, "")
    return Grant(given) if given in Grant.__members__.values() else None
