"""How soon a relay passes on what a node writes, and what it loses when it is killed.

R rooms, each with one writer and four readers. The writer sits where a node sits, in a room of the
server's process, and writes as a node does: a token of four characters is due every 20 ms, and what
is due while the last write is on its way to the disk goes out with the next one. The readers are
plain y-websocket connections from another process. Latency counts from the moment a token was *due*
until a reader has its bytes, so a server that falls behind cannot hide it by writing less. Each
update is checked and durable (WAL, ``synchronous=FULL``) before anybody hears of it.

At the end the server is killed with SIGKILL in mid-stream and its log is read again: every token
that any reader had must be there.

The limit: a token waits for the commit that is under way and then for its own, so p50 is about one
and a half times what ``fdatasync`` takes on this disk, which is measured first; beyond some 50
rooms it is the server's one event loop. Under 100 % of CPU latency is the disk's, above it queues
grow. A client that needs the whole of its CPU measures itself.

    python bench/relay.py [--rooms 10 50 100] [--seconds 4]

The last line is the result as JSON; the exit code is 0 only if there was something to lose and
nothing of it was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import secrets
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from crdt_llm.cli.serve import SWITCH_INTERVAL_S
from crdt_llm.document.chain import lease_message
from crdt_llm.document.conversation import EMPTY_STATE_VECTOR, EMPTY_UPDATE, Conversation
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
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay.access import TokenAccess
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.server import Relay
from crdt_llm.sync.wire.y_websocket import FRAME_BYTES_MAX, SyncStep1, SyncStep2, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crdt_llm.store.sqlite import Seam
    from crdt_llm.sync.relay.hub import Membership

READERS = 4
TOKEN_S = 0.020
WARM_TOKENS = 50
KILL_AFTER_S = 0.7  # into a stream of its own; every room has written then
START_AFTER_S = 0.1  # from the order to write to the first token: the order has arrived by then
STEP_S_MAX = 120  # whatever takes longer hangs
JOINING_AT_ONCE = 32  # handshakes at a time: the listening socket's queue is short
BAR_P99_MS = 15.0
OWNER = "owner"
ACCESS_TOKEN = "bench"  # noqa: S105 - of a server that lives for seconds
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"


def token(number: int) -> bytes:
    """The text of the token with this number in its room: four characters, each time others."""
    return f"~{DIGITS[number >> 12]}{DIGITS[number >> 6 & 63]}{DIGITS[number & 63]}".encode()


def due(start: float, room: int, rooms: int, number: int) -> float:
    """When a token is due; rooms are spread evenly over the interval between two tokens."""
    return start + (number + room / rooms) * TOKEN_S


# --- the server's process ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Order:
    """What the server is told to write: tokens ``first`` to ``last - 1`` in every room.

    Token ``n`` is due at :func:`due` of ``start``, as of the monotonic clock of the machine.
    """

    first: int
    last: int
    start: float


class Writer:
    """A node's part in one room: the slot it streams into, and the replica it writes on."""

    def __init__(self, membership: Membership, slot: str) -> None:
        self._membership = membership
        self._slot = slot
        self._replica = Conversation(
            _client_id(), seal_client_id=_client_id(), update=membership.state
        )

    @classmethod
    async def begin(cls, hub: Hub, key: SigningKey) -> tuple[str, Self]:
        """Make a conversation with one slot, admit the slot, and open its reply."""
        birth = Birth(OWNER, secrets.token_bytes(NONCE_BYTES))
        conversation, at_ms = conversation_id(birth), time.time_ns() // 1_000_000
        slot = entry_id(at_ms, secrets.token_bytes(10))
        author = Conversation(_client_id())
        with author.writing() as writer:
            writer.give_birth(birth, SCHEMA_VERSION)
            writer.add(slot, Born(Role.ASSISTANT, OWNER, "bench", at_ms, 1))
        asking = await hub.join(conversation, OWNER, deliver=_ignore)
        await asking.submit(author.diff())
        asking.leave()
        node = cls(await hub.join(conversation, "node", node=True, deliver=_ignore), slot)
        lease = key.sign(lease_message(conversation, 1, key.public))
        with node._replica.writing() as writer:
            writer.add_lease(1, key.public, lease)
            writer.place(slot, Place(ROOT, 1))
            writer.state(slot, State.STREAMING)
            writer.open_reply(slot)
        await node._submit(writer.change)
        return conversation, node

    async def stream(self, order: Order, room: int, rooms: int) -> None:
        """Write each token as soon as it is due, or with those that are when the disk is free."""
        number = order.first
        start = due(order.start, room, rooms, -order.first)
        while number < order.last:
            await asyncio.sleep(start + number * TOKEN_S - time.monotonic())
            following = int((time.monotonic() - start) / TOKEN_S) + 1
            following = min(max(following, number + 1), order.last)
            text = b"".join(token(n) for n in range(number, following)).decode()
            with self._replica.writing() as writer:
                writer.append_text(self._slot, text)
            number = following
            await self._submit(writer.change)

    async def _submit(self, change: Any) -> None:
        await self._membership.submit(change.update)


