from __future__ import annotations

import asyncio
import logging
import threading
from random import Random
from typing import TYPE_CHECKING, Any

import pycrdt
import pytest
from sync.device import CONVERSATION, Device
from sync.rooms import Place, born, turns

from crdt_llm.document import rules
from crdt_llm.document.conversation import EMPTY_UPDATE, Conversation
from crdt_llm.document.schema import Grant
from crdt_llm.errors import (
    CrdtLlmError,
    Forbidden,
    Gap,
    LocalMisuse,
    MalformedMessage,
    Refused,
    StoreFailed,
    TooLarge,
)
from crdt_llm.sync.room import look as look_module
from crdt_llm.sync.room import replica as replica_module
from crdt_llm.sync.room import room as room_module
from crdt_llm.sync.room import seats as seats_module
from crdt_llm.sync.room.offload import OFFLOAD_BYTES_MIN
from crdt_llm.sync.room.room import STORE_PAUSE_FIRST_S
from crdt_llm.sync.room.seats import UNSETTLED_MAX
from crdt_llm.sync.room.upkeep import COMPACT_BYTES_MIN
from crdt_llm.sync.update import structure
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sync.rooms import Member


def replayed(updates: Sequence[bytes]) -> Device:
    device = Device(Random(0))
    for update in updates:
        assert device.merge(update)
    return device


def device_with(client: int, principal: str, like: Device) -> Device:
    device = Device(Random(client), principal)
    device.replica = Conversation(client, update=like.replica.diff())
    return device


async def test_nothing_leaves_before_it_is_durable() -> None:
    place = Place()
    owner, device = await born(place)
    other = await place.join()
    place.gate.clear()
    writing = asyncio.create_task(owner.membership.submit(device.say("hello")))
    joining = asyncio.create_task(place.join())
    await turns()
    assert not writing.done()
    assert other.heard == []
    assert not joining.done()
    assert place.durable == 1
    place.gate.set()
    await writing
    assert place.durable == 2
    assert replayed([other.membership.state, *other.heard]).texts == ["hello"]
    assert replayed([(await joining).membership.state]).texts == ["hello"]
    assert owner.heard == []


async def test_a_failed_commit_concerns_those_who_wrote_and_nobody_else() -> None:
    place = Place()
    owner, device = await born(place)
    other = await place.join()
    place.failing = True
    with pytest.raises(StoreFailed):
        await owner.membership.submit(device.say("lost"))
    assert [type(error) for error in owner.lost] == [StoreFailed]
    assert not other.heard
    assert not other.lost
    await other.membership.submit(EMPTY_UPDATE)  # there is nothing to write in it
    again = await place.join()
    assert replayed([again.membership.state]).texts == []
    with pytest.raises(StoreFailed, match="cannot be used now"):
        await again.membership.submit(device.written[-1])
    place.failing = False
    again = await place.join()
    with pytest.raises(StoreFailed, match="not take writes now"):  # so soon nobody tries
        await again.membership.submit(device.written[-1])
    place.now += 2 * STORE_PAUSE_FIRST_S
    again = await place.join()
    await again.membership.submit(device.written[-1])
    assert replayed([(await place.join()).membership.state]).texts == ["lost"]
    assert replayed([other.membership.state, *other.heard]).texts == ["lost"]
    assert other.lost == []


