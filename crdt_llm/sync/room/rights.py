"""What somebody may do in a conversation: the one place where a right and a token meet.

A right is the principal's, and a token may allow less than that. What is asked may be a document,
the register's row of it, or whatever else says who owns a conversation and who has access. This
module must not know rooms, stores, frames or sockets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import Grant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crdt_llm.document.rules import Author

WRITERS: Final = (Grant.OWNER, Grant.WRITER)
"""The rights that allow writing."""


class Record(Protocol):
    """What says who may do what, apart from the document."""

    @property
    def owner(self) -> str:
        """The principal in the conversation's birth."""

    @property
    def access(self) -> Mapping[str, str]:
        """Who has which right, by principal."""


def right_of(source: Conversation | Record, author: Author) -> Grant | None:
    """What is left of somebody's right under its token; whatever is no right counts as none.

    A node has no right: what it may do follows from its lease.
    """
    if isinstance(source, Conversation):
        return author.bounded(source.grant_of(author.principal))
    if author.principal == source.owner:
        return author.bounded(Grant.OWNER)
    given = source.access.get(author.principal, "")
    return author.bounded(Grant(given) if given in Grant.__members__.values() else None)
