"""``crdt-llm replay``: make a conversation's replies anew from the document alone.

This module owns the wiring and the table; the comparison is
:mod:`crdt_llm.inference.replay`'s.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from crdt_llm.cli.folders import DataFolder
from crdt_llm.cli.stored import complete_id, list_stored, load_stored
from crdt_llm.document.keys import load_or_create_secret
from crdt_llm.document.seal import Sealer
from crdt_llm.errors import Corrupt, LocalMisuse
from crdt_llm.inference.models import resolve
from crdt_llm.inference.process import EngineProcess
from crdt_llm.inference.prompt import Renderer
from crdt_llm.inference.replay import replay
from crdt_llm.inference.tokens import Vocabulary
from crdt_llm.inference.transcript import Transcript

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.inference.replay import Replayed


def open_transcript(
    conversation: Conversation, folder: DataFolder, model_dir: Path
) -> tuple[Transcript, Renderer]:
    """What a model reads of a stored conversation, with the key of the data folder.

    Raises:
        Corrupt: the key is missing.
    """
    key = folder.key("master")
    if not key.exists():
        raise Corrupt(f"the key {key} is missing: without it the sealed ids cannot be read")
    vocabulary = Vocabulary.load(model_dir)
    renderer = Renderer.learn(model_dir, vocabulary)
    sealer = Sealer(load_or_create_secret(key), os.urandom)
    return Transcript(conversation, renderer, sealer), renderer


def find_stored(folder: DataFolder, beginning: str | None) -> tuple[str, Conversation]:
    """A conversation of a data folder, by the beginning of its id; by default the last one.

    Raises:
        LocalMisuse: there is none, or there are several.
    """
    stored = [one.conversation for one in list_stored(folder.log)]
    name = stored[0] if beginning is None and stored else complete_id(beginning or "", stored)
    if name is None:
        raise LocalMisuse(f"{folder.path} has no such conversation: see `crdt-llm chat --list`")
    return name, load_stored(folder.log, name)


async def _replay(
    conversation: Conversation,
    folder: DataFolder,
    model_dir: Path,
    show: Callable[[Replayed], None],
) -> list[Replayed]:
    """Replay the view's path; each reply is shown as soon as it is made."""
    transcript, renderer = open_transcript(conversation, folder, model_dir)
    rows: list[Replayed] = []
    async with await EngineProcess.start(model_dir) as engine:
        path = conversation.view()
        async for one in replay(conversation, path, transcript, renderer, engine):
            show(one)
            rows.append(one)
    return rows


def _show(one: Replayed) -> None:
    sys.stdout.write(_row(one) + "\n")
    sys.stdout.flush()


def _silent(_: Replayed) -> None:
    """One document of facts comes at the end."""


def report(line: str) -> None:
    """Say something about the model while it is looked for."""
    sys.stderr.write(f"{line}\n")


def _row(one: Replayed) -> str:
    if one.problem is not None:
        return f"{one.entry}  not replayed: {one.problem}"
    if one.skipped is not None:
        return f"{one.entry}  skipped: {one.skipped}"
    verdict = "exact" if one.exact else f"differs at token {one.equal}"
    model = "" if one.same_model else "  (made by another build of the model)"
    return f"{one.entry}  prompt {one.prompt:>6}  tokens {one.recorded:>5}  {verdict}{model}"


def run_replay(*, conversation: str | None, data: Path | None, model: str, as_json: bool) -> int:
    """The command. Returns the exit code: 0 if every reply came out token for token."""
    folder = DataFolder.named(data)
    name, replica = find_stored(folder, conversation)
    model_dir = resolve(model, fetch=True, report=report)
    rows = asyncio.run(_replay(replica, folder, model_dir, _silent if as_json else _show))
    exact = all(one.exact for one in rows)
    if as_json:
        facts = [asdict(one) | {"exact": one.exact} for one in rows]
        sys.stdout.write(
            json.dumps({"conversation": name, "exact": exact, "replies": facts}) + "\n"
        )
    else:
        tokens = sum(one.recorded for one in rows)
        sys.stdout.write(
            f"{len(rows)} replies, {tokens} tokens, {'exact' if exact else 'NOT exact'}\n"
        )
    return 0 if exact else 1
