"""A reply that was asked for, as it comes.

This module owns how a program waits for a reply. It must not know sockets, disks or models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from crdt_llm.document.schema import ENDED, State
from crdt_llm.errors import Refused, ReplyFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Entry
    from crdt_llm.sync.client.changes import Changed, Feed
    from crdt_llm.sync.client.journal import RefusedWrite


class Source(Protocol):
    """What a reply needs of the conversation that it stands in."""

    @property
    def document(self) -> Conversation:
        """The replica, for reading."""

    def entry(self, entry: str) -> Entry:
        """One entry as it is now."""

    def refusal_of(self, entry: str) -> RefusedWrite | None:
        """The refused write that an entry was part of."""

    def changes(self) -> Feed:
        """What happens from now on."""

    async def next_of(self, feed: Feed, wanted: Callable[[Changed], bool]) -> Changed:
        """The next change of a feed that is ``wanted``; raises when there will be none."""


class Reply:
    """A reply that was asked for: its text as it comes, and its end.

    Every iteration starts at the beginning of the text. It ends when the slot has ended, however
    that was: look at ``(await reply.entry()).state``, or call :meth:`text`, which raises.
    """

    def __init__(self, conversation: Source, slot: str) -> None:
        self.id = slot
        self._conversation = conversation

    def __aiter__(self) -> AsyncIterator[str]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[str]:
        shown = ""
        feed = self._conversation.changes()
        while True:
            text, ended = self._conversation.document.text(self.id), self.ended
            if text.startswith(shown):
                if len(text) > len(shown):
                    delta, shown = text[len(shown) :], text
                    yield delta
                    continue  # the consumer took its time: look again before anything else
            else:
                ended = True  # what was shown was withdrawn; a redaction ends the reply too
            if ended:
                return
            await self._conversation.next_of(feed, lambda changed: changed.touches(self.id))

    @property
    def ended(self) -> bool:
        """Whether nothing more will come: it has ended, was withdrawn, or will not be answered.

        The last is a slot that was stopped before the node took it up, or that a later request on
        the same line took over.

        Raises:
            Refused: the relay refused the request itself.
        """
        document = self._conversation.document
        # Asked with every change: nothing here may cost what the reply has grown to.
        if document.born(self.id) is None:
            # Another device asked, and it has not come here yet; or the relay refused the request.
            refused = self._conversation.refusal_of(self.id)
            if refused is not None:
                raise Refused(refused.code, refused.reason)
            return False
        over = document.state(self.id) in ENDED or document.is_redacted(self.id)
        return over or document.tree.is_end(self.id)

    async def entry(self) -> Entry:
        """The slot once it has ended, with its state, usage and proof. Never raises for a failure.

        Raises:
            Refused: the relay does not let this conversation in; the text so far stays readable.
            ConnectionLost: the conversation was closed on this device.
        """
        feed = self._conversation.changes()
        while not self.ended:
            await self._conversation.next_of(feed, lambda _: True)
        return self._conversation.entry(self.id)

    async def text(self) -> str:
        """The whole text once the reply has ended; of a stopped one, what there is.

        Raises:
            ReplyFailed: the node could not finish it.
            Refused: the relay does not let this conversation in.
            ConnectionLost: the conversation was closed on this device.
        """
        entry = await self.entry()
        if entry.state is State.FAILED:
            usage = entry.usage
            code = usage.error_code if usage is not None else None
            said = usage.error_message if usage is not None else None
            raise ReplyFailed(code or "failed", said or "the node could not finish this reply")
        return entry.content
