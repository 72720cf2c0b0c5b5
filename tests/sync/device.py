"""A device of a test: a replica that writes by the schema, and the client's side of one link."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sync.plain_link import Asked, Offered, PlainLink

from crdt_llm.document.conversation import EMPTY_UPDATE, Conversation
from crdt_llm.document.schema import Birth, Born, Role, conversation_id, entry_id
from crdt_llm.sync.update.structure import find_gap, read_update
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from random import Random

    from crdt_llm.document.conversation import Change
    from crdt_llm.document.schema import Grant

BIRTH = Birth("owner", b"nonce of 16 byte")
CONVERSATION = conversation_id(BIRTH)
AT_MS = 1_700_000_000_000


class Device:
    """One replica of :data:`CONVERSATION`.

    Attributes:
        replica: What it holds.
        written: The updates it wrote.
        received: The updates it got from elsewhere.
    """

    def __init__(self, random: Random, principal: str = "owner") -> None:
        self.random = random
        self.principal = principal
        self.replica = Conversation(random.randrange(1, 2**32))
        self.written: list[bytes] = []
        self.received: list[bytes] = []
        self.link: PlainLink | None = None

    # -- writing -------------------------------------------------------------------------------

    def _wrote(self, change: Change | None) -> bytes:
        assert change is not None
        self.written.append(change.update)
        if self.link is not None:
            self.link.publish(change.update)
        return change.update

    def give_birth(self, birth: Birth = BIRTH) -> bytes:
        with self.replica.writing() as writer:
            writer.give_birth(birth, 1)
        return self._wrote(writer.change)

    def say(self, text: str, *, role: Role = Role.USER, author: str | None = None) -> bytes:
        tree = self.replica.tree
        born = Born(
            role, author or self.principal, "test", AT_MS, tree.clock + 1, after=tree.last("")
        )
        with self.replica.writing() as writer:
            writer.add(entry_id(AT_MS, self.random.randbytes(10)), born, text)
        return self._wrote(writer.change)

    def entitle(self, title: str | None) -> bytes:
        with self.replica.writing() as writer:
            writer.set_meta("title", title)
        return self._wrote(writer.change)

    def grant(self, principal: str, grant: Grant | None) -> bytes:
        with self.replica.writing() as writer:
            writer.grant(principal, grant)
        return self._wrote(writer.change)

    def forge(self, key: str = "no-such-key") -> bytes:
        """Write what no schema allows."""
        with self.replica.writing() as writer:
            writer.set_meta(key, "forged")
        return self._wrote(writer.change)

    @property
    def texts(self) -> list[str]:
        return [self.replica.text(entry) for entry in self.replica.view()]

    # -- reading -------------------------------------------------------------------------------

    def merge(self, update: bytes) -> bool:
        """Take an update from elsewhere, unless it has a gap."""
        known = decode_state_vector(self.replica.state_vector())
        if find_gap(read_update(update), known) is not None:
            return False
        if update != EMPTY_UPDATE:
            self.replica.apply(update)
            self.received.append(update)
        return True

    # -- a connection --------------------------------------------------------------------------

    def connect(self) -> PlainLink:
        self.link = PlainLink(self.replica.client_id, "test")
        self.link.open(self.replica.state_vector())
        return self.link

    def disconnect(self) -> None:
        self.link = None

    def frames(self) -> list[bytes]:
        """What it has to send."""
        frames: list[bytes] = []
        while self.link is not None and (frame := self.link.data_to_send()) is not None:
            frames.append(frame)
        return frames

    def take(self, frame: bytes) -> None:
        """Take a frame from the relay."""
        assert self.link is not None
        match self.link.receive(frame):
            case Asked(state_vector):
                self.link.answer(self.replica.diff(state_vector))
            case Offered(update, _) as offer:
                gap = not self.merge(update)
                self.link.merged(offer, gap=gap, state_vector=self.replica.state_vector())
            case _:
                pass
