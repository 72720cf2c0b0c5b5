"""What checking costs: the relay's time for a token of a stream, with its checks and without.

A node writes tokens into a room of this process, one update each, and four readers take them as
frames, as over sockets. Each update is committed to a log on this disk, in a turn of its own. What
counts is the CPU time of the event loop's thread: that is what a relay runs out of first. Rounds
with and without checks take turns in one run, on rooms that are alike, and of each the least
disturbed round counts; so the ratio holds on any machine, while the times drift. The rounds are
short, a hundredth of a second, so that on a busy machine some of them are not disturbed at all.

Without checks an update is applied as it comes, committed and delivered. With checks its structure
is read and searched before, its meaning judged after, and its facts are compared with the
register's. This is done for two kinds of tokens: a node of this project writes the text and a
sealed chunk with the ids in one update; a plainer writer would write the text alone, which costs
less to merge, so that the same checks are more of it. The bar: of either kind checks are at most
40 % of the relay's time. What a socket adds, and a network, is not in it: it would be less of that.

    python bench/checks.py [--rounds 60] [--tokens 50]

The last line is the result as JSON, the kind of which the checks are more; the exit code is 0 only
within the bar.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from crdt_llm.document.chain import lease_message
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.schema import (
    NONCE_BYTES,
    ROOT,
    SCHEMA_VERSION,
    Birth,
    Born,
    Place,
    Role,
    State,
    conversation_id,
    entry_id,
)
from crdt_llm.store.register import SqliteRegister
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay import hub as hub_module
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.plain_peer import RemotePeer
from crdt_llm.sync.room.room import Room
from crdt_llm.sync.wire.verdict import Committed
from crdt_llm.sync.wire.y_websocket import SyncStep1, SyncStep2, encode

if TYPE_CHECKING:
    from crdt_llm.document.conversation import Writer
    from crdt_llm.document.rules import Author
    from crdt_llm.sync.relay.hub import Membership
    from crdt_llm.sync.room.peer import Submission
    from crdt_llm.sync.room.seats import Batch, Seat
    from crdt_llm.sync.wire.verdict import Verdict

READERS: Final = 4
WARM_TOKENS: Final = 50
SEALED_BYTES: Final = 158  # of a chunk with one id
BAR: Final = 0.40
OWNER: Final = "owner"
EMPTY_UPDATE: Final = b"\x00\x00"


class UncheckedRoom(Room):
    """A room that believes everything; only for this comparison."""

    async def _decide(
        self, seat: Seat, submission: Submission, author: Author, batch: Batch
    ) -> Verdict:
        del author
        change = self._replica.document.apply(submission.update)
        batch.accepted.append((seat, change))
        return Committed(0)

    async def _note(self, batch: Batch) -> None:
        """Keep no register, but for the row that a lease needs."""
        if self._registered.row is None:
            await super()._note(batch)


@dataclass(slots=True)
class Stream:
    """One room, its node, and its readers."""

    replica: Conversation
    slot: str
    is_sealed: bool
    node: Membership
    readers: list[RemotePeer]

    @classmethod
    async def open(cls, hub: Hub, key: SigningKey, room: type[Room], *, is_sealed: bool) -> Stream:
        """Make a conversation with a slot, and begin its reply."""
        vars(hub_module)["Room"] = room
        birth = Birth(OWNER, secrets.token_bytes(NONCE_BYTES))
        conversation, at_ms = conversation_id(birth), time.time_ns() // 1_000_000
        slot = entry_id(at_ms, secrets.token_bytes(10))
        author = Conversation(_client_id())
        with author.writing() as writer:
            writer.give_birth(birth, SCHEMA_VERSION)
            writer.add(slot, Born(Role.ASSISTANT, OWNER, "bench", at_ms, 1))
        asking = await hub.join(conversation, OWNER, deliver=lambda _: None)
        await asking.submit(author.diff())
        node = await hub.join(conversation, "node", node=True, deliver=lambda _: None)
        epoch = await hub.grant_epoch(conversation, key.public)
        node.author = replace(node.author, epoch=epoch)
        replica = Conversation(_client_id(), seal_client_id=_client_id(), update=node.state)
        with replica.writing() as writer:
            message = lease_message(conversation, epoch, key.public)
            writer.add_lease(epoch, key.public, key.sign(message))
            writer.place(slot, Place(ROOT, epoch))
            writer.state(slot, State.STREAMING)
            writer.open_reply(slot)
        await node.submit(_written(writer))
        readers = []
        for _ in range(READERS):
            reader = RemotePeer(OWNER, lambda: None)
            await hub.enter(conversation, reader)
            await reader.receive(encode(SyncStep1(replica.state_vector())))
            await reader.receive(encode(SyncStep2(EMPTY_UPDATE)))
            readers.append(reader)
        stream = cls(replica, slot, is_sealed, node, readers)
        await asyncio.sleep(0.05)  # the readers' own turns
        await stream.run(WARM_TOKENS)
        return stream

    async def run(self, tokens: int) -> float:
        """Write tokens; the loop's CPU time for each, in us."""
        updates = []
        for _ in range(tokens):
            with self.replica.writing() as writer:
                writer.append_text(self.slot, "abcd")
                if self.is_sealed:
                    writer.append_sealed(self.slot, secrets.token_bytes(SEALED_BYTES))
            updates.append(_written(writer))
        delivered = 0
        start = time.thread_time()
        for update in updates:
            await self.node.submit(update)
            for reader in self.readers:
                while reader.take() is not None:
                    delivered += 1
        spent = time.thread_time() - start
        if delivered < tokens * READERS:
            raise RuntimeError("a reader did not get every token: this measures something else")
        return spent / tokens * 1e6


