"""Bytes, as the wire has them."""

from __future__ import annotations

import pytest

from crdt_llm.sync.client.traffic import Traffic, framed_bytes
from crdt_llm.sync.wire.frames import Ack, Opened, Update


@pytest.mark.parametrize(
    ("payload", "header"), [(0, 2), (125, 2), (126, 4), (65535, 4), (65536, 10)]
)
def test_frames_are_counted_as_rfc_6455_writes_them(payload: int, header: int) -> None:
    assert framed_bytes(payload, masked=False) == header + payload
    assert framed_bytes(payload, masked=True) == header + 4 + payload


def test_frames_are_told_apart_by_what_they_are_for() -> None:
    traffic = Traffic()
    assert traffic.of(Update(1, 1, b"")) is traffic.of(Ack(1, 1, 1)) is traffic.live
    assert traffic.of(Opened(1, "l", 1, b"", b"", None, behind=False)) is traffic.sync
    traffic.live.sent(10)
    traffic.live.received(200)
    assert (traffic.live.sent_frames, traffic.live.sent_bytes) == (1, 16)
    assert (traffic.live.received_frames, traffic.live.received_bytes) == (1, 204)
