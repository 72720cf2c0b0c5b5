"""Cases about replication: nothing lost, nothing doubled, nothing rolled back, one state for all.

This module owns what is tried; how a device behaves is :mod:`crdt_llm.conformance.device`'s.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.conformance.case import (
    Case,
    Need,
    agree,
    bring_back,
    covers,
    require,
    require_lost,
)
from crdt_llm.conformance.connection import Plain
from crdt_llm.conformance.device import CHANNEL
from crdt_llm.document.conversation import EMPTY_STATE_VECTOR
from crdt_llm.document.schema import Grant
from crdt_llm.errors import ConnectionLost
from crdt_llm.sync.wire import frames, y_websocket
from crdt_llm.sync.wire.frames import (
    Ack,
    Change,
    Code,
    Leave,
    Nack,
    Open,
    Opened,
    Presence,
    Pull,
    State,
    Update,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.conformance.case import World
    from crdt_llm.conformance.connection import Native
    from crdt_llm.conformance.device import Device

_MANY: Final = 20  # entries: enough that an order can be wrong
_RESUME_BYTES_MAX: Final = 16 << 10
"""Of a resume after one short entry: that, and what a node wrote meanwhile to admit the letters
(some 350 bytes each). The document is more than twice as large."""

_LETTER: Final = "All work and no play makes a short letter long. " * 40


async def acknowledges_what_is_durable(world: World) -> None:
    """Each update gets exactly one answer, and an acknowledgement speaks for those before it."""
    first, second = await world.pair()
    numbers = []
    for index in range(_MANY):
        _, update = first.say(f"entry {index}")
        numbers.append(first.wire.next_id() if first.wire else 0)
        if first.wire is not None:
            await first.wire.send(Update(CHANNEL, numbers[-1], update))
    verdict = await first.verdict(numbers[-1])
    require(isinstance(verdict, Ack), "the last of twenty valid updates was refused")
    await second.until(lambda replica: len(replica.tree) == _MANY, "all twenty entries")
    await agree([first, second])


async def keeps_newer_turns_from_a_stale_tab(world: World) -> None:
    """A tab that slept through three turns writes into what it still shows."""
    first, stale = await world.pair()
    _, update = first.say("before the tab fell asleep")
    await first.send(update)
    await stale.until(lambda replica: len(replica.tree) == 1, "the first entry")
    stale.cut()
    for text in ("one", "two", "three"):
        _, update = first.say(text)
        await first.send(update)
    stale.say("written in a stale tab")
    stale.compose(lambda writer: writer.set_meta("title", "renamed in a stale tab"))
    await stale.connect()
    await first.until(lambda replica: replica.meta.title != "", "the stale tab's title")
    require(
        {"one", "two", "three", "written in a stale tab"} <= set(first.texts()),
        "a turn is missing after a stale tab wrote",
    )
    await agree([first, stale])


async def merges_what_was_written_offline(world: World) -> None:
    """Two devices write for days without a network."""
    first, second = await world.pair()
    first.cut()
    second.cut()
    for index in range(_MANY):
        first.say(f"phone {index}")
        second.say(f"laptop {index}")
    await first.connect()
    await second.connect()
    await first.until(lambda replica: len(replica.tree) == 2 * _MANY, "the other's entries")
    await agree([first, second])
    phone = [text for text in first.texts() if text.startswith("phone")]
    require(
        phone == [f"phone {index}" for index in range(_MANY)],
        "a device's own entries are out of order after the merge",
    )


async def takes_a_conversation_it_never_knew(world: World) -> None:
    """The server's id expired, or the server is another one: the client has it all."""
    first = world.device()
    for index in range(_MANY):
        first.say(f"kept at home {index}")
    await first.connect()
    second = world.another(first, "second")
    await second.connect()
    await agree([first, second])


async def loses_nothing_with_an_acknowledgement(world: World) -> None:
    """The connection goes after the write and before the answer."""
    first = world.device()
    await first.connect()
    name, update = first.say("sent once, sent twice")
    if first.wire is not None:
        await first.wire.send(Update(CHANNEL, first.wire.next_id(), update))
    first.cut()
    await first.connect()
    verdict = await first.submit(update)
    require(isinstance(verdict, Ack), "a repeated write was refused")
    second = world.another(first, "second")
    await second.connect()
    require(second.replica.view() == (name,), "the entry is not there exactly once")
    await agree([first, second])


