from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from sync.device import BIRTH, CONVERSATION
from sync.native import IDENTITY, PASSES, Native, device, open_frame, update_frame
from sync.rooms import Place, born, turns

from crdt_llm.document.conversation import EMPTY_UPDATE
from crdt_llm.document.schema import Birth, Grant, conversation_id
from crdt_llm.sync.relay import channel_peer as channel_peer_module
from crdt_llm.sync.relay import outbox as outbox_module
from crdt_llm.sync.relay.access import Pass
from crdt_llm.sync.relay.native_session import LEFT
from crdt_llm.sync.relay.plain_peer import RemotePeer
from crdt_llm.sync.room import seats as seats_module
from crdt_llm.sync.room.refusal_rate import REFUSALS_FREE, RefusalRate
from crdt_llm.sync.room.room import STORE_PAUSE_FIRST_S, STORE_PAUSE_MAX_S
from crdt_llm.sync.wire.frames import (
    Ack,
    Change,
    Closed,
    Code,
    Hello,
    Leave,
    Nack,
    Opened,
    Presence,
    Pull,
    Renew,
    Restore,
    State,
    Welcome,
)
from crdt_llm.sync.wire.verdict import CloseCode
from crdt_llm.sync.wire.y_websocket import AwarenessState, AwarenessUpdate, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from sync.native import NativeDevice


async def greeted(place: Place, token: str = "owner") -> Native:  # noqa: S107 - a test's own
    native = Native(place, token)
    await native.greet()
    return native


async def opened(
    place: Place,
    seed: int,
    token: str = "owner",  # noqa: S107 - a test's own
) -> tuple[Native, NativeDevice]:
    native, replica = await greeted(place, token), device(seed, token)
    await native.send(open_frame())
    await turns()
    replica.hear(native.down())
    return native, replica


async def test_a_hello_is_answered_with_who_and_where_this_is() -> None:
    native = Native(Place())
    assert await native.greet() == Welcome(1, "owner", IDENTITY.key, None, IDENTITY.log)


async def test_the_token_of_the_handshake_counts_if_the_hello_has_none() -> None:
    native = Native(Place(), None)
    native.connection._came_with = "friend"
    assert (await native.greet()).principal == "friend"


@pytest.mark.parametrize("token", [None, "", "wrong"])
async def test_without_its_token_nobody_is_welcome(token: str | None) -> None:
    native = Native(Place(), token)
    await native.send(Hello(1, token, "test", None))
    assert native.down() == []
    assert native.connection.close_code is CloseCode.UNAUTHENTICATED


async def test_a_node_needs_a_nodes_token() -> None:
    native = Native(Place())
    await native.send(Hello(1, "owner", "test", b"n" * 32))
    assert native.connection.close_code is CloseCode.UNAUTHENTICATED


async def test_a_renewal_may_not_change_the_principal() -> None:
    native = await greeted(Place())
    await native.send(Hello(1, "owner", "test", None))
    native.down()
    assert len(native.of(Welcome)) == 2
    await native.send(Hello(1, "friend", "test", None))
    assert native.connection.close_code is CloseCode.UNAUTHENTICATED


async def test_a_conversation_begins_and_two_devices_share_it() -> None:
    place = Place()
    (a, one), (b, two) = await opened(place, 1), await opened(place, 2)
    assert a.of(Opened)[0].grant is None
    await a.send(update_frame(1, one.give_birth()), update_frame(2, one.say("hello")))
    await turns()
    a.down()
    two.hear(b.down())
    assert two.texts == ["hello"]
    assert a.of(Ack)[-1] == Ack(1, 2, place.durable)
    assert a.of(Change) == []
    _, three = await opened(place, 3)
    assert three.texts == ["hello"]


async def test_an_opening_says_what_the_relay_has_and_what_one_may_do() -> None:
    place = Place()
    owner, replica = await born(place)
    await owner.membership.submit(replica.grant("friend", Grant.READER))
    native, _ = await opened(place, 1, "friend")
    (answer,) = native.of(Opened)
    assert (answer.grant, answer.lsn, answer.log) == ("reader", 2, IDENTITY.log)
    assert answer.state_vector == replica.replica.state_vector()
    assert not answer.behind


