"""The client side of one connection, frame by frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.errors import LocalMisuse, MalformedMessage, Unavailable
from crdt_llm.sync.client.channel import CompanyChanged
from crdt_llm.sync.client.link import DRAFT_EVERY_S, REQUESTS_MAX, Happened, Link
from crdt_llm.sync.client.local_replica import Written
from crdt_llm.sync.client.presence import Company
from crdt_llm.sync.client.traffic import Traffic, framed_bytes
from crdt_llm.sync.wire.frames import (
    CHANNEL_MAX,
    VERSION,
    Ack,
    Answer,
    Change,
    Closed,
    Code,
    Draft,
    Hello,
    Hint,
    Leased,
    Leave,
    Listed,
    Nack,
    Open,
    Opened,
    Presence,
    Renewed,
    Request,
    State,
    Update,
    Watch,
    Welcome,
    Work,
    decode_from_client,
    encode,
)
from crdt_llm.sync.wire.y_websocket import AwarenessState

if TYPE_CHECKING:
    from crdt_llm.sync.client.channel import Channel
    from crdt_llm.sync.client.link import LinkEvent
    from crdt_llm.sync.wire.frames import FromClient, FromRelay

SV = b"\x00"
WELCOME = Welcome(VERSION, "owner", bytes(32), None, "log")
OF_A_CHANNEL: tuple[FromRelay, ...] = (
    Opened(0, "log", 1, b"u", SV, "owner", False),
    Change(0, 1, b"u"),
    State(0, 1, b"u"),
    Ack(0, 1, 1),
    Nack(0, 1, Code.GAP, "", "", None, SV),
    Presence(0, (AwarenessState(9, 1, '{"device":"laptop"}'),)),
    Closed(0, 1013, ""),
)
FOR_NODES: tuple[FromRelay, ...] = (
    Leased(0, 1, bytes(64), 5, ""),
    Hint(0, 1, "", 0, "text"),
    Renewed(5),
    Work(("A" * 22,)),
)


class Wire:
    """A link, and the frames on both sides of it."""

    def __init__(self, *, welcomed: bool = True, token: str | None = "a token") -> None:  # noqa: S107 - the test's own
        self.traffic = Traffic()
        self.link = Link(token, "phone", self.traffic)
        self.now_s = 0.0
        if welcomed:
            self.sent()
            self.hear(WELCOME)

    def sent(self) -> list[FromClient]:
        frames: list[FromClient] = []
        while (data := self.link.data_to_send(self.now_s)) is not None:
            frames.append(decode_from_client(data))
        return [frame for frame in frames if not isinstance(frame, Presence)]

    def hear(self, frame: FromRelay) -> LinkEvent | None:
        return self.link.receive(encode(frame), self.now_s)

    def channel(self, writes: int = 0, traffic: Traffic | None = None) -> Channel:
        def next_to_send(after: int) -> Written | None:
            return Written(after + 1, b"w", (), {}, deletes=False) if after < writes else None

        return self.link.channel(Company(1, "phone"), next_to_send, traffic or Traffic())

    def live(self, writes: int = 0, traffic: Traffic | None = None) -> Channel:
        """A channel that is open and in sync."""
        channel = self.channel(writes, traffic)
        channel.open("A" * 22, None, 0, SV)
        assert isinstance(self.sent()[-1], Open)
        self.hear(Opened(channel.number, "log", 1, b"u", SV, "owner", False))
        channel.opened(None)
        return channel


def test_hello_is_said_first_and_nothing_until_it_is_answered() -> None:
    wire = Wire(welcomed=False)
    wire.link.watch(on=True)
    assert wire.sent() == [Hello(VERSION, "a token", "phone", None)]
    assert wire.link.due_s(0.0) == float("inf")
    with pytest.raises(LocalMisuse):
        wire.channel()
    assert wire.hear(WELCOME) == WELCOME
    assert wire.link.welcome == WELCOME
    assert wire.sent() == [Watch(True)]


def test_a_renewed_token_goes_before_all_else() -> None:
    wire = Wire()
    wire.live(writes=1)
    wire.link.say_hello("another token")
    assert wire.sent() == [Hello(VERSION, "another token", "phone", None)]
    wire.hear(WELCOME)
    assert [type(frame) for frame in wire.sent()] == [Update]


@pytest.mark.parametrize("frame", [*OF_A_CHANNEL, *FOR_NODES, Listed(True, True, ())])
def test_whoever_did_not_say_who_it_is_is_not_listened_to(frame: FromRelay) -> None:
    wire = Wire(welcomed=False)
    wire.sent()
    with pytest.raises(MalformedMessage, match="did not say who it is"):
        wire.hear(frame)


def test_another_version_is_not_spoken_here() -> None:
    wire = Wire(welcomed=False)
    with pytest.raises(MalformedMessage, match="version"):
        wire.hear(Welcome(VERSION + 1, "owner", bytes(32), None, "log"))
    assert wire.link.welcome is None


@pytest.mark.parametrize("frame", FOR_NODES)
def test_what_is_for_nodes_is_not_for_us(frame: FromRelay) -> None:
    wire = Wire()
    wire.live()
    with pytest.raises(MalformedMessage, match="for nodes"):
        wire.hear(frame)


@pytest.mark.parametrize("frame", OF_A_CHANNEL)
def test_a_channel_that_is_not_open_cannot_be_spoken_of(frame: FromRelay) -> None:
    with pytest.raises(MalformedMessage, match="not open"):
        Wire().hear(frame)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_frame_or_malformed(data: bytes) -> None:
    wire = Wire()
    wire.live()
    for frame in (data, encode(OF_A_CHANNEL[1])[: len(data)], encode(WELCOME) + data[1:]):
        try:
            wire.link.receive(frame, 0.0)
        except MalformedMessage:
            continue


def test_events_name_their_channel() -> None:
    wire = Wire()
    one, two = wire.live(), wire.live()
    assert (one.number, two.number) == (0, 1)
    somebody = AwarenessState(9, 1, '{"device":"laptop"}')
    assert wire.hear(Presence(1, (somebody,))) == Happened(two, CompanyChanged())
    assert wire.hear(Presence(1, (somebody,))) is None
    assert one.company.devices == ()


def test_a_number_is_free_again_once_the_relay_closed_the_channel() -> None:
    wire = Wire()
    channels = [wire.channel() for _ in range(CHANNEL_MAX + 1)]
    assert [channel.number for channel in channels] == list(range(CHANNEL_MAX + 1))
    with pytest.raises(Unavailable):
        wire.channel()
    channels[7].open("A" * 22, None, 0, SV)
    channels[7].leave()
    assert wire.sent() == [Leave(7)]
    with pytest.raises(Unavailable):  # the relay may still speak of it
        wire.channel()
    closed = Closed(7, 1000, "left")
    assert wire.hear(closed) == Happened(channels[7], closed)
    assert wire.channel().number == 7


def test_channels_take_turns() -> None:
    wire = Wire()
    channels = [wire.channel(writes) for writes in (3, 1, 2)]
    for channel in channels:
        channel.open("A" * 22, None, 0, SV)
    wire.sent()
    for channel in channels:
        wire.hear(Opened(channel.number, "log", 1, b"u", SV, "owner", False))
        channel.opened(None)
    frames = wire.sent()
    assert all(isinstance(frame, Update) for frame in frames)
    turns = [frame.channel for frame in frames if isinstance(frame, Update)]
    assert sorted(turns) == [0, 0, 0, 1, 2, 2]
    assert sorted(turns[:3]) == [0, 1, 2]  # each has had one before any has a second


def test_each_request_is_answered_once() -> None:
    wire = Wire()
    numbers = [wire.link.request("archive", {"archived": True}) for _ in range(REQUESTS_MAX)]
    assert numbers == list(range(1, REQUESTS_MAX + 1))
    with pytest.raises(Unavailable):
        wire.link.request("archive", {})
    assert wire.sent()[0] == Request(1, "archive", {"archived": True})
    answer = Answer(2, {}, "", "")
    assert wire.hear(answer) == answer
    with pytest.raises(MalformedMessage, match="nobody asked"):
        wire.hear(answer)
    assert wire.link.request("archive", {}) == REQUESTS_MAX + 1


def test_drafts_of_all_channels_share_one_pace() -> None:
    wire = Wire()
    one, two = wire.live(), wire.live()
    wire.sent()
    one.draft("", "Hello")
    two.draft("", "Hello")
    assert wire.sent() == [Draft(0, "", 0, "Hello")]
    one.draft("", "Hello you")
    assert wire.link.due_s(wire.now_s) == DRAFT_EVERY_S
    told = []
    for step in range(1, 3):
        wire.now_s = step * DRAFT_EVERY_S
        told += wire.sent()
    assert sorted(frame.channel for frame in told if isinstance(frame, Draft)) == [0, 1]


def test_what_it_costs_is_counted_where_it_belongs() -> None:
    wire, traffic = Wire(), Traffic()
    hello = encode(Hello(VERSION, "a token", "phone", None))
    assert wire.traffic.sync.sent_bytes == framed_bytes(len(hello), masked=True)
    welcome = framed_bytes(len(encode(WELCOME)), masked=False)
    assert wire.traffic.sync.received_bytes == welcome
    channel = wire.live(writes=1, traffic=traffic)
    wire.sent()
    update = encode(Update(channel.number, 1, b"w"))
    assert traffic.live.sent_bytes == framed_bytes(len(update), masked=True)
    ack = Ack(channel.number, 1, 1)
    wire.hear(ack)
    assert traffic.live.received_bytes == framed_bytes(len(encode(ack)), masked=False)
    assert traffic.sync.sent_frames == 2  # Open, and who we are
    assert wire.traffic.live.sent_frames == 0
