"""One sitting of the node at a conversation: look, decide, have it done, and look again.

This module owns that sequence. What is next is decided in
:mod:`crdt_llm.inference.node.evaluate`; what takes more than a line in the document is done by
those who know how: the lease, admission, replies, reading ahead, forgetting. It must not know
sockets, stores, or why a sitting ends.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from crdt_llm.document.schema import Born, Role, State, entry_id
from crdt_llm.inference.node.admission import Admission
from crdt_llm.inference.node.ahead import Ahead
from crdt_llm.inference.node.evaluate import (
    Admit,
    Clear,
    End,
    Forget,
    Mark,
    Nothing,
    ReadDraft,
    Request,
    Resume,
    TakeLease,
    Warm,
    Withdraw,
    evaluate,
)
from crdt_llm.inference.node.leasing import Leasing
from crdt_llm.inference.node.overflow import Overflow
from crdt_llm.inference.node.presence import Doing, NodeState, Presence
from crdt_llm.inference.node.replies import Replies
from crdt_llm.inference.node.withdrawals import Withdrawals
from crdt_llm.inference.node.workplace import PRINCIPAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.document.conversation import Writer
    from crdt_llm.inference.node.evaluate import Action, Situation
    from crdt_llm.inference.node.held import Held
    from crdt_llm.inference.node.replies import Trouble
    from crdt_llm.inference.node.shared import Shared
    from crdt_llm.inference.node.workplace import Workplace


class Sitting:
    """The node at work in one conversation, from taking a seat to losing it.

    Args:
        shared: what the node's desks share.
        conversation: the conversation's id.
        work: the replica to work on.
        wake: asks for another look.
        troubles: what went wrong with replies that were begun; outlives a sitting.
        held: what is not admitted for now; outlives a sitting.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what outlives a sitting is an argument
        self,
        shared: Shared,
        conversation: str,
        work: Workplace,
        wake: Callable[[], None],
        troubles: dict[str, Trouble],
        held: Held,
    ) -> None:
        self.work = work
        self._shared = shared
        self._id = conversation
        self._held = held
        self._fed = shared.fed(conversation)
        self._presence = Presence(work.seat, work.conversation.client_id, self._look)
        work.conversation.subscribe(lambda _: self._presence.changed())
        self._leasing = Leasing(conversation, work, wake)
        self._overflow = Overflow(shared, conversation, work, wake)
        self._ahead = ahead = Ahead(shared, conversation, work, self._fed, wake)
        self._withdrawals = Withdrawals(shared, conversation, work, self._fed, ahead)
        self._replies = Replies(
            shared, conversation, work, ahead, troubles, wake, self._presence.changed
        )
        self._admission = Admission(
            shared, conversation, work, ahead, self._overflow, self._replies, held
        )

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        pending = self.work.conversation.tree.pending
        return not (self._replies.running or self._ahead.busy or pending or self.work.has_open)

    @property
    def is_needless(self) -> bool:
        """Whether nothing is lost by giving the seat back, now that there is nothing to do.

        With what is held, a seat would be in the way: whoever has one is not told to look.
        """
        gives_back = self._shared.surroundings.gives_back and not self._leasing.is_granted
        if not self._held and not gives_back:
            return False
        replies = self._replies.running or self._replies.have_ended
        busy = replies or self._leasing.is_asking or self._ahead.busy
        owed = self._ahead.cold is not None or self._overflow.preparing or self._fed.drops
        drafts = self._shared.drafts(self._id)
        ready = self._shared.engine is not None  # else it may have something to forget
        return ready and not (busy or owed or drafts.waiting or drafts.drops)

    async def act(self) -> bool:
        """Do the one next thing. Says whether there was one."""
        acted = await self._act()
        self._stand_in_line()
        self._presence.changed()
        return acted

    async def _act(self) -> bool:
        if self._replies.have_ended:
            if await self._replies.finish():
                self._held.release()  # whatever was not heard of meanwhile
            return True
        await self._overflow.drop_stale()
        if (ready := self._overflow.pop_ready()) is not None:
            await self._admission.write_summary(*ready)
            return True
        action = evaluate(self._situation())
        if isinstance(action, TakeLease) and not self._leasing.is_granted:
            self._leasing.ask()
            return False
        if isinstance(action, Nothing):
            self._leasing.cancel()  # whoever has the lease did what there was to do
        await self._do(action)
        return not isinstance(action, Nothing)

    async def end(self) -> None:
        """Leave everything as it is: replies that stream go on after the next sitting began."""
        tasks = (*self._replies.cancel(), *self._leasing.cancel())
        self._presence.close()
        self._shared.stand_in_line(self._id, waits=False)
        tidying = (self._ahead.stop(), self._overflow.stop())
        await asyncio.gather(*tasks, *tidying, return_exceptions=True)
        self._replies.clear()

    def _look(self) -> NodeState | None:
        """What to show of this node; nothing while another one may be the conversation's."""
        if not self.work.leased:
            return None
        generations = self._replies.generations
        replies = [generation.reply for generation in generations]
        places = [one.place for one in generations if one.place is not None]
        unasked = self._stand_in_line()
        queue = min(places) + 1 if places else unasked
        if any(one.place is None and one.reply.first_at_ms is not None for one in generations):
            doing = Doing.GENERATING
        elif len(places) < len(generations) or self._ahead.busy or self._overflow.preparing:
            doing = Doing.PREFILLING
        else:
            doing = Doing.QUEUED if queue else Doing.IDLE
        warm, tokens = self.work.measure({reply.slot: len(reply.own_ids) for reply in replies})
        return NodeState(self._shared.identity.model, doing, warm, tokens, queue)

    def _stand_in_line(self) -> int:
        """Where this conversation stands in the node's line for room; 0 if it needs none."""
        waits = any(self.work.conversation.tree.facts(one).slot for one in self._pending)
        waits = waits and self.work.leased and not self._shared.capacity
        return self._shared.stand_in_line(self._id, waits=waits)

    @property
    def _pending(self) -> tuple[str, ...]:
        return self.work.conversation.tree.pending

    def _situation(self) -> Situation:
        shared = self._shared
        self._leasing.find()
        running = self._replies.running
        ready = shared.engine is not None
        # One path at a time: two that interrupt each other would never come to an end.
        at_rest = ready and not running and not self._ahead.busy
        situation = self.work.situation(
            running=running,
            capacity=shared.capacity if ready else 0,
            cold=self._ahead.cold if at_rest else None,
        )
        withdrawn = situation.withdrawn or bool(self._fed.drops)
        return replace(
            situation,
            withdrawn=ready and withdrawn,
            # Not beside a reply: it may stand on rows that a draft shares with it.
            dropped=at_rest and bool(shared.drafts(self._id).drops),
            draft=at_rest and self._ahead.draft,
            preparing=self._overflow.preparing,
            held=self._held.entries(at_rest=not running),
        )

    async def _do(self, action: Action) -> None:
        match action:
            case Nothing():
                pass
            case TakeLease():
                await self._leasing.record()
            case End(slot):
                await self._replies.stop(slot)
            case Resume(slot):
                await self._replies.resume(slot)
            case Admit():
                await self._admission.admit(action)
            case Warm(entry):
                self._ahead.start(entry)
            case ReadDraft():
                self._ahead.start_draft()
            case Forget():
                await self._forget()
            case Mark() | Request() | Clear() | Withdraw():
                await self.work.write(lambda writer: self._note_down(writer, action))

    async def _forget(self) -> None:
        """Have the engine forget what was withdrawn, and what was computed from it (I8)."""
        await self._ahead.stop()  # it may be just reading it
        if self.work.conversation.tree.pending:
            await self._overflow.stop()
        await self._withdrawals.forget()

    def _note_down(self, writer: Writer, action: Mark | Request | Clear | Withdraw) -> None:
        match action:
            case Mark(slots):
                for slot in slots:
                    writer.state(slot, State.STOPPED)
            case Request(after):
                self._request(writer, after)
            case Clear(entries):
                for entry in entries:
                    writer.clear(entry)
            case Withdraw(summaries):
                now = self._shared.surroundings.clock_ms()
                for summary in summaries:
                    writer.redact(summary, PRINCIPAL, now)

    def _request(self, writer: Writer, after: str) -> None:
        outside = self._shared.surroundings
        now, clock = outside.clock_ms(), self.work.conversation.tree.clock + 1
        born = Born(Role.ASSISTANT, PRINCIPAL, PRINCIPAL, now, clock, after=after)
        writer.add(entry_id(now, outside.random(10)), born)
