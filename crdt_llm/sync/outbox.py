"""What waits to be sent to one peer: bounded, and honest about what was dropped.

This module owns the order of waiting frames and the limit. It must not know sockets or documents.

A reader that is slower than its conversation makes frames wait. Dropping single updates would leave
a hole in its replica, and buffering them all would let one phone in a tunnel fill the relay's
memory. So beyond the limit **all** waiting updates are dropped, and once the reader has taken what
was under way it gets one Step2 with the difference instead: usually smaller than what was dropped,
and never larger than the document.

Presence needs no queue: of each client only the latest state counts.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from crdt_llm.sync.awareness import messages
from crdt_llm.sync.wire import AWARENESS_STATES_MAX, encode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crdt_llm.sync.wire import AwarenessState

WAITING_BYTES_MAX: Final = 1 << 20
"""Bytes of waiting updates: seconds of a stream on a bad line, and 1,000 such readers fit a server.
A Step2 may be larger: it is the one frame that replaces all others."""

WAITING_FRAMES_MAX: Final = 4096
"""Waiting updates, whose Python objects weigh more than small updates do."""


class Outbox:
    """Frames on their way to one peer."""

    def __init__(self) -> None:
        self._first: deque[bytes] = deque()
        self._document: bytes | None = None
        self._updates: deque[bytes] = deque()
        self._updates_bytes = 0
        self._presence: dict[int, AwarenessState] = {}
        self._presence_is_next = False

    def __bool__(self) -> bool:
        waiting = self._first or self._updates or self._presence
        return bool(waiting) or self._document is not None

    def put_first(self, frame: bytes) -> None:
        """Add a frame that goes before everything else (a question, a refusal)."""
        self._first.append(frame)

    def put_document(self, frame: bytes) -> None:
        """Add a Step2. It covers every update that waits, so those are dropped."""
        self.drop_document()
        self._document = frame

    def put_update(self, frame: bytes) -> bool:
        """Add an update; ``False`` if that is too much: then it and all others were dropped.

        One that is alone may have any size: it waits for nobody.
        """
        self._updates.append(frame)
        self._updates_bytes += len(frame)
        fits = self._updates_bytes <= WAITING_BYTES_MAX and len(self._updates) <= WAITING_FRAMES_MAX
        if fits or (len(self._updates) == 1 and self._document is None):
            return True
        self.drop_document()
        return False

    def put_presence(self, states: Iterable[AwarenessState]) -> None:
        """Add states of presence; newer ones replace older ones of their client.

        Beyond what one message holds those who went are dropped: peers let them expire.
        """
        self._presence.update((state.client, state) for state in states)
        if len(self._presence) > AWARENESS_STATES_MAX:
            here = [state for state in self._presence.values() if state.state_json is not None]
            self._presence = {state.client: state for state in here[-AWARENESS_STATES_MAX:]}

    def drop_document(self) -> None:
        """Drop every waiting update and Step2."""
        self._document = None
        self._updates.clear()
        self._updates_bytes = 0

    def drop_all(self) -> None:
        """Drop everything."""
        self.drop_document()
        self._first.clear()
        self._presence.clear()

    def take(self) -> bytes | None:
        """The next frame, or ``None``. Presence and updates alternate, so neither starves."""
        if self._first:
            return self._first.popleft()
        if self._presence and (self._presence_is_next or not self._has_document):
            self._presence_is_next = False
            message = next(messages(self._presence.values()))
            for state in message.states:
                del self._presence[state.client]
            return encode(message)
        self._presence_is_next = True
        if self._document is not None:
            frame, self._document = self._document, None
            return frame
        if self._updates:
            frame = self._updates.popleft()
            self._updates_bytes -= len(frame)
            return frame
        return None

    @property
    def _has_document(self) -> bool:
        return self._document is not None or bool(self._updates)
