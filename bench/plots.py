"""Plots of what was measured: a chat turn by turn, and restoring against replaying.

This module owns what is drawn; the figures come from :mod:`chat` and :mod:`tree`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from peer import Turn

    # A line: its name, and where it goes.
    Lines = dict[str, tuple[Sequence[float], Sequence[float]]]

mpl.use("svg")
INCHES = (7.0, 4.0)


def draw_chat(turns: dict[str, list[Turn]], folder: Path, name: str) -> None:
    """Write one SVG a figure into a folder: first token and bytes by turn, decode by context."""
    ttft: Lines = {}
    sent: Lines = {}
    rate: Lines = {}
    for peer, had in turns.items():
        numbers = range(1, len(had) + 1)
        ttft[peer] = (numbers, [turn.ttft_ms for turn in had])
        sent[peer] = (numbers, list(accumulate(turn.sent_bytes for turn in had)))
        rate[peer] = ([turn.prompt for turn in had], [turn.tokens_per_s for turn in had])
    _draw(folder / f"{name}-ttft.svg", ("turn", "time to first token, ms"), ttft)
    _draw(folder / f"{name}-bytes.svg", ("turn", "bytes sent so far"), sent)
    _draw(folder / f"{name}-rate.svg", ("context, tokens", "tokens per second"), rate)


def draw_restore(
    tokens: Sequence[float],
    restored_ms: Sequence[float],
    replayed_ms: Sequence[float],
    folder: Path,
) -> None:
    """Write an SVG into a folder: first token after a restart, with checkpoints and without."""
    lines: Lines = {"restored": (tokens, restored_ms), "replayed": (tokens, replayed_ms)}
    labels = ("tokens of the conversation", "time to first token after a restart, ms")
    _draw(folder / "restore-ttft.svg", labels, lines)


def _draw(file: Path, labels: tuple[str, str], lines: Lines) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=INCHES)
    axes = figure.add_subplot()
    for name, (across, up) in lines.items():
        axes.plot(across, up, label=name)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, bbox_inches="tight")
