from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from crdt_llm.sync.relay import outbox as outbox_module
from crdt_llm.sync.relay.outbox import WAITING_BYTES_MAX, WAITING_FRAMES_MAX, Lanes, Outbox
from crdt_llm.sync.wire.y_websocket import (
    AWARENESS_STATES_MAX,
    AwarenessState,
    AwarenessUpdate,
    decode,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


def taken(outbox: Outbox) -> Iterator[bytes]:
    while (frame := outbox.take()) is not None:
        yield frame


def here(client: int, clock: int = 1) -> AwarenessState:
    return AwarenessState(client, clock, "{}")


def test_an_empty_outbox_has_nothing_to_take() -> None:
    outbox = Outbox()
    assert not outbox
    assert outbox.take() is None


def test_updates_keep_their_order_and_questions_go_first() -> None:
    outbox = Outbox()
    for frame in (b"1", b"2"):
        assert outbox.put_update(frame)
    outbox.put_first(b"question")
    assert outbox
    assert list(taken(outbox)) == [b"question", b"1", b"2"]


def test_a_document_covers_what_waits_and_precedes_what_follows() -> None:
    outbox = Outbox()
    outbox.put_update(b"covered")
    outbox.put_document(b"document")
    outbox.put_update(b"after")
    assert list(taken(outbox)) == [b"document", b"after"]


@pytest.mark.parametrize(
    ("frame", "fitting"),
    [(b"x" * 1024, WAITING_BYTES_MAX // 1024), (b"x", WAITING_FRAMES_MAX)],
    ids=["bytes", "frames"],
)
def test_beyond_its_limit_it_drops_every_update_and_says_so(frame: bytes, fitting: int) -> None:
    outbox = Outbox()
    outbox.put_first(b"question")
    assert all(outbox.put_update(frame) for _ in range(fitting))
    assert not outbox.put_update(frame)
    assert list(taken(outbox)) == [b"question"]
    assert outbox.put_update(frame)


def test_an_update_that_is_alone_may_have_any_size() -> None:
    outbox = Outbox()
    large = bytes(WAITING_BYTES_MAX + 1)
    assert outbox.put_update(large)
    assert outbox.take() == large
    outbox.put_document(b"document")
    assert not outbox.put_update(large)


def test_what_was_taken_counts_no_more() -> None:
    outbox = Outbox()
    for _ in range(3 * WAITING_BYTES_MAX // 1024):
        assert outbox.put_update(b"x" * 1024)
        assert outbox.take() is not None


def test_of_each_client_only_the_latest_presence_waits() -> None:
    outbox = Outbox()
    for clock in range(1, 100):
        outbox.put_presence([here(7, clock), here(8, clock)])
    (frame,) = taken(outbox)
    assert decode(frame) == AwarenessUpdate((here(7, 99), here(8, 99)))


def test_presence_and_updates_take_turns() -> None:
    outbox = Outbox()
    for number in range(3):
        outbox.put_update(b"%d" % number)
    outbox.put_presence([here(7)])
    first = outbox.take()
    outbox.put_presence([here(7, 2)])
    assert first == b"0"
    assert decode(outbox.take() or b"") == AwarenessUpdate((here(7, 2),))
    outbox.put_presence([here(7, 3)])
    assert outbox.take() == b"1"
    assert decode(outbox.take() or b"") == AwarenessUpdate((here(7, 3),))
    assert outbox.take() == b"2"


def test_waiting_presence_is_bounded() -> None:
    outbox = Outbox()
    for client in range(1, 3 * AWARENESS_STATES_MAX):
        outbox.put_presence([here(client), AwarenessState(client, 1, None)])
        outbox.put_presence([here(client + 10**6)])
    states = [
        state
        for frame in taken(outbox)
        for state in decode(frame).states  # type: ignore[union-attr]
    ]
    assert 0 < len(states) <= AWARENESS_STATES_MAX


def test_dropping_all_leaves_nothing() -> None:
    outbox = Outbox()
    outbox.put_first(b"question")
    outbox.put_document(b"document")
    outbox.put_update(b"update")
    outbox.put_presence([here(7)])
    outbox.drop_all()
    assert not outbox


# -- many conversations on one wire ------------------------------------------------------------


def presence_frame(channel: int, states: tuple[AwarenessState, ...]) -> bytes:
    return f"presence {channel} {len(states)}".encode()


def lanes() -> Lanes:
    return Lanes(presence_frame)


def everything(waiting: Lanes) -> list[bytes]:
    taken: list[bytes] = []
    while (frame := waiting.take()) is not None:
        taken.append(frame)
    return taken


def test_channels_take_turns_and_keep_their_order() -> None:
    waiting = lanes()
    for frame in (b"a1", b"a2", b"a3"):
        waiting.put_change(1, frame)
    waiting.put(2, b"b1")
    waiting.put_first(b"first")
    assert everything(waiting) == [b"first", b"a1", b"b1", b"a2", b"a3"]
    assert waiting.waiting_bytes == 0


def test_an_acknowledgement_covers_the_one_right_before_it() -> None:
    waiting = lanes()
    for number in range(3):
        waiting.put_ack(1, b"ack %d" % number)
    waiting.put(1, b"nack 3")
    waiting.put_ack(1, b"ack 4")
    assert everything(waiting) == [b"ack 2", b"nack 3", b"ack 4"]


def test_an_acknowledgement_that_went_is_not_replaced() -> None:
    waiting = lanes()
    waiting.put_ack(1, b"ack 1")
    assert waiting.take() == b"ack 1"
    waiting.put_ack(1, b"ack 2")
    assert everything(waiting) == [b"ack 2"]


def test_what_is_owed_goes_between_what_came_before_and_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox_module, "WAITING_FRAMES_MAX", 2)
    waiting = lanes()
    waiting.put(1, b"opened", opens=True)
    waiting.put_change(1, b"c1")
    waiting.put_ack(1, b"ack 1")
    waiting.put_change(1, b"c2")
    assert waiting.put_change(1, b"c3") == 1
    assert waiting.put_change(1, b"c4") is None
    waiting.put(1, b"nack 2")
    assert everything(waiting) == [b"opened"]
    waiting.put_state(1, b"state")
    waiting.put_change(1, b"c5")
    assert everything(waiting) == [b"state", b"ack 1", b"nack 2", b"c5"]
    assert waiting.waiting_bytes == 0


def test_the_channel_with_the_most_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "WAITING_BYTES_MAX", 100)
    waiting = lanes()
    assert waiting.put_change(1, b"x" * 80) is None
    assert waiting.put_change(2, b"y" * 30) == 1
    assert everything(waiting) == [b"y" * 30]


def test_a_change_that_is_alone_may_have_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "WAITING_BYTES_MAX", 100)
    waiting = lanes()
    assert waiting.put_change(1, bytes(500)) is None
    assert not waiting.has_room
    assert everything(waiting) == [bytes(500)]
    assert waiting.has_room


def test_the_last_frame_of_a_channel_drops_what_it_would_speak_of_too_early() -> None:
    waiting = lanes()
    waiting.put_ack(1, b"ack 1")
    waiting.put_change(1, b"c1")
    waiting.put_ack(1, b"ack 2")
    waiting.put_presence(1, [AwarenessState(7, 1, "{}")])
    waiting.end(1, b"closed")
    waiting.put(1, b"opened again", opens=True)
    waiting.put_presence(1, [AwarenessState(7, 2, "{}")])
    assert everything(waiting) == [b"ack 1", b"closed", b"opened again", b"presence 1 1"]
    assert waiting.waiting_bytes == 0


def test_presence_waits_for_the_opening_and_alternates_after_it() -> None:
    waiting = lanes()
    waiting.put_presence(1, [AwarenessState(7, 1, "{}"), AwarenessState(8, 1, "{}")])
    waiting.put(1, b"opened", opens=True)
    waiting.put_change(1, b"c1")
    assert everything(waiting) == [b"opened", b"presence 1 2", b"c1"]


def test_nothing_of_a_connection_that_ended_is_left() -> None:
    waiting = lanes()
    waiting.put_first(b"first")
    waiting.put_change(1, b"c1")
    waiting.owe(2)
    waiting.drop_all()
    assert waiting.take() is None
    assert waiting.waiting_bytes == 0
    assert waiting.put_change(2, b"c2") is None
    assert everything(waiting) == [b"c2"]
