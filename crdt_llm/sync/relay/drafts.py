"""Drafts on their way from those who type to the node, kept nowhere else.

This module owns what each draft says now, what of it the node was told, and how often: one
:class:`Drafts` a relay, one :class:`Typist` a connection. It must not know sockets, rooms or
models. A draft is never stored, logged, or shown to anyone but the listener of its conversation,
which is the node that has the lease.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from crdt_llm.errors import MalformedMessage
from crdt_llm.sync.wire.draft import NOTHING, common
from crdt_llm.sync.wire.frames import DRAFT_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.sync.wire.draft import Said

DRAFTS_PER_CONNECTION_MAX: Final = 8
"""Drafts of one connection at a time: a person types in one conversation, a page that is left and
opened again in two. Each may be as large as a hint."""

DRAFT_INTERVAL_S: Final = 0.1
"""Between two drafts of one connection that are passed on: ten a second is faster than typing."""

Listener: TypeAlias = "Callable[[int, str | None, int, str], bool]"
"""Takes source, ``after`` (``None``: dropped), how many UTF-8 bytes stay, and what follows them;
answers whether it had room for it."""


class Cancellable(Protocol):
    """A call that waits for its time, such as the event loop's."""

    def cancel(self) -> None:
        """Do not call."""


@dataclass(slots=True)
class _Draft:
    conversation: str
    says: Said
    told: Said = NOTHING  # to the present listener


class Drafts:
    """All drafts of one relay, and who listens to them."""

    def __init__(self) -> None:
        self._drafts: dict[int, _Draft] = {}
        self._of: dict[str, dict[int, None]] = {}  # conversation -> sources
        self._listeners: dict[str, list[Listener]] = {}  # the last one is told
        self._sources = 0

    def new_source(self) -> int:
        """A number for a draft."""
        self._sources += 1
        return self._sources

    def listen(self, conversation: str, listener: Listener) -> Callable[[], None]:
        """Tell a listener of a conversation's drafts, those that are there first.

        Returns:
            What ends it; then whoever listened before is told again.
        """
        listeners = self._listeners.setdefault(conversation, [])
        listeners.append(listener)
        self._tell_anew(conversation)

        def release() -> None:
            if listener in listeners:
                was_told = listeners[-1] is listener
                listeners.remove(listener)
                if not listeners:
                    self._listeners.pop(conversation, None)
                if was_told:
                    self._tell_anew(conversation)

        return release

    def say(self, source: int, conversation: str, says: Said) -> None:
        """Pass a draft on."""
        draft = self._drafts.get(source)
        if draft is None:
            draft = self._drafts[source] = _Draft(conversation, says)
            self._of.setdefault(conversation, {})[source] = None
        draft.says = says
        self._tell(source, draft)
        if says == NOTHING:
            del self._drafts[source]
            of = self._of[conversation]
            del of[source]
            if not of:
                del self._of[conversation]

    def _tell_anew(self, conversation: str) -> None:
        for source in self._of.get(conversation, ()):
            draft = self._drafts[source]
            draft.told = NOTHING
            self._tell(source, draft)

    def _tell(self, source: int, draft: _Draft) -> None:
        listeners = self._listeners.get(draft.conversation)
        if not listeners or draft.says == draft.told:
            return
        says, told = draft.says, draft.told
        keep = common(says.text, told.text) if says.after == told.after else 0
        if listeners[-1](source, says.after, keep, says.text[keep:].decode()):
            draft.told = says


@dataclass(slots=True)
class _Typed:
    source: int
    conversation: str
    says: Said = NOTHING


class Typist:
    """What one connection types, by channel: bounded, and passed on at its pace.

    Args:
        drafts: Where it is passed on to.
        may_write: Whether what is typed in a channel may be meant; ``None`` if that cannot be said
            now. It is asked whenever something is passed on, for rights come and go.
        later: Calls something after so many seconds, unless what it answers is cancelled.
    """

    def __init__(
        self,
        drafts: Drafts,
        may_write: Callable[[int], bool | None],
        later: Callable[[float, Callable[[], None]], Cancellable],
    ) -> None:
        self._drafts = drafts
        self._may_write = may_write
        self._later = later
        self._typed: dict[int, _Typed] = {}
        self._waiting: dict[int, None] = {}
        self._pause: Cancellable | None = None

    def type(
        self, channel: int, conversation: str, after: str | None, keep: int, text: str
    ) -> None:
        """Take a change of a draft."""
        typed = self._typed.get(channel)
        if typed is None:
            if after is None:
                return
            if len(self._typed) >= DRAFTS_PER_CONNECTION_MAX:
                self.drop(next(iter(self._typed)))
            typed = self._typed[channel] = _Typed(self._drafts.new_source(), conversation)
        try:
            typed.says = typed.says.then(after, keep, text)
        except MalformedMessage:  # some of it was lost on the way; the next whole one counts
            self.drop(channel)
            return
        if len(typed.says.text) > DRAFT_BYTES_MAX or typed.says == NOTHING:
            self.drop(channel)
            return
        self._waiting[channel] = None
        if self._pause is None:
            self._pass_on()

    def drop(self, channel: int) -> None:
        """A channel's draft is over."""
        self._waiting.pop(channel, None)
        typed = self._typed.pop(channel, None)
        if typed is not None:
            self._drafts.say(typed.source, typed.conversation, NOTHING)

    def look_again(self) -> None:
        """Rights may have changed: nothing stays that may not be meant any more."""
        self._waiting.update(dict.fromkeys(self._typed))
        if self._pause is None:
            self._pass_on()

    def stop(self) -> None:
        """All drafts are over."""
        for channel in tuple(self._typed):
            self.drop(channel)
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    def _pass_on(self) -> None:
        """At most one in a while; of each only how it is now."""
        self._pause = None
        if not self._waiting:
            return
        channel = next(iter(self._waiting))
        del self._waiting[channel]
        typed, may_write = self._typed[channel], self._may_write(channel)
        if may_write is None:
            self._waiting[channel] = None
        else:
            says = typed.says if may_write else NOTHING
            self._drafts.say(typed.source, typed.conversation, says)
        self._pause = self._later(DRAFT_INTERVAL_S, self._pass_on)
