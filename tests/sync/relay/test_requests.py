from __future__ import annotations

import asyncio
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from sync.device import BIRTH, CONVERSATION
from sync.native import Native
from sync.rooms import Place, born, turns

from crdt_llm.document.schema import Grant
from crdt_llm.errors import StoreFailed
from crdt_llm.store.archive import Archive
from crdt_llm.store.token_ledger import TokenLedger
from crdt_llm.sync.relay.access import Authority, Pass
from crdt_llm.sync.relay.conversation_list import ConversationLists
from crdt_llm.sync.relay.requests import INVITES_PER_MINUTE, REQUESTS_PER_SECOND, Requests
from crdt_llm.sync.wire.frames import Answer, Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sync.device import Device


class World:
    """A conversation with an owner, and whoever asks for something."""

    def __init__(self, path: Path) -> None:
        self.place = Place()
        self.archive = Archive.open(None)
        self.lists = ConversationLists(self.place.hub, self.archive, clock=lambda: 1_000)
        self.ledger = TokenLedger.open(path / "tokens.db")
        self.authority = Authority("owners", b"s" * 32, self.ledger, clock=lambda: 1_000)
        self.now_s = 0.0
        self.requests = Requests(self.lists, self.authority, clock=lambda: self.now_s)
        self.device: Device

    async def ask(self, principal: str | Pass, request: str, /, **arguments: Any) -> Answer:
        found = Pass(principal) if isinstance(principal, str) else principal
        return await self.requests.answer(found, Request(7, request, arguments))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    owner, world.device = await born(world.place)
    await owner.membership.submit(world.device.grant("friend", Grant.WRITER))
    yield world
    await world.lists.close()
    world.ledger.close()
    world.archive.close()


async def test_a_conversation_is_put_away_and_taken_back(world: World) -> None:
    for archived in (True, False):
        answer = await world.ask("friend", "archive", conversation=CONVERSATION, archived=archived)
        assert answer == Answer(7, {}, "", "")
        assert world.archive.of("friend") == ({CONVERSATION} if archived else set())


async def test_an_owner_invites_and_the_token_is_for_that_conversation(world: World) -> None:
    answer = await world.ask(
        "owner", "invite", conversation=CONVERSATION, role="reader", expires_at=2_000, name=None
    )
    assert answer.values is not None
    found = world.authority.authenticate(answer.values["token"])
    assert found == Pass(
        answer.values["principal"],
        answer.values["id"],
        2_000,
        conversations={CONVERSATION: Grant.READER},
    )
    assert found.principal.startswith("guest:")


async def test_whoever_owns_the_conversation_or_the_relay_revokes(world: World) -> None:
    for principal in ("owner", BIRTH.owner):
        made = await world.ask("owner", "invite", conversation=CONVERSATION, role="writer")
        assert made.values is not None
        answer = await world.ask(principal, "revoke", id=made.values["id"])
        assert answer.code == ""
        assert world.authority.authenticate(made.values["token"]) is None


async def test_other_owners_revoke_only_what_is_for_their_own(world: World) -> None:
    scoped = Pass("owner", "id", None, conversations={CONVERSATION: Grant.OWNER})
    made = await world.ask("owner", "invite", conversation=CONVERSATION, role="writer")
    _, everywhere = world.authority.issue("ada")
    assert made.values is not None
    assert (await world.ask("friend", "revoke", id=made.values["id"])).code == "denied"
    assert (await world.ask(scoped, "revoke", id=everywhere.id)).code == "denied"
    assert (await world.ask(scoped, "revoke", id="no-such-token")).code == "denied"
    assert (await world.ask(scoped, "revoke", id=made.values["id"])).code == ""


@pytest.mark.parametrize("principal", ["friend", "stranger"])
async def test_only_an_owner_invites(world: World, principal: str) -> None:
    answer = await world.ask(principal, "invite", conversation=CONVERSATION, role="writer")
    assert (answer.values, answer.code) == (None, "denied")
    capped = Pass("owner", "id", None, conversations={CONVERSATION: Grant.WRITER})
    answer = await world.ask(capped, "invite", conversation=CONVERSATION, role="writer")
    assert answer.code == "denied"


