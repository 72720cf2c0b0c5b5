"""Whoever takes part in a room, and what passes between the two.

This module owns the contract: what a peer hands over, and the calls in which it hears. It must not
know on what wire a peer hangs, nor what a room does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crdt_llm.document.rules import Author

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.sync.room.room import Room
    from crdt_llm.sync.wire.verdict import Verdict
    from crdt_llm.sync.wire.y_websocket import AwarenessState


@dataclass(frozen=True, slots=True, eq=False)
class Submission:
    """One update on its way through a room.

    Attributes:
        peer: Whose it is.
        update: A Yjs v1 update, unchecked.
        is_large: It may be as large as a document, not just as a transaction.
        may_restore: After a loss of the log it is taken as a restore: its peer was asked for all
            that it has, or offers what was acknowledged. Before one it is an update like any.
        tag: Whatever the peer wants to see again with the verdict.
        doubts: Believe a conversation that the register does not know, and say in this list what
            in it could not be verified. For an operator's import, never for a client.
    """

    peer: Peer
    update: bytes
    is_large: bool = False
    may_restore: bool = False
    tag: Any = None
    doubts: list[str] | None = None


class Delivery:
    """What one commit brought, as one update; frames made of it are made once for all peers."""

    __slots__ = ("_frames", "update")

    def __init__(self, update: bytes) -> None:
        self.update = update
        self._frames: dict[Callable[[bytes], bytes], bytes] = {}

    def frame(self, encode: Callable[[bytes], bytes]) -> bytes:
        """The update as a frame of some dialect."""
        frame = self._frames.get(encode)
        if frame is None:
            frame = self._frames[encode] = encode(self.update)
        return frame


class Peer(ABC):
    """Someone who takes part in a room. The room calls; every call returns at once.

    Args:
        principal: The authenticated name.
        node: Whether it acts as the conversation's node.
    """

    survives_refusal = False
    """Whether it may go on after a refusal. If not, what it sent after is never looked at."""

    survives_failure = False
    """Whether it may go on when what it wrote did not become durable. If not, it is dismissed."""

    address: str | None = None
    """Where it comes from; ``None`` inside this process."""

    is_operator = False
    """Whether it acts for whoever runs this relay: it may be in any room, without a right."""

    def __init__(self, principal: str, *, node: bool = False) -> None:
        self.author = Author(principal, node)

    @abstractmethod
    def entered(self, room: Room) -> None:
        """It is let in; the room's state may be read now."""

    @abstractmethod
    def settle(self, submission: Submission, verdict: Verdict, room: Room) -> None:
        """What became of an update; the room's state may be read now."""

    @abstractmethod
    def deliver(self, delivery: Delivery) -> None:
        """What others wrote is durable; all that one commit brought."""

    @abstractmethod
    def answer(self, room: Room) -> None:
        """The room's state may be read now, as the peer wished with :meth:`Room.ask`."""

    @abstractmethod
    def presence(self, states: tuple[AwarenessState, ...]) -> None:
        """Who is here, or went."""

    @abstractmethod
    def dismiss(self, error: CrdtLlmError) -> None:
        """The room is over for this peer. Nothing else is called after this."""
