"""Plots of a chat: time to first token, bytes and decode rate, turn by turn.

This module owns what is drawn; the figures come from :mod:`chat`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from peer import Turn

mpl.use("svg")
INCHES = (7.0, 4.0)


def draw(turns: dict[str, list[Turn]], folder: Path, name: str) -> None:
    """Write one SVG a figure into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, tuple[str, Callable[[Sequence[Turn]], list[float]]]] = {
        "ttft": ("time to first token, ms", lambda had: [turn.ttft_ms for turn in had]),
        "bytes": (
            "bytes sent so far",
            lambda had: [float(total) for total in accumulate(turn.sent_bytes for turn in had)],
        ),
        "rate": ("tokens per second", lambda had: [turn.tokens_per_s for turn in had]),
    }
    for kind, (title, values) in figures.items():
        figure = Figure(figsize=INCHES)
        axes = figure.add_subplot()
        for peer, had in turns.items():
            axes.plot(range(1, len(had) + 1), values(had), label=peer)
        axes.set_xlabel("turn")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(folder / f"{name}-{kind}.svg", bbox_inches="tight")