async def test_who_was_away_for_a_moment_gets_what_the_log_has_since() -> None:
    place = Place()
    owner, replica = await born(place)
    _, away = await opened(place, 1)
    lsn = place.durable
    await owner.membership.submit(replica.say("meanwhile"))
    native = await greeted(place)
    await native.send(open_frame(log=IDENTITY.log, lsn=lsn))
    await turns()
    frames = native.down()
    assert (
        len(native.of(Opened)[0].update) <= len(replica.written[-1]) < len(replica.replica.diff())
    )
    away.hear(frames)
    assert away.texts == ["meanwhile"]
    await native.send(Leave(1), open_frame(log=IDENTITY.log, lsn=lsn + 1))
    await turns()
    native.down()
    assert native.of(Opened)[1].update == EMPTY_UPDATE


@pytest.mark.parametrize(("log", "lsn"), [("another", 1), (None, 1), (IDENTITY.log, 99)])
async def test_what_another_log_says_is_not_trusted(log: str | None, lsn: int) -> None:
    place = Place()
    _, replica = await born(place)
    native = await greeted(place)
    await native.send(open_frame(log=log, lsn=lsn))
    await turns()
    fresh = device(1)
    fresh.hear(native.down())
    assert fresh.replica.state_vector() == replica.replica.state_vector()


async def test_an_unknown_place_in_the_log_falls_back_to_the_state_vector() -> None:
    place = Place()
    _, replica = await born(place)
    native = await greeted(place)
    vector = replica.replica.state_vector()
    await native.send(open_frame(log="another", lsn=1, state_vector=vector))
    await turns()
    native.down()
    assert native.of(Opened)[0].update == EMPTY_UPDATE


async def test_a_refusal_is_whole_and_the_channel_goes_on() -> None:
    place = Place()
    await born(place)
    (a, one), (b, _) = await opened(place, 1), await opened(place, 2)
    forged = one.forge()
    await a.send(update_frame(1, forged))
    fresh = device(3)
    fresh.hear(a.taken)
    await a.send(update_frame(2, fresh.say("still here")))
    await turns()
    a.down()
    (nack,) = a.of(Nack)
    assert (nack.id, nack.code, nack.rule, nack.retry_ms) == (1, Code.INVALID, "schema", None)
    assert [ack.id for ack in a.of(Ack)] == [2]
    assert len([one for one in b.down() if isinstance(one, Change)]) == 1
    assert a.connection.close_code is None


async def test_a_reader_may_not_write_and_hears_why() -> None:
    place = Place()
    owner, replica = await born(place)
    await owner.membership.submit(replica.grant("friend", Grant.READER))
    native, friend = await opened(place, 1, "friend")
    await native.send(update_frame(1, friend.say("not allowed")))
    await turns()
    native.down()
    assert [nack.code for nack in native.of(Nack)] == [Code.DENIED]


async def test_what_is_no_update_is_refused_without_an_end() -> None:
    place = Place()
    await born(place)
    native, _ = await opened(place, 1)
    await native.send(update_frame(1, b"\1\2\3"))
    await turns()
    native.down()
    assert [(one.code, one.rule) for one in native.of(Nack)] == [(Code.INVALID, "malformed")]


async def test_a_gap_says_what_the_relay_has() -> None:
    place = Place()
    await born(place)
    native, replica = await opened(place, 1)
    known = native.of(Opened)[0].state_vector
    replica.say("lost on the way")
    await native.send(update_frame(1, replica.say("arrives")))
    await turns()
    native.down()
    (nack,) = native.of(Nack)
    assert (nack.code, nack.state_vector) == (Code.GAP, known)
    await native.send(update_frame(2, replica.replica.diff(known)))
    await turns()
    native.down()
    assert [ack.id for ack in native.of(Ack)] == [2]


async def test_known_updates_are_acknowledged_and_passed_on_to_nobody() -> None:
    place = Place()
    await born(place)
    (a, one), (b, _) = await opened(place, 1), await opened(place, 2)
    update = one.say("once")
    for number in (1, 2, 3):
        await a.send(update_frame(number, update))
        await turns()
    a.down()
    b.down()
    assert a.of(Ack)[-1].id == 3
    assert len(b.of(Change)) == 1


async def test_acknowledgements_that_wait_become_one() -> None:
    place = Place()
    await born(place)
    native, replica = await opened(place, 1)
    for number in range(1, 20):
        await native.send(update_frame(number, replica.say("x")))
    await turns(100)
    native.down()
    assert [ack.id for ack in native.of(Ack)] == [19]


async def test_nothing_is_acknowledged_or_shown_before_it_is_durable() -> None:
    place = Place()
    await born(place)
    (a, one), (b, _) = await opened(place, 1), await opened(place, 2)
    place.gate.clear()
    await a.send(update_frame(1, one.say("not yet")))
    await turns()
    assert a.down() == b.down() == []
    place.gate.set()
    await turns()
    assert [type(frame) for frame in a.down() + b.down()] == [Ack, Change]


