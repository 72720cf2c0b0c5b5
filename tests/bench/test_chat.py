"""The bars of a chat: against whom, over which turns, and which figures."""

from __future__ import annotations

from dataclasses import replace

from chat import OURS, SHORT_TURNS, TYPED, Growth, verdicts
from many import Row
from many import verdicts as verdicts_of_many
from peer import Summary, Turn
from theirs import GENERATE

ROW = Summary(
    ttft_ms=100.0,
    ttft_last_ms=100.0,
    tokens_per_s=50.0,
    tokens_per_s_last=50.0,
    sent_bytes=1000,
    prefilled=0,
    drafted=0,
    wasted=0,
)
THEIRS = {
    "quick to begin": replace(ROW, tokens_per_s=40.0),
    "quick to go on": replace(ROW, ttft_ms=300.0, sent_bytes=2000),
    GENERATE: replace(ROW, ttft_ms=900.0, tokens_per_s=25.0, sent_bytes=3000),
}


def held(mine: dict[str, Summary], *, short: bool = False) -> list[bool]:
    return [one.holds for one in verdicts(mine | THEIRS, short=short)]


def test_each_figure_is_held_against_the_best_in_it() -> None:
    mine = replace(ROW, ttft_ms=60.0, tokens_per_s=50.0, sent_bytes=150)
    assert held({OURS: mine}) == [True] * 4
    assert held({OURS: replace(mine, ttft_ms=61.0)}).count(False) == 1
    assert held({OURS: replace(mine, sent_bytes=151)}).count(False) == 1
    assert held({OURS: replace(mine, tokens_per_s=49.0)}).count(False) == 2
    typed = replace(mine, ttft_ms=31.0)
    assert held({OURS: mine, TYPED: typed}) == [True] * 4 + [False]


def test_short_turns_have_a_bar_of_their_own_for_bytes() -> None:
    assert held({OURS: replace(ROW, sent_bytes=40)}, short=True) == [True]
    assert held({OURS: replace(ROW, sent_bytes=41)}, short=True) == [False]


def test_without_others_there_is_no_bar() -> None:
    assert verdicts({OURS: ROW}, short=False) == []


def test_growth_compares_the_end_with_the_turns_around_the_tenth() -> None:
    turns = [
        Turn(
            ttft_ms=float(number), tokens_per_s=1.0, sent_bytes=1, prefilled=30, prompt=60 * number
        )
        for number in range(1, SHORT_TURNS + 1)
    ]
    found = Growth.of(turns)
    assert found is not None
    assert found.measured == 95.5 / 10.5
    assert (found.rows, found.early, found.late) == (30, 600, 5700)
    assert Growth.of(turns[:-1]) is None


def test_many_at_once_have_a_bar_for_the_rate_and_one_for_the_pauses() -> None:
    theirs = Row(tokens_per_s=100.0, gap_median_ms=10.0, gap_longest_ms=90.0)
    mine = Row(tokens_per_s=100.0, gap_median_ms=10.0, gap_longest_ms=40.0)
    slow = Row(tokens_per_s=99.0, gap_median_ms=10.0, gap_longest_ms=41.0)
    for row, expected in ((mine, [True, True]), (slow, [False, False])):
        must = verdicts_of_many({"128": {OURS: row, "theirs": theirs}})
        assert [one.holds for one in must] == expected
