"""Bars hold or they do not, on either side, and say so in words and in JSON."""

from __future__ import annotations

import json

import pytest
from verdicts import Verdict, rounded, show


@pytest.mark.parametrize(
    ("value", "at_most", "holds"),
    [(0.6, True, True), (0.61, True, False), (0.6, False, True), (0.59, False, False)],
)
def test_a_value_on_the_bar_holds(
    value: float,
    at_most: bool,  # noqa: FBT001 - a case
    holds: bool,  # noqa: FBT001 - a case
    capsys: pytest.CaptureFixture[str],
) -> None:
    verdict = Verdict("ours", "TTFT by theirs", value, 0.6, at_most=at_most)
    assert verdict.holds is holds
    assert verdict.plain()["at_most" if at_most else "at_least"] == 0.6
    assert verdict.plain()["holds"] is holds
    show([verdict])
    assert capsys.readouterr().out.strip().startswith("holds" if holds else "FAILS")


def test_a_result_is_json_with_short_numbers() -> None:
    result = {"a": [0.123456, {"b": (1, "x", None, True)}]}
    assert json.dumps(rounded(result)) == '{"a": [0.1235, {"b": [1, "x", null, true]}]}'
