"""What a peer is told of a fault: enough to act on, and nothing of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from crdt_llm.errors import (
    Corrupt,
    Forbidden,
    MalformedMessage,
    StoreFailed,
    Unavailable,
)
from crdt_llm.sync.wire.verdict import CloseCode, close_code, reason_of

if TYPE_CHECKING:
    from crdt_llm.errors import (
        CrdtLlmError,
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreFailed("/home/ada/relay/log.db cannot be used now"), CloseCode.TRY_AGAIN),
        (Corrupt("/home/ada/relay/log.db is damaged"), CloseCode.DAMAGED),
    ],
)
def test_where_our_files_are_is_told_to_nobody(error: CrdtLlmError, code: CloseCode) -> None:
    assert "ada" not in reason_of(error)
    assert reason_of(error)
    assert close_code(error) is code


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Forbidden("forbidden", "you may\nnot"), "forbidden: you may not"),
        (MalformedMessage("cut short"), "malformed: cut short"),
        (Unavailable("too many  are open"), "too many are open"),
    ],
)
def test_all_else_is_one_line_with_its_code(error: CrdtLlmError, reason: str) -> None:
    assert reason_of(error) == reason
