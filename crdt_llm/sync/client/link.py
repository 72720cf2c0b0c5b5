"""One connection to a relay, without the connection: the client side of the native dialect.

This module owns the first frames, the numbers of channels and requests, whose turn it is to send,
and the count of what went over the wire. It must not know sockets, tasks, clocks or documents:
frames go in and come out as bytes, and time is an argument. What happens in a conversation is
:mod:`crdt_llm.sync.client.channel`'s.

    hello -> Welcome -> (channels, requests, the list)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from crdt_llm.errors import LocalMisuse, MalformedMessage, Unavailable
from crdt_llm.sync.client.channel import Channel
from crdt_llm.sync.wire.frames import (
    CHANNEL_MAX,
    VERSION,
    Ack,
    Answer,
    Change,
    Closed,
    Hello,
    Listed,
    Nack,
    Opened,
    Presence,
    Request,
    State,
    Watch,
    Welcome,
    decode_from_relay,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from crdt_llm.sync.client.channel import Event
    from crdt_llm.sync.client.local_replica import Written
    from crdt_llm.sync.client.presence import Company
    from crdt_llm.sync.client.traffic import Traffic
    from crdt_llm.sync.wire.frames import FromClient, FromRelay

DRAFT_EVERY_S: Final = 0.1
"""At most ten hints of what is being typed in a second: more than a node can make use of."""

REQUESTS_MAX: Final = 64
"""Requests that wait for an answer: a person makes one at a time."""


@dataclass(frozen=True, slots=True)
class Happened:
    """Something to be done about a conversation."""

    channel: Channel
    event: Event


LinkEvent: TypeAlias = Welcome | Listed | Answer | Happened


class Link:
    """The client side of one connection.

    Args:
        token: who we are; ``None`` if the handshake said so.
        device: this device's name.
        traffic: where frames are counted that belong to no conversation.
    """

    def __init__(self, token: str | None, device: str, traffic: Traffic) -> None:
        self.welcome: Welcome | None = None
        self._device = device
        self._traffic = traffic
        self._frames: deque[FromClient] = deque()
        self._channels: dict[int, Channel] = {}
        self._traffic_of: dict[int, Traffic] = {}
        self._last_channel = 0
        self._turn: deque[Channel] = deque()  # whose turn it is to send
        self._last_request = 0
        self._asked: set[int] = set()
        self._draft_at_s = 0.0
        self._hello: Hello | None = None  # to be said
        self._is_greeting = False  # it was, and nothing else may be until there is an answer
        self.say_hello(token)

    # -- what the application says -------------------------------------------------------------

    def say_hello(self, token: str | None) -> None:
        """Say who we are; once more to renew the token."""
        self._hello = Hello(VERSION, token, self._device, None)

    def channel(
        self, company: Company, next_to_send: Callable[[int], Written | None], traffic: Traffic
    ) -> Channel:
        """A new channel; open it.

        Raises:
            LocalMisuse: the relay has not said who it is yet.
            Unavailable: so many are open already.
        """
        if self.welcome is None:
            raise LocalMisuse("a channel is opened once the relay is known")
        if len(self._channels) > CHANNEL_MAX:
            raise Unavailable("too many conversations are open")
        while (number := self._last_channel) in self._channels:
            self._last_channel = (self._last_channel + 1) % (CHANNEL_MAX + 1)
        self._last_channel = (number + 1) % (CHANNEL_MAX + 1)
        channel = self._channels[number] = Channel(number, company, next_to_send)
        self._traffic_of[number] = traffic
        self._turn.append(channel)
        return channel

    def watch(self, *, on: bool) -> None:
        """Hear of one's own list of conversations, or no more."""
        self._frames.append(Watch(on))

    def request(self, name: str, arguments: Mapping[str, Any]) -> int:
        """Ask for something; the answer has the same number.

        Raises:
            Unavailable: too many requests wait.
        """
        if len(self._asked) >= REQUESTS_MAX:
            raise Unavailable("too many requests wait for the relay's answer")
        self._last_request += 1
        self._asked.add(self._last_request)
        self._frames.append(Request(self._last_request, name, arguments))
        return self._last_request

    # -- what goes out -------------------------------------------------------------------------

    def data_to_send(self, now_s: float) -> bytes | None:
        """The next frame to send, or ``None``."""
        if self._is_greeting:
            return None
        if self._hello is not None:
            hello, self._hello = self._hello, None
            self._is_greeting = True
            return self._counted(hello, self._traffic)
        if self._frames:
            return self._counted(self._frames.popleft(), self._traffic)
        for _ in range(len(self._turn)):  # each may send one, then the next
            channel = self._turn[0]
            self._turn.rotate(-1)
            taken = channel.take(now_s)
            if taken is not None:
                return self._counted(taken, self._traffic_of[channel.number])
        if now_s >= self._draft_at_s:
            due = (one for one in self._turn if one.draft_due_s(now_s) <= now_s)
            drafting = next(due, None)
            if drafting is not None:
                self._draft_at_s = now_s + DRAFT_EVERY_S
                traffic = self._traffic_of[drafting.number]
                return self._counted(drafting.take_draft(), traffic)
        return None

    def _counted(self, frame: FromClient, traffic: Traffic) -> bytes:
        data = encode(frame)
        traffic.of(frame).sent(len(data))
        return data

    def due_s(self, now_s: float) -> float:
        """When there is something to send again without anything else happening."""
        if self._is_greeting:
            return float("inf")
        due_s = min((channel.due_s(now_s) for channel in self._turn), default=float("inf"))
        draft_s = min((one.draft_due_s(now_s) for one in self._turn), default=float("inf"))
        return min(due_s, max(draft_s, self._draft_at_s))

    # -- what comes in -------------------------------------------------------------------------

    def receive(self, data: bytes, now_s: float) -> LinkEvent | None:
        """Take one frame in.

        Returns:
            What is to be done about it, if anything.

        Raises:
            MalformedMessage: it is no message of the dialect, or none that may come now.
        """
        frame = decode_from_relay(data)
        if self.welcome is None and not isinstance(frame, Welcome):
            raise MalformedMessage("the relay did not say who it is")
        match frame:
            case Opened() | Change() | State() | Ack() | Nack() | Presence() | Closed():
                return self._of_channel(frame, len(data), now_s)
            case _:
                self._traffic.of(frame).received(len(data))
                return self._of_connection(frame)

    def _of_connection(self, frame: FromRelay) -> LinkEvent | None:
        match frame:
            case Welcome():
                if frame.version != VERSION:
                    raise MalformedMessage(f"the relay speaks version {frame.version}")
                self.welcome = frame
                self._is_greeting = False
                return frame
            case Listed():
                return frame
            case Answer(identity):
                if identity not in self._asked:
                    raise MalformedMessage("the relay answered what nobody asked")
                self._asked.discard(identity)
                return frame
            case _:
                raise MalformedMessage(f"{type(frame).__name__} is for nodes")

    def _of_channel(
        self,
        frame: Opened | Change | State | Ack | Nack | Presence | Closed,
        size: int,
        now_s: float,
    ) -> LinkEvent | None:
        channel = self._channels.get(frame.channel)
        if channel is None:
            raise MalformedMessage("the relay speaks of a channel that is not open")
        self._traffic_of[channel.number].of(frame).received(size)
        event = channel.receive(frame, now_s)
        if isinstance(frame, Closed):
            del self._channels[channel.number]
            del self._traffic_of[channel.number]
            self._turn.remove(channel)
        return None if event is None else Happened(channel, event)