def _written(writer: Writer) -> bytes:
    if writer.change is None:
        raise RuntimeError("nothing was written")
    return writer.change.update


def _client_id() -> int:
    return secrets.randbelow(2**32 - 1) + 1


async def measure(folder: Path, rounds: int, tokens: int) -> dict[str, dict[str, float]]:
    """Run the rounds; by kind of token the best rounds in us and what of it are the checks."""
    key = SigningKey(secrets.token_bytes(32))
    log = await SqliteLog.open(folder / "log.db")
    register = await SqliteRegister.open(folder / "register.db")
    hub = Hub(log, register=register, relay_key=key.public)
    found = {}
    for kind, is_sealed in (("text and sealed ids", True), ("text alone", False)):
        checked = await Stream.open(hub, key, Room, is_sealed=is_sealed)
        unchecked = await Stream.open(hub, key, UncheckedRoom, is_sealed=is_sealed)
        vars(hub_module)["Room"] = Room
        on, off = [], []
        for _ in range(rounds):
            on.append(await checked.run(tokens))
            off.append(await unchecked.run(tokens))
        with_checks, without = min(on), min(off)
        found[kind] = {
            "with_checks_us": round(with_checks, 1),
            "without_us": round(without, 1),
            "checks_us": round(with_checks - without, 1),
            "share": round(1 - without / with_checks, 3),
        }
    await hub.close()
    await log.close()
    await register.close()
    return found


def main() -> int:
    """Measure, print, and say whether it is within the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(Path(folder), arguments.rounds, arguments.tokens))
    print(f"{'us of the loop a token,':<24}{'with':>9}{'without':>9}{'checks':>9}")
    for kind, one in found.items():
        spent = f"{one['with_checks_us']:>9}{one['without_us']:>9}{one['checks_us']:>9}"
        print(f"{kind:<24}{spent}  = {one['share']:.0%}")
    print(f"{'the bar':<51}    {BAR:.0%}")
    worst = max(found, key=lambda kind: found[kind]["share"])
    result = {"bench": "checks", "readers": READERS, "bar": BAR, "kind": worst, **found[worst]}
    print(json.dumps(result))
    return 0 if found[worst]["share"] <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
