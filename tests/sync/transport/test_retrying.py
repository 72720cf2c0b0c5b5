"""What the end of a connection means, and when to come back."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.errors import AuthenticationFailed, Forbidden, Refused, TooLarge
from crdt_llm.sync.transport.retrying import RETRY_FIRST_S, RETRY_LAST_S, Backoff, refusal


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


def test_waits_double_up_to_a_limit_and_begin_again_after_a_sync() -> None:
    backoff = Backoff(Random(1))
    waits = [backoff.next_s() for _ in range(40)]
    longest = [min(RETRY_FIRST_S * 2**n, RETRY_LAST_S) for n in range(40)]
    assert all(top / 2 <= wait <= top for wait, top in zip(waits, longest, strict=True))
    assert len(set(waits)) == 40  # devices do not come back in step
    backoff.reset()
    assert backoff.next_s() <= RETRY_FIRST_S
