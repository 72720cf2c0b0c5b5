"""The inference node: a peer that gives entries their place and slots their replies.

This module owns the engine, its restarts, and which conversations the node sits in; what happens
inside one is :mod:`crdt_llm.inference.node.desk`'s. It must not know sockets or stores.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from crdt_llm.errors import CrdtLlmError, Unavailable
from crdt_llm.inference.node.desk import RETRY_FIRST_S, RETRY_MAX_S, Desk
from crdt_llm.inference.node.drafts import Drafts, Tally
from crdt_llm.inference.node.fed import Fed
from crdt_llm.inference.node.figures import Computed, Figures
from crdt_llm.inference.node.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from crdt_llm.inference.contract import Engine
    from crdt_llm.inference.node.digests import Digests
    from crdt_llm.inference.node.reply import Identity
    from crdt_llm.inference.node.seat import Surroundings
    from crdt_llm.inference.prompt.renderer import Renderer
    from crdt_llm.inference.prompt.tokens import Vocabulary

logger = logging.getLogger("crdt_llm.inference")

REPLIES_MAX: Final = 8  # running at once: each holds a whole KV path in memory
DESKS_MAX: Final = 1000  # replicas in memory; the least recently used idle one leaves first
LINGER_S: Final = 2.0  # what was read of a draft that is over waits so long for what was sent
FED_MAX: Final = 2 * DESKS_MAX  # conversations of which is known what an engine was given


class Node:
    """An inference node.

    Args:
        surroundings: what it takes from outside.
        renderer: turns entries into ids.
        vocabulary: turns ids into text.
        identity: its keys and names.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        renderer: Renderer,
        vocabulary: Vocabulary,
        identity: Identity,
    ) -> None:
        self.surroundings = surroundings
        self.renderer = renderer
        self.vocabulary = vocabulary
        self.identity = identity
        self.engine: Engine | None = None
        self.problem: str | None = "the engine is starting"
        self.turns = Turns()
        self._running = 0
        self._line: dict[str, None] = {}  # where a reply waits for room, who came first first
        self._desks: dict[str, tuple[Desk, asyncio.Task[None]]] = {}
        self._fed: dict[str, Fed] = {}
        self.drafted = Tally()
        self.figures = Figures(Computed(), self.drafted)
        self.digests: Digests | None = None  # where they are recorded, if they are
        self._drafts: dict[str, Drafts] = {}
        self._reading = 0  # admitted paths that are read ahead
        self._until_rest: set[Callable[[], None]] = set()
        self._restarting: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Start the engine.

        Raises:
            ModelUnusable: the model cannot be used.
            EngineDied: the engine's process ended while it started.
        """
        await self._take_engine()

    async def start_at_last(self) -> None:
        """As :meth:`start`, but a process that dies is started again, for as long as it takes.

        Raises:
            ModelUnusable: the model cannot be used.
        """
        await self._start_again(Unavailable)

    async def _start_again(self, *passing: type[Exception]) -> None:
        """Start the engine; wait, longer each time, after an error that may pass."""
        wait = RETRY_FIRST_S
        while True:
            try:
                await self._take_engine()
            except passing as error:
                self.problem = f"the engine does not start: {error}"
                logger.warning("%s; next attempt in %.1f s", self.problem, wait)
                await self.surroundings.sleep(wait)
                wait = min(2 * wait, RETRY_MAX_S)
            else:
                return

    async def _take_engine(self) -> None:
        self.engine = await self.surroundings.start_engine()
        fingerprint = self.engine.capabilities.fingerprint
        self.identity = replace(self.identity, model=fingerprint)
        self.problem = None

    def notice(self, conversation: str) -> None:
        """Something was committed in a conversation: have a look at it, soon.

        Where this node has a seat it hears of that there, and its own commits are no news to it.
        """
        if not self._closed:
            self._desk(conversation).notice()

    def _wake(self, conversation: str) -> None:
        """Have a look at a conversation, soon."""
        if not self._closed:
            self._desk(conversation).wake()

    def _desk(self, conversation: str) -> Desk:
        seated = self._desks.pop(conversation, None)
        if seated is None or seated[1].done():
            self._make_room()
            desk = Desk(self, conversation)
            seated = (desk, asyncio.create_task(desk.run(), name=f"desk {conversation}"))
        self._desks[conversation] = seated  # last in order: used last
        return seated[0]

    async def visit(self, conversation: str) -> None:
        """Look at a conversation, and return when there is nothing to do there but to wait."""
        self._wake(conversation)
        desk, _ = self._desks[conversation]
        await desk.settled.wait()

    def _make_room(self) -> None:
        """Let go of who is idle, the least recently used first, until there is room for one."""
        too_many = len(self._desks) + 1 - min(DESKS_MAX, self.surroundings.seats_max)
        if too_many <= 0:
            return
        idle = [name for name, (desk, task) in self._desks.items() if desk.idle or task.done()]
        for name in idle[:too_many]:
            self._desks.pop(name)[1].cancel()

    # -- what desks share ----------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """How many more replies may be started now."""
        return max(0, REPLIES_MAX - self._running)

    @property
    def running(self) -> int:
        """How many replies run."""
        return self._running

    def occupy(self, change: int) -> None:
        """So many more (or fewer) replies run; whoever waited for room has a look."""
        waited = self.capacity == 0
        self._running += change
        self._come_to_rest()
        if waited and self.capacity:
            self._wake_all()

    def stand_in_line(self, conversation: str, *, waits: bool) -> int:
        """Where a conversation stands among those where a reply waits for room; 1 is next.

        Args:
            conversation: its id.
            waits: whether a reply waits there now; if not, it leaves the line, and 0 is returned.
        """
        if not waits:
            self._line.pop(conversation, None)
            return 0
        self._line.setdefault(conversation)
        return list(self._line).index(conversation) + 1

    def _wake_all(self) -> None:
        """Have everybody look, those first who wait in the line."""
        for conversation in (*self._line, *self._desks):
            if conversation in self._desks:
                self._desks[conversation][0].wake()

    @property
    def is_at_work(self) -> bool:
        """Whether a reply runs or an admitted path is read, in any conversation."""
        return self._running > 0 or self._reading > 0

    def read_ahead(self, change: int) -> None:
        """So many more (or fewer) admitted paths are being read."""
        self._reading += change
        self._come_to_rest()

    def call_at_rest(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` once, when nothing admitted is at work any more."""
        self._until_rest.add(wake)

    def _come_to_rest(self) -> None:
        if not self.is_at_work:
            waiting, self._until_rest = self._until_rest, set()
            for wake in waiting:
                wake()

    # -- drafts --------------------------------------------------------------------------------

    def hint(
        self, conversation: str, source: Hashable, *, after: str | None, keep: int, text: str
    ) -> None:
        """Somebody is typing: what they have may be read before they send it.

        Nothing of it is stored or logged, and it yields to everything that was admitted.

        Args:
            conversation: its id.
            source: tells drafts of one conversation apart.
            after: the entry that it will be written after, ``""`` for none; ``None`` when nobody
                types there any more.
            keep: how many UTF-8 bytes of the draft before stay.
            text: what follows them.
        """
        if self._closed or (after is None and conversation not in self._drafts):
            return
        drafts = self.drafts(conversation)
        drafts.hint(source, after, keep, text)
        if source not in drafts.waiting:
            # What was read may just have been sent: it stays until that must have arrived.
            loop = asyncio.get_running_loop()
            loop.call_later(LINGER_S, self._drop_draft, conversation, source)
        self._wake(conversation)

    def _drop_draft(self, conversation: str, source: Hashable) -> None:
        drafts = self._drafts.get(conversation)
        if drafts is None or self._closed:
            return
        drafts.drop(source, if_ended=True)
        if drafts.drops:
            self._wake(conversation)

    def drafts(self, conversation: str) -> Drafts:
        """What is being typed in a conversation; the least recently used one is dropped."""
        drafts = self._drafts.pop(conversation, None) or Drafts(self.drafted)
        self._drafts[conversation] = drafts
        for name in list(self._drafts)[: max(0, len(self._drafts) - DESKS_MAX)]:
            del self._drafts[name]
        return drafts

    def fed(self, conversation: str) -> Fed:
        """What engines were given of a conversation; the least recently used one is forgotten."""
        fed = self._fed.pop(conversation, None) or Fed()
        self._fed[conversation] = fed
        if len(self._fed) > FED_MAX:
            del self._fed[next(iter(self._fed))]
        return fed

    def lost_engine(self, engine: Engine) -> None:
        """An engine died: start another one, once, however many replies notice it."""
        if self.engine is not engine or self._closed:
            return
        self.engine, self.problem = None, "the engine died and is being restarted"
        for drafts in self._drafts.values():
            drafts.lose()
        logger.warning("the engine died; starting another one")
        self._restarting = asyncio.create_task(self._restart(engine), name="engine restart")

    async def _restart(self, dead: Engine) -> None:
        with suppress(Unavailable):  # it is dead already: closing it only frees the pipes
            await dead.close()
        await self._start_again(CrdtLlmError, OSError)
        self._wake_all()

    async def close(self) -> None:
        """Stop everything. Replies that stream stay as they are and go on after the next start."""
        self._closed = True
        tasks = [task for _, task in self._desks.values()]
        if self._restarting is not None:
            tasks.append(self._restarting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._desks.clear()
        if self.engine is not None:
            await self.engine.close()
            self.engine = None
