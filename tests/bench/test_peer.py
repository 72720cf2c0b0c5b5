"""What every peer has in common: why one is skipped, and how its turns become a row."""

from __future__ import annotations

import pytest
from peer import CAUSE_CHARACTERS_MAX, Summary, Turn, root_cause

WRAPPED = """\
INFO 11-22 05:41:47 [model.py:733] Resolved architecture: LlamaForCausalLM
Loading shards:   0% Completed
(Worker pid=7) WARNING 11-22 05:42:07 [cpu.py:114] an Error: of no account
(Worker pid=7) ERROR 11-22 05:43:06 [multiproc.py:1063] WorkerProc hit an exception.
(Worker pid=7) ERROR 11-22 05:43:06 [multiproc.py:1063] Traceback (most recent call last):
(Worker pid=7) ERROR 11-22 05:43:06 [multiproc.py:1063]   File "utils.py", line 554, in select
(Worker pid=7) ERROR 11-22 05:43:06 [multiproc.py:1063]     raise ValueError(
(Worker pid=7) ERROR 11-22 05:43:06 [multiproc.py:1063] ValueError: No common block size for 16.
(EngineCore pid=8) ERROR 11-22 05:43:06 [core.py:1510] RuntimeError: Worker failed, see above
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above.
UserWarning: resource_tracker: There appear to be 1 leaked objects
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (WRAPPED, "ValueError: No common block size for 16."),
        (
            "torch.OutOfMemoryError: no room\nRuntimeError: failed",
            "torch.OutOfMemoryError: no room",
        ),
        ("ERROR: No matching distribution found\n[notice] a new pip", None),
        ("loading\ncannot open shared object file\n\n", "cannot open shared object file"),
        ("", "it said nothing"),
    ],
)
def test_what_went_wrong_first_is_the_cause(log: str, cause: str | None) -> None:
    assert root_cause(log) == (cause or log.splitlines()[0])


def test_a_cause_is_cut_to_a_line() -> None:
    assert len(root_cause("ValueError: " + "x" * 10_000)) == CAUSE_CHARACTERS_MAX


def test_the_first_turn_warms_up_and_sums_have_all_turns() -> None:
    turns = [
        Turn(ttft, rate, sent_bytes=10, prefilled=5, prompt=50, drafted=2, wasted=1)
        for ttft, rate in ((9000.0, 1.0), (10.0, 40.0), (30.0, 20.0), (20.0, 30.0))
    ]
    row = Summary.of(turns)
    assert (row.ttft_ms, row.tokens_per_s) == (20.0, 30.0)
    assert (row.sent_bytes, row.prefilled, row.drafted, row.wasted) == (40, 20, 8, 4)
