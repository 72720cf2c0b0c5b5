"""``crdt-llm replay``: make a conversation's replies anew from the document alone.

This module owns the wiring and the table; the comparison is
:mod:`crdt_llm.inference.replay.replay`'s.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from crdt_llm.cli.embedded_node import DIGESTS, engine_starter
from crdt_llm.cli.engine_options import DEFAULTS
from crdt_llm.cli.folders import DataFolder
from crdt_llm.cli.stored import complete_id, list_stored, load_stored
from crdt_llm.document.keys import load_or_create_secret
from crdt_llm.document.schema import ROOT
from crdt_llm.document.seal import Sealer
from crdt_llm.errors import Corrupt, LocalMisuse
from crdt_llm.inference.contract import BIT_EXACT
from crdt_llm.inference.models.folders import resolve
from crdt_llm.inference.node.digests import Digests, verify
from crdt_llm.inference.prompt.renderer import Renderer
from crdt_llm.inference.prompt.tokens import Vocabulary
from crdt_llm.inference.prompt.transcript import Transcript
from crdt_llm.inference.replay.replay import replay

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from crdt_llm.cli.engine_options import EngineOptions
    from crdt_llm.document.conversation import Conversation
    from crdt_llm.inference.engine.process import EngineProcess
    from crdt_llm.inference.node.digests import Verified
    from crdt_llm.inference.replay.replay import Replayed

NOT_BIT_EXACT: Final = (
    "this model is computed at exactness level 1: where two tokens are almost equally likely,"
    " another one may come out; no KV was recorded to compare"
)


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


async def _replay(  # noqa: PLR0913 - what a replay reads, and where it goes
    conversation: Conversation,
    folder: DataFolder,
    model_dir: Path,
    start_engine: Callable[[], Awaitable[EngineProcess]],
    show: Callable[[Replayed], None],
    *,
    check_kv: bool,
) -> tuple[list[Replayed], list[Verified]]:
    """Replay the view's path; each reply is shown as soon as it is made."""
    transcript, renderer = open_transcript(conversation, folder, model_dir)
    rows: list[Replayed] = []
    borders: list[Verified] = []
    async with await start_engine() as engine:
        if engine.capabilities.exactness < BIT_EXACT:
            report(NOT_BIT_EXACT)
        path = conversation.view()
        async for one in replay(conversation, path, transcript, renderer, engine):
            show(one)
            rows.append(one)
        if check_kv:
            recorded = Digests(folder.kv / DIGESTS).load(conversation.id or "")
            verifying = verify(
                conversation, _end_of(path, conversation), transcript, recorded, engine
            )
            borders = [border async for border in verifying]
    return rows, borders


def _end_of(path: Sequence[str], conversation: Conversation) -> str:
    """The last entry of a path that was admitted and has ended."""
    entries = (conversation.entry(name) for name in reversed(path))
    ended = (one for one in entries if one is not None and one.proof is not None)
    last = next(ended, None)
    return ROOT if last is None else last.id


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


def _border(one: Verified) -> str:
    verdict = {None: "not recorded", True: "same", False: "DIFFERS"}[one.same]
    return f"{one.entry}  KV of {one.tokens:>6} tokens  {verdict}"


def run_replay(  # noqa: PLR0913 - the options of a command
    *,
    conversation: str | None,
    data: Path | None,
    model: str,
    engine: EngineOptions = DEFAULTS,
    as_json: bool,
    check_kv: bool = False,
) -> int:
    """The command. Returns the exit code: 0 if every reply came out token for token.

    With ``check_kv`` the KV at every entry border must also be what it was when it was live, as far
    as that was recorded; it must have been recorded somewhere.
    """
    folder = DataFolder.named(data)
    name, replica = find_stored(folder, conversation)
    model_dir = resolve(model, fetch=True, report=report)
    start_engine = engine_starter(model_dir, None, engine)
    show = _silent if as_json else _show
    rows, borders = asyncio.run(
        _replay(replica, folder, model_dir, start_engine, show, check_kv=check_kv)
    )
    exact = all(one.exact for one in rows)
    compared = [one.same for one in borders if one.same is not None]
    same_kv = all(compared) and bool(compared)
    if as_json:
        replies = [asdict(one) | {"exact": one.exact} for one in rows]
        facts: dict[str, object] = {"conversation": name, "exact": exact, "replies": replies}
        if check_kv:
            facts |= {"same_kv": same_kv, "borders": [asdict(one) for one in borders]}
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        tokens = sum(one.recorded for one in rows)
        sys.stdout.write(
            f"{len(rows)} replies, {tokens} tokens, {'exact' if exact else 'NOT exact'}\n"
        )
        if check_kv:
            sys.stdout.writelines(f"{_border(one)}\n" for one in borders)
            verdict = "all the same" if same_kv else "NOT the same" if compared else "none recorded"
            sys.stdout.write(f"{len(compared)} of {len(borders)} KV digests compared, {verdict}\n")
    return 0 if exact and (same_kv or not check_kv) else 1
