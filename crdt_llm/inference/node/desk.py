"""The node's place in one conversation: taking the seat, and taking it anew when it is lost.

This module owns the lifetime of seats and what is delivered to them; what is done in one is
:mod:`crdt_llm.inference.node.sitting`'s. It must not know sockets or stores: updates cross a
:class:`~crdt_llm.inference.node.seat.Seat` in both directions. Updates only mark the desk dirty.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from crdt_llm.document.conversation import Conversation
from crdt_llm.errors import Corrupt, CrdtLlmError, Forbidden
from crdt_llm.inference.node.held import Held, is_unconfirmed
from crdt_llm.inference.node.sitting import Sitting
from crdt_llm.inference.node.workplace import Workplace
from crdt_llm.inference.prompt.transcript import Transcript

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.inference.node.replies import Trouble
    from crdt_llm.inference.node.shared import Shared

logger = logging.getLogger("crdt_llm.inference")

RETRY_FIRST_S: Final = 0.2  # after a seat was lost
RETRY_MAX_S: Final = 10.0


class Desk:
    """The node's place in one conversation.

    Args:
        shared: what the node's desks share.
        conversation: the conversation's id.

    Attributes:
        settled: set once there was nothing to do but to wait, or the seat could not be had.
    """

    def __init__(self, shared: Shared, conversation: str) -> None:
        self.settled = asyncio.Event()
        self._shared = shared
        self._id = conversation
        self._dirty = asyncio.Event()
        self._lost = False
        self._early: list[bytes] = []
        self._sitting: Sitting | None = None
        self._troubles: dict[str, Trouble] = {}
        self._held = Held()
        self._is_away = False
        self._was_of_use = False  # the last seat

    @property
    def idle(self) -> bool:
        """Whether nothing runs here and nothing is left to look at."""
        if self._dirty.is_set():
            return False
        return self._is_away or (self._sitting is not None and self._sitting.idle)

    def wake(self) -> None:
        """Ask for a look."""
        self._dirty.set()

    def notice(self) -> None:
        """Something was committed, perhaps by this node: with a seat it comes here by itself."""
        if self._sitting is None:
            self.wake()

    async def run(self) -> None:
        """Sit at the conversation until cancelled; take the seat anew whenever it is lost.

        A seat of which nothing can come is given back until the next :meth:`wake`.

        Ends by itself where trying again cannot help: the conversation is damaged, or not ours.
        """
        wait = RETRY_FIRST_S
        while True:
            try:
                if await self._sit():
                    await self._stay_away()
                    wait = RETRY_FIRST_S
                    continue
            except (Corrupt, Forbidden) as error:
                logger.warning("conversation %s: %s; left alone", self._id, error)
                self.settled.set()
                return
            except CrdtLlmError as error:
                if is_unconfirmed(error):
                    wait = RETRY_FIRST_S  # it is not tried again: nothing to wait for
                logger.warning("conversation %s: %s; again in %.1f s", self._id, error, wait)
            except Exception:
                logger.exception("conversation %s: a bug; again in %.1f s", self._id, wait)
            self.settled.set()
            wait = RETRY_FIRST_S if self._was_of_use else wait
            await self._shared.surroundings.sleep(wait)
            wait = min(2 * wait, RETRY_MAX_S)

    async def _stay_away(self) -> None:
        self._is_away = True
        try:
            await self._dirty.wait()
        finally:
            self._is_away = False

    async def _sit(self) -> bool:
        """Have a seat until it is lost, or given back: says whether it was given back."""
        shared, outside = self._shared, self._shared.surroundings
        self._lost, self._early, self._was_of_use = False, [], False
        seat = await outside.take_seat(self._id, self._deliver, self._lose)
        conversation = Conversation(
            _client_id(outside.random), seal_client_id=_client_id(outside.random)
        )
        transcript = Transcript(conversation, shared.renderer, shared.identity.sealer)
        computed = shared.figures.computed
        work = Workplace(conversation, transcript, seat, outside.clock_ms, computed)
        sitting = Sitting(shared, self._id, work, self.wake, self._troubles, self._held)
        sender = asyncio.create_task(work.send(self._lose), name=f"outbox {self._id}")
        try:
            for update in (seat.state, *self._early):
                conversation.apply(update)
            del update  # what is withdrawn later must not stay here
            self._early = []
            self._held.look(conversation)
            self._sitting = sitting
            self._dirty.set()
            while not self._lost:
                await self._dirty.wait()
                self._dirty.clear()
                if await self._look(sitting):
                    return True
        finally:
            self._sitting = None
            self._was_of_use = work.was_of_use
            sender.cancel()
            await sitting.end()
            await asyncio.gather(sender, return_exceptions=True)
            await work.settle()
            await seat.leave()
        return False

    async def _look(self, sitting: Sitting) -> bool:
        """Do what there is to do. Says whether the seat is of no use any more."""
        while not self._lost:
            if not await sitting.act():
                self.settled.set()
                return sitting.is_needless and not self._dirty.is_set()
        return False

    def _deliver(self, update: bytes) -> None:
        self._dirty.set()
        if self._sitting is None:
            self._early.append(update)
        elif self._sitting.work.conversation.apply(update).structure:
            self._held.release()

    def _lose(self) -> None:
        self._lost = True
        self._dirty.set()


def _client_id(random: Callable[[int], bytes]) -> int:
    return int.from_bytes(random(4)) or 1
