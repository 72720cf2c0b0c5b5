"""Digests of the KV cache as it was while a conversation was live, to compare a replay with.

This module owns a folder with one small text file a conversation: a line for each entry border that
was read, with the number of tokens up to it, the fingerprint of the engine and the SHA-256 of the
KV of those tokens. All of it is derived and may be deleted. A digest would let a short secret be
guessed by whoever has the model, so what is withdrawn is overwritten here before it is removed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from crdt_llm.document.reading import read
from crdt_llm.inference.contract import BIT_EXACT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence
    from pathlib import Path

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.tree import Tree
    from crdt_llm.inference.contract import Capabilities, KvDigest
    from crdt_llm.inference.prompt.transcript import Transcript

BORDERS_MAX: Final = 1 << 17
"""Lines of one file: more than a conversation may have entries. The rest is not recorded."""

_FIELDS: Final = 4
_FORGOTTEN: Final = ".forgotten"


@runtime_checkable
class Digesting(Protocol):
    """An engine whose KV can be compared."""

    @property
    def capabilities(self) -> Capabilities:
        """What this engine is."""
        ...

    async def digest(self, ids: Sequence[int]) -> KvDigest:
        """Bring the KV of ``ids`` and hash it."""
        ...


@dataclass(frozen=True, slots=True)
class Border:
    """The end of an entry in a prompt.

    Attributes:
        entry: its id.
        tokens: how many tokens the prompt has up to there.
        model: the fingerprint of the engine.
    """

    entry: str
    tokens: int
    model: str


class Digests:
    """The digests of a node's conversations.

    Args:
        folder: made when something is recorded; belongs to one process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, conversation: str) -> dict[Border, str]:
        """What was recorded of a conversation; a line that cannot be read counts as absent."""
        file = self._folder / conversation
        found: dict[Border, str] = {}
        if not file.is_file():
            return found
        for line in file.read_text(encoding="ascii", errors="replace").splitlines():
            fields = line.split(" ")
            if len(fields) == _FIELDS and fields[1].isdecimal():
                found[Border(fields[0], int(fields[1]), fields[2])] = fields[3]
        return found

    def note(self, conversation: str, border: Border, kv: bytes) -> None:
        """Record a digest."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        line = f"{border.entry} {border.tokens} {border.model} {kv.hex()}\n"
        handle = os.open(self._folder / conversation, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(line.encode("ascii"))

    def drop(self, conversation: str, tree: Tree, withdrawn: Collection[str]) -> None:
        """Forget what was recorded of some entries and behind them: nothing of it stays on disk."""
        kept = self.load(conversation)
        gone = {border for border in kept if _is_behind(tree, border.entry, withdrawn)}
        file = self._folder / conversation
        if not gone:
            return
        with file.open("r+b") as old:
            old.write(b"\0" * file.stat().st_size)
            old.flush()
            os.fsync(old.fileno())
        file.unlink()
        for border, kv in kept.items():
            if border not in gone:
                self.note(conversation, border, bytes.fromhex(kv))

    def forgotten(self, conversation: str) -> frozenset[str]:
        """The withdrawn entries that engines were told to forget, on disk too."""
        file = self._folder / f"{conversation}{_FORGOTTEN}"
        return (
            frozenset(file.read_text(encoding="ascii").split()) if file.is_file() else frozenset()
        )

    def note_forgotten(self, conversation: str, entries: Collection[str]) -> None:
        """Record that engines were told to forget entries, so that they are told once."""
        fresh = [entry for entry in entries if entry not in self.forgotten(conversation)]
        if fresh:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._folder / f"{conversation}{_FORGOTTEN}").open("a", encoding="ascii") as file:
                file.writelines(f"{entry}\n" for entry in fresh)

    async def record(
        self,
        conversation: str,
        segments: Sequence[tuple[str, tuple[int, ...]]],
        engine: Digesting,
    ) -> None:
        """Record every border of a prompt that an engine has, and that was not recorded yet."""
        capabilities = engine.capabilities
        if capabilities.exactness < BIT_EXACT:
            return
        known = self.load(conversation)
        ids: tuple[int, ...] = ()
        for name, part in segments:
            ids += part
            border = Border(name, len(ids), capabilities.fingerprint)
            if part and border not in known and len(known) < BORDERS_MAX:
                self.note(conversation, border, (await engine.digest(ids)).kv)


def _is_behind(tree: Tree, entry: str, withdrawn: Collection[str]) -> bool:
    return entry not in tree or not set(tree.path(entry)).isdisjoint(withdrawn)


@dataclass(frozen=True, slots=True)
class Verified:
    """What became of one border.

    Attributes:
        entry: the entry that ends there.
        tokens: tokens up to it.
        same: whether its KV is what it was; ``None`` if it was not recorded with this engine.
    """

    entry: str
    tokens: int
    same: bool | None


async def verify(
    conversation: Conversation,
    entry: str,
    transcript: Transcript,
    recorded: dict[Border, str],
    engine: Digesting,
) -> AsyncIterator[Verified]:
    """Compute the KV of a path anew, and compare it at every border.

    Args:
        conversation: the replica.
        entry: where the path ends; it must have ended itself.
        transcript: reads its ids.
        recorded: what :meth:`Digests.load` gave.
        engine: computes the KV.

    Raises:
        BadProof: something on the path cannot be read.
    """
    ids: tuple[int, ...] = ()
    for name, part in transcript.segments(read(conversation, entry).entries):
        ids += part
        kv = recorded.get(Border(name, len(ids), engine.capabilities.fingerprint))
        if kv is None or not part:
            yield Verified(name, len(ids), None)
        else:
            yield Verified(name, len(ids), (await engine.digest(ids)).kv.hex() == kv)
