"""Every figure is one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peer import Turn
from plots import draw_chat, draw_restore

if TYPE_CHECKING:
    from pathlib import Path


def test_a_chat_has_three_figures_and_a_restart_one(tmp_path: Path) -> None:
    turn = Turn(ttft_ms=1.0, tokens_per_s=2.0, sent_bytes=3, prefilled=4, prompt=5)
    folder = tmp_path / "plots"
    draw_chat({"ours": [turn, turn], "theirs": [turn]}, folder, "chat")
    draw_restore([250, 500], [10.0, 11.0], [100.0, 200.0], folder)
    names = {file.name for file in folder.iterdir()}
    assert names == {"chat-ttft.svg", "chat-bytes.svg", "chat-rate.svg", "restore-ttft.svg"}
    assert all(b"</svg>" in file.read_bytes() for file in folder.iterdir())
