"""A stock client's side of one connection in the plain dialect, as bytes in and bytes out."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdt_llm.sync.wire.y_websocket import (
    AwarenessState,
    AwarenessUpdate,
    QueryAwareness,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
    encode,
)

if TYPE_CHECKING:
    from crdt_llm.sync.wire.y_websocket import Message


@dataclass(frozen=True, slots=True)
class Asked:
    """The relay says what it has; answer it with the rest."""

    state_vector: bytes


@dataclass(frozen=True, slots=True)
class Offered:
    """Something to merge; tell the link how it went."""

    update: bytes
    step2: bool


class PlainLink:
    """What y-websocket does: Step1 both ways, updates once the relay's was answered."""

    def __init__(self, client: int, device: str) -> None:
        self._client = client
        self._device = device
        self._answered = False  # the answer to the relay's Step1 carries what was written before
        self._outgoing: deque[Message] = deque()
        self._presence_clock = 0
        self.is_synced = False

    def open(self, state_vector: bytes) -> None:
        self.put(SyncStep1(state_vector))
        self._announce()

    def answer(self, update: bytes) -> None:
        self._answered = True
        self.put(SyncStep2(update))

    def publish(self, update: bytes) -> None:
        if self._answered:
            self.put(SyncUpdate(update))

    def put(self, message: Message) -> None:
        self._outgoing.append(message)

    def _announce(self) -> None:
        self._presence_clock += 1
        state = json.dumps({"device": self._device})
        self.put(AwarenessUpdate((AwarenessState(self._client, self._presence_clock, state),)))

    def data_to_send(self) -> bytes | None:
        return encode(self._outgoing.popleft()) if self._outgoing else None

    def receive(self, frame: bytes) -> Asked | Offered | None:
        match decode(frame):
            case SyncStep1(state_vector):
                return Asked(state_vector)
            case SyncStep2(update):
                return Offered(update, step2=True)
            case SyncUpdate(update):
                return Offered(update, step2=False)
            case QueryAwareness():
                self._announce()
        return None

    def merged(self, offer: Offered, *, gap: bool, state_vector: bytes) -> None:
        assert not (gap and offer.step2), "the relay left out what it was asked for"
        self.is_synced = not gap and (offer.step2 or self.is_synced)
        if gap and not offer.step2:
            self.put(SyncStep1(state_vector))
