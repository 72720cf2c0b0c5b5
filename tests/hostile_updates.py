"""Updates that a room must not take, generated without end; each kind breaks one rule.

What is generated is well-formed up to the one thing that is wrong with it, so that it gets as far
as the check which is meant for it; the kinds ``random bytes`` and ``changed bytes`` are not even
that. Everything follows from a seed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sync.device import AT_MS, CONVERSATION
from sync.leased_node import LeasedNode, ask
from sync.rooms import Place, born
from sync.update_writer import Pen, any_bytes

from crdt_llm.document.schema import Grant, entry_id
from crdt_llm.errors import Gap, MalformedMessage, Refused
from crdt_llm.sync.update.structure import (
    Format,
    Id,
    Kind,
    SharedType,
    Subdocument,
    TypeRef,
    read_update,
)
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from sync.rooms import Member

    Make = Callable[["World", Random], tuple["Member", bytes]]

SALT, DIGEST, SIGNATURE, KEY = b"-" * 16, b"d" * 32, b"s" * 64, b"k" * 32


@dataclass
class World:
    """A conversation with everybody in it: an answered turn, and a reply that streams."""

    place: Place
    owner: Member
    will: Member
    rita: Member
    node: LeasedNode  # holds the lease
    fenced: LeasedNode  # held it before
    idle: LeasedNode  # never held it
    question: str
    done: str
    streaming: str
    known: dict[int, int] = field(default_factory=dict)
    ids: dict[tuple[str, str], Id] = field(default_factory=dict)  # (entry, field) -> its struct
    entries: dict[str, Id] = field(default_factory=dict)
    roots: dict[tuple[str, str], Id] = field(default_factory=dict)
    last_letter: Id = field(default_factory=lambda: Id(0, 0))
    last_chunk: Id = field(default_factory=lambda: Id(0, 0))
    blobs: tuple[bytes, ...] = ()
    document: bytes = b""

    @property
    def room(self) -> Any:
        return self.place.hub._rooms[CONVERSATION]

    def learn(self) -> None:
        """Read the ids of everything there is, as anyone who takes part can."""
        self.document = bytes(self.room.diff())
        self.known = decode_state_vector(self.room.state_vector())
        owners: dict[Id, str] = {}
        fields: dict[Id, tuple[str, str]] = {}
        structs = [item for items in read_update(self.document).structs.values() for item in items]
        for item in structs:
            where = Id(item.client, item.clock)
            if item.parent == "entries" and item.parent_sub is not None:
                self.entries[item.parent_sub] = where
                owners[where] = item.parent_sub
            elif isinstance(item.parent, str) and item.parent_sub is not None:
                self.roots[item.parent, item.parent_sub] = where
        for item in structs:
            if isinstance(item.parent, Id) and item.parent in owners and item.parent_sub:
                name = (owners[item.parent], item.parent_sub)
                self.ids[name] = Id(item.client, item.clock)
                fields[Id(item.client, item.clock)] = name
        text, chunks = self.ids[self.streaming, "content"], self.ids[self.streaming, "sealed"]
        for item in structs:
            if item.kind is Kind.STRING and item.parent in (text, None):
                self.last_letter = Id(item.client, item.end - 1)
            elif item.kind in (Kind.BINARY, Kind.ANY) and item.parent in (chunks, None):
                self.last_chunk = Id(item.client, item.end - 1)
        entry = self.node.replica.entry(self.streaming)
        done = self.node.replica.entry(self.done)
        assert entry is not None
        assert done is not None
        self.blobs = (*entry.sealed, *done.sealed)


async def a_world(seed: int = 0) -> World:
    place = Place(leased=True)
    owner, device = await born(place)
    for name, grant in (("will", Grant.WRITER), ("rita", Grant.READER)):
        await owner.membership.submit(device.grant(name, grant))
    await owner.membership.submit(device.entitle("a title"))
    question, done = await ask(device, owner)
    fenced = await LeasedNode.sit(place, seed)
    await fenced.admit(question)
    await fenced.start(done)
    for words in ("Be", "cause."):
        await fenced.say(done, words)
    await fenced.finish(done)
    for update in owner.heard:
        device.merge(update)
    asked, streaming = await ask(device, owner, "and then?")
    await fenced.admit(asked)
    await fenced.start(streaming)
    await fenced.say(streaming, "Then ")
    node = await LeasedNode.sit(place, seed + 1)
    node.member.heard.clear()
    idle = LeasedNode(await place.join("node", node=True), seed + 2)
    will, rita = await place.join("will"), await place.join("rita")
    world = World(place, owner, will, rita, node, fenced, idle, question, done, streaming)
    world.learn()
    return world


# -- what goes into them ------------------------------------------------------------------------


def fresh(rng: Random) -> Pen:
    return Pen(rng.randrange(1, 2**32))


def ulid(rng: Random) -> str:
    return entry_id(AT_MS + rng.randrange(1000), rng.randbytes(10))


def a_born(rng: Random, author: str, role: str = "user", **more: Any) -> dict[str, Any]:
    plain = {"role": role, "author": author, "device": "d", "at": AT_MS, "mode": "continue"}
    return plain | {"clock": rng.randrange(20, 900)} | more


def entry(pen: Pen, rng: Random, author: str, *, said: Any = "text", **more: Any) -> Id:
    made = pen.type(TypeRef.MAP, "entries", ulid(rng))
    role = "assistant" if said is None else "user"
    pen.value(made, "born", a_born(rng, author, **{"role": role, **more}))
    if said is not None:
        pen.value(made, "content", said)
    return made


def plain(rng: Random, depth: int = 0) -> Any:
    """Any plain value."""
    choice = rng.randrange(9 if depth < 3 else 6)
    values: tuple[Any, ...] = (
        None,
        rng.random() < 0.5,
        rng.randrange(-(2**40), 2**40),
        rng.random(),
        "".join(rng.choices("aé🦜\0 \u202e", k=rng.randrange(9))),
        rng.randbytes(rng.randrange(80)),
    )
    if choice < len(values):
        return values[choice]
    if choice == 6:
        return [plain(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {f"k{n}": plain(rng, depth + 1) for n in range(rng.randrange(4))}


def node_value(rng: Random, key: str) -> Any:
    """What a node would write there."""
    proof = {"content": DIGEST, "digest": rng.randbytes(32), "signature": rng.randbytes(64)}
    return {
        "place": {"parent": "", "epoch": rng.randrange(3)},
        "state": rng.choice(["streaming", "done", "stopped", "failed", "superseded"]),
        "calls": [plain(rng)],
        "reads": [ulid(rng)],
        "usage": {"prompt": rng.randrange(100)},
        "salt": rng.randbytes(16),
        "proof": proof,
        "sealed": [rng.randbytes(9)],
    }[key]


NODE_KEYS: Final = ("place", "state", "calls", "reads", "usage", "salt", "proof", "sealed")
KINDS: Final[dict[str, Make]] = {}


def kind(name: str) -> Callable[[Make], Make]:
    def remember(make: Make) -> Make:
        KINDS[name] = make
        return make

    return remember


def person(world: World, rng: Random) -> tuple[Member, str]:
    return rng.choice([(world.will, "will"), (world.owner, "owner")])


# -- the kinds ----------------------------------------------------------------------------------


@kind("a forged author")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, name = person(world, rng)
    pen = fresh(rng)
    others = [one for one in ("owner", "will", "rita", "node", "nobody", "") if one != name]
    said = rng.choice(["text", None])
    entry(pen, rng, rng.choice(others), said=said)
    return who, pen.update()


@kind("a forged node field")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, name = person(world, rng)
    pen, key = fresh(rng), rng.choice(NODE_KEYS)
    if rng.random() < 0.5:
        target = world.entries[rng.choice([world.question, world.done, world.streaming])]
        origin = world.ids.get((world.streaming, key))
        if origin is not None and target == world.entries[world.streaming]:
            pen.put(Kind.ANY, (node_value(rng, key),), origin=origin)
            return who, pen.update()
    else:
        target = entry(pen, rng, name, said=rng.choice(["text", None]))
    if key == "sealed" or rng.random() < 0.1:
        pen.type(rng.choice([TypeRef.ARRAY, TypeRef.TEXT]), target, rng.choice(["sealed", "calls"]))
    else:
        pen.value(target, key, node_value(rng, key))
    return who, pen.update()


@kind("words in a reply")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, name = person(world, rng)
    pen = fresh(rng)
    if rng.random() < 0.7:
        pen.put(Kind.STRING, rng.choice(["!", "hate", "🦜"]), origin=world.last_letter)
    elif rng.random() < 0.5:
        pen.put(Kind.BINARY, rng.choice(world.blobs), origin=world.last_chunk)
    else:
        text = pen.type(TypeRef.TEXT, entry(pen, rng, name, said=None), "content")
        pen.put(Kind.STRING, "I, the model", parent=text)
    return who, pen.update()


@kind("an edit of an admitted entry")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, name = person(world, rng)
    target = rng.choice([world.question, world.done])
    key = rng.choice([key for one, key in world.ids if one == target and key != "sealed"])
    where = world.ids[target, key]
    pen = fresh(rng)
    choice = rng.randrange(3)
    if choice == 0:
        pen.put(Kind.ANY, (rng.choice(["better", plain(rng), a_born(rng, name)]),), origin=where)
        return who, pen.update()
    if choice == 1:  # deleted
        return who, pen.update({where.client: [range(where.clock, where.clock + 1)]})
    pen.put(Kind.DELETED, origin=where)
    return who, pen.update({where.client: [range(where.clock, where.clock + 1)]})


@kind("an entry deleted or replaced")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, name = person(world, rng)
    where = world.entries[rng.choice([world.question, world.done, world.streaming])]
    pen = fresh(rng)
    if rng.random() < 0.5:
        return who, pen.update(
            {where.client: [range(where.clock, where.clock + rng.choice([1, 2]))]}
        )
    made = pen.put(Kind.TYPE, SharedType(TypeRef.MAP, None), origin=where)
    pen.value(made, "born", a_born(rng, name))
    pen.value(made, "content", "instead")
    return who, pen.update()


@kind("a withdrawal by somebody else")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    pen = fresh(rng)
    target = rng.choice([world.question, world.done])
    by = rng.choice(["will", "owner", "node"])
    pen.value(world.entries[target], "redacted", {"by": by, "at": AT_MS})
    where = world.ids[target, "content"]
    return world.will, pen.update({where.client: [range(where.clock, where.clock + 1)]})


def _by_node(node: LeasedNode, rng: Random, world: World) -> Pen:
    client = node.replica.client_id
    return Pen(client, world.known.get(client, 0)) if rng.random() < 0.7 else fresh(rng)


@kind("a stale epoch")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    node = rng.choice([world.fenced, world.idle])
    pen = _by_node(node, rng, world)
    choice = rng.randrange(4)
    if choice == 0:
        pen.put(Kind.STRING, "and on", origin=world.last_letter)
    elif choice == 1:
        pen.put(Kind.BINARY, rng.choice(world.blobs), origin=world.last_chunk)
    elif choice == 2:
        pen.value("leases", str(rng.randrange(1, 9)), {"node": KEY, "signature": SIGNATURE})
    else:
        entry(pen, rng, "node")
    return node.member, pen.update()


@kind("a late proof of a fenced node")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    pen = _by_node(world.fenced, rng, world)
    slot = world.entries[world.streaming]
    pen.put(Kind.ANY, ("done",), origin=world.ids[world.streaming, "state"])
    for key in rng.sample(["usage", "salt", "proof"], rng.randrange(1, 4)):
        pen.value(slot, key, node_value(rng, key))
    return world.fenced.member, pen.update()


@kind("a seal that was moved")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    """Out of its reply, into another one, or out of another conversation; by whoever may not."""
    who = rng.choice([world.will, world.owner, world.rita, world.fenced.member, world.idle.member])
    pen = fresh(rng)
    blob = rng.choice([*world.blobs, rng.randbytes(120)])
    if rng.random() < 0.5:
        pen.put(Kind.BINARY, blob, origin=world.last_chunk)
    else:
        chunks = world.ids[world.done, "sealed"]
        pen.put(Kind.BINARY, blob, parent=chunks)
    return who, pen.update()


@kind("a reader's writes")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    pen = fresh(rng)
    choice = rng.randrange(5)
    if choice == 0:
        entry(pen, rng, "rita", said=rng.choice(["text", None]))
    elif choice == 1:
        pen.put(Kind.ANY, ("mine",), origin=world.roots["meta", "title"])
    elif choice == 2:
        pen.value(world.entries[world.streaming], "stop", "rita")
    elif choice == 3:
        pen.put(Kind.ANY, ("owner",), origin=world.roots["access", "rita"])
    else:
        where = world.roots["meta", "title"]
        return world.rita, pen.update({where.client: [range(where.clock, where.clock + 1)]})
    return world.rita, pen.update()


@kind("rights that are not one's to give")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    pen = fresh(rng)
    choice = rng.randrange(4)
    if choice == 0:
        pen.value("access", rng.choice(["stan", "owner"]), rng.choice(["owner", "writer"]))
    elif choice == 1:
        pen.put(Kind.ANY, ("owner",), origin=world.roots["access", "will"])
    elif choice == 2:
        where = world.roots["access", "rita"]
        return world.will, pen.update({where.client: [range(where.clock, where.clock + 1)]})
    else:
        pen.value("access", "owner", rng.choice(["reader", "king", 7, None]))
        return world.owner, pen.update()
    return world.will, pen.update()


@kind("another birth")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, _ = person(world, rng)
    pen, key = fresh(rng), rng.choice(["birth", "schema"])
    where = world.roots["meta", key]
    if rng.random() < 0.5:
        value = rng.choice([{"owner": "will", "nonce": rng.randbytes(16)}, 2, plain(rng), None])
        pen.put(Kind.ANY, (value if key == "birth" or value != 1 else 2,), origin=where)
        return who, pen.update()
    return who, pen.update({where.client: [range(where.clock, where.clock + 1)]})


@kind("a value that loses")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    """Beside a later value of the same key: no reader ever sees it."""
    pen = Pen(rng.randrange(1, 1000))  # the smaller client id loses
    choice = rng.randrange(4)
    if choice == 0:
        pen.value("leases", "1", {"node": rng.randbytes(32), "signature": rng.randbytes(64)})
    elif choice == 1:
        pen.value("access", rng.choice(["will", "rita"]), "owner")
    elif choice == 2:
        target = rng.choice([world.question, world.done])
        pen.value(world.entries[target], "born", a_born(rng, "will"))
    else:
        made = pen.type(TypeRef.MAP, "entries", rng.choice([world.question, world.streaming]))
        pen.value(made, "born", a_born(rng, "will"))
        pen.value(made, "content", "instead")
    return world.will, pen.update()


@kind("a lease by a client")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, _ = person(world, rng)
    pen = fresh(rng)
    lease = {"node": rng.randbytes(32), "signature": rng.randbytes(64)}
    pen.value("leases", str(rng.randrange(10)), lease)
    return who, pen.update()


@kind("a malformed entry")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, name = person(world, rng)
    pen = fresh(rng)
    wrong: dict[str, Any] = rng.choice(
        [
            {"role": "poet"},
            {"role": "tool"},
            {"clock": 0},
            {"clock": rng.choice([1.5, True, "8", 2**53, None])},
            {"at": -1},
            {"device": 7},
            {"mode": "branch"},
            {"after": "main"},
            {"after": world.done, "clock": 1},
            {"covers": "all"},
            {"params": {"seed": 1}},
            {"call": "x"},
            {"colour": "red"},
        ]
    )
    entry(pen, rng, name, **wrong)
    return who, pen.update()


@kind("a clock that leaps")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, name = person(world, rng)
    pen = fresh(rng)
    entry(pen, rng, name, clock=rng.randrange(5_000, 2**53 - 1))
    return who, pen.update()


@kind("a gap")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, name = person(world, rng)
    choice = rng.randrange(4)
    pen = fresh(rng)
    nowhere = Id(rng.randrange(1, 2**32), rng.randrange(50))
    if choice == 0:
        pen.clock = rng.randrange(1, 2**20)
        entry(pen, rng, name)
    elif choice == 1:
        pen.put(Kind.ANY, ("x",), origin=nowhere)
    elif choice == 2:
        pen.value(nowhere, "stop", name)
    else:
        entry(pen, rng, name, after=ulid(rng))
    return who, pen.update()


@kind("clocks to come of somebody else")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, name = person(world, rng)
    own = "person " + name
    clients = world.room._registered.clients
    victims = [one for one in world.known if clients[one] != own]
    client = rng.choice(victims)
    pen = Pen(client, world.known[client] + rng.choice([0, 0, 1, 7, 2**20]))
    entry(pen, rng, name)
    return who, pen.update()


@kind("deletions of what is not there yet")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, _ = person(world, rng)
    client = rng.choice([*world.known, rng.randrange(1, 2**32)])
    start = world.known.get(client, 0) + rng.randrange(5)
    pen = fresh(rng)
    if rng.random() < 0.5:
        pen.put(Kind.ANY, ("t",), origin=world.roots["meta", "title"])
    return who, pen.update({client: [range(start, start + rng.randrange(1, 10**6))]})


@kind("another value for a known clock")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    client = rng.choice([one for one, end in world.known.items() if end > 1])
    pen = Pen(client, rng.randrange(world.known[client]))
    who = rng.choice([world.will, world.owner, world.rita])
    pen.value("meta", "title", f"rewritten {rng.random()}")
    return who, pen.update()


@kind("deep nesting")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, _ = person(world, rng)
    depth = rng.choice([17, 18, 40, 300, 2_000, 20_000])
    opening = rng.choice([bytes([117, 1]), bytes([118, 1, 1, 97])])
    pen = fresh(rng)
    pen.value("meta", "title", "@@@")
    value = opening * depth + bytes([126])
    return who, pen.update().replace(any_bytes("@@@"), value)


@kind("giant values")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, name = person(world, rng)
    pen = fresh(rng)
    choice = rng.randrange(40)
    if choice == 0:
        entry(pen, rng, name, said="x" * ((1 << 20) + 1 + rng.randrange(9)))
    elif choice < 14:
        pen.put(Kind.ANY, ("t" * rng.randrange(501, 9_000),), origin=world.roots["meta", "title"])
    elif choice < 27:
        entry(pen, rng, name, device="d" * rng.randrange(201, 9_000))
    else:
        pen.value("access", "n" * rng.randrange(201, 9_000), "reader")
        who = world.owner
    return who, pen.update()


@kind("an unknown root")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, _ = person(world, rng)
    pen = fresh(rng)
    root = rng.choice(["", "Meta", "x" * rng.randrange(1, 300), "entries\0", "__proto__"])
    if rng.random() < 0.5:
        pen.value(root, rng.choice([None, "key"]), plain(rng))
    else:
        pen.put(Kind.STRING, "hidden", parent=root)
    return who, pen.update()


@kind("an unknown key")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, _ = person(world, rng)
    pen = fresh(rng)
    key = rng.choice(["x", "", "Born", "__proto__", "k" * 300])
    if rng.random() < 0.5:
        pen.value("meta", key, plain(rng))
    else:
        pen.value(world.entries[world.streaming], key, plain(rng))
    return who, pen.update()


@kind("an unknown content kind")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, _ = person(world, rng)
    pen = fresh(rng)
    where: dict[str, Any] = rng.choice(
        [{"parent": "meta", "key": "title"}, {"origin": world.last_letter}]
    )
    ref = rng.choice(
        [TypeRef.XML_ELEMENT, TypeRef.XML_FRAGMENT, TypeRef.XML_TEXT, TypeRef.XML_HOOK]
    )
    what, content = rng.choice(
        [
            (Kind.JSON, ("x",)),
            (Kind.EMBED, ({"image": "x"},)),
            (Kind.FORMAT, Format("bold", value=True)),
            (Kind.DOC, Subdocument("guid", {})),
            (Kind.TYPE, SharedType(ref, "p")),
        ]
    )
    pen.put(what, content, **where)
    return who, pen.update()


@kind("what no reader sees")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who, name = person(world, rng)
    pen = fresh(rng)
    choice = rng.randrange(6)
    if choice == 0:
        pen.value(rng.choice(["meta", "access", "leases", "entries"]), None, plain(rng))
    elif choice == 1:
        pen.value(entry(pen, rng, name), None, plain(rng))
    elif choice == 2:
        pen.value(world.ids[world.streaming, "content"], "stop", name)
    elif choice == 3:
        pen.put(Kind.ANY, ("a", "b"), origin=world.roots["meta", "title"])
    elif choice == 4:
        pen.put(Kind.STRING, "abc", origin=world.roots["meta", "title"])
    else:
        pen.value(world.roots["meta", "title"], "stop", name)
    return who, pen.update()


@kind("random bytes")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    who = rng.choice([world.will, world.owner, world.rita, world.fenced.member])
    return who, bytes([rng.randrange(1, 9)]) + rng.randbytes(rng.randrange(1, 400))


@kind("changed bytes")
def _(world: World, rng: Random) -> tuple[Member, bytes]:
    """Of what a reader wrote, who may not write even what is whole."""
    pen = fresh(rng)
    entry(pen, rng, "rita")
    update = bytearray(pen.update())
    for _ in range(rng.randrange(1, 5)):
        update[rng.randrange(len(update))] = rng.randrange(256)
    cut = rng.choice([len(update), rng.randrange(1, len(update) + 1)])
    return world.rita, bytes(update[:cut])


# -- running them -------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of one kind: how many by code, and which were taken."""

    codes: Counter[str] = field(default_factory=Counter)
    taken: list[bytes] = field(default_factory=list)


async def send(world: World, who: Member, update: bytes) -> str:
    """Hand one in; how it was answered. Empty for one that changed nothing, and is no offence."""
    before = world.place.durable
    try:
        await who.membership.submit(update)
    except Refused as refused:
        return refused.code
    except Gap:
        return "gap"
    except MalformedMessage:
        return "malformed"
    return "TAKEN" if world.place.durable != before else ""


async def run(world: World, rng: Random, count: int, kinds: tuple[str, ...]) -> dict[str, Outcome]:
    """Hand in ``count`` updates, the kinds taking turns."""
    outcomes = {name: Outcome() for name in kinds}
    for number in range(count):
        name = kinds[number % len(kinds)]
        who, update = KINDS[name](world, rng)
        code = await send(world, who, update)
        outcomes[name].codes[code or "no-op"] += 1
        if code == "TAKEN":
            outcomes[name].taken.append(update)
    return outcomes


def is_same(one: bytes, other: bytes) -> bool:
    """Whether two documents say the same: the library writes clients in no order."""
    return read_update(one) == read_update(other)
