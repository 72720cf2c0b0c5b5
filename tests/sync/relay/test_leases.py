"""Who holds which lease, and for how long: the desk alone, then at work."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from crdt_llm.document.chain import lease_message
from crdt_llm.document.keys import SigningKey, verify
from crdt_llm.errors import StoreFailed
from crdt_llm.sync.relay.leases import (
    Ended,
    Grant,
    LeaseDesk,
    LeaseOffice,
    Vacant,
    Wait,
)
from crdt_llm.sync.wire.lease import Granted

if TYPE_CHECKING:
    from crdt_llm.sync.relay.leases import LeaseEvent

TTL_S = 10.0
HERE = "c" * 22
RELAY_KEY = SigningKey(bytes(32))


@dataclass(eq=False)
class Node:
    """One connection of a node; remembers what it was told."""

    node: bytes
    embedded: bool = False
    told: list[Granted | str] = field(default_factory=list)

    def leased(self, lease: Granted) -> None:
        self.told.append(lease)

    def unleased(self, conversation: str, retry_s: float, reason: str) -> None:
        assert conversation == HERE
        assert retry_s >= 0
        self.told.append(reason)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(clock: Clock) -> LeaseDesk:
    return LeaseDesk(clock, TTL_S)


@pytest.fixture
def first() -> Node:
    return Node(b"1" * 32)


@pytest.fixture
def second() -> Node:
    return Node(b"2" * 32)


def granted(desk: LeaseDesk, events: list[LeaseEvent]) -> Node:
    """Carry out the one grant among events; answers who got it."""
    grants = [event for event in events if isinstance(event, Grant)]
    assert len(grants) == 1
    assert desk.confirm(grants[0])
    holder = grants[0].holder
    assert isinstance(holder, Node)
    return holder


def kinds(events: list[LeaseEvent]) -> list[type[LeaseEvent]]:
    return [type(event) for event in events]


def test_the_first_who_asks_gets_a_new_epoch(desk: LeaseDesk, first: Node) -> None:
    events = desk.want(HERE, first)
    (grant,) = events
    assert isinstance(grant, Grant)
    assert granted(desk, events) is first
    assert desk.holder(HERE) is first
    assert desk.held(first) == (HERE,)


def test_who_comes_later_waits_and_gets_it_unasked_when_the_ttl_is_over(
    desk: LeaseDesk, clock: Clock, first: Node, second: Node
) -> None:
    granted(desk, desk.want(HERE, first))
    clock.now = 4.0
    (wait,) = desk.want(HERE, second)
    assert wait == Wait(HERE, second, 6.0, "another node has the lease")
    clock.now = 9.99
    assert desk.tick() == []
    clock.now = 10.0
    events = desk.tick()
    assert kinds(events) == [Ended, Grant]
    assert granted(desk, events) is second


def test_who_asks_first_after_a_lease_ran_out_unnoticed_holds_it(
    desk: LeaseDesk, clock: Clock, first: Node, second: Node
) -> None:
    (granted,) = desk.want(HERE, first)
    assert isinstance(granted, Grant)
    assert desk.confirm(granted)
    desk.lost(first)
    clock.now += TTL_S + 1.0  # and nobody ticks in between
    (grant,) = (event for event in desk.want(HERE, second) if isinstance(event, Grant))
    assert desk.confirm(grant)
    assert desk.holder(HERE) is second


def test_renewing_keeps_a_lease_and_too_late_is_too_late(
    desk: LeaseDesk, clock: Clock, first: Node, second: Node
) -> None:
    granted(desk, desk.want(HERE, first))
    for now in (3.0, 12.0, 21.0):
        clock.now = now
        assert desk.renew(first) == []
    assert desk.next_at == 31.0
    desk.want(HERE, second)
    clock.now = 31.0
    events = desk.renew(first)
    assert kinds(events) == [Ended, Grant]
    assert granted(desk, events) is second


def test_what_is_given_back_is_passed_on_at_once(
    desk: LeaseDesk, first: Node, second: Node
) -> None:
    granted(desk, desk.want(HERE, first))
    desk.want(HERE, second)
    events = desk.give_back(HERE, first)
    assert kinds(events) == [Ended, Grant]
    assert granted(desk, events) is second
    assert kinds(desk.give_back(HERE, second)) == [Ended]
    assert desk.holder(HERE) is None


def test_who_gave_up_waiting_gets_nothing(desk: LeaseDesk, first: Node, second: Node) -> None:
    granted(desk, desk.want(HERE, first))
    desk.want(HERE, second)
    assert desk.give_back(HERE, second) == []
    assert kinds(desk.give_back(HERE, first)) == [Ended]


def test_a_node_that_comes_back_in_time_goes_before_those_who_wait(
    desk: LeaseDesk, clock: Clock, first: Node, second: Node
) -> None:
    granted(desk, desk.want(HERE, first))
    desk.want(HERE, second)
    clock.now = 2.0
    assert desk.lost(first) == []
    back = Node(first.node)
    clock.now = 9.0
    (grant,) = desk.want(HERE, back)
    assert isinstance(grant, Grant)
    assert desk.confirm(grant)
    clock.now = 18.0
    assert desk.tick() == []


def test_a_node_that_comes_back_on_another_connection_ends_the_first(
    desk: LeaseDesk, first: Node
) -> None:
    granted(desk, desk.want(HERE, first))
    again = Node(first.node)
    ended, grant = desk.want(HERE, again)
    assert ended == Ended(HERE, first, "your node has come back elsewhere")
    assert isinstance(grant, Grant)
    assert grant.holder is again
    assert desk.give_back(HERE, first) == []
    assert desk.renew(first) == []
    assert desk.holder(HERE) is again


def test_a_node_that_comes_back_too_late_waits_like_anybody(
    desk: LeaseDesk, clock: Clock, first: Node, second: Node
) -> None:
    granted(desk, desk.want(HERE, first))
    desk.lost(first)
    clock.now = 10.0
    assert desk.tick() == [Vacant(HERE)]
    desk.want(HERE, second)
    assert kinds(desk.want(HERE, Node(first.node))) == [Wait]


def test_the_embedded_node_takes_over_at_once_and_never_runs_out(
    desk: LeaseDesk, clock: Clock, first: Node, second: Node
) -> None:
    granted(desk, desk.want(HERE, first))
    desk.want(HERE, second)
    house = Node(b"3" * 32, embedded=True)
    events = desk.want(HERE, house)
    assert events[0] == Ended(HERE, first, "the relay's own node has taken over")
    assert granted(desk, events) is house
    clock.now = 1e6
    assert desk.tick() == []
    events = desk.lost(house)
    assert granted(desk, events) is second


def test_nobody_takes_a_lease_of_the_embedded_node_by_its_key(desk: LeaseDesk) -> None:
    house = Node(b"3" * 32, embedded=True)
    granted(desk, desk.want(HERE, house))
    assert kinds(desk.want(HERE, Node(house.node))) == [Wait]
    assert desk.holder(HERE) is house


def test_a_grant_whose_holder_went_meanwhile_does_not_stand(desk: LeaseDesk, first: Node) -> None:
    (grant,) = desk.want(HERE, first)
    assert isinstance(grant, Grant)
    desk.lost(first)
    assert not desk.confirm(grant)
    (again,) = desk.want(HERE, Node(first.node))
    assert isinstance(again, Grant)
    assert desk.confirm(again)


def test_an_old_grant_of_the_same_holder_does_not_stand(desk: LeaseDesk, first: Node) -> None:
    (old,) = desk.want(HERE, first)
    desk.give_back(HERE, first)
    (new,) = desk.want(HERE, first)
    assert isinstance(old, Grant)
    assert isinstance(new, Grant)
    assert not desk.confirm(old)
    assert desk.fail(old, "too late") == []
    assert desk.confirm(new)


def test_asking_twice_is_answered_twice_and_changes_nothing(desk: LeaseDesk, first: Node) -> None:
    grants = desk.want(HERE, first)
    assert desk.want(HERE, first) == []
    granted(desk, grants)
    assert kinds(desk.want(HERE, first)) == [Grant]
    assert desk.held(first) == (HERE,)


class Desks(RuleBasedStateMachine):
    """Any order of anything: at most one holder, and epochs only grow."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.desk = LeaseDesk(self.clock, TTL_S)
        self.connections = [Node(bytes([key]) * 32, embedded=key == 3) for key in (1, 1, 2, 3)]
        self.epoch = 0
        self.holder = b""
        self.grants: list[Grant] = []
        self.holding: dict[Node, int] = {}  # what each was told, and not told to be over

    def take(self, events: list[LeaseEvent]) -> None:
        for event in events:
            if isinstance(event, Grant):
                self.grants.append(event)
            elif isinstance(event, Ended):
                assert isinstance(event.holder, Node)
                self.holding.pop(event.holder, None)

    @rule(who=st.integers(0, 3))
    def want(self, who: int) -> None:
        self.take(self.desk.want(HERE, self.connections[who]))

    @rule(who=st.integers(0, 3))
    def give_back(self, who: int) -> None:
        self.take(self.desk.give_back(HERE, self.connections[who]))

    @rule(who=st.integers(0, 3))
    def renew(self, who: int) -> None:
        self.take(self.desk.renew(self.connections[who]))

    @rule(who=st.integers(0, 3))
    def lose(self, who: int) -> None:
        lost = self.connections[who]
        self.holding.pop(lost, None)
        self.take(self.desk.lost(lost))
        self.connections[who] = Node(lost.node, embedded=lost.embedded)

    @rule(seconds=st.sampled_from((0.0, 1.0, 9.0, 10.0)))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.take(self.desk.tick())

    @rule(works=st.booleans(), which=st.integers(0, 3))
    def carry_out(self, *, works: bool, which: int) -> None:
        """The room's turn: in any order, for a task may be late."""
        if not self.grants:
            return
        grant = self.grants.pop(which % len(self.grants))
        if not works:
            self.take(self.desk.fail(grant, "the disk is full"))
            return
        if grant.holder.node != self.holder:
            self.epoch += 1
            self.holder = grant.holder.node
        if self.desk.confirm(grant):
            assert isinstance(grant.holder, Node)
            before = self.holding.get(grant.holder, 0)
            assert self.epoch >= before
            self.holding[grant.holder] = self.epoch

    @invariant()
    def one_holder(self) -> None:
        assert len(self.holding) <= 1
        for node in self.holding:
            assert self.desk.holder(HERE) is node


