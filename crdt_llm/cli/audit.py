"""``crdt-llm audit``: say how far this build of a model agrees with the one that made the replies.

This module owns the wiring and the table; the comparison is
:mod:`crdt_llm.inference.replay.audit`'s.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from crdt_llm.cli.embedded_node import engine_starter
from crdt_llm.cli.engine_options import DEFAULTS
from crdt_llm.cli.folders import DataFolder
from crdt_llm.cli.replay import find_stored, open_transcript, report
from crdt_llm.inference.models.folders import resolve
from crdt_llm.inference.replay.audit import audit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from crdt_llm.cli.engine_options import EngineOptions
    from crdt_llm.document.conversation import Conversation
    from crdt_llm.inference.engine.process import EngineProcess
    from crdt_llm.inference.replay.audit import Audited


async def _audit(
    conversation: Conversation,
    folder: DataFolder,
    model_dir: Path,
    start_engine: Callable[[], Awaitable[EngineProcess]],
    show: Callable[[Audited], None],
) -> list[Audited]:
    """Audit the view's path; each reply is shown as soon as it is done."""
    transcript, _ = open_transcript(conversation, folder, model_dir)
    rows: list[Audited] = []
    async with await start_engine() as engine:
        async for one in audit(conversation, conversation.view(), transcript, engine):
            show(one)
            rows.append(one)
    return rows


def _show(one: Audited) -> None:
    sys.stdout.write(_row(one) + "\n")
    sys.stdout.flush()


def _silent(_: Audited) -> None:
    """One document of facts comes at the end."""


def _row(one: Audited) -> str:
    if one.problem is not None:
        return f"{one.entry}  not audited: {one.problem}"
    if one.skipped is not None:
        return f"{one.entry}  skipped: {one.skipped}"
    changed = [
        f"    token {change.position}: {change.recorded} was the most likely, now {change.now} is"
        for change in one.changes
    ]
    model = "" if one.same_model else "  (made by another build of the model)"
    figures = f"tokens {one.tokens:>5}  largest difference {one.difference:.4f} nats"
    return "\n".join((f"{one.entry}  {figures}  choices changed {len(changed)}{model}", *changed))


def run_audit(  # noqa: PLR0913 - the options of a command
    *,
    conversation: str | None,
    data: Path | None,
    model: str,
    engine: EngineOptions = DEFAULTS,
    tolerance: float,
    as_json: bool,
) -> int:
    """The command. Returns the exit code: 0 if every reply agrees within the tolerance."""
    folder = DataFolder.named(data)
    name, replica = find_stored(folder, conversation)
    model_dir = resolve(model, fetch=True, report=report)
    start_engine, show = engine_starter(model_dir, None, engine), _silent if as_json else _show
    rows = asyncio.run(_audit(replica, folder, model_dir, start_engine, show))
    agree = all(one.agrees(tolerance) for one in rows)
    largest = max((one.difference for one in rows), default=0.0)
    changes = sum(len(one.changes) for one in rows)
    if as_json:
        facts = {
            "conversation": name,
            "agree": agree,
            "tolerance": tolerance,
            "difference": largest,
            "replies": [asdict(one) for one in rows],
        }
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        verdict = "agrees" if agree else "does NOT agree"
        sys.stdout.write(
            f"{len(rows)} replies, {sum(one.tokens for one in rows)} tokens, largest difference "
            f"{largest:.4f} nats, choices changed {changes}: {verdict}\n"
        )
    return 0 if agree else 1
