"""What waits to be sent to one peer: bounded, and honest about what was dropped.

This module owns the order of waiting frames and the limit. It must not know sockets or documents.
:class:`Outbox` is that of one conversation on its own wire, :class:`Lanes` that of many on one.

A reader that is slower than its conversation makes frames wait. Dropping single updates would leave
a hole in its replica, and buffering them all would let one phone in a tunnel fill the relay's
memory. So beyond the limit **all** waiting updates are dropped, and once the reader has taken what
was under way it gets one Step2 with the difference instead: usually smaller than what was dropped,
and never larger than the document.

Presence needs no queue: of each client only the latest state counts.
"""

from __future__ import annotations

import enum
from collections import deque
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Final

from crdt_llm.sync.room.awareness import messages
from crdt_llm.sync.wire.y_websocket import AWARENESS_STATES_MAX, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crdt_llm.sync.wire.y_websocket import AwarenessState

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


class _Kind(enum.Enum):
    """What may become of a waiting frame."""

    KEPT = enum.auto()
    OPENING = enum.auto()  # kept, and before any presence
    CHANGE = enum.auto()  # may be dropped, with all others of its channel


class _Lane:
    """What waits of one channel, in order.

    While something is owed, ``ready`` may go, and ``held`` waits for what is owed, which goes
    between the two: a client that hears of a verdict has everything that came before it.
    """

    __slots__ = ("ack", "held", "is_owed", "openings", "presence", "presence_is_next", "ready")

    def __init__(self) -> None:
        self.ready: deque[tuple[bytes, _Kind]] = deque()
        self.held: deque[tuple[bytes, _Kind]] = deque()
        self.is_owed = False
        self.openings = 0  # presence comes after them
        self.presence: dict[int, AwarenessState] = {}
        self.presence_is_next = False
        self.ack: bytes | None = None  # the last frame, if that is an acknowledgement

    @property
    def line(self) -> deque[tuple[bytes, _Kind]]:
        """Where the next frame is put."""
        return self.held if self.is_owed else self.ready

    def __bool__(self) -> bool:
        return bool(self.ready or self.held or self.presence or self.is_owed)


