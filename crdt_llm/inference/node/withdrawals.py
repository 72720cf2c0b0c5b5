"""What an engine has to forget: whatever was withdrawn, and all that was computed from it.

This module owns what of a withdrawal an engine is told, also of one that this process never gave to
an engine: what engines wrote to disk outlives them. It must not know how a withdrawal is written,
or when it is time to tell; that is decided in :mod:`crdt_llm.inference.node.evaluate`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from crdt_llm.errors import BadProof, EngineDied
from crdt_llm.inference.node.fed import Drop

if TYPE_CHECKING:
    from crdt_llm.inference.contract import Engine
    from crdt_llm.inference.node.ahead import Ahead, Reader
    from crdt_llm.inference.node.fed import Fed
    from crdt_llm.inference.node.workplace import Workplace

logger = logging.getLogger("crdt_llm.inference")


class Withdrawals:
    """What was withdrawn in one conversation, as far as engines are concerned.

    Args:
        shared: the node.
        conversation: the conversation's id.
        work: the replica.
        fed: what engines were given.
        ahead: what is read before anybody asks for it.
    """

    def __init__(
        self, shared: Reader, conversation: str, work: Workplace, fed: Fed, ahead: Ahead
    ) -> None:
        self._shared = shared
        self._id = conversation
        self._work = work
        self._fed = fed
        self._ahead = ahead

    async def forget(self) -> None:
        """Have the engine forget what it was not told of yet. Nothing may be reading meanwhile."""
        engine, tree = self._shared.engine, self._work.conversation.tree
        withdrawn = self._work.take_withdrawn()
        if withdrawn:
            # It may have been typed here a moment ago.
            self._shared.drafts(self._id).reset()
            if self._shared.digests is not None:
                self._shared.digests.drop(self._id, tree, withdrawn)
        for entry in withdrawn:
            known = len(self._fed.drops)
            self._fed.withdraw(entry)
            if tree.is_admitted(entry):
                self._ahead.plan(tree.tip(entry))
                if len(self._fed.drops) == known and not self._was_forgotten(entry):
                    self._fed.drops.append(self._drop_unseen(entry))
        if engine is not None:
            await self._tell_to_forget(engine, withdrawn)

    async def _tell_to_forget(self, engine: Engine, withdrawn: tuple[str, ...]) -> None:
        try:
            while self._fed.drops:
                await engine.forget(self._fed.drops[0].ids, self._fed.drops[0].keep)
                self._fed.drops.popleft()
            await self._ahead.drop_drafts(engine)
        except EngineDied:
            self._shared.lost_engine(engine)
            return
        if self._shared.digests is not None:
            self._shared.digests.note_forgotten(self._id, withdrawn)

    def _was_forgotten(self, entry: str) -> bool:
        """Whether no engine can have read an entry that this process never gave to one.

        What engines wrote to disk outlives them. Without a folder there is nothing of the kind.
        """
        digests = self._shared.digests
        return digests is None or entry in digests.forgotten(self._id)

    def _drop_unseen(self, entry: str) -> Drop:
        """What an engine has to forget of an entry whose ids nobody knows any more.

        Everything behind its parent; where it may have been read elsewhere too, or stands at the
        root, everything that begins as its path does.
        """
        conversation, transcript = self._work.conversation, self._work.transcript
        parent, path = conversation.tree.up(entry), conversation.tree.path(entry)
        if parent and all(conversation.reads(name) is None for name in conversation.tree.entries):
            try:
                ids = transcript.ids(parent)
            except BadProof as error:
                logger.info("conversation %s: %s", self._id, error)
            else:
                return Drop(ids, len(ids) - 1)
        first = transcript.drafting(())("")[:1]
        logger.info("conversation %s: all KV is forgotten, for %s", self._id, path[0])
        return Drop(first, 0)
