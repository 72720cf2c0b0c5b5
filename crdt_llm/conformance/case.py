"""What a case is, and the world that it runs in.

This module owns the form of a case and what cases share: devices that are let go at the end, a
second principal, ways to crash the endpoint and to make it lose its log. It must not know any
particular case.
"""

from __future__ import annotations

import enum
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crdt_llm.conformance.connection import Broken, Native
from crdt_llm.conformance.device import Device
from crdt_llm.document.schema import State
from crdt_llm.errors import ConnectionLost
from crdt_llm.sync.wire.frames import Ack, Answer, Request
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from crdt_llm.conformance.connection import Endpoint
    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Grant
    from crdt_llm.sync.wire.frames import Opened


class Need(enum.StrEnum):
    """What a case cannot do without."""

    NODE = "an inference node that answers"
    CRASH = "a command that kills the endpoint and starts it again (--crash)"
    WIPE = "a command that makes the endpoint lose its log and keep its register (--wipe)"


@dataclass(frozen=True, slots=True)
class Case:
    """One promise of the protocol.

    Attributes:
        id: Short and stable.
        promise: What must hold.
        report: What users of message-passing APIs report where it does not.
        run: Returns if it holds, raises :class:`Broken` if not.
        needs: Without these it is skipped.
    """

    id: str
    promise: str
    report: str
    run: Callable[[World], Awaitable[None]]
    needs: frozenset[Need] = frozenset()


@dataclass(slots=True)
class World:
    """What one case has.

    Attributes:
        endpoint: Where to connect, and as whom.
        principal: Whom the token stands for.
        relay: The relay's public key.
        crash: Kills the endpoint and starts it again, if that can be done.
        wipe: Makes the endpoint lose its log and keep its register, if that can be done.
    """

    endpoint: Endpoint
    principal: str
    relay: bytes
    crash: Callable[[], Awaitable[None]] | None = None
    wipe: Callable[[], Awaitable[None]] | None = None
    _devices: list[Device] = field(default_factory=list)
    _wires: list[Native] = field(default_factory=list)

    def device(self, name: str = "first") -> Device:
        """A device that begins a conversation, not connected yet."""
        return self.kept(
            Device.born(
                self.endpoint, principal=self.principal, token=self.endpoint.token, name=name
            )
        )

    def kept(self, device: Device) -> Device:
        """Let a device go at the end of the case."""
        self._devices.append(device)
        return device

    def another(self, device: Device, name: str, *, state: bytes | None = None) -> Device:
        """Another device of the same person."""
        return self.kept(device.another(name, state=state))

    async def pair(self) -> tuple[Device, Device]:
        """Two connected devices of one conversation."""
        first = self.device()
        await first.connect()
        second = self.another(first, "second")
        await second.connect()
        return first, second

    async def native(self) -> Native:
        """A bare connection that has said nothing yet."""
        wire = await Native.connect(self.endpoint)
        self._wires.append(wire)
        return wire

    async def guest(self, owner: Device, role: Grant, name: str = "guest") -> Device:
        """Somebody else who was invited into an owner's conversation; not connected yet."""
        values = await request(owner, "invite", {"conversation": owner.id, "role": str(role)})
        principal, token = values.get("principal"), values.get("token")
        if not isinstance(principal, str) or not isinstance(token, str):
            raise Broken("an invitation has a principal and a token")
        verdict = await owner.write(lambda writer: writer.grant(principal, role))
        if not isinstance(verdict, Ack):
            raise Broken(f"an owner may give rights: {verdict.reason}")
        device = Device(self.endpoint, owner.id, principal=principal, token=token, name=name)
        return self.kept(device)

    async def lose_log(self) -> None:
        """Make the endpoint lose every conversation, and keep what it registered of them."""
        if self.wipe is None:
            raise Broken("nothing makes the endpoint lose its log: the case is wrong")
        for device in self._devices:
            if device.wire is not None:
                device.cut()
        await self.wipe()

    async def close(self) -> None:
        """Let everything go."""
        for device in self._devices:
            with suppress(ConnectionLost):
                await device.close()
        for wire in self._wires:
            await wire.close()


async def request(device: Device, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Ask the endpoint for something that is no write.

    Raises:
        Broken: It says no.
    """
    answer = await requested(device, name, arguments)
    if answer.values is None:
        raise Broken(f"{name} was refused: {answer.code} {answer.reason}")
    return dict(answer.values)


async def requested(device: Device, name: str, arguments: dict[str, Any]) -> Answer:
    """Ask, and hear what comes of it."""
    wire = device.wire
    if wire is None:
        raise Broken("not connected: the case is wrong")
    number = wire.next_id()
    await wire.send(Request(number, name, arguments))
    return await wire.expect(Answer, lambda answer: answer.id == number)


async def bring_back(device: Device) -> Opened:
    """Connect, and give the endpoint back what it has lost.

    Raises:
        Broken: It does not take it.
    """
    opened = await device.open()
    verdict = await device.submit(device.replica.diff(opened.state_vector), restore=True)
    if not isinstance(verdict, Ack):
        raise Broken(f"what {device.name} brought back was refused: {verdict.reason}")
    return opened


def require_lost(opened: Opened) -> None:
    """The first to open after a loss finds nothing; else nothing was tried.

    Raises:
        Broken: The endpoint still has something.
    """
    require(not decode_state_vector(opened.state_vector), "the log is still there after --wipe")


def require(holds: object, what: str) -> None:
    """Say what does not hold.

    Raises:
        Broken: It does not.
    """
    if not holds:
        raise Broken(what)


async def agree(devices: Sequence[Device]) -> None:
    """All devices come to hold one and the same document.

    What is on its way is merged first: a node behind the endpoint admits entries when it likes.

    Raises:
        Broken: They do not.
    """
    while late := next((device for device in devices if _lacks(device, devices)), None):
        await late.merge_next()
    first = devices[0].facts()
    for device in devices[1:]:
        for key, value in device.facts().items():
            require(
                value == first[key],
                f"{device.name} and {devices[0].name} differ in their {key}",
            )


def covers(device: Device, other: Device) -> bool:
    """Whether a device has every write that another has."""
    clocks = decode_state_vector(device.replica.state_vector())
    theirs = decode_state_vector(other.replica.state_vector())
    return all(clocks.get(client, 0) >= clock for client, clock in theirs.items())


def _lacks(device: Device, others: Sequence[Device]) -> bool:
    return not all(covers(device, other) for other in others)


def ended(slot: str) -> Callable[[Conversation], bool]:
    """Whether a reply has come to its end."""

    def holds(replica: Conversation) -> bool:
        entry = replica.entry(slot)
        return entry is not None and entry.ended

    return holds


def begun(slot: str, characters: int = 1) -> Callable[[Conversation], bool]:
    """Whether a reply has so much text."""
    return lambda replica: slot in replica.tree and len(replica.text(slot)) >= characters


def streams(slot: str, replica: Conversation) -> bool:
    """Whether a reply is under way now."""
    return replica.state(slot) is State.STREAMING
