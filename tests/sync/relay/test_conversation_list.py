from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sync.device import BIRTH, CONVERSATION
from sync.native import PASSES, Native, device, open_frame, update_frame
from sync.rooms import Place, born, turns

from crdt_llm.document.schema import Birth, Grant, conversation_id
from crdt_llm.errors import StoreFailed
from crdt_llm.store.archive import Archive
from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.store.register import MemoryRegister
from crdt_llm.sync.relay import conversation_list as conversation_list_module
from crdt_llm.sync.relay.access import Pass
from crdt_llm.sync.relay.conversation_list import ConversationLists
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.wire import frames as frames_module
from crdt_llm.sync.wire.frames import VERSION, Hello, Listed, Watch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import pytest

    from crdt_llm.sync.relay.conversation_list import Lines

OTHER = Birth("owner", b"another 16 bytes")


class Watching:
    """Somebody's list, as they put it together."""

    def __init__(self, world: World, found: Pass) -> None:
        self.lines: dict[str, Mapping[str, Any]] = {}
        self.frames: list[tuple[Lines, bool]] = []
        self.has_room = True
        self.stop = world.lists.watch(found, self.tell)

    def tell(self, lines: Lines, whole: bool) -> bool:  # noqa: FBT001 - called by place
        if not self.has_room:
            return False
        self.frames.append((lines, whole))
        if whole:
            self.lines.clear()
        for conversation, facts in lines:
            if facts is None:
                del self.lines[conversation]
            else:
                self.lines[conversation] = facts
        return True


class World:
    """A hub, and lists whose pauses the test ends."""

    def __init__(self) -> None:
        self.place = Place()
        self.register = MemoryRegister()
        self.place.hub = Hub(self.place.log, register=self.register)
        self.archive = Archive.open(None)
        self.now = 1_000
        self.pauses: asyncio.Queue[None] = asyncio.Queue()
        self.lists = self.new_lists()

    def new_lists(self) -> ConversationLists:
        return ConversationLists(
            self.place.hub, self.archive, clock=lambda: self.now, sleep=self._sleep
        )

    async def _sleep(self, _seconds: float) -> None:
        await self.pauses.get()

    async def on(self) -> None:
        """Let what pauses go on."""
        await turns()
        self.pauses.put_nowait(None)
        await turns()


async def test_the_list_says_what_there_is() -> None:
    world = World()
    owner, replica = await born(world.place)
    await owner.membership.submit(replica.entitle("On tea"))
    watching = Watching(world, Pass("owner"))
    await turns()
    assert [whole for _, whole in watching.frames] == [True]
    assert watching.lines == {
        CONVERSATION: {
            "title": "On tea",
            "role": "owner",
            "owner": "owner",
            "created_at": None,
            "changed_at": 1_000,
            "archived": False,
        }
    }


async def test_strangers_lists_are_empty() -> None:
    world = World()
    await born(world.place)
    watching = Watching(world, Pass("stranger"))
    await turns()
    assert watching.frames == [((), True)]


async def test_a_list_follows_the_document() -> None:
    world = World()
    watching, friend = Watching(world, Pass("owner")), Watching(world, Pass("friend"))
    await turns()
    owner, replica = await born(world.place)
    await world.on()
    assert watching.lines[CONVERSATION]["title"] == ""
    await owner.membership.submit(replica.entitle("On tea"))
    await owner.membership.submit(replica.grant("friend", Grant.READER))
    await world.on()
    assert watching.lines[CONVERSATION]["title"] == "On tea"
    assert friend.lines[CONVERSATION]["role"] == "reader"
    await owner.membership.submit(replica.grant("friend", None))
    await world.on()
    assert friend.lines == {}
    assert CONVERSATION in watching.lines


async def test_many_commits_are_one_line_in_a_while() -> None:
    world = World()
    owner, replica = await born(world.place)
    watching = Watching(world, Pass("owner"))
    await turns()
    for number in range(20):
        world.now += 1
        await owner.membership.submit(replica.say(f"{number}"))
    await turns()
    assert len(watching.frames) <= 2
    await world.on()
    assert watching.lines[CONVERSATION]["changed_at"] == world.now
    assert len(watching.frames) <= 3


async def test_what_was_put_away_is_so_for_its_principal_alone() -> None:
    world = World()
    owner, replica = await born(world.place)
    await owner.membership.submit(replica.grant("friend", Grant.WRITER))
    watching, friend = Watching(world, Pass("owner")), Watching(world, Pass("friend"))
    await turns()
    await world.lists.put_away("owner", CONVERSATION, archived=True)
    await world.on()
    assert watching.lines[CONVERSATION]["archived"] is True
    assert friend.lines[CONVERSATION]["archived"] is False
    again = Watching(world, Pass("owner"))
    await turns()
    assert again.lines[CONVERSATION]["archived"] is True


async def test_a_token_bounds_what_its_list_shows() -> None:
    world = World()
    await born(world.place)
    other = await world.place.join(conversation=conversation_id(OTHER))
    await other.membership.submit(device(9).give_birth(OTHER))
    scoped = Pass("owner", "id", None, conversations={CONVERSATION: Grant.READER})
    watching = Watching(world, scoped)
    await turns()
    assert {name: line["role"] for name, line in watching.lines.items()} == {CONVERSATION: "reader"}


