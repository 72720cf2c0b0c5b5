"""A client of a test in the native dialect, by hand: what it sends is what the test says."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from sync.device import CONVERSATION, Device

from crdt_llm.document.conversation import EMPTY_STATE_VECTOR
from crdt_llm.errors import AuthenticationFailed
from crdt_llm.sync.relay.access import Pass
from crdt_llm.sync.relay.native_peer import NativeConnection, RelayIdentity
from crdt_llm.sync.wire.frames import (
    VERSION,
    Change,
    Hello,
    Open,
    Opened,
    State,
    Update,
    Welcome,
    decode_from_relay,
    encode,
)

if TYPE_CHECKING:
    from sync.rooms import Place

    from crdt_llm.sync.wire.frames import FromClient, FromRelay

IDENTITY = RelayIdentity(b"k" * 32, "the log")
PASSES = {name: Pass(name) for name in ("owner", "friend", "stranger")} | {
    "node": Pass("node", node=True)
}
Kind = TypeVar("Kind")


def admit(token: str | None) -> Pass:
    """Tokens are names here."""
    found = PASSES.get(token or "")
    if found is None:
        raise AuthenticationFailed("unauthenticated", "a valid token is needed")
    return found


class Native:
    """A connection without a socket; nothing moves unless the test moves it."""

    def __init__(
        self,
        place: Place,
        token: str | None = "owner",  # noqa: S107 - a name, here
        **options: Any,
    ) -> None:
        self.token = token
        self.woken = 0
        self.taken: list[FromRelay] = []
        options.setdefault("admit", admit)
        self.connection = NativeConnection(
            place.hub, IDENTITY, came_with=None, wake=self.wake, **options
        )

    def wake(self) -> None:
        self.woken += 1

    async def send(self, *frames: FromClient) -> None:
        for frame in frames:
            await self.connection.receive(encode(frame))

    def down(self) -> list[FromRelay]:
        """Take everything that waits."""
        news: list[FromRelay] = []
        while (frame := self.connection.take()) is not None:
            news.append(decode_from_relay(frame))
        self.taken += news
        return news

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [frame for frame in self.taken if isinstance(frame, kind)]

    async def greet(self, node: bytes | None = None) -> Welcome:
        await self.send(Hello(VERSION, self.token, "test", node))
        self.down()
        return self.of(Welcome)[-1]


class NativeDevice(Device):
    """A replica that hears one channel."""

    def hear(self, frames: list[FromRelay], channel: int = 1) -> None:
        for frame in frames:
            if isinstance(frame, Opened | Change | State) and frame.channel == channel:
                assert self.merge(frame.update)


def device(seed: int, principal: str = "owner") -> NativeDevice:
    return NativeDevice(Random(seed), principal)


def open_frame(
    channel: int = 1,
    *,
    log: str | None = None,
    lsn: int = 0,
    state_vector: bytes = EMPTY_STATE_VECTOR,
    conversation: str = CONVERSATION,
) -> Open:
    return Open(channel, conversation, log, lsn, state_vector)


def update_frame(id: int, update: bytes, channel: int = 1) -> Update:  # noqa: A002 - its name there
    return Update(channel, id, update)
