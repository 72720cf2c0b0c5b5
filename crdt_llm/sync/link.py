"""One connection to a relay, without the connection: the client side of the plain dialect.

This module owns the order of the messages (who says what first, when a device is in sync, what a
gap means, which close codes are final), the waiting time before another try, and the count of what
went over the wire. It must not know sockets, tasks, clocks or documents: frames go in and come out
as bytes, state vectors and updates stay opaque.

A link lives as long as its socket. Both sides open with Step1; a device is *in sync* when the
relay's Step2 was merged. What a device writes before it has answered the relay's Step1 needs no
frame of its own: the answer carries it.
"""

from __future__ import annotations

import json
import re
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from crdt_llm.errors import (
    AuthenticationFailed,
    ConnectionLost,
    Forbidden,
    LocalMisuse,
    MalformedMessage,
    Refused,
    TooLarge,
)
from crdt_llm.sync.verdict import CloseCode
from crdt_llm.sync.wire import (
    UPDATE_BYTES_MAX,
    AuthDenied,
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
    from random import Random

    from crdt_llm.sync.wire import Message

OUTGOING_FRAMES_MAX: Final = 1024
"""Frames waiting for a slow socket. Beyond it the connection is given up: one Step2 on the next
one carries the same in fewer bytes than ever more single updates."""

DEVICES_MAX: Final = 256
"""Other devices remembered as present. A person has a handful; a crowd is for a dashboard."""

DEVICE_CHARACTERS_MAX: Final = 64
"""Characters of a device's name that others show: it is sent anew every 15 seconds."""

RETRY_FIRST_S: Final = 0.25
"""The longest first wait: a relay that restarts is back within a second."""

RETRY_LAST_S: Final = 30.0
"""The longest wait of all: a laptop that wakes up should not sit next to a live relay for long."""

_FINAL_CODES: Final = range(4400, 4500)
"""Close codes that mean "do not come back with the same request", as y-websocket 3 reads them."""

_KINDS: Final[dict[int, type[Refused]]] = {
    CloseCode.UNAUTHENTICATED: AuthenticationFailed,
    CloseCode.FORBIDDEN: Forbidden,
    CloseCode.TOO_LARGE: TooLarge,
}
_CODED_REASON: Final = re.compile(r"([a-z][a-z0-9-]*): (.+)", re.DOTALL)


@dataclass(slots=True)
class Count:
    """Frames and bytes one way and the other, websocket framing included, TCP and TLS not."""

    sent_frames: int = 0
    sent_bytes: int = 0
    received_frames: int = 0
    received_bytes: int = 0

    def sent(self, payload: int) -> None:
        """Count a frame with so many bytes of payload on its way out."""
        self.sent_frames += 1
        self.sent_bytes += framed_bytes(payload, masked=True)

    def received(self, payload: int) -> None:
        """Count a frame with so many bytes of payload that came in."""
        self.received_frames += 1
        self.received_bytes += framed_bytes(payload, masked=False)


@dataclass(slots=True)
class Traffic:
    """What a conversation cost on the wire since it was opened.

    Attributes:
        sync: connecting, reconnecting and staying there: Step1, Step2 and presence.
        live: what was written while connected: the updates of turns and replies.
    """

    sync: Count = field(default_factory=Count)
    live: Count = field(default_factory=Count)

    def of(self, message: Message) -> Count:
        """The count that a message belongs to."""
        return self.live if isinstance(message, SyncUpdate) else self.sync


def framed_bytes(payload: int, *, masked: bool) -> int:
    """Bytes of one unfragmented websocket frame (RFC 6455, 5.2); clients mask, servers do not."""
    length = 0 if payload < 126 else 2 if payload < 2**16 else 8  # noqa: PLR2004 - the RFC's steps
    return 2 + length + (4 if masked else 0) + payload


def refusal(code: int, reason: str) -> Refused | None:
    """What a close code means: ``None`` to come back, or the refusal that it stands for.

    Args:
        code: the websocket close code.
        reason: what the relay said, with its word for programs in front (``word: sentence``);
            empty if it said nothing.
    """
    if code not in _FINAL_CODES:
        return None
    kind = _KINDS.get(code, Refused)
    if coded := _CODED_REASON.fullmatch(reason):
        return kind(coded[1], coded[2])
    known = code in CloseCode.__members__.values()
    word = CloseCode(code).name.lower().replace("_", "-") if known else f"refused-{code}"
    return kind(word, reason or f"the relay refused this conversation ({word}) and gave no reason")


class Backoff:
    """How long to wait before the next try: doubling, with half of it left to chance.

    Chance keeps the devices of a relay that restarts from coming back all at once.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self._tries = 0

    def reset(self) -> None:
        """Begin again with short waits; only a completed sync earns that."""
        self._tries = 0

    def next_s(self) -> float:
        """The next wait in seconds."""
        longest = min(RETRY_LAST_S, RETRY_FIRST_S * 2.0 ** min(self._tries, 16))
        self._tries += 1
        return longest * (0.5 + 0.5 * self._random.random())


class Phase(StrEnum):
    """Where a link stands."""

    NEW = "new"  # nothing was said yet
    SYNCING = "syncing"  # our Step1 is on its way, the relay's Step2 is not merged yet
    SYNCED = "synced"  # the relay's Step2 was merged


class Merge(StrEnum):
    """How the merge of an offered update went."""

    WHOLE_STEP2 = "whole step2"
    GAP_STEP2 = "gap in step2"
    WHOLE_UPDATE = "whole update"
    GAP_UPDATE = "gap in update"


# Where a merge leads. What is not here is the relay's fault: its Step2 left out what we said that
# we lack, and asking a second time for the same would go on for ever.
_AFTER_MERGE: Final[dict[tuple[Phase, Merge], Phase]] = {
    (Phase.SYNCING, Merge.WHOLE_STEP2): Phase.SYNCED,
    (Phase.SYNCING, Merge.WHOLE_UPDATE): Phase.SYNCING,
    (Phase.SYNCING, Merge.GAP_UPDATE): Phase.SYNCING,  # the Step2 to come brings it
    (Phase.SYNCED, Merge.WHOLE_STEP2): Phase.SYNCED,
    (Phase.SYNCED, Merge.WHOLE_UPDATE): Phase.SYNCED,
    (Phase.SYNCED, Merge.GAP_UPDATE): Phase.SYNCING,  # ask anew
    (Phase.SYNCED, Merge.GAP_STEP2): Phase.SYNCING,  # one that we had not asked for
}


@dataclass(frozen=True, slots=True)
class Asked:
    """The relay says what it has; :meth:`Link.answer` it with the rest."""

    state_vector: bytes


@dataclass(frozen=True, slots=True)
class Offered:
    """Something to merge; tell the link how it went with :meth:`Link.merged`."""

    update: bytes
    step2: bool


@dataclass(frozen=True, slots=True)
class DevicesChanged:
    """Another device came, went or changed its name."""


Event: TypeAlias = Asked | Offered | DevicesChanged


class Link:
    """The client side of one connection.

    Args:
        client: the client id that presence is announced under.
        device: this device's name.
        traffic: where frames are counted.
    """

    def __init__(self, client: int, device: str, traffic: Traffic) -> None:
        self.phase = Phase.NEW
        self._client = client
        self._device = device[:DEVICE_CHARACTERS_MAX]
        self._traffic = traffic
        self._answered = False  # whether the relay's Step1 was answered: from then on updates flow
        self._outgoing: deque[Message] = deque()
        self._presence_clock = 0
        self._present: dict[int, tuple[int, str]] = {}  # client -> (clock, name of the device)
        self._denied = ""

    # -- out -----------------------------------------------------------------------------------

    def open(self, state_vector: bytes) -> None:
        """Say what this device has, and its name."""
        if self.phase is not Phase.NEW:
            raise LocalMisuse("a link is opened once; make a new one for a new connection")
        self.phase = Phase.SYNCING
        self._put(SyncStep1(state_vector))
        self.renew()

    def answer(self, update: bytes) -> None:
        """Answer the relay's Step1 with everything that it lacks.

        Raises:
            TooLarge: it does not fit into a frame.
        """
        if len(update) > UPDATE_BYTES_MAX:
            raise TooLarge(
                "document-too-large",
                f"the relay lacks {len(update)} bytes of this conversation, over the limit of"
                f" {UPDATE_BYTES_MAX}",
            )
        self._answered = True
        self._put(SyncStep2(update))

    def publish(self, update: bytes) -> None:
        """Send what this device wrote, unless the answer to the relay's Step1 will carry it.

        Raises:
            ConnectionLost: too much waits for a slow socket; give the connection up.
        """
        if self._answered:
            self._put(SyncUpdate(update))

    def renew(self) -> None:
        """Announce this device (again): relays forget presence after 30 s of silence."""
        self._presence_clock += 1  # peers ignore a state at clock 0
        state = json.dumps({"device": self._device}, ensure_ascii=False, separators=(",", ":"))
        self._put(AwarenessUpdate((AwarenessState(self._client, self._presence_clock, state),)))

    def _put(self, message: Message) -> None:
        if len(self._outgoing) >= OUTGOING_FRAMES_MAX:
            raise ConnectionLost(f"over {OUTGOING_FRAMES_MAX} frames wait for the relay")
        self._outgoing.append(message)

    def data_to_send(self) -> bytes | None:
        """The next frame to send, or ``None``."""
        if not self._outgoing:
            return None
        message = self._outgoing.popleft()
        frame = encode(message)
        self._traffic.of(message).sent(len(frame))
        return frame

    # -- in ------------------------------------------------------------------------------------

    def receive(self, frame: bytes) -> Event | None:
        """Take one frame in.

        Returns:
            What is to be done about it, if anything.

        Raises:
            MalformedMessage: it is no message of the dialect.
        """
        message = decode(frame)
        self._traffic.of(message).received(len(frame))
        match message:
            case SyncStep1(state_vector):
                return Asked(state_vector)
            case SyncStep2(update):
                return Offered(update, step2=True)
            case SyncUpdate(update):
                return Offered(update, step2=False)
            case AwarenessUpdate(states):
                return self._hear_of(states)
            case AuthDenied(reason):
                self._denied = reason  # the close that follows says whether it is final
                return None
            case QueryAwareness():
                self.renew()
                return None

    def merged(self, offer: Offered, *, gap: bool, state_vector: bytes) -> None:
        """Say how the merge of an offered update went.

        Args:
            offer: the event.
            gap: it builds on something this device does not have, and was left out.
            state_vector: what this device has now.

        Raises:
            MalformedMessage: the relay's Step2 leaves out what we said that we lack.
        """
        if offer.step2:
            result = Merge.GAP_STEP2 if gap else Merge.WHOLE_STEP2
        else:
            result = Merge.GAP_UPDATE if gap else Merge.WHOLE_UPDATE
        phase = _AFTER_MERGE.get((self.phase, result))
        if phase is None:
            raise MalformedMessage(f"the relay sent a {result} while {self.phase}")
        if self.phase is Phase.SYNCED and phase is Phase.SYNCING:
            self._put(SyncStep1(state_vector))
        self.phase = phase

    def refusal(self, lost: ConnectionLost) -> Refused | None:
        """What the end of the connection means: ``None`` to come back, or a refusal."""
        return refusal(lost.code, self._denied or lost.reason)

    # -- presence ------------------------------------------------------------------------------

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the other devices that are here now, sorted."""
        return tuple(sorted(name for _, name in self._present.values()))

    def _hear_of(self, states: tuple[AwarenessState, ...]) -> DevicesChanged | None:
        before = self.devices
        for state in states:
            if state.client == self._client:
                continue  # a relay echoes us, so that silent peers keep their connection
            known = self._present.get(state.client)
            if known is not None and state.clock < known[0]:
                continue
            if state.state_json is None:
                self._present.pop(state.client, None)
            elif known is not None or len(self._present) < DEVICES_MAX:
                self._present[state.client] = (state.clock, _device_name(state.state_json))
        return DevicesChanged() if self.devices != before else None


def _device_name(state_json: str) -> str:
    """The name in a state; other clients may show other things, or nothing."""
    state = json.loads(state_json)  # the codec has checked that it is JSON
    name = state.get("device") if isinstance(state, dict) else None
    return name[:DEVICE_CHARACTERS_MAX] if isinstance(name, str) else ""
