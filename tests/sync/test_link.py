"""The client side of one connection, as bytes in and bytes out."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.errors import (
    AuthenticationFailed,
    ConnectionLost,
    Forbidden,
    LocalMisuse,
    MalformedMessage,
    Refused,
    TooLarge,
)
from crdt_llm.sync.link import (
    OUTGOING_FRAMES_MAX,
    RETRY_FIRST_S,
    RETRY_LAST_S,
    Asked,
    Backoff,
    DevicesChanged,
    Link,
    Offered,
    Phase,
    Traffic,
    framed_bytes,
    refusal,
)
from crdt_llm.sync.wire import (
    UPDATE_BYTES_MAX,
    AuthDenied,
    AwarenessState,
    AwarenessUpdate,
    QueryAwareness,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
    encode,
)

NOTHING = b"\x00"  # a state vector
UPDATE = b"\x00\x00"


def sent(link: Link) -> list[object]:
    frames = iter(link.data_to_send, None)
    return [decode(frame) for frame in frames]


def opened() -> Link:
    link = Link(7, "laptop", Traffic())
    link.open(NOTHING)
    sent(link)
    return link


def synced() -> Link:
    link = opened()
    merge(link, SyncStep2(UPDATE))
    return link


def merge(link: Link, message: SyncStep2 | SyncUpdate, *, gap: bool = False) -> None:
    offer = link.receive(encode(message))
    assert offer == Offered(message.update, step2=isinstance(message, SyncStep2))
    link.merged(offer, gap=gap, state_vector=NOTHING)


def test_it_opens_with_step1_and_its_name() -> None:
    link = Link(7, "laptop", Traffic())
    link.open(NOTHING)
    state = AwarenessState(7, 1, '{"device":"laptop"}')
    assert sent(link) == [SyncStep1(NOTHING), AwarenessUpdate((state,))]
    assert link.phase is Phase.SYNCING
    with pytest.raises(LocalMisuse):
        link.open(NOTHING)


def test_writes_flow_only_after_the_relays_step1_was_answered() -> None:
    link = opened()
    link.publish(b"\x01")  # the answer will carry it
    assert sent(link) == []
    assert link.receive(encode(SyncStep1(NOTHING))) == Asked(NOTHING)
    link.answer(UPDATE)
    link.publish(b"\x02")
    assert sent(link) == [SyncStep2(UPDATE), SyncUpdate(b"\x02")]


@pytest.mark.parametrize(
    ("messages", "phase", "asks"),
    [
        ([(SyncStep2(UPDATE), False)], Phase.SYNCED, False),
        ([(SyncUpdate(UPDATE), False)], Phase.SYNCING, False),
        ([(SyncUpdate(UPDATE), True)], Phase.SYNCING, False),  # the Step2 to come has it
        ([(SyncStep2(UPDATE), False), (SyncUpdate(UPDATE), False)], Phase.SYNCED, False),
        ([(SyncStep2(UPDATE), False), (SyncUpdate(UPDATE), True)], Phase.SYNCING, True),
        ([(SyncStep2(UPDATE), False), (SyncStep2(UPDATE), True)], Phase.SYNCING, True),
        ([(SyncStep2(UPDATE), False), (SyncStep2(UPDATE), False)], Phase.SYNCED, False),
    ],
)
def test_where_a_merge_leads(
    messages: list[tuple[SyncStep2 | SyncUpdate, bool]], phase: Phase, *, asks: bool
) -> None:
    link = opened()
    for message, gap in messages:
        merge(link, message, gap=gap)
    assert link.phase is phase
    assert sent(link) == ([SyncStep1(NOTHING)] if asks else [])


def test_a_step2_that_leaves_out_what_was_asked_for_is_the_relays_fault() -> None:
    with pytest.raises(MalformedMessage, match="gap in step2"):
        merge(opened(), SyncStep2(UPDATE), gap=True)
    link = synced()
    merge(link, SyncUpdate(UPDATE), gap=True)
    with pytest.raises(MalformedMessage):
        merge(link, SyncStep2(UPDATE), gap=True)


def test_what_does_not_fit_into_a_frame_is_final() -> None:
    with pytest.raises(TooLarge, match="over the limit"):
        opened().answer(bytes(UPDATE_BYTES_MAX + 1))


def test_a_socket_that_takes_nothing_costs_the_connection() -> None:
    link = synced()
    link.answer(UPDATE)
    for _ in range(OUTGOING_FRAMES_MAX - 1):
        link.publish(UPDATE)
    with pytest.raises(ConnectionLost, match="wait for the relay"):
        link.publish(UPDATE)


def test_presence_follows_what_others_say() -> None:
    link = synced()

    def hear(client: int, clock: int, state: str | None) -> object:
        states = (AwarenessState(client, clock, state),)
        return link.receive(encode(AwarenessUpdate(states)))

    assert hear(8, 1, '{"device":"phone"}') == DevicesChanged()
    assert list(link.devices) == ["phone"]
    assert hear(8, 2, '{"device":"phone"}') is None  # renewed
    assert hear(8, 1, '{"device":"old news"}') is None
    assert hear(7, 9, '{"device":"laptop"}') is None  # our echo
    assert hear(9, 1, '{"user":{"name":"a browser"}}') == DevicesChanged()
    assert list(link.devices) == ["", "phone"]
    hear(8, 2, None)
    hear(9, 2, None)
    assert list(link.devices) == []
    assert link.receive(encode(QueryAwareness())) is None
    (answer,) = sent(link)
    assert answer == AwarenessUpdate((AwarenessState(7, 2, '{"device":"laptop"}'),))


def test_the_auth_message_says_more_than_the_close_does() -> None:
    link = synced()
    assert link.receive(encode(AuthDenied("too-large: a very long sentence"))) is None
    refused = link.refusal(ConnectionLost("closed", code=4413, reason="too-large: a ve"))
    assert isinstance(refused, TooLarge)
    assert (refused.code, refused.reason) == ("too-large", "a very long sentence")
    assert link.refusal(ConnectionLost("closed", code=1013, reason="later")) is None


@pytest.mark.parametrize(
    ("code", "reason", "kind", "word"),
    [
        (4400, "", Refused, "malformed"),
        (4401, "", AuthenticationFailed, "unauthenticated"),
        (4403, "No.", Forbidden, "forbidden"),
        (4404, "", Refused, "no-such-conversation"),
        (4413, "", TooLarge, "too-large"),
        (4422, "forged-author: not you", Refused, "forged-author"),
        (4499, "", Refused, "refused-4499"),
    ],
)
def test_final_close_codes_become_refusals(
    code: int, reason: str, kind: type[Refused], word: str
) -> None:
    refused = refusal(code, reason)
    assert type(refused) is kind
    assert refused.code == word
    assert refused.reason


@given(st.integers(0, 4999))
def test_only_44xx_is_final(code: int) -> None:
    assert (refusal(code, "") is not None) == (4400 <= code <= 4499)


@given(st.binary(max_size=64))
def test_any_bytes_give_an_event_or_a_typed_error(frame: bytes) -> None:
    link = synced()
    try:
        link.receive(frame)
    except MalformedMessage:
        assert link.phase is Phase.SYNCED


def test_waits_double_up_to_a_limit_and_begin_again_after_a_sync() -> None:
    backoff = Backoff(Random(1))
    waits = [backoff.next_s() for _ in range(40)]
    longest = [min(RETRY_FIRST_S * 2**n, RETRY_LAST_S) for n in range(40)]
    assert all(top / 2 <= wait <= top for wait, top in zip(waits, longest, strict=True))
    assert len(set(waits)) == 40  # devices do not come back in step
    backoff.reset()
    assert backoff.next_s() <= RETRY_FIRST_S


@pytest.mark.parametrize(
    ("payload", "header"), [(0, 2), (125, 2), (126, 4), (65535, 4), (65536, 10)]
)
def test_frames_are_counted_as_rfc_6455_writes_them(payload: int, header: int) -> None:
    assert framed_bytes(payload, masked=False) == header + payload
    assert framed_bytes(payload, masked=True) == header + 4 + payload


def test_traffic_is_split_by_what_a_frame_is_for() -> None:
    traffic = Traffic()
    link = Link(7, "laptop", traffic)
    link.open(NOTHING)
    link.answer(UPDATE)
    link.publish(UPDATE)
    link.receive(encode(SyncUpdate(UPDATE)))
    link.receive(encode(SyncStep1(NOTHING)))
    assert traffic.sync.sent_frames == 0  # counted as they go out
    sent(link)
    assert (traffic.sync.sent_frames, traffic.live.sent_frames) == (3, 1)
    assert (traffic.sync.received_frames, traffic.live.received_frames) == (1, 1)
    assert traffic.live.sent_bytes == len(encode(SyncUpdate(UPDATE))) + 6
    assert traffic.live.received_bytes == len(encode(SyncUpdate(UPDATE))) + 2
