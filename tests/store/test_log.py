from __future__ import annotations

import pytest

from crdt_llm.errors import LocalMisuse
from crdt_llm.store.log import Limits, Loaded, Status


@pytest.mark.parametrize(
    "limits",
    [
        {"append_bytes_max": 65 * 1024 * 1024},
        {"snapshot_bytes_max": 65 * 1024 * 1024},
        {"update_bytes_max": 33 * 1024 * 1024},
    ],
)
def test_limits_that_would_let_something_wait_for_ever_are_misuse(limits: dict[str, int]) -> None:
    with pytest.raises(LocalMisuse, match="must hold the largest"):
        Limits(**limits)


def test_the_end_of_what_was_loaded_is_its_last_update_or_its_snapshot() -> None:
    assert Loaded(None, 0, ()).lsn == 0
    assert Loaded(b"", 7, ()).lsn == 7
    assert Loaded(b"", 7, ((8, b"x"), (9, b"y"))).lsn == 9


def test_a_status_with_a_reason_is_not_healthy() -> None:
    assert Status().healthy
    assert not Status("the disk is full").healthy
