"""Whatever happens to nodes, wires, clocks and the relay: each reply is made once, and rightly.

A slice of the schedules; ``bench/takeover.py`` plays a thousand. A failing seed replays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from stack.simulated_takeover import House

from crdt_llm.document import rules

if TYPE_CHECKING:
    from typing import Any

SLICES = 4
SEEDS_OF_SLICE = 5
OPENS_MAX = 4  # at the start, to stand by for the reply, and for what came after it


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"))


@pytest.mark.parametrize("part", range(SLICES))
def test_two_nodes_never_answer_one_slot_and_no_reply_is_doubled_or_lost(
    house: House, part: int
) -> None:
    """The checks are the schedule's own; here that something happened for them to look at."""
    first = part * SEEDS_OF_SLICE
    reports = [house.run(seed) for seed in range(first, first + SEEDS_OF_SLICE)]
    assert sum(report.replies for report in reports) > SEEDS_OF_SLICE
    assert sum(report.takeovers for report in reports) > 0
    assert sum(report.resumed for report in reports) > 0


def test_a_seed_replays(house: House) -> None:
    assert house.run(19) == house.run(19)


def test_a_node_with_nothing_to_do_hardly_takes_a_seat_while_another_one_streams(
    house: House,
) -> None:
    """It is named the conversation about once a second, which is 40 times."""
    opens = house.count_opens(tokens=200)
    assert set(opens) == {"ada", "bob"}
    assert max(opens.values()) <= OPENS_MAX


def test_it_is_the_fence_that_holds(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it nodes write across each other, and the schedules find that."""
    check = rules.check

    def unfenced(*given: Any, epoch: int | None = None, **more: Any) -> None:
        del epoch
        check(*given, epoch=None, **more)

    monkeypatch.setattr(rules, "check", unfenced)
    assert any(goes_wrong(house, seed) for seed in range(8, 40))


def goes_wrong(house: House, seed: int) -> bool:
    try:
        house.run(seed)
    except Exception:  # noqa: BLE001 - how it goes wrong differs
        return True
    return False
