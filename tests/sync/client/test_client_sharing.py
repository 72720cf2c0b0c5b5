"""The client against the real relay: others are let in and sent away, and lost logs come back."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from sync.relay_house import TOKEN, House

from crdt_llm import Client
from crdt_llm.errors import AuthenticationFailed, Forbidden, LocalMisuse, Refused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from crdt_llm.sync.client.client import Invitation, OpenConversation


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    folder = tmp_path / "house"
    folder.mkdir()
    async with House(folder) as house:
        yield house


class Pair:
    """An owner and a guest, both in one conversation."""

    def __init__(self, owner: Client, guest: Client, invitation: Invitation) -> None:
        self.owner = owner
        self.guest = guest
        self.invitation = invitation
        self.here: OpenConversation
        self.there: OpenConversation


@asynccontextmanager
async def pair(
    house: House, role: str = "writer", guest_data: Path | None = None
) -> AsyncIterator[Pair]:
    """An owner with a conversation, and a guest who came by the owner's link."""
    async with Client(house.url, token=TOKEN, device="owner's") as owner:
        here = await owner.create("A trip")
        await here.send("Hello")
        invitation = await here.invite(role)
        await here.synced_once()
        async with Client(house.url, token=invitation.token, data=guest_data) as guest:
            found = Pair(owner, guest, invitation)
            found.here, found.there = here, await guest.open(here.id)
            await found.there.synced_once()
            yield found


async def until(conversation: OpenConversation, condition: Callable[[], bool]) -> None:
    feed = conversation.changes()
    while not condition():
        await conversation.next_of(feed, lambda _: True)


def texts(conversation: OpenConversation) -> list[str]:
    return [entry.content for entry in conversation.view()]


async def test_a_guest_comes_by_a_link_and_takes_part(house: House) -> None:
    async with pair(house) as both:
        here, there = both.here, both.there
        assert texts(there) == ["Hello"]
        assert both.guest.principal == both.invitation.principal
        assert there.grant == "writer"
        assert both.invitation.link == (f"{house.url}#c={here.id}&token={both.invitation.token}")
        entry = await there.send("Hello to you")
        await until(here, lambda: texts(here) == ["Hello", "Hello to you"])
        assert here.entry(entry).born.author == both.invitation.principal
        assert here.members() == {"owner": "owner", both.invitation.principal: "writer"}
        (listed,) = await both.guest.list()
        assert (listed.id, listed.title, listed.role, listed.owner) == (
            here.id,
            "A trip",
            "writer",
            "owner",
        )
        with pytest.raises(Refused) as caught:
            await there.invite("writer")
        assert caught.value.code == "denied"


async def test_a_token_lets_nobody_in_elsewhere(house: House) -> None:
    async with pair(house) as both:
        secret = await both.owner.create("Not for guests")
        await secret.synced_once()
        await both.here.share(both.invitation.principal, "writer")
        attempt = await both.guest.open(secret.id)
        with pytest.raises(Forbidden):
            await attempt.synced_once()
        assert attempt.view() == ()
        await both.there.send("the other one goes on")
        await both.there.synced_once()


async def test_a_reader_writes_nothing_and_says_so_at_once(house: House) -> None:
    async with pair(house, "reader") as both:
        assert both.there.grant == "reader"
        with pytest.raises(LocalMisuse, match="the relay would refuse this"):
            await both.there.send("Let me say something")
        assert both.there.refused_writes == ()
        await both.here.send("Read this")
        await until(both.there, lambda: texts(both.there) == ["Hello", "Read this"])


async def test_what_a_right_was_lost_for_is_a_draft_that_can_be_sent_again(
    house: House, tmp_path: Path
) -> None:
    async with pair(house, guest_data=tmp_path / "guest") as both:
        here, there = both.here, both.there
        there.pause()
        first, second = await there.send("From the train"), await there.send("Still there")
        await here.share(both.invitation.principal, "reader")
        await here.synced_once()
        there.resume()
        await there.synced_once()
        assert texts(there) == ["Hello"]
        assert [one.text for one in there.refused_writes] == ["From the train", "Still there"]
        assert {one.code for one in there.refused_writes} == {"denied"}
        assert there.refused is None
        refused = there.refusal_of(first)
        assert refused is not None
        with pytest.raises(LocalMisuse, match="would refuse"):
            await there.resend(refused)
        assert there.refusal_of(first) == refused
        await here.share(both.invitation.principal, "writer")
        await until(there, lambda: there.members()[both.invitation.principal] == "writer")
        assert await there.resend(refused) == first
        await until(here, lambda: texts(here) == ["Hello", "From the train"])
        token, identity = both.invitation.token, here.id
    async with Client(house.url, token=token, data=tmp_path / "guest") as guest:
        again = await guest.open(identity)
        assert texts(again) == ["Hello", "From the train"]
        (left,) = again.refused_writes
        assert left.entry == second
        await again.discard(left)
        await again.synced_once()
    async with Client(house.url, token=token, data=tmp_path / "guest") as guest:
        assert (await guest.open(identity)).refused_writes == ()