async def test_strangers_put_nothing_away(world: World) -> None:
    answer = await world.ask("stranger", "archive", conversation=CONVERSATION, archived=True)
    assert answer.code == "denied"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("archive", {}),
        ("archive", {"conversation": CONVERSATION, "archived": 1}),
        ("archive", {"conversation": "short", "archived": True}),
        ("archive", {"conversation": 5, "archived": True}),
        ("invite", {"conversation": CONVERSATION, "role": "owner"}),
        ("invite", {"conversation": CONVERSATION, "role": "writer", "expires_at": "soon"}),
        ("invite", {"conversation": CONVERSATION, "role": "writer", "expires_at": 1}),
        ("invite", {"conversation": CONVERSATION, "role": "writer", "expires_at": 2**53}),
        ("invite", {"conversation": CONVERSATION, "role": "writer", "expires_at": 2**63}),
        ("invite", {"conversation": CONVERSATION, "role": "writer", "name": "x" * 201}),
        ("revoke", {"id": None}),
    ],
)
async def test_what_makes_no_sense_is_said(
    world: World, name: str, arguments: dict[str, Any]
) -> None:
    answer = await world.ask("owner", name, **arguments)
    assert (answer.values, answer.code) == (None, "invalid")
    assert answer.reason


async def test_an_invitation_says_when_it_ends_and_notes_whom_it_is_for(world: World) -> None:
    answer = await world.ask(
        "owner", "invite", conversation=CONVERSATION, role="reader", name="my aunt"
    )
    assert answer.values is not None
    found = world.authority.authenticate(answer.values["token"])
    assert found is not None
    assert found.expires_at == answer.values["expires_at"] > 1_000
    (line,) = world.ledger.issued()
    assert (line.inviter, line.name) == ("owner", "my aunt")


@pytest.mark.parametrize(
    ("name", "count", "again_s"),
    [("invite", INVITES_PER_MINUTE, 6.0), ("archive", REQUESTS_PER_SECOND, 0.1)],
)
async def test_who_asks_too_often_waits(
    world: World, name: str, count: int, again_s: float
) -> None:
    given = {"role": "reader"} if name == "invite" else {"archived": True}

    async def ask(principal: str = "owner") -> str:
        return (await world.ask(principal, name, conversation=CONVERSATION, **given)).code

    assert [await ask() for _ in range(count + 1)] == [""] * count + ["unavailable"]
    assert await ask("friend") != "unavailable"
    world.now_s += again_s
    assert [await ask() for _ in range(2)] == ["", "unavailable"]


async def test_nobody_waits_for_another_process_that_holds_the_files(
    world: World, tmp_path: Path
) -> None:
    other = sqlite3.connect(tmp_path / "tokens.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    inviting = asyncio.ensure_future(
        world.ask("owner", "invite", conversation=CONVERSATION, role="reader")
    )
    await turns()
    assert world.ledger._file._waiting == 1
    assert not world.ledger.is_revoked("any")
    assert not inviting.done()
    other.execute("COMMIT")
    other.close()
    assert (await inviting).code == ""


async def test_an_unknown_request_is_answered(world: World) -> None:
    assert (await world.ask("owner", "dance")).code == "unknown"


async def test_a_failing_store_says_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise StoreFailed("the disk is full")

    monkeypatch.setattr(world.archive, "put", fail)
    answer = await world.ask("owner", "archive", conversation=CONVERSATION, archived=True)
    assert answer.code == "unavailable"


async def test_without_an_authority_no_tokens_are_issued(world: World) -> None:
    world.requests = Requests(world.lists)
    answer = await world.ask("owner", "invite", conversation=CONVERSATION, role="writer")
    assert answer.code == "invalid"


async def test_requests_travel_in_frames(world: World) -> None:
    native = Native(world.place, requests=world.requests)
    await native.greet()
    arguments = {"conversation": CONVERSATION, "archived": True}
    await native.send(Request(5, "archive", arguments), Request(6, "dance", {}))
    assert [(one.id, one.code) for one in native.down() if isinstance(one, Answer)] == [
        (5, ""),
        (6, "unknown"),
    ]


async def test_without_requests_they_are_answered_too() -> None:
    native = Native(Place())
    await native.greet()
    await native.send(Request(5, "archive", {}))
    (answer,) = native.down()
    assert isinstance(answer, Answer)
    assert answer.code == "unknown"