def _ignore(_update: bytes) -> None:
    """Nobody else writes in the bench's rooms."""


def _client_id() -> int:
    return secrets.randbelow(2**32 - 1) + 1


async def serve(folder: Path, rooms: int) -> None:
    """Serve as ``crdt-llm serve`` does, with writers in the node's place. Orders come by stdin."""
    commits = 0

    def count(seam: Seam) -> None:
        nonlocal commits
        commits += seam == "after-commit"

    key = SigningKey(secrets.token_bytes(32))
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    async with await SqliteLog.open(folder / "log.db", faults=count) as log:
        hub = Hub(log)
        async with Relay(hub, authenticate=TokenAccess(ACCESS_TOKEN).authenticate) as relay:
            writers = dict([await Writer.begin(hub, key) for _ in range(rooms)])
            await relay.start()
            _say({"port": relay.address[1], "conversations": list(writers)})
            while line := await orders.readline():
                order = Order(**json.loads(line))
                cpu_s, before = time.process_time(), commits
                async with asyncio.TaskGroup() as group:
                    for room, writer in enumerate(writers.values()):
                        group.create_task(writer.stream(order, room, rooms))
                _say({"cpu_s": time.process_time() - cpu_s, "commits": commits - before})


def _say(fact: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fact) + "\n")
    sys.stdout.flush()


# --- the clients' process ----------------------------------------------------------------------


class Server:
    """The server's process, as its clients see it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, folder: Path, rooms: int) -> Self:
        """Start it."""
        command = [sys.executable, __file__, "--serve", str(folder), "--rooms", str(rooms)]
        return cls(
            await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
        )

    def order(self, order: Order) -> None:
        """Have it write; it says a fact when it is done."""
        if self._process.stdin is None:
            raise RuntimeError("the server was started without a pipe for its orders")
        fields = {"first": order.first, "last": order.last, "start": order.start}
        self._process.stdin.write(json.dumps(fields).encode() + b"\n")

    async def fact(self) -> dict[str, Any]:
        """What it says next."""
        if self._process.stdout is None:
            raise RuntimeError("the server was started without a pipe for its facts")
        async with asyncio.timeout(STEP_S_MAX):
            line = await self._process.stdout.readline()
        if not line:
            raise SystemExit("the server ended: see above")
        fact: dict[str, Any] = json.loads(line)
        return fact

    async def kill(self) -> None:
        """SIGKILL."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


@dataclass(slots=True)
class Reader:
    """One connection: how many tokens it has, in order, and when each came."""

    room: int
    arrivals: list[float] = field(default_factory=list)
    synced: asyncio.Event = field(default_factory=asyncio.Event)
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, url: str) -> None:
        """Follow the room until the connection ends."""
        with suppress(ConnectionClosed):
            async with connect(
                url, compression=None, max_queue=None, max_size=FRAME_BYTES_MAX
            ) as socket:
                await socket.send(encode(SyncStep1(EMPTY_STATE_VECTOR)))
                await socket.send(encode(SyncStep2(EMPTY_UPDATE)))
                async for frame in socket:
                    if isinstance(frame, bytes):
                        self._take(frame)

    def _take(self, frame: bytes) -> None:
        """A frame with updates holds the text of the tokens as it is, one after the other."""
        now = time.monotonic()
        if frame[:2] == b"\x00\x01":  # sync, Step2: this connection is live
            self.synced.set()
        at = 0
        while (at := frame.find(token(len(self.arrivals)), at)) >= 0:
            self.arrivals.append(now)
            at += 4
        self.progress.set()

    async def until(self, tokens: int) -> None:
        """Wait until it has so many tokens."""
        while len(self.arrivals) < tokens:
            self.progress.clear()
            await self.progress.wait()


async def join(url: str, conversations: Sequence[str], group: asyncio.TaskGroup) -> list[Reader]:
    """Connect all readers and bring them up to date."""
    readers = [Reader(room) for room in range(len(conversations)) for _ in range(READERS)]
    for first in range(0, len(readers), JOINING_AT_ONCE):
        joining = readers[first : first + JOINING_AT_ONCE]
        for reader in joining:
            group.create_task(
                reader.run(f"{url}/{conversations[reader.room]}?token={ACCESS_TOKEN}")
            )
        for reader in joining:
            await reader.synced.wait()
    return readers


@dataclass(frozen=True, slots=True)
class Result:
    """What a run with a number of rooms measured. Latencies are ms, CPU is shares of one core."""

    rooms: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    deliveries_per_s: float
    commits_per_s: float
    server_cpu: float
    client_cpu: float
    broadcast: int
    lost: int

    def row(self) -> str:
        """A line of the table."""
        return (
            f"{self.rooms:5} {self.p50_ms:8.1f} {self.p99_ms:8.1f} {self.max_ms:8.1f}"
            f" {self.deliveries_per_s:13,.0f} {self.commits_per_s:10.0f}"
            f" {self.server_cpu:10.0%} {self.client_cpu:10.0%}"
            f" {self.broadcast:10,} {self.lost:5}"
        )