async def test_what_came_with_a_failed_commit_has_no_verdict_either() -> None:
    """It was judged with what is lost before its eyes: what is known, and what is not allowed."""
    place = Place()
    owner, device = await born(place)
    friend = await place.join()
    place.failing = True
    said = device.say("lost")
    writes = ((owner, said), (friend, said), (friend, device.forge()))
    answers = await asyncio.gather(
        *(member.membership.submit(update) for member, update in writes), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [StoreFailed] * 3
    place.failing = False
    again = await place.join()
    assert replayed([again.membership.state]).texts == []
    await again.membership.submit(said)


async def test_a_client_id_is_nobodys_whose_first_use_was_not_durable() -> None:
    place = Place()
    owner, device = await born(place)
    await owner.membership.submit(device.grant("friend", Grant.WRITER))
    theirs = device_with(5, "friend", device)
    friend = await place.join("friend")
    place.failing = True
    with pytest.raises(StoreFailed):
        await friend.membership.submit(theirs.say("lost"))
    place.failing = False
    mine = device_with(5, "owner", device)
    await owner.membership.submit(mine.say("mine"))
    friend = await place.join("friend")
    with pytest.raises(Refused) as refused:
        await friend.membership.submit(theirs.written[-1])
    assert refused.value.code == "rewrite"


async def test_a_log_that_has_more_than_it_said_ends_the_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else what is in it would never be delivered."""
    place = Place()
    owner, device = await born(place)
    other, append = await place.join(), place.log.append

    async def unheard(conversation: str, updates: Sequence[bytes]) -> int:
        await append(conversation, updates)
        raise StoreFailed("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(place.log, "append", unheard)
        with pytest.raises(StoreFailed):
            await owner.membership.submit(device.say("durable after all"))
    assert [type(error) for error in other.lost] == [StoreFailed]
    assert replayed([(await place.join()).membership.state]).texts == ["durable after all"]


async def test_a_refusal_is_whole() -> None:
    place = Place()
    owner, device = await born(place)
    other = await place.join()
    with pytest.raises(Refused) as refused:
        await owner.membership.submit(device.forge())
    assert refused.value.code == "schema"
    assert other.heard == []
    assert place.durable == 1
    now = replayed([(await place.join()).membership.state])
    assert now.replica.meta_plain().keys() == {"schema", "birth"}


async def test_what_no_reader_of_the_document_sees_is_refused() -> None:
    """No rule sees it either: rules are about the roots of the schema."""
    place = Place()
    owner, device = await born(place)
    other = await place.join()
    smuggler: pycrdt.Doc[Any] = pycrdt.Doc(client_id=55)
    smuggler.apply_update(device.replica.diff())
    known = smuggler.get_state()
    smuggler.get("smuggled", type=pycrdt.Map)["x"] = "y" * 1000
    with pytest.raises(Refused, match="smuggled") as refused:
        await owner.membership.submit(smuggler.get_update(known))
    assert refused.value.code == "schema"
    assert other.heard == []
    assert place.durable == 1


async def test_a_large_update_is_read_and_searched_off_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: dict[str, int] = {}

    def noting(name: str, asked: Callable[..., Any]) -> Callable[..., Any]:
        def asking(*arguments: Any) -> Any:
            threads[name] = threading.get_ident()
            return asked(*arguments)

        return asking

    for asked in (structure.read_update, structure.find_gap, structure.brings):
        monkeypatch.setattr(look_module, asked.__name__, noting(asked.__name__, asked))
    place = Place()
    owner, device = await born(place)
    assert set(threads.values()) == {threading.get_ident()}  # a small one is not worth the way
    threads.clear()
    await owner.membership.submit(device.say("x" * OFFLOAD_BYTES_MIN))
    assert len(threads) == 3
    assert threading.get_ident() not in threads.values()


async def test_a_refusal_leaves_the_others_of_its_batch_alone() -> None:
    place = Place()
    owner, device = await born(place)
    reader = await place.join()
    place.gate.clear()
    first = asyncio.create_task(owner.membership.submit(device.say("before")))
    await turns()
    hostile, honest = Device(Random(8)), Device(Random(9))
    for one in (hostile, honest):
        one.merge(owner.membership.state)
        one.merge(device.written[0])
    writes = [
        asyncio.create_task(owner.membership.submit(update))
        for update in (honest.entitle("a title"), hostile.forge(), honest.say("after"))
    ]
    await turns()
    place.gate.set()
    await first
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), Refused, type(None)]
    seen = replayed([reader.membership.state, *reader.heard])
    assert sorted(seen.texts) == ["after", "before"]
    assert seen.replica.meta.title == "a title"
    assert "no-such-key" not in seen.replica.meta_plain()


async def test_whatever_our_checks_raise_is_refused_and_undone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place()
    owner, device = await born(place)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines")

    with monkeypatch.context() as patch:
        patch.setattr(rules, "check", broken)
        with pytest.raises(Refused) as refused:
            await owner.membership.submit(device.say("hello"))
    assert refused.value.code == "unreadable"
    assert replayed([(await place.join()).membership.state]).texts == []
    (record,) = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert record.getMessage().endswith("RuntimeError: two lines")
    await owner.membership.submit(device.written[-1])


async def test_a_panic_of_the_library_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicError(BaseException):
        """What the library's own panics derive from."""

    place = Place()
    owner, device = await born(place)

    def panics(*_: object, **__: object) -> None:
        raise PanicError("already borrowed")

    with monkeypatch.context() as patch:
        patch.setattr(Conversation, "text", panics)
        patch.setattr(rules, "check", panics)
        with pytest.raises(Refused):
            await owner.membership.submit(device.say("hello"))
    await owner.membership.submit(device.written[-1])


async def test_a_gap_is_no_offence_and_not_applied() -> None:
    place = Place()
    owner, device = await born(place)
    reader = await place.join()
    first, second = device.say("first"), device.say("second")
    with pytest.raises(Gap):
        await owner.membership.submit(second)
    assert place.durable == 1
    await owner.membership.submit(first)
    await owner.membership.submit(second)
    assert replayed([reader.membership.state, *reader.heard]).texts == ["first", "second"]


async def test_a_gap_in_meaning_is_undone_too() -> None:
    place = Place()
    member, device = await place.join(), Device(Random(7))
    title = device.entitle("before its birth")
    with pytest.raises(Gap, match="birth"):
        await member.membership.submit(title)
    assert place.durable == 0
    await member.membership.submit(device.give_birth() and device.replica.diff())
    assert place.durable == 1


async def test_what_is_known_is_a_no_op_for_everybody() -> None:
    place = Place()
    owner, device = await born(place)
    await owner.membership.submit(device.grant("rita", Grant.READER))
    rita = await place.join("rita")
    await rita.membership.submit(EMPTY_UPDATE)
    await rita.membership.submit(device.replica.diff())
    assert place.durable == 2
    assert owner.heard == []


async def test_a_reader_reads_and_writes_nothing() -> None:
    place = Place()
    owner, device = await born(place)
    await owner.membership.submit(device.grant("rita", Grant.READER))
    rita = await place.join("rita")
    hers = Device(Random(8), "rita")
    hers.merge(rita.membership.state)
    with pytest.raises(Forbidden):
        await rita.membership.submit(hers.say("hello"))
    await owner.membership.submit(device.say("read this"))
    assert replayed([rita.membership.state, *rita.heard]).texts == ["read this"]


async def test_a_stranger_does_not_come_in() -> None:
    place = Place()
    await born(place)
    with pytest.raises(Forbidden):
        await place.join("stranger")


async def test_the_node_comes_in_without_a_grant() -> None:
    place = Place()
    owner, device = await born(place)
    node = await place.join("node", node=True)
    await owner.membership.submit(device.say("hello"))
    assert replayed([node.membership.state, *node.heard]).texts == ["hello"]


async def test_whoever_loses_the_right_is_let_go_at_once() -> None:
    place = Place()
    owner, device = await born(place)
    await owner.membership.submit(device.grant("will", Grant.WRITER))
    will = await place.join("will")
    await owner.membership.submit(device.grant("will", None))
    assert [type(error) for error in will.lost] == [Forbidden]
    heard = len(will.heard)
    await owner.membership.submit(device.say("secret"))
    assert len(will.heard) == heard


async def test_whoever_loses_the_right_does_not_hear_what_came_with_that() -> None:
    place = Place()
    owner, device = await born(place)
    await owner.membership.submit(device.grant("will", Grant.WRITER))
    will = await place.join("will")
    place.gate.clear()
    writes = [asyncio.create_task(owner.membership.submit(device.entitle("blocks the turn")))]
    await turns()
    together = (device.grant("will", None), device.say("secret"))
    writes.extend(asyncio.create_task(owner.membership.submit(update)) for update in together)
    await turns()
    place.gate.set()
    await asyncio.gather(*writes)
    assert replayed([will.membership.state, *will.heard]).texts == []
    assert len(will.lost) == 1


async def test_an_unborn_conversation_belongs_to_whoever_may_give_it_its_birth() -> None:
    place = Place()
    owner, stranger = await place.join("owner"), await place.join("stranger")
    await stranger.membership.submit(EMPTY_UPDATE)
    assert place.durable == 0
    theirs = Device(Random(8), "stranger")
    with pytest.raises(Forbidden):
        await stranger.membership.submit(theirs.give_birth())
    assert place.durable == 0
    await owner.membership.submit(Device(Random(7)).give_birth())
    assert [type(error) for error in stranger.lost] == [Forbidden]
    assert owner.lost == []


@pytest.mark.parametrize("update", [b"", b"\1", b"\0\0\0", b"\xff" * 40])
async def test_what_is_no_update_is_refused(update: bytes) -> None:
    place = Place()
    owner, _ = await born(place)
    with pytest.raises((MalformedMessage, TooLarge)):
        await owner.membership.submit(update)


async def test_a_large_update_is_read_in_a_thread_with_the_same_verdict() -> None:
    place = Place()
    owner, device = await born(place)
    text = "x" * (OFFLOAD_BYTES_MIN + 1)
    await owner.membership.submit(device.say(text))
    assert replayed([(await place.join()).membership.state]).texts == [text]
    with pytest.raises(MalformedMessage):
        await owner.membership.submit(bytes([1]) * OFFLOAD_BYTES_MIN)


async def test_a_conversation_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "DOCUMENT_BYTES_MAX", 30_000)
    monkeypatch.setattr(replica_module, "NODE_RESERVE_BYTES", 10_000)
    monkeypatch.setattr(replica_module, "DOCUMENT_SLACK_BYTES", 1_000)
    place = Place()
    owner, device = await born(place)
    node = await place.join("owner", node=True)
    # What is replaced counts no more: the size is measured before anything is refused.
    for number in range(60):
        await owner.membership.submit(device.entitle(f"{number:0500}"))
    with pytest.raises(TooLarge):
        await owner.membership.submit(device.say("x" * 20_000))
    assert replayed([(await place.join()).membership.state]).texts == []
    its = replayed([node.membership.state, *node.heard])
    await node.membership.submit(its.say("x" * 20_000))
    assert len(replayed([(await place.join()).membership.state]).texts) == 1


