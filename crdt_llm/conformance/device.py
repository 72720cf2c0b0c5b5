"""A device: a replica of one conversation and the connection that keeps it in sync.

This module owns what every case does: be born, write, ask, wait until something is seen, lose the
connection and come back. It keeps nothing from the case: verdicts are returned, not acted on.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.conformance.connection import Broken, Native
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import (
    SCHEMA_VERSION,
    Birth,
    Born,
    Params,
    Role,
    conversation_id,
    entry_id,
)
from crdt_llm.errors import ConnectionLost
from crdt_llm.sync.wire.frames import (
    Ack,
    Change,
    Closed,
    Nack,
    Open,
    Opened,
    Restore,
    State,
    Update,
)
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.conformance.connection import Endpoint
    from crdt_llm.document.conversation import Writer
    from crdt_llm.document.schema import Entry

CHANNEL: Final = 1
_NONCE_BYTES: Final = 16
_ULID_RANDOM_BYTES: Final = 10


def fresh_client_id() -> int:
    """A client id for one life of a replica."""
    return int.from_bytes(os.urandom(4), "big") or 1


def now_ms() -> int:
    """Wall time, ms since 1970."""
    return time.time_ns() // 1_000_000


class Device:
    """One device.

    Args:
        endpoint: Where the conversation is.
        conversation: Its id.
        principal: Whom the token stands for.
        token: Who we are.
        name: Of the device.
        state: What the replica begins with.
    """

    def __init__(  # noqa: PLR0913 - everything that tells devices apart
        self,
        endpoint: Endpoint,
        conversation: str,
        *,
        principal: str,
        token: str,
        name: str = "device",
        state: bytes | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.id = conversation
        self.principal = principal
        self.name = name
        self._token = token
        self.replica = Conversation(fresh_client_id())
        if state is not None:
            self.replica.apply(state)
        self.wire: Native | None = None
        self.log: str | None = None
        self.lsn = 0

    @classmethod
    def born(cls, endpoint: Endpoint, *, principal: str, token: str, name: str = "first") -> Device:
        """A device that begins a conversation, without a connection."""
        birth = Birth(principal, os.urandom(_NONCE_BYTES))
        device = cls(endpoint, conversation_id(birth), principal=principal, token=token, name=name)
        with device.replica.writing() as writer:
            writer.give_birth(birth, SCHEMA_VERSION)
            writer.set_meta("created_at", now_ms())
        return device

    def another(self, name: str, *, state: bytes | None = None) -> Device:
        """Another device of the same person, without a connection, and empty if not told else."""
        return Device(
            self.endpoint,
            self.id,
            principal=self.principal,
            token=self._token,
            name=name,
            state=state,
        )

    # -- the connection ------------------------------------------------------------------------

    @property
    def _native(self) -> Native:
        if self.wire is None:
            raise Broken(f"{self.name} is not connected: the case is wrong")
        return self.wire

    async def connect(self) -> Opened:
        """Connect, be in sync, and hand over what the endpoint lacks.

        Raises:
            Broken: The endpoint does not let it.
        """
        opened = await self.open()
        missing = self.replica.diff(opened.state_vector)
        if self.replica.state_vector() != opened.state_vector:
            verdict = await self.submit(missing)
            if not isinstance(verdict, Ack):
                raise Broken(f"what {self.name} brought was refused: {verdict.reason}")
        return opened

    async def open(self) -> Opened:
        """Connect and be in sync; hand nothing over.

        Raises:
            Broken: The endpoint does not let it.
        """
        self.wire = await Native.connect(self.endpoint)
        await self.wire.hello(self._token, self.name)
        state_vector = self.replica.state_vector()
        await self.wire.send(Open(CHANNEL, self.id, self.log, self.lsn, state_vector))
        while not isinstance(answer := await self.wire.receive(), Opened):
            self.take(answer)
        self.replica.apply(answer.update)
        self.log, self.lsn = answer.log, answer.lsn
        return answer

    def cut(self) -> None:
        """Lose the connection."""
        self._native.cut()
        self.wire = None

    async def close(self) -> None:
        """Hang up, if connected."""
        if self.wire is not None:
            await self.wire.close()
            self.wire = None

    async def submit(self, update: bytes, *, restore: bool = False) -> Ack | Nack:
        """Send an update and wait for its verdict; what others write meanwhile is merged."""
        number = self._native.next_id()
        await self._native.send((Restore if restore else Update)(CHANNEL, number, update))
        return await self.verdict(number)

    async def verdict(self, number: int) -> Ack | Nack:
        """Wait for what became of an update; an acknowledgement speaks for earlier ones too."""
        while True:
            frame = await self._native.receive()
            if isinstance(frame, Nack) and frame.id == number:
                return frame
            if isinstance(frame, Ack) and frame.id >= number:
                return frame
            self.take(frame)

    def take(self, frame: Any) -> None:
        """Merge a frame that carries something to merge."""
        match frame:
            case Change(_, lsn, update) | State(_, lsn, update):
                self.replica.apply(update)
                self.lsn = lsn
            case Closed(_, code, reason):
                raise Broken(f"the channel was closed: {code} {reason}")
            case _:
                self._native.waiting.append(frame)

    async def merge_next(self) -> None:
        """Merge the next thing that comes.

        Raises:
            Broken: Nothing comes in time.
        """
        self.take(await self._native.receive())

    async def until(self, holds: Callable[[Conversation], bool], what: str) -> None:
        """Merge what comes until something holds.

        Raises:
            Broken: It does not come to hold in time; ``what`` says what that is.
        """
        try:
            async with asyncio.timeout(self.endpoint.deadline_s):
                while not holds(self.replica):
                    await self.merge_next()
        except (TimeoutError, ConnectionLost) as error:
            raise Broken(f"{self.name}: not seen in time: {what} ({error})") from error

    # -- writing -------------------------------------------------------------------------------

    def compose(self, write: Callable[[Writer], None]) -> bytes:
        """Write into the replica; the answer is the update."""
        before = self.replica.state_vector()
        with self.replica.writing() as writer:
            write(writer)
        return self.replica.diff(before)

    async def write(self, write: Callable[[Writer], None]) -> Ack | Nack:
        """Write, and hand it over."""
        return await self.submit(self.compose(write))

    def entry(
        self, role: Role = Role.USER, after: str | None = None, **fields: Any
    ) -> tuple[str, Born]:
        """A new entry's id and birth, after the last of the view if not told else."""
        view = self.replica.view()
        last = (view[-1] if view else "") if after is None else after
        at = now_ms()
        born = Born(
            role=role,
            author=self.principal,
            device=self.name,
            at=at,
            clock=self.replica.tree.clock + 1,
            after=last,
        )
        return entry_id(at, os.urandom(_ULID_RANDOM_BYTES)), replace(born, **fields)

    def say(self, text: str, after: str | None = None, **fields: Any) -> tuple[str, bytes]:
        """Write an entry of one's own; the answer is its id and the update."""
        name, born = self.entry(after=after, **fields)
        return name, self.compose(lambda writer: writer.add(name, born, text))

    def ask(self, text: str, **params: Any) -> tuple[str, str, bytes]:
        """Write an entry and a slot; the answer is both ids and the update."""
        name, born = self.entry()
        slot, asked = self.entry(Role.ASSISTANT)
        asked = replace(asked, after=name, clock=born.clock + 1, params=Params(**params))

        def write(writer: Writer) -> None:
            writer.add(name, born, text)
            writer.add(slot, asked)

        return name, slot, self.compose(write)

    async def send(self, update: bytes) -> None:
        """Hand an update over that must be taken.

        Raises:
            Broken: It was not.
        """
        verdict = await self.submit(update)
        if isinstance(verdict, Nack):
            raise Broken(f"a valid write was refused: {verdict.code} {verdict.reason}")

    # -- reading -------------------------------------------------------------------------------

    def texts(self) -> tuple[str, ...]:
        """The shown texts, in order."""
        return tuple(entry.content for entry in self.view())

    def view(self) -> tuple[Entry, ...]:
        """The shown entries, in order."""
        found = (self.replica.entry(name) for name in self.replica.view())
        return tuple(entry for entry in found if entry is not None)

    def facts(self) -> dict[str, Any]:
        """All that the replica says: two that agree on it are one."""
        entries = (self.replica.entry(name) for name in sorted(self.replica.tree.entries))
        return {
            "clocks": decode_state_vector(self.replica.state_vector()),
            "meta": self.replica.meta_plain(),
            "access": dict(self.replica.access()),
            "entries": tuple(entries),
            "view": self.replica.view(),
        }