async def test_leaving_is_answered_and_the_number_is_free() -> None:
    place = Place()
    await born(place)
    native, replica = await opened(place, 1)
    await native.send(Leave(1), update_frame(1, replica.say("too late")), Leave(1), open_frame())
    await turns()
    assert [type(frame) for frame in native.down()] == [Closed, Opened]
    assert native.of(Closed) == [Closed(1, LEFT, "left")]
    assert place.durable == 1


async def test_a_channel_may_be_left_before_it_opened() -> None:
    place = Place()
    await born(place)
    native = await greeted(place)
    await native.send(open_frame(), Leave(1))
    await turns()
    assert native.down() == [Closed(1, LEFT, "left")]
    (room,) = place.hub._rooms.values()
    assert len(room._seats._seats) == 1


async def test_one_connection_holds_many_conversations() -> None:
    place = Place()
    native, births = await greeted(place), [Birth("owner", bytes([n]) * 16) for n in range(5)]
    devices = [device(n) for n in range(5)]
    for n, birth in enumerate(births):
        await native.send(open_frame(n, conversation=conversation_id(birth)))
    await turns(50)
    native.down()
    for n, birth in enumerate(births):
        await native.send(update_frame(1, devices[n].give_birth(birth), n))
    await turns(50)
    native.down()
    assert sorted((ack.channel, ack.id) for ack in native.of(Ack)) == [(n, 1) for n in range(5)]


async def test_a_stranger_is_closed_out_of_one_conversation_only() -> None:
    place = Place()
    await born(place)
    native = await greeted(place, "stranger")
    own = Birth("stranger", b"another 16 bytes")
    await native.send(open_frame(1), open_frame(2, conversation=conversation_id(own)))
    await turns()
    native.down()
    assert [(one.channel, one.code) for one in native.of(Closed)] == [(1, CloseCode.FORBIDDEN)]
    assert [one.channel for one in native.of(Opened)] == [2]


async def test_a_tokens_scope_bounds_where_and_what(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place()
    await born(place)
    scoped = Pass("owner", "id", None, conversations={CONVERSATION: Grant.READER})
    monkeypatch.setitem(PASSES, "owner", scoped)
    native, replica = await opened(place, 1)
    assert native.of(Opened)[0].grant == "reader"
    other = conversation_id(Birth("owner", b"another 16 bytes"))
    await native.send(open_frame(2, conversation=other), update_frame(1, replica.say("no")))
    await turns()
    native.down()
    assert [(one.channel, one.code) for one in native.of(Closed)] == [(2, CloseCode.FORBIDDEN)]
    assert [one.code for one in native.of(Nack)] == [Code.DENIED]


async def test_a_renewed_token_bounds_what_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place()
    await born(place)
    native, replica = await opened(place, 1)
    other = conversation_id(Birth("owner", b"another 16 bytes"))
    await native.send(open_frame(2, conversation=other))
    await turns()
    scoped = Pass("owner", "id", None, conversations={CONVERSATION: Grant.READER})
    monkeypatch.setitem(PASSES, "owner", scoped)
    await native.greet()
    await native.send(update_frame(1, replica.say("no")))
    await turns()
    native.down()
    assert [(one.channel, one.code) for one in native.of(Closed)] == [(2, CloseCode.FORBIDDEN)]
    assert [one.code for one in native.of(Nack)] == [Code.DENIED]


async def test_who_loses_the_right_hears_nothing_of_what_took_it() -> None:
    place = Place()
    owner, replica = await born(place)
    await owner.membership.submit(replica.grant("friend", Grant.READER))
    native, _ = await opened(place, 1, "friend")
    await owner.membership.submit(replica.grant("friend", None))
    await turns()
    assert [type(frame) for frame in native.down()] == [Closed]
    assert native.of(Closed)[0].code == CloseCode.FORBIDDEN


async def test_what_is_not_durable_may_come_again_later() -> None:
    place = Place()
    await born(place)
    native, replica = await opened(place, 1)
    place.failing = True
    update = replica.say("kept by its author")
    await native.send(update_frame(1, update), update_frame(2, replica.say("and this")))
    await turns()
    native.down()
    first, second = native.of(Nack)
    assert (first.id, first.code, first.state_vector) == (1, Code.UNAVAILABLE, None)
    assert first.reason == "the store cannot be used now"
    assert second == replace(first, id=2)
    assert not native.of(Ack)
    for failure in range(1, 7):  # from the second on nothing is tried for a while
        pause_s = min(STORE_PAUSE_FIRST_S * 2 ** (failure - 1), STORE_PAUSE_MAX_S)
        assert native.of(Nack)[-1].retry_ms == 1000 * pause_s
        place.now += pause_s
        await native.send(update_frame(2 + failure, update))
        await turns()
        native.down()
    place.failing = False
    await native.send(update_frame(9, update))
    await turns()
    native.down()
    assert "not take writes now" in native.of(Nack)[-1].reason
    place.now += STORE_PAUSE_MAX_S
    await native.send(*(update_frame(10 + n, one) for n, one in enumerate(replica.written)))
    await turns()
    native.down()
    assert native.of(Ack)[-1].id == 9 + len(replica.written)
    assert not native.of(Closed)


async def test_a_slow_reader_gets_everything_at_once_and_verdicts_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox_module, "WAITING_BYTES_MAX", 2_000)
    place = Place()
    owner, theirs = await born(place)
    native, replica = await opened(place, 1)
    for _ in range(5):
        await owner.membership.submit(theirs.say("x" * 800))
    await native.send(update_frame(1, replica.say("my own")))
    await turns()
    frames = native.down()
    await turns()
    frames += native.down()
    assert [type(frame) for frame in frames] == [State, Ack]
    state, ack = native.of(State)[0], native.of(Ack)[0]
    assert state.lsn >= ack.lsn
    replica.hear(frames)
    assert len(replica.texts) == 6
    await owner.membership.submit(theirs.say("afterwards"))
    replica.hear(native.down())
    assert replica.texts[-1] == "afterwards"