class Lanes:
    """Frames on their way to one peer that takes part in many conversations.

    Each channel keeps its order; channels take turns. Changes are what may be dropped, of the
    channel that has the most of them, which then is owed everything it lacks as one frame.

    Args:
        encode_presence: Makes a frame of a channel's states.
    """

    def __init__(self, encode_presence: Callable[[int, tuple[AwarenessState, ...]], bytes]) -> None:
        self._encode_presence = encode_presence
        self._first: deque[bytes] = deque()
        self._lanes: dict[int, _Lane] = {}  # with something in them; whose turn is next is first
        self._changes: dict[int, list[int]] = {}  # channel -> number and bytes of its changes
        self.waiting_bytes = 0
        self._changes_count = 0
        self._changes_bytes = 0

    @property
    def has_room(self) -> bool:
        """Whether more may be made for this peer: answers wait for this, and so do its frames."""
        return self.waiting_bytes <= WAITING_BYTES_MAX

    def put_first(self, frame: bytes) -> None:
        """Add a frame of the connection as a whole, which goes before all channels."""
        self._first.append(frame)
        self.waiting_bytes += len(frame)

    def put(self, channel: int, frame: bytes, *, opens: bool = False) -> None:
        """Add a frame that is never dropped; presence does not overtake one that opens."""
        lane = self._lane(channel)
        lane.line.append((frame, _Kind.OPENING if opens else _Kind.KEPT))
        lane.openings += opens
        lane.ack = None
        self.waiting_bytes += len(frame)

    def put_ack(self, channel: int, frame: bytes) -> None:
        """Add an acknowledgement, which covers the one right before it."""
        lane = self._lane(channel)
        if lane.ack is not None and lane.line and lane.line[-1][0] is lane.ack:
            lane.line.pop()
            self.waiting_bytes -= len(lane.ack)
        self.put(channel, frame)
        lane.ack = frame

    def put_change(self, channel: int, frame: bytes) -> int | None:
        """Add what others wrote.

        Returns:
            A channel whose changes were dropped for space, and which is :meth:`owed` now, if any.
            A change that is alone may have any size: it waits for nobody.
        """
        lane = self._lane(channel)
        if lane.is_owed:
            return None
        lane.ready.append((frame, _Kind.CHANGE))
        lane.ack = None
        self.waiting_bytes += len(frame)
        counted = self._changes.setdefault(channel, [0, 0])
        self._count(counted, 1, len(frame))
        fits = (
            self._changes_bytes <= WAITING_BYTES_MAX and self._changes_count <= WAITING_FRAMES_MAX
        )
        if fits or self._changes_count == 1:
            return None
        fattest = max(self._changes, key=lambda one: self._changes[one][1])
        self.owe(fattest)
        return fattest

    def owe(self, channel: int) -> None:
        """Drop the changes of a channel; what comes after them waits for :meth:`put_state`."""
        lane = self._lane(channel)
        if lane.is_owed:
            return
        lane.is_owed, lane.ack = True, None
        waiting = lane.ready
        lane.ready = deque(takewhile(lambda one: one[1] is not _Kind.CHANGE, waiting))
        after = islice(waiting, len(lane.ready), None)
        lane.held = deque(one for one in after if one[1] is not _Kind.CHANGE)
        number, size = self._changes.pop(channel, (0, 0))
        self._changes_count -= number
        self._changes_bytes -= size
        self.waiting_bytes -= size

    def put_state(self, channel: int, frame: bytes) -> None:
        """Add what was owed; what waited for it follows."""
        lane = self._lane(channel)
        lane.ready.append((frame, _Kind.KEPT))
        lane.ready.extend(lane.held)
        lane.held.clear()
        lane.is_owed, lane.ack = False, None
        self.waiting_bytes += len(frame)

    def put_presence(self, channel: int, states: Iterable[AwarenessState]) -> None:
        """Add states of presence; newer ones replace older ones of their client."""
        lane = self._lane(channel)
        lane.presence.update((state.client, state) for state in states)
        if len(lane.presence) > AWARENESS_STATES_MAX:
            here = [state for state in lane.presence.values() if state.state_json is not None]
            lane.presence = {state.client: state for state in here[-AWARENESS_STATES_MAX:]}

    def end(self, channel: int, frame: bytes) -> None:
        """Add the last frame of a channel.

        Changes that wait are dropped, and with them what waits behind them: a verdict would speak
        of what the client does not have. It sends again what has no verdict.
        """
        self.owe(channel)
        lane = self._lane(channel)
        self.waiting_bytes -= sum(len(one) for one, _ in lane.held)
        lane.openings -= sum(kind is _Kind.OPENING for _, kind in lane.held)
        lane.held.clear()
        lane.presence.clear()
        lane.is_owed = False
        self.put(channel, frame)

    def drop_all(self) -> None:
        """Drop everything."""
        self._first.clear()
        self._lanes.clear()
        self._changes.clear()
        self.waiting_bytes = self._changes_count = self._changes_bytes = 0

    def take(self) -> bytes | None:
        """The next frame, or ``None``."""
        if self._first:
            frame = self._first.popleft()
            self.waiting_bytes -= len(frame)
            return frame
        for channel, lane in self._lanes.items():
            taken = self._take_of(channel, lane)
            if taken is not None:
                del self._lanes[channel]
                if lane:
                    self._lanes[channel] = lane  # behind all others
                return taken
        return None

    def _take_of(self, channel: int, lane: _Lane) -> bytes | None:
        presence_is_next = lane.presence_is_next or not lane.ready
        if lane.presence and presence_is_next and not lane.openings:
            lane.presence_is_next = False
            states = next(messages(lane.presence.values())).states
            for state in states:
                del lane.presence[state.client]
            return self._encode_presence(channel, states)
        if not lane.ready:
            return None
        lane.presence_is_next = True
        frame, kind = lane.ready.popleft()
        self.waiting_bytes -= len(frame)
        lane.openings -= kind is _Kind.OPENING
        if kind is _Kind.CHANGE:
            counted = self._changes[channel]
            self._count(counted, -1, -len(frame))
            if not counted[0]:
                del self._changes[channel]
        return frame

    def _count(self, counted: list[int], number: int, size: int) -> None:
        counted[0] += number
        counted[1] += size
        self._changes_count += number
        self._changes_bytes += size

    def _lane(self, channel: int) -> _Lane:
        lane = self._lanes.get(channel)
        if lane is None:
            lane = self._lanes[channel] = _Lane()
        return lane
