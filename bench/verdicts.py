"""Bars that must hold, and whether they do.

This module owns the comparison and the words for it. It must not know what was measured, or how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bar against what was measured.

    Attributes:
        row: Whose value it is.
        what: Which value, in words.
        value: What was measured.
        bar: What it must not be above, or not below.
        at_most: Whether the bar is an upper one.
        unit: Behind both numbers: "x", "ms", "tokens".
    """

    row: str
    what: str
    value: float
    bar: float
    at_most: bool = True
    unit: str = "x"

    @property
    def holds(self) -> bool:
        """Whether the bar was kept."""
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def __str__(self) -> str:
        side = "at most" if self.at_most else "at least"
        said = "holds" if self.holds else "FAILS"
        return (
            f"{said}  {self.row}: {self.what} {self.value:.3g} {self.unit},"
            f" must be {side} {self.bar:.3g} {self.unit}"
        )

    def plain(self) -> dict[str, Any]:
        """For a line of JSON."""
        side = "at_most" if self.at_most else "at_least"
        return {
            "row": self.row,
            "what": self.what,
            "value": self.value,
            side: self.bar,
            "unit": self.unit,
            "holds": self.holds,
        }


def show(verdicts: Sequence[Verdict]) -> None:
    """Print one line each."""
    print()
    for one in verdicts:
        print(one)


def rounded(value: Any) -> Any:
    """A result for a line of JSON: numbers with as many digits as mean something."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