async def test_one_that_floods_does_not_keep_the_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room_module, "BATCH_UPDATES_MAX", 4)
    place = Place()
    owner, device = await born(place)
    patient = await place.join()
    other = Device(Random(8))
    other.merge(patient.membership.state)
    place.gate.clear()
    settled: list[str] = []

    def submit(member: Member, update: bytes, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(member.membership.submit(update))
        task.add_done_callback(lambda _: settled.append(name))
        return task

    writes = [submit(owner, device.say("x"), "flood") for _ in range(500)]
    await turns()
    writes.append(submit(patient, other.say("y"), "patient"))
    await turns()
    place.gate.set()
    await asyncio.gather(*writes)
    # One turn was under way already; in the next one the peers take turns.
    assert settled.index("patient") < 2 * room_module.BATCH_UPDATES_MAX


async def test_a_peer_with_too_much_unsettled_waits() -> None:
    place = Place()
    owner, device = await born(place)
    place.gate.clear()
    writes = [asyncio.create_task(owner.membership.submit(device.say("x"))) for _ in range(500)]
    await turns(100)
    seat = place.hub._rooms[CONVERSATION]._seats._seats[owner.membership]
    assert seat.unsettled == UNSETTLED_MAX
    place.gate.set()
    await asyncio.gather(*writes)
    assert seat.unsettled == seat.unsettled_bytes == 0
    assert place.durable == 501


async def test_what_was_handed_over_is_carried_out_though_its_peer_left() -> None:
    place = Place()
    owner, device = await born(place)
    place.gate.clear()
    writes = [asyncio.create_task(owner.membership.submit(device.say("x"))) for _ in range(3)]
    await turns()
    owner.membership.leave()
    place.gate.set()
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert all(isinstance(outcome, CrdtLlmError) for outcome in outcomes)
    assert replayed([(await place.join()).membership.state]).texts == ["x"] * 3


async def test_cancelling_whoever_submits_cancels_nothing() -> None:
    place = Place()
    owner, device = await born(place)
    place.gate.clear()
    writing = asyncio.create_task(owner.membership.submit(device.say("x")))
    await turns()
    writing.cancel()
    place.gate.set()
    assert replayed([(await place.join()).membership.state]).texts == ["x"]


async def test_a_peer_that_fails_is_let_go_and_nobody_else_notices(
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = Place()
    owner, device = await born(place)
    lost: list[CrdtLlmError] = []

    def fail(_: bytes) -> None:
        raise ValueError("a fault")

    await place.hub.join(CONVERSATION, "owner", deliver=fail, lost=lost.append)
    healthy = await place.join()
    await owner.membership.submit(device.say("hello"))
    assert len(lost) == 1
    assert len(healthy.heard) == 1
    assert owner.lost == healthy.lost == []
    assert "ValueError: a fault" in caplog.text


async def test_what_one_commit_brought_comes_as_one_update_without_ones_own() -> None:
    place = Place()
    owner, device = await born(place)
    second, reader = await place.join(), await place.join()
    other = Device(Random(8))
    other.merge(second.membership.state)
    place.gate.clear()
    blocking = asyncio.create_task(owner.membership.submit(device.entitle("first")))
    await turns()
    writes = [
        asyncio.create_task(owner.membership.submit(device.say("mine"))),
        asyncio.create_task(second.membership.submit(other.say("theirs"))),
    ]
    await turns()
    place.gate.set()
    await asyncio.gather(blocking, *writes)
    assert [len(one.heard) for one in (owner, second, reader)] == [1, 2, 2]
    for one, own in ((owner, device), (second, other)):
        for update in one.heard:
            assert own.merge(update)
        assert sorted(own.texts) == ["mine", "theirs"]
    assert own.texts == replayed([reader.membership.state, *reader.heard]).texts


async def test_the_store_stays_bounded_by_the_document() -> None:
    place = Place()
    owner, device = await born(place)
    for number in range(400):
        await owner.membership.submit(device.entitle(f"{number:0480}"))
    await turns()
    stored = place.disk.conversations[CONVERSATION]
    assert stored.lsn == 401
    assert stored.snapshot is not None
    assert sum(map(len, stored.updates)) < 2 * COMPACT_BYTES_MIN
    assert len(stored.snapshot) < COMPACT_BYTES_MIN
    place.now += 1000
    owner.membership.leave()
    place.hub.tick()
    again = replayed([(await place.join()).membership.state])
    assert again.replica.meta.title == f"{399:0480}"
    assert again.replica.state_vector() == device.replica.state_vector()


async def test_a_failed_compaction_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place()
    owner, device = await born(place)

    async def full(*_: object) -> None:
        raise StoreFailed("no space")

    monkeypatch.setattr(place.log, "compact", full)
    for number in range(300):
        await owner.membership.submit(device.entitle(f"{number:0480}"))
    failures = [record for record in caplog.records if "not compacted" in record.getMessage()]
    assert 1 <= len(failures) <= 3  # it is tried again when the log has doubled, not each time
    assert owner.lost == []


async def test_the_known_clocks_are_those_of_the_replica() -> None:
    random = Random(3)
    place = Place()
    owner, device = await born(place)
    for _ in range(200):
        text = random.choice("äbc") * random.randrange(1, 9)
        update = device.say(text) if random.random() < 0.5 else device.entitle(text)
        await owner.membership.submit(update)
        if random.random() < 0.1:
            stray = Device(random)
            stray.merge(device.replica.diff())
            forged = stray.forge()
            with pytest.raises(Refused):
                await owner.membership.submit(forged)
        room = place.hub._rooms[CONVERSATION]
        assert room._replica.known == decode_state_vector(room.state_vector())


async def test_a_rooms_state_is_not_read_while_some_of_it_is_not_durable() -> None:
    place = Place()
    owner, device = await born(place)
    room = place.hub._rooms[CONVERSATION]
    place.gate.clear()
    writing = asyncio.create_task(owner.membership.submit(device.say("x")))
    await turns()
    with pytest.raises(LocalMisuse):
        room.diff()
    place.gate.set()
    await writing
    assert room.state_vector() == device.replica.state_vector()
    assert replayed([room.diff()]).texts == ["x"]


async def test_a_panic_outside_the_checks_ends_only_this_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class PanicError(BaseException):
        """What the library's own panics derive from."""

    def panics(*_: object) -> None:
        raise PanicError("poisoned")

    place = Place()
    owner, device = await born(place)
    with monkeypatch.context() as patch:
        patch.setattr(seats_module, "merge", panics)
        with pytest.raises(CrdtLlmError):
            await owner.membership.submit(device.say("x"))
    assert len(owner.lost) == 1
    assert "PanicError: poisoned" in caplog.text
    again = await place.join()
    assert replayed([again.membership.state]).texts == ["x"]  # it was durable before
