"""Whatever a stock Yjs client does by the schema is taken: no check may cost it its document.

The clients are plain documents of the CRDT library that speak the y-websocket dialect as the npm
provider does: they answer Step1 with everything the server lacks, send what they write at once,
whether or not they are in sync, keep what they have when a connection drops, and come back from
their storage under a new client id.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycrdt import Doc, Map, UndoManager
from sync.device import AT_MS, BIRTH, CONVERSATION
from sync.rooms import Place, turns

from crdt_llm.document.schema import entry_id
from crdt_llm.sync.relay.plain_peer import RemotePeer
from crdt_llm.sync.wire.y_websocket import (
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
    decode_state_vector,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pycrdt import TransactionEvent

EMPTY = b"\x00\x00"


class StockClient:
    """A y-websocket provider and the document behind it."""

    def __init__(self, place: Place, random: Random, principal: str = "owner") -> None:
        self.place, self.random, self.principal = place, random, principal
        self.peer: RemotePeer | None = None
        self.synced = False
        self._open(EMPTY)

    def _open(self, stored: bytes) -> None:
        self.doc: Doc[Any] = Doc(client_id=self.random.randrange(1, 2**32))
        self.roots = {name: self.doc.get(name, type=Map) for name in ("meta", "access", "entries")}
        self.doc.apply_update(stored)
        self.undo = UndoManager(scopes=[self.roots["meta"]], capture_timeout_millis=0)
        self.unsent: list[bytes] = []
        self.unseen: list[str] = []  # entries that nobody else can have
        self.doc.observe(self._wrote)

    def _wrote(self, event: TransactionEvent) -> None:
        if self.peer is not None:  # what is written offline goes out with the next Step2
            self.unsent.append(bytes(event.update))

    # -- the provider ----------------------------------------------------------------------------

    async def connect(self, *, typing_first: Callable[[], None] | None = None) -> None:
        if self.peer is not None:
            return
        self.peer = RemotePeer(self.principal, lambda: None)
        await self.place.hub.enter(CONVERSATION, self.peer)
        if typing_first is not None:
            typing_first()
            await self._send_updates()
        await self.peer.receive(encode(SyncStep1(self.doc.get_state())))
        await self.settle()

    def drop(self) -> None:
        """The connection ends; what was on its way is lost."""
        if self.peer is not None:
            self.peer.leave()
        self.peer, self.synced = None, False
        self.unsent.clear()

    def reload(self) -> None:
        """The page is opened anew: the document comes from IndexedDB, the client id is fresh."""
        self.drop()
        self._open(self.doc.get_update())

    async def _send_updates(self) -> None:
        assert self.peer is not None
        unsent, self.unsent[:] = list(self.unsent), []
        if unsent:
            self.unseen.clear()
        for update in unsent:
            await self.peer.receive(encode(SyncUpdate(update)))

    async def settle(self) -> None:
        """Carry frames until nothing moves; the client answers what it is asked."""
        quiet = 0
        while self.peer is not None and quiet < 3:
            await self._send_updates()
            frame = self.peer.take()
            if frame is None:
                quiet += 1
                await turns(8)
                continue
            quiet = 0
            await self._take(frame)
        if self.peer is not None:
            assert self.peer.close_code is None, self.peer.close_reason

    async def _take(self, frame: bytes) -> None:
        assert self.peer is not None
        match decode(frame):
            case SyncStep1(state_vector):
                self.unseen.clear()
                self.unsent.clear()  # they are all in the answer
                await self.peer.receive(encode(SyncStep2(self.doc.get_update(state_vector))))
            case SyncStep2(update) | SyncUpdate(update):
                count = len(self.unsent)
                with self.doc.transaction(origin="provider"):  # not for its undo manager
                    self.doc.apply_update(update)
                del self.unsent[count:]  # the provider does not send back what it was sent
                self.synced = True

    # -- the application -------------------------------------------------------------------------

    def birth(self) -> None:
        with self.doc.transaction():
            self.roots["meta"]["schema"] = 1
            self.roots["meta"]["birth"] = BIRTH.plain()
        self.undo.clear()

    def entitle(self) -> None:
        self.roots["meta"]["title"] = f"title {self.random.randrange(1000)}"

    def untitle(self) -> None:
        if "title" in self.roots["meta"]:
            del self.roots["meta"]["title"]

    def ask(self) -> None:
        self.say(slot=True)

    def say(self, *, slot: bool = False) -> None:
        name = entry_id(AT_MS, self.random.randbytes(10))
        clocks = {key: entry["born"]["clock"] for key, entry in self.roots["entries"].items()}
        after = max(clocks, key=lambda key: (clocks[key], key), default="")
        born = {
            "role": "assistant" if slot else "user",
            "author": self.principal,
            "device": "web",
            "at": AT_MS,
            "clock": float(1 + max(clocks.values(), default=0)),
            "mode": "continue",
        }
        if after:
            born["after"] = after
        fields: dict[str, Any] = {"born": born}
        if not slot:
            fields["content"] = self.random.choice(["hello", "grüße 🦜", "x" * 300, ""])
        self.roots["entries"][name] = Map(fields)
        self.unseen.append(name)

    def think_again(self) -> None:
        """Delete an entry that never left this device."""
        if self.unseen and self.peer is None:
            # Nothing may have been written after it: the schema has no dangling `after`.
            name = self.unseen.pop()
            if not any(e["born"].get("after") == name for e in self.roots["entries"].values()):
                del self.roots["entries"][name]

    def undo_title(self) -> None:
        """Undo, as an application offers it for titles."""
        self.undo.undo()

    def redo_title(self) -> None:
        self.undo.redo()

    def stop(self) -> None:
        slots = [e for e in self.roots["entries"].values() if e["born"]["role"] == "assistant"]
        if slots:
            self.random.choice(slots)["stop"] = self.principal

    def withdraw(self) -> None:
        own = [e for e in self.roots["entries"].values() if e["born"]["author"] == self.principal]
        if own:
            entry = self.random.choice(own)
            with self.doc.transaction():
                entry["redacted"] = {"by": self.principal, "at": float(AT_MS)}
                if "content" in entry:
                    del entry["content"]

    def grant(self) -> None:
        if self.principal == "owner":
            self.roots["access"]["will"] = "writer"


OFFLINE = ("entitle", "untitle", "say", "ask", "stop", "withdraw", "think_again")
UNDO = ("undo_title", "redo_title")


async def take_step(place: Place, clients: list[StockClient], number: int, step: str) -> None:
    client = clients[number]
    is_born = "birth" in client.roots["meta"]
    if step == "connect":
        await client.connect()
    elif step == "typing first":
        await client.connect(typing_first=client.entitle if is_born else None)
    elif step == "restart":
        for one in clients:
            one.drop()
        await place.hub.close()
        place.open_hub(client.random.randrange(1000))
    elif step in ("drop", "reload") or is_born:
        getattr(client, step)()


async def run(seed: int, steps: list[tuple[int, str]]) -> None:
    random, place = Random(seed), Place()
    clients = [StockClient(place, random, name) for name in ("owner", "owner", "will")]
    clients[0].birth()
    clients[0].grant()
    await clients[0].connect()
    for number, step in steps:
        await take_step(place, clients, number, step)
        for one in clients:
            await one.settle()
    for one in (*clients, *clients):
        await one.connect()
        await one.settle()
    states = [decode_state_vector(one.doc.get_state()) for one in clients]
    assert states[1:] == states[:-1]
    assert len({frozenset(one.roots["entries"]) for one in clients}) == 1


STEPS = ("connect", "drop", "reload", "restart", "typing first", *OFFLINE, *UNDO)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(STEPS)), max_size=25),
)
async def test_no_stock_client_is_refused(seed: int, steps: list[tuple[int, str]]) -> None:
    await run(seed, steps)


async def test_two_thousand_entries_written_offline_are_taken_at_once() -> None:
    random, place = Random(3), Place()
    owner = StockClient(place, random)
    owner.birth()
    last = ""
    for clock in range(1, 2001):
        name = entry_id(AT_MS + clock, random.randbytes(10))
        born = {"role": "user", "author": "owner", "device": "web", "at": AT_MS}
        born |= {"clock": float(clock), "mode": "continue", **({"after": last} if last else {})}
        owner.roots["entries"][name] = Map({"born": born, "content": f"entry {clock}"})
        last = name
    await owner.connect()
    await owner.settle()
    reader = StockClient(place, random)
    await reader.connect()
    assert len(reader.roots["entries"]) == 2000
    owner.reload()
    owner.entitle()
    await owner.connect()
    await owner.settle()
    await reader.settle()
    assert reader.roots["meta"]["title"] == owner.roots["meta"]["title"]


async def test_a_client_that_repeats_itself_is_no_offender() -> None:
    random, place = Random(3), Place()
    owner = StockClient(place, random)
    owner.birth()
    owner.say()
    owner.withdraw()
    await owner.connect()
    assert owner.peer is not None
    before = place.durable
    for _ in range(3):
        await owner.peer.receive(encode(SyncStep2(owner.doc.get_update())))
        await owner.settle()
    assert place.durable == before


async def test_a_client_that_says_something_else_is_told_to_give_up() -> None:
    """Two documents under one client id, as a copied storage makes them."""
    random, place = Random(3), Place()
    owner = StockClient(place, random)
    owner.birth()
    await owner.connect()
    stored = owner.doc.get_update()
    owner.entitle()
    await owner.settle()
    twin: Doc[Any] = Doc(client_id=owner.doc.client_id)
    meta = twin.get("meta", type=Map)
    twin.apply_update(stored)
    meta["title"] = "another title under the same clock"
    peer = RemotePeer("owner", lambda: None)
    await place.hub.enter(CONVERSATION, peer)
    await peer.receive(encode(SyncStep2(twin.get_update())))
    await turns()
    while peer.take() is not None:
        pass
    assert peer.close_code == 4422
    assert peer.close_reason.startswith("rewrite:")