async def test_a_pull_is_answered_with_all_that_lacks() -> None:
    place = Place()
    owner, theirs = await born(place)
    await owner.membership.submit(theirs.say("something"))
    native, _ = await opened(place, 1)
    await native.send(Pull(1, b"\0"))
    await turns()
    (state,) = native.down()
    assert isinstance(state, State)
    fresh = device(2)
    fresh.hear([state])
    assert fresh.texts == ["something"]


async def test_presence_crosses_the_dialects() -> None:
    place = Place()
    await born(place)
    native, _ = await opened(place, 1)
    plain = RemotePeer("owner", lambda: None)
    await place.hub.enter(CONVERSATION, plain)
    state = AwarenessState(77, 1, json.dumps({"device": "phone"}))
    await native.send(Presence(1, (state,)))
    heard = []
    while (frame := plain.take()) is not None:
        heard.append(decode(frame))
    assert heard[-1] == AwarenessUpdate((state,))
    assert native.down() == []
    theirs = AwarenessState(78, 1, json.dumps({"device": "page"}))
    await plain.receive(encode(AwarenessUpdate((theirs,))))
    assert native.down() == [Presence(1, (theirs,))]
    native.connection.leave()
    while (frame := plain.take()) is not None:
        heard.append(decode(frame))
    (last,) = [one for one in heard[-1:] if isinstance(one, AwarenessUpdate)]
    assert AwarenessState(77, 1, None) in last.states


async def test_who_opens_hears_who_is_here_after_it_is_open() -> None:
    place = Place()
    await born(place)
    first, _ = await opened(place, 1)
    await first.send(Presence(1, (AwarenessState(77, 1, "{}"),)))
    second = await greeted(place)
    await second.send(open_frame())
    await turns()
    assert [type(frame) for frame in second.down()] == [Opened, Presence]


async def test_only_nodes_speak_of_leases() -> None:
    native = await greeted(Place())
    await native.send(Renew())
    assert native.connection.close_code is CloseCode.FORBIDDEN


async def test_a_client_brings_back_what_the_relay_lost() -> None:
    place = Place()
    owner, theirs = await born(place)
    await owner.membership.submit(theirs.say("kept by a client"))
    native, replica = await opened(place, 1)
    native.connection.leave()
    place = Place()
    again = await greeted(place)
    vector = replica.replica.state_vector()
    await again.send(open_frame(log="the lost one", lsn=2, state_vector=vector))
    await turns()
    again.down()
    lacks = again.of(Opened)[0].state_vector
    await again.send(Restore(1, 1, replica.replica.diff(lacks)))
    await turns()
    again.down()
    assert [ack.id for ack in again.of(Ack)] == [1]
    _, other = await opened(place, 2)
    assert other.texts == ["kept by a client"]