async def passes_a_duplicate_on_once(world: World) -> None:
    """The same bytes three times: three answers, one change."""
    first, second = await world.pair()
    _, update = first.say("only once")
    for _ in range(3):
        require(isinstance(await first.submit(update), Ack), "a duplicate was refused")
    _, update = first.say("the end")
    await first.send(update)
    passed_on = 0
    wire_of_second = _wire(second)
    while "the end" not in second.texts():
        frame = await wire_of_second.receive()
        passed_on += isinstance(frame, Change) and b"only once" in frame.update
        second.take(frame)
    require(passed_on == 1, f"one write was passed on {passed_on} times")


async def asks_for_what_is_missing(world: World) -> None:
    """The second update comes before the first."""
    first, second = await world.pair()
    _, earlier = first.say("first")
    _, later = first.say("second")
    verdict = await first.submit(later)
    require(
        isinstance(verdict, Nack) and verdict.code is Code.GAP,
        "an update that builds on an unknown one must be answered with `gap`",
    )
    require(
        isinstance(verdict, Nack) and verdict.state_vector is not None,
        "`gap` must say what the endpoint has",
    )
    require(len(second.replica.tree) == 0, "half of a write was seen by others")
    require(isinstance(await first.submit(earlier), Ack), "the earlier update was refused")
    require(isinstance(await first.submit(later), Ack), "the later update was refused again")
    await second.until(lambda replica: len(replica.tree) == 2, "both entries")  # noqa: PLR2004
    await agree([first, second])


async def is_not_rolled_back_by_an_old_replica(world: World) -> None:
    """A device comes back from last month's backup, with its own log position."""
    first, second = await world.pair()
    for index in range(3):
        _, update = first.say(f"old {index}")
        await first.send(update)
    backup = first.replica.diff()
    for index in range(3):
        _, update = first.say(f"new {index}")
        await first.send(update)
    restored = world.another(first, "restored", state=backup)
    restored.say("from the backup")
    await restored.connect()
    await second.until(lambda replica: len(replica.tree) == 7, "all seven entries")  # noqa: PLR2004
    await first.until(lambda replica: len(replica.tree) == 7, "all seven entries")  # noqa: PLR2004
    await agree([first, second, restored])


async def costs_what_is_new(world: World) -> None:
    """A reconnect after one new entry does not send the conversation again."""
    first, second = await world.pair()
    for _ in range(_MANY):
        _, update = first.say(_LETTER)
        await first.send(update)
    await second.until(lambda replica: len(replica.tree) == _MANY, "the letters")
    second.cut()
    _, update = first.say("short")
    await first.send(update)
    await second.connect()
    received = _wire(second).received_bytes
    require(
        received <= _RESUME_BYTES_MAX,
        f"a resume after one short entry took {received} bytes",
    )
    await agree([first, second])


async def survives_an_oversized_message(world: World) -> None:
    """What is over a limit is refused by itself; the conversation goes on."""
    first, second = await world.pair()
    _, update = first.say("x" * (3 << 20))
    verdict = await first.submit(update)
    require(
        isinstance(verdict, Nack) and verdict.code is Code.TOO_LARGE,
        "an entry of 3 MiB must be refused as too large",
    )
    again = world.another(first, "again")
    await again.connect()
    _, update = again.say("business as usual")
    await again.send(update)
    await second.until(lambda replica: len(replica.tree) == 1, "the entry after it")
    require(second.texts() == ("business as usual",), "something of the oversized write is there")


async def survives_what_is_no_frame(world: World) -> None:
    """Random bytes, frames of no kind, text: the connection ends with a reason, others go on."""
    first, second = await world.pair()
    nonsense: list[bytes | str] = [
        os.urandom(64),
        b"",
        b"\x91\xcc\xff",
        b"\xc1",
        "text",
        b"\x94\x02\x01\x01",
        b"\xdd\xff\xff\xff\xff",
        json.dumps([2, 1, 1, ""]),
    ]
    for data in nonsense:
        bare = await world.native()
        await bare.hello(world.endpoint.token)
        await bare.send_bytes(data)
        code, _ = await bare.expect_end()
        require(4400 <= code <= 4499, f"{data!r} was answered with {code}")  # noqa: PLR2004
    _, update = first.say("still here")
    await first.send(update)
    await second.until(lambda replica: len(replica.tree) == 1, "an entry after the nonsense")