TestDesks = Desks.TestCase


# -- at work -----------------------------------------------------------------------------------


class Epochs:
    """A register of one conversation, and its room's turn."""

    def __init__(self) -> None:
        self.epoch = 0
        self.holder = b""
        self.turn = asyncio.Event()
        self.turn.set()
        self.fails = False

    async def grant(self, conversation: str, node: bytes) -> int:
        assert conversation == HERE
        assert len(node) == 32
        await self.turn.wait()
        if self.fails:
            raise StoreFailed("cannot write /srv/crdt_llm/register.db: the disk is full")
        if node != self.holder:
            self.epoch += 1
            self.holder = node
        return self.epoch


def office(epochs: Epochs, clock: Clock, vacant: list[str]) -> LeaseOffice:
    return LeaseOffice(epochs.grant, RELAY_KEY.sign, clock=clock, ttl_s=TTL_S, vacant=vacant.append)


async def settle() -> None:
    """Let every task that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_lease_is_signed_and_told_once_its_epoch_is_durable(
    clock: Clock, first: Node
) -> None:
    epochs = Epochs()
    desk = office(epochs, clock, [])
    epochs.turn.clear()
    desk.want(HERE, first)
    await settle()
    assert first.told == []
    epochs.turn.set()
    await settle()
    (lease,) = first.told
    assert isinstance(lease, Granted)
    assert (lease.conversation, lease.epoch, lease.ttl_s) == (HERE, 1, TTL_S)
    verify(RELAY_KEY.public, lease.signature, lease_message(HERE, 1, first.node))


async def test_a_takeover_tells_the_old_holder_first(
    clock: Clock, first: Node, second: Node
) -> None:
    desk = office(Epochs(), clock, [])
    desk.want(HERE, first)
    await settle()
    desk.want(HERE, second)
    clock.now = TTL_S
    desk.tick()
    assert first.told[1:] == ["the lease was not renewed in time"]
    assert second.told == ["another node has the lease"]
    await settle()
    lease = second.told[-1]
    assert isinstance(lease, Granted)
    assert lease.epoch == 2


async def test_a_register_that_fails_is_told_and_asked_again(
    clock: Clock, first: Node, caplog: pytest.LogCaptureFixture
) -> None:
    epochs = Epochs()
    desk = office(epochs, clock, [])
    epochs.fails = True
    desk.want(HERE, first)
    await settle()
    assert first.told == ["the store cannot be used now"], "our files are our log's alone"
    assert "cannot write /srv/crdt_llm/register.db: the disk is full" in caplog.text
    epochs.fails = False
    desk.want(HERE, first)
    await settle()
    assert isinstance(first.told[-1], Granted)


async def test_a_lease_that_runs_out_unwanted_is_announced(clock: Clock, first: Node) -> None:
    vacant: list[str] = []
    desk = office(Epochs(), clock, vacant)
    desk.want(HERE, first)
    await settle()
    desk.lost(first)
    clock.now = TTL_S
    desk.tick()
    assert vacant == [HERE]
    assert len(first.told) == 1, "who has gone is not called"


async def test_nothing_is_granted_after_the_end(clock: Clock, first: Node) -> None:
    epochs = Epochs()
    desk = office(epochs, clock, [])
    epochs.turn.clear()
    desk.want(HERE, first)
    await desk.close()
    epochs.turn.set()
    await settle()
    assert first.told == []