async def test_a_reader_that_does_not_read_is_not_read_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox_module, "WAITING_BYTES_MAX", 300)
    place = Place()
    await born(place)
    native, _ = await opened(place, 1)

    async def send_all() -> None:
        for number in range(1, 100):
            await native.send(update_frame(number, b"\1\2\3"))

    sending = asyncio.ensure_future(send_all())
    await turns(500)
    assert not sending.done()
    while not sending.done():
        native.down()
        await turns()
    native.down()
    assert [nack.id for nack in native.of(Nack)] == list(range(1, 100))


async def test_a_connection_that_goes_leaves_every_room() -> None:
    place = Place()
    await born(place)
    native, _ = await opened(place, 1)
    await native.send(open_frame(2, conversation=conversation_id(Birth("owner", b"o" * 16))))
    native.connection.leave()
    await turns()
    assert sum(len(room._seats._seats) for room in place.hub._rooms.values()) == 1
    assert native.connection.take() is None


async def test_flooding_one_channel_waits_for_its_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats_module, "UNSETTLED_MAX", 2)
    place = Place()
    await born(place)
    native, replica = await opened(place, 1)
    place.gate.clear()
    await native.send(*[update_frame(n, replica.say("x")) for n in (1, 2)])
    waiting = asyncio.ensure_future(native.send(update_frame(3, replica.say("x"))))
    await turns()
    assert not waiting.done()
    place.gate.set()
    await waiting
    await turns()
    native.down()
    assert native.of(Ack)[-1].id == 3


class Held:
    """A place whose refusals wait until the test lets them go."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []
        self.now = 0.0
        self.place = Place(refusals=RefusalRate(lambda: self.now, later=self._later))

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self.calls.append((self.now + seconds, call))

    async def release(self) -> None:
        while self.calls:
            due = min(self.calls, key=lambda one: one[0])
            self.calls.remove(due)
            self.now = due[0]
            due[1]()
            await turns()

    async def flooded(self, count: int) -> tuple[Native, NativeDevice]:
        """A writer that was refused too often, and has no room left."""
        await born(self.place)
        native = Native(self.place, clock=lambda: self.place.now)
        await native.greet()
        replica = device(1)
        await native.send(open_frame())
        await turns()
        replica.hear(native.down())
        for number in range(1, count + 1):
            await native.send(update_frame(number, b"\1\2\3"))
            if number <= REFUSALS_FREE + 1:
                await turns()
        native.down()
        self.place.now += channel_peer_module.PATIENCE_S + 1
        return native, replica


async def test_a_channel_that_is_held_does_not_hold_up_the_others() -> None:
    held = Held()
    full = REFUSALS_FREE + seats_module.UNSETTLED_MAX
    native, replica = await held.flooded(full)
    other = Birth("owner", b"another 16 bytes")
    await native.send(update_frame(full + 1, replica.say("behind it")))
    await native.send(open_frame(2, conversation=conversation_id(other)))
    await turns()
    await native.send(Pull(2, b"\0"))
    await turns()
    native.down()
    assert [opened.channel for opened in native.of(Opened)] == [1, 2]
    assert [state.channel for state in native.of(State)] == [2]
    assert native.of(Closed) == []

    await held.release()
    native.down()
    nacks = [nack for nack in native.of(Nack) if nack.channel == 1]
    assert [nack.id for nack in nacks] == list(range(1, full + 2))
    assert (nacks[-1].code, nacks[-1].retry_ms) == (Code.RATE_LIMITED, channel_peer_module.RETRY_MS)
    assert {nack.code for nack in nacks[:-1]} == {Code.INVALID}
    await native.send(update_frame(full + 2, replica.written[-1]))
    await turns()
    await held.release()
    native.down()
    assert native.of(Ack)[-1].id == full + 2


async def test_whoever_sends_on_and_on_is_closed_out_of_that_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_peer_module, "PUT_OFF_MAX", 2)
    held = Held()
    full = REFUSALS_FREE + seats_module.UNSETTLED_MAX
    native, _ = await held.flooded(full)
    for number in range(full + 1, full + 4):
        await native.send(update_frame(number, b"\1\2\3"))
    native.down()
    assert [(closed.channel, closed.code) for closed in native.of(Closed)] == [(1, 1013)]
    assert native.connection.close_code is None
    await held.release()


def test_the_births_of_these_tests_are_the_owners() -> None:
    assert BIRTH.owner in PASSES