HEADER = (
    f"{'rooms':>5} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8} {'deliveries/s':>13}"
    f" {'commits/s':>10} {'server CPU':>10} {'client CPU':>10} {'broadcast':>10} {'lost':>5}"
)


async def measure(rooms: int, seconds: float, folder: Path) -> Result:
    """One run, with a server of its own."""
    server = await Server.start(folder, rooms)
    try:
        facts = await server.fact()
        conversations: list[str] = facts["conversations"]
        async with asyncio.TaskGroup() as group:
            async with asyncio.timeout(STEP_S_MAX):
                readers = await join(f"ws://127.0.0.1:{facts['port']}", conversations, group)
            await _write(server, readers, 0, WARM_TOKENS)
            first, last = WARM_TOKENS, WARM_TOKENS + round(seconds / TOKEN_S)
            client_cpu_s = time.process_time()
            start, facts = await _write(server, readers, first, last)
            client_cpu_s = time.process_time() - client_cpu_s
            latencies = sorted(
                1000 * (reader.arrivals[n] - due(start, reader.room, rooms, n - first))
                for reader in readers
                for n in range(first, last)
            )
            busy_s = time.monotonic() - start
            # A stream that nobody sees the end of.
            server.order(Order(last, len(DIGITS) ** 3, time.monotonic()))
            await asyncio.sleep(KILL_AFTER_S)
            await server.kill()
        broadcast, lost = await count_lost(folder, conversations, readers, last)
    finally:
        await server.kill()
    return Result(
        rooms=rooms,
        p50_ms=statistics.median(latencies),
        p99_ms=latencies[int(0.99 * len(latencies))],
        max_ms=latencies[-1],
        deliveries_per_s=len(latencies) / busy_s,
        commits_per_s=facts["commits"] / busy_s,
        server_cpu=facts["cpu_s"] / busy_s,
        client_cpu=client_cpu_s / busy_s,
        broadcast=broadcast,
        lost=lost,
    )


async def _write(
    server: Server, readers: Sequence[Reader], first: int, last: int
) -> tuple[float, dict[str, Any]]:
    """Have tokens written, and wait until every reader has them."""
    start = time.monotonic() + START_AFTER_S
    server.order(Order(first, last, start))
    facts = await server.fact()
    async with asyncio.timeout(STEP_S_MAX):
        for reader in readers:
            await reader.until(last)
    return start, facts


async def count_lost(
    folder: Path, conversations: Sequence[str], readers: Sequence[Reader], first: int
) -> tuple[int, int]:
    """How many tokens from ``first`` on some reader had; how many of all it had the log lacks."""
    broadcast = lost = 0
    async with await SqliteLog.open(folder / "log.db") as log:
        for room, name in enumerate(conversations):
            loaded = await log.load(name)
            replica = Conversation(_client_id(), update=loaded.snapshot or EMPTY_UPDATE)
            for _, update in loaded.updates:
                replica.apply(update)
            (slot,) = replica.tree.entries
            text = replica.text(slot).encode()
            seen = max(len(reader.arrivals) for reader in readers if reader.room == room)
            broadcast += seen - first
            lost += sum(token(n) != text[4 * n : 4 * n + 4] for n in range(seen))
    return broadcast, lost


def sync_ms(folder: Path) -> float:
    """What ``fdatasync`` of two pages takes on the disk of a folder; the median, in ms."""
    times_ms: list[float] = []
    file = os.open(folder / "sync", os.O_CREAT | os.O_WRONLY)
    try:
        os.pwrite(file, bytes(1 << 20), 0)
        os.fsync(file)
        for index in range(100):
            os.pwrite(file, secrets.token_bytes(8192), index * 8192)
            before = time.perf_counter()
            os.fdatasync(file)
            times_ms.append(1000 * (time.perf_counter() - before))
    finally:
        os.close(file)
    return statistics.median(times_ms)


def _allow_sockets() -> None:
    """Take the file handles that one relay and its readers need."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> int:
    """Measure, print the table and the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rooms", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    _allow_sockets()
    if options.serve is not None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        asyncio.run(serve(options.serve, options.rooms[0]))
        return 0
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="crdt-llm-relay-") as path:
        disk_ms = sync_ms(Path(path))
        print(
            f"{READERS} readers a room, a token every {1000 * TOKEN_S:.0f} ms;"
            f" fdatasync here: {disk_ms:.1f} ms\n{HEADER}",
            flush=True,
        )
        for rooms in options.rooms:
            folder = Path(path) / str(rooms)
            folder.mkdir()
            results.append(asyncio.run(measure(rooms, options.seconds, folder)))
            print(results[-1].row(), flush=True)
    for result in results:
        if result.p99_ms > BAR_P99_MS:
            print(f"above the bar of {BAR_P99_MS:.0f} ms at p99: {result.rooms} rooms")
    runs = [
        {name: round(getattr(result, name), 3) for name in Result.__dataclass_fields__}
        for result in results
    ]
    print(json.dumps({"bench": "relay", "fdatasync_ms": round(disk_ms, 3), "runs": runs}))
    return 1 if any(result.lost or not result.broadcast for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