async def carries_many_conversations(world: World) -> None:
    """Channels of one socket are independent."""
    owners = [world.device(f"owner {index}") for index in range(5)]
    for device in owners:
        await device.connect()
    bare = await world.native()
    await bare.hello(world.endpoint.token)
    for channel, device in enumerate(owners, start=10):
        await bare.send(Open(channel, device.id, None, 0, EMPTY_STATE_VECTOR))
        await bare.expect(Opened, _on(channel))
    await bare.send(Leave(10))
    for device in owners:
        _, update = device.say("for one channel alone")
        await device.send(update)
    heard: set[int] = set()
    while len(heard) < len(owners) - 1:
        heard.add((await bare.expect(Change)).channel)
    require(10 not in heard, "a channel that was left still hears")  # noqa: PLR2004 - the first
    await bare.send(Open(10, owners[0].id, None, 0, EMPTY_STATE_VECTOR))
    await bare.expect(Opened, _on(10))


async def ends_presence_with_its_connection(world: World) -> None:
    """Who is cut off goes, for everyone, without waiting for an expiry."""
    first, second = await world.pair()
    state = y_websocket.AwarenessState(77, 1, json.dumps({"device": "phone"}))
    await _wire(first).send(Presence(CHANNEL, (state,)))
    await _presence(second, 77, present=True)
    first.cut()
    await _presence(second, 77, present=False)


async def tells_what_a_replica_lacks(world: World) -> None:
    """A client that noticed a hole asks, and gets the whole."""
    first = world.device()
    await first.connect()
    _, update = first.say("something")
    await first.send(update)
    second = world.another(first, "second")
    await second.open()
    await _wire(second).send(Pull(CHANNEL, EMPTY_STATE_VECTOR))
    answer = await _wire(second).expect(State)
    fresh = world.another(first, "fresh", state=answer.update)
    require(covers(fresh, first), "the answer to Pull is not the whole")
    require(fresh.texts() == ("something",), "the answer to Pull is not the document")


async def speaks_to_stock_clients(world: World) -> None:
    """A y-websocket client and a native one are in one conversation."""
    first = world.device()
    await first.connect()
    _, update = first.say("from the native side")
    await first.send(update)
    stock = world.another(first, "stock")
    plain = await Plain.connect(world.endpoint, first.id, world.endpoint.token)
    try:
        await plain.expect(y_websocket.SyncStep1)
        await plain.send(y_websocket.SyncStep1(EMPTY_STATE_VECTOR))
        await plain.send(y_websocket.SyncStep2(b"\x00\x00"))
        stock.replica.apply((await plain.expect(y_websocket.SyncStep2)).update)
        require(stock.texts() == ("from the native side",), "the stock client lacks an entry")
        _, update = stock.say("from the stock side")
        await plain.send(y_websocket.SyncUpdate(update))
        await first.until(lambda replica: len(replica.tree) == 2, "the stock client's entry")  # noqa: PLR2004
        require(covers(first, stock), "a native client lacks what a stock client has")
        require(first.texts() == stock.texts(), "a stock client and a native one show differently")
    finally:
        await plain.close()


async def keeps_acknowledged_writes_over_a_crash(world: World) -> None:
    """Killed right after the acknowledgement, as hard as it goes."""
    if world.crash is None:
        return
    first = world.device()
    await first.connect()
    names = []
    for index in range(_MANY):
        name, update = first.say(f"acknowledged {index}")
        await first.send(update)
        names.append(name)
    await world.crash()
    fresh = world.another(first, "fresh")
    await fresh.open()
    missing = [name for name in names if name not in fresh.replica.tree]
    require(not missing, f"{len(missing)} acknowledged writes were lost")


async def comes_back_after_a_loss(world: World) -> None:
    """Whoever comes meanwhile has the right that was registered; the first who has it brings it."""
    owner = world.device("owner")
    await owner.connect()
    await owner.send(owner.compose(lambda writer: writer.set_meta("title", "Only with us")))
    _, update = owner.say("the endpoint will not know this")
    await owner.send(update)
    guest = await world.guest(owner, Grant.READER)
    await world.lose_log()
    opened = await guest.open()
    require_lost(opened)
    require(opened.grant == Grant.READER, f"after a loss a reader was told to be {opened.grant}")
    await bring_back(owner)
    await guest.until(lambda replica: bool(replica.view()), "what the owner brought back")
    await agree([owner, guest])


