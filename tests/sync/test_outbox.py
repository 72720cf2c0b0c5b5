from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from crdt_llm.sync.outbox import WAITING_BYTES_MAX, WAITING_FRAMES_MAX, Outbox
from crdt_llm.sync.wire import AWARENESS_STATES_MAX, AwarenessState, AwarenessUpdate, decode

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
