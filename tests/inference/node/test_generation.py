"""The pace at which a reply reaches its readers."""

from __future__ import annotations

from crdt_llm.inference.node.generation import FLUSH_WINDOW_S, FLUSHES_PER_S_MAX, window_s
from crdt_llm.inference.node.node import REPLIES_MAX


def test_a_reply_alone_has_the_shortest_windows() -> None:
    assert window_s(1) == FLUSH_WINDOW_S


def test_many_replies_together_make_no_more_updates_than_a_few() -> None:
    for replies in range(1, REPLIES_MAX + 1):
        assert replies / window_s(replies) <= FLUSHES_PER_S_MAX + 1e-9
    assert window_s(REPLIES_MAX) < 0.25