async def never_blocks_a_writer(world: World) -> None:
    """Eight devices write at once; nobody is told to wait for another."""
    first = world.device()
    await first.connect()
    devices = [world.another(first, f"device {index}") for index in range(8)]
    for device in devices:
        await device.connect()
    for turn in range(5):
        for device in devices:
            _, update = device.say(f"{device.name}, turn {turn}")
            await device.send(update)
    for device in [first, *devices]:
        await device.until(lambda replica: len(replica.tree) == 40, "all forty entries")  # noqa: PLR2004
    await agree([first, *devices])


def _on(channel: int) -> Callable[[Opened], bool]:
    return lambda opened: opened.channel == channel


def _wire(device: Device) -> Native:
    if device.wire is None:
        raise ConnectionLost(f"{device.name} is not connected")
    return device.wire


async def _presence(device: Device, client: int, *, present: bool) -> None:
    def says(frame: Any) -> bool:
        states = (state for state in frame.states if state.client == client)
        return any((state.state_json is not None) is present for state in states)

    await _wire(device).expect(frames.Presence, says)


CASES: Final = (
    Case(
        "durable-ack",
        "every update is answered once, after it is durable",
        "a message that was shown as sent is gone",
        acknowledges_what_is_durable,
    ),
    Case(
        "stale-tab",
        "a stale tab adds to newer turns and removes none",
        "an old tab saved its copy of the history over the newer turns",
        keeps_newer_turns_from_a_stale_tab,
    ),
    Case(
        "offline-merge",
        "what was written offline on two devices is all there, in one order everywhere",
        "the thread on the phone and the one on the laptop have split",
        merges_what_was_written_offline,
    ),
    Case(
        "expired-id",
        "a conversation that the endpoint does not know is taken from a client",
        "the thread's id has expired on the server, and the thread cannot be used any more",
        takes_a_conversation_it_never_knew,
    ),
    Case(
        "lost-ack",
        "a write whose acknowledgement was lost is sent again and is there once",
        "after a timeout the message was retried and stands there twice",
        loses_nothing_with_an_acknowledgement,
    ),
    Case(
        "duplicate",
        "a duplicate is acknowledged and passed on to nobody",
        "the same message arrives twice on the other device",
        passes_a_duplicate_on_once,
    ),
    Case(
        "gap",
        "a write that builds on a missing one is asked for, and no half of it is seen",
        "messages arrive out of order and the thread stays broken",
        asks_for_what_is_missing,
    ),
    Case(
        "old-replica",
        "an old replica catches up and rolls nothing back",
        "restoring a backup on one device rolled the conversation back for all",
        is_not_rolled_back_by_an_old_replica,
    ),
    Case(
        "resume-cost",
        "a reconnect costs what is new, not the history",
        "each send uploads the whole history again",
        costs_what_is_new,
    ),
    Case(
        "oversized",
        "an oversized write is refused by itself",
        "one huge message bricked the room for everybody",
        survives_an_oversized_message,
    ),
    Case(
        "malformed",
        "what is no frame ends its own connection, with a reason",
        "a broken client took the server down",
        survives_what_is_no_frame,
    ),
    Case(
        "channels",
        "many conversations share a socket and do not disturb each other",
        "an error in one thread closed all of them",
        carries_many_conversations,
    ),
    Case(
        "presence",
        "presence ends with its connection",
        "ghosts stay in the list of who is here",
        ends_presence_with_its_connection,
    ),
    Case(
        "pull",
        "a replica that noticed a hole is brought up to date",
        "only reloading the page brings the missing messages",
        tells_what_a_replica_lacks,
    ),
    Case(
        "stock-client",
        "stock Yjs clients take part",
        "only the vendor's own client can be used",
        speaks_to_stock_clients,
    ),
    Case(
        "locked",
        "a write is accepted at any time, whoever else is writing",
        "the conversation is locked: another request is in progress",
        never_blocks_a_writer,
    ),
    Case(
        "crash",
        "what was acknowledged survives a crash",
        "the server crashed, and acknowledged messages were lost",
        keeps_acknowledged_writes_over_a_crash,
        frozenset({Need.CRASH}),
    ),
    Case(
        "lost-log",
        "a conversation that the endpoint lost comes back with a client, and rights are kept",
        "the server lost its disk, and every thread is gone for everybody",
        comes_back_after_a_loss,
        frozenset({Need.WIPE}),
    ),
)