async def test_whoever_was_invited_can_be_sent_away(house: House) -> None:
    async with pair(house) as both:
        await both.here.revoke(both.invitation.id)
        house.look_at_tokens()
        with pytest.raises(AuthenticationFailed):
            await until(both.there, lambda: False)
        both.there.resume()
        with pytest.raises(AuthenticationFailed):
            await both.there.synced_once()
        assert texts(both.there) == ["Hello"]  # what was read was read
        await both.here.send("Now we are alone")
        await both.here.synced_once()


async def test_whose_right_ends_may_not_stay(house: House) -> None:
    async with pair(house) as both:
        await both.here.share(both.invitation.principal, None)
        with pytest.raises(Forbidden):
            await until(both.there, lambda: False)
        assert await both.guest.list() == ()


async def test_one_can_leave_but_for_who_made_it(house: House) -> None:
    async with pair(house) as both:
        with pytest.raises(LocalMisuse, match="archive it instead"):
            await both.here.leave()
        watch = both.guest.watch()
        assert len(await anext(watch)) == 1
        await both.there.leave()
        await until(both.here, lambda: both.invitation.principal not in both.here.members())
        assert await anext(watch) == ()
        with pytest.raises(Forbidden):
            await until(both.there, lambda: False)


async def test_a_conversation_is_put_away_for_oneself_alone(house: House) -> None:
    async with pair(house) as both:
        watch = both.guest.watch()
        (line,) = await anext(watch)
        assert not line.archived
        await both.there.archive()
        (line,) = await anext(watch)
        assert line.archived
        assert [one.archived for one in await both.owner.list()] == [False]
        await both.guest.archive(both.there.id, archived=False)
        (line,) = await anext(watch)
        assert not line.archived
        with pytest.raises(Refused) as caught:
            await both.guest.archive("A" * 22)
        assert caught.value.code == "denied"


async def test_the_list_follows_titles_and_new_conversations(house: House) -> None:
    async with Client(house.url, token=TOKEN) as one, Client(house.url, token=TOKEN) as two:
        watch = two.watch()
        assert await anext(watch) == ()
        here = await one.create("First")
        lines: tuple[str, ...] = ()
        while lines != ("First",):
            lines = tuple(line.title for line in await anext(watch))
        await here.rename("Renamed")
        while lines != ("Renamed",):
            lines = tuple(line.title for line in await anext(watch))


@pytest.mark.parametrize("first", ["owner", "guest"])
async def test_whoever_comes_first_brings_a_lost_log_back(house: House, first: str) -> None:
    async with pair(house) as both:
        here, there = both.here, both.there
        await there.send("From the guest")
        await until(here, lambda: len(here.view()) == 2)
        await house.stop()
        await until(here, lambda: not here.online)
        await until(there, lambda: not there.online)
        here.pause()
        there.pause()
        offline = await there.send("Meanwhile")
        house.lose("log")
        await house.start()
        early, late = (here, there) if first == "owner" else (there, here)
        for conversation in (early, late):
            conversation.resume()
            await conversation.synced_once()
        await until(here, lambda: offline in here.document.tree)
        assert texts(here) == texts(there) == ["Hello", "From the guest", "Meanwhile"]
        assert here.refused_writes == there.refused_writes == ()
        async with Client(house.url, token=TOKEN) as fresh:
            witness = await fresh.open(here.id)
            await witness.synced_once()
            assert witness.title == "A trip"
            assert witness.members() == here.members()
            assert texts(witness) == texts(here)
            (line,) = await fresh.list()
            assert (line.title, line.role) == ("A trip", "owner")


async def test_a_right_that_was_taken_stays_taken_though_the_log_is_lost(house: House) -> None:
    """The register knows: a guest's old copy gives back no right."""
    async with pair(house) as both:
        here, there = both.here, both.there
        there.pause()
        await here.share(both.invitation.principal, None)
        await here.synced_once()
        await house.stop()
        await until(here, lambda: not here.online)
        here.pause()
        house.lose("log")
        await house.start()
        there.resume()
        with pytest.raises(Forbidden):
            await there.synced_once()
        here.resume()
        await here.synced_once()
        assert both.invitation.principal not in here.members()