async def test_closed_rooms_and_a_new_start_show_the_same() -> None:
    world = World()
    owner, replica = await born(world.place)
    await owner.membership.submit(replica.entitle("On tea"))
    before = Watching(world, Pass("owner"))
    await turns()
    await world.place.hub.close()
    for register in (world.register, MemoryRegister()):  # with its rows, and before it had any
        world.place.hub = Hub(world.place.log, register=register)
        world.lists = world.new_lists()
        after = Watching(world, Pass("owner"))
        await turns()
        assert after.lines[CONVERSATION]["title"] == before.lines[CONVERSATION]["title"]
        assert world.place.hub._rooms == {}


async def test_a_conversation_whose_log_is_lost_is_still_in_the_list() -> None:
    world = World()
    owner, replica = await born(world.place)
    await owner.membership.submit(replica.grant("friend", Grant.WRITER))
    world.place.hub = Hub(MemoryLog(MemoryDisk("new"), clock=lambda: 0), register=world.register)
    world.lists = world.new_lists()
    watching = Watching(world, Pass("friend"))
    await turns()
    assert watching.lines[CONVERSATION]["role"] == "writer"
    assert watching.lines[CONVERSATION]["title"] == ""


async def test_who_had_no_room_is_told_later() -> None:
    world = World()
    owner, replica = await born(world.place)
    watching = Watching(world, Pass("owner"))
    await turns()
    watching.has_room = False
    await owner.membership.submit(replica.entitle("On tea"))
    await world.on()
    watching.has_room = True
    await world.on()
    assert watching.lines[CONVERSATION]["title"] == "On tea"


async def test_a_store_that_fails_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    await born(world.place)
    with monkeypatch.context() as patch:

        async def fail() -> None:
            raise StoreFailed("not now")

        patch.setattr(world.place.log, "conversations", fail)
        watching = Watching(world, Pass("owner"))
        await turns()
        assert watching.frames == []
    await world.on()
    assert list(watching.lines) == [CONVERSATION]


async def test_what_changes_while_a_list_is_read_is_not_lost() -> None:
    world = World()
    owner, replica = await born(world.place)
    watching = Watching(world, Pass("owner"))
    await owner.membership.submit(replica.entitle("On tea"))
    await world.on()
    await world.on()
    assert watching.lines[CONVERSATION]["title"] == "On tea"


async def test_whoever_stops_hears_nothing_and_nothing_is_left() -> None:
    world = World()
    owner, replica = await born(world.place)
    watching = Watching(world, Pass("owner"))
    await turns()
    heard = len(watching.frames)
    watching.stop()
    watching.stop()
    await owner.membership.submit(replica.entitle("On tea"))
    await world.on()
    assert len(watching.frames) == heard
    await world.lists.close()
    assert not world.lists._dirty
    assert world.lists._looking is None


async def test_only_the_latest_fit_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation_list_module, "LINES_MAX", 1)
    world = World()
    await born(world.place)
    world.now += 1
    other = await world.place.join(conversation=conversation_id(OTHER))
    await other.membership.submit(device(9).give_birth(OTHER))
    watching = Watching(world, Pass("owner"))
    await turns()
    assert list(watching.lines) == [conversation_id(OTHER)]


async def test_it_travels_in_frames_that_say_where_they_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames_module, "LISTED_MAX", 1)
    world = World()
    for birth in (BIRTH, OTHER):
        member = await world.place.join(conversation=conversation_id(birth))
        await member.membership.submit(device(9).give_birth(birth))
    native = Native(world.place, lists=world.lists)
    await native.greet()
    await native.send(Watch(on=True))
    await turns()
    native.down()
    listed = native.of(Listed)
    assert [(one.whole, one.end, len(one.conversations)) for one in listed] == [
        (True, False, 1),
        (True, True, 1),
    ]
    await native.send(open_frame())
    await turns()
    replica = device(3)
    replica.hear(native.down())
    await native.send(update_frame(1, replica.entitle("On tea")))
    await turns()
    (change,) = [one for one in native.down() if isinstance(one, Listed)]
    assert (change.whole, change.end) == (False, True)
    await native.send(Watch(on=False), update_frame(2, replica.entitle("On coffee")))
    await world.on()
    assert [one for one in native.down() if isinstance(one, Listed)] == []


async def test_a_renewed_token_bounds_the_list_that_is_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = Pass("owner", conversations={conversation_id(OTHER): Grant.READER})
    monkeypatch.setitem(PASSES, "narrow", elsewhere)
    world = World()
    owner, replica = await born(world.place)
    native = Native(world.place, lists=world.lists)
    await native.greet()
    await native.send(Watch(on=True))
    await turns(40)
    native.down()
    assert [len(listed.conversations) for listed in native.of(Listed)] == [1]
    native.taken.clear()
    await native.send(Hello(VERSION, "narrow", "test", None))
    await owner.membership.submit(replica.entitle("a title that the new token may not see"))
    await world.on()
    await world.on()
    native.down()
    assert native.of(Listed) == [Listed(whole=True, end=True, conversations=())]
    native.connection.leave()
    await world.lists.close()


async def test_a_list_without_conversations_is_said_too() -> None:
    native = Native(Place())
    await native.greet()
    await native.send(Watch(on=True))
    native.down()
    assert native.of(Listed) == [Listed(whole=True, end=True, conversations=())]
