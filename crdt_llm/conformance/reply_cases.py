"""Cases about replies: one per request, streaming to every device, stopped when told, provable.

This module owns what is tried. All of them need an inference node behind the endpoint; the words do
not matter.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.conformance.case import (
    Case,
    Need,
    agree,
    begun,
    bring_back,
    ended,
    require,
    require_lost,
    streams,
)
from crdt_llm.conformance.connection import Broken
from crdt_llm.document.chain import verify_path
from crdt_llm.document.schema import Params, Role, State
from crdt_llm.sync.wire.frames import Ack

if TYPE_CHECKING:
    from crdt_llm.conformance.case import (
        World,
    )
    from crdt_llm.conformance.device import Device
    from crdt_llm.document.conversation import Conversation, Writer
    from crdt_llm.document.schema import Entry

_LONG: Final = 160  # tokens: long enough to be interrupted in the middle
_SHORT: Final = 12
_ENDLESS: Final = 4096  # tokens: it is stopped
_SOME: Final = 20  # characters: a part of a reply
_NODE: Final = frozenset({Need.NODE})
_CRASH: Final = frozenset({Need.NODE, Need.CRASH})
_WIPE: Final = frozenset({Need.NODE, Need.WIPE})


async def _asked(device: Device, tokens: int, text: str = "Tell me something.") -> tuple[str, str]:
    name, slot, update = device.ask(
        text, max_tokens=tokens, temperature=0.0, ignore_eos=True, seed=1
    )
    await device.send(update)
    return name, slot


def _entry(device: Device, name: str) -> Entry:
    entry = device.replica.entry(name)
    if entry is None:
        raise Broken(f"{device.name} lacks entry {name}")
    return entry


def _done(device: Device, slot: str) -> Any:
    entry = device.replica.entry(slot)
    require(entry is not None and entry.state is State.DONE, f"the reply did not end well: {entry}")
    return entry


async def answers(world: World) -> None:
    """A slot becomes a reply, with a cost and a proof."""
    first, second = await world.pair()
    _, slot = await _asked(first, _SHORT)
    await first.until(ended(slot), "the end of the reply")
    await second.until(ended(slot), "the end of the reply")
    entry = _done(first, slot)
    require(entry.usage is not None, "a reply ends with what it cost")
    require(entry.usage.sampled == _SHORT, f"{entry.usage.sampled} tokens, not {_SHORT}")
    require(entry.proof is not None and entry.salt is not None, "a reply ends with a proof")
    require(entry.sealed, "a reply carries its hidden fields")
    await agree([first, second])


async def streams_on_to_another_device(world: World) -> None:
    """Begun on the phone, read to its end on the laptop; the phone catches up later."""
    phone = world.device("phone")
    await phone.connect()
    _, slot = await _asked(phone, _LONG)
    await phone.until(begun(slot), "the beginning of the reply")
    phone.cut()
    laptop = world.another(phone, "laptop")
    await laptop.connect()
    await laptop.until(ended(slot), "the end of the reply")
    _done(laptop, slot)
    await phone.connect()
    await phone.until(ended(slot), "the end of the reply")
    await agree([phone, laptop])


async def doubles_nothing_on_a_replay(world: World) -> None:
    """Three reconnects in mid-stream; the text only ever grows."""
    first, steady = await world.pair()
    _, slot = await _asked(first, _LONG)
    seen = ""
    for characters in (1, 40, 80):
        await first.until(_begun_or_ended(slot, characters), "more of the reply")
        text = first.replica.text(slot)
        require(text.startswith(seen), "the text of a reply was rewritten")
        seen = text
        first.cut()
        await first.connect()
        require(first.replica.text(slot).startswith(seen), "a resume rewrote the text")
    await first.until(ended(slot), "the end of the reply")
    await steady.until(ended(slot), "the end of the reply")
    require(
        first.replica.text(slot) == steady.replica.text(slot),
        "a resumed stream and a steady one differ",
    )
    await agree([first, steady])


async def stops_a_resumed_stream(world: World) -> None:
    """Stop works from any device, also after a reconnect."""
    first = world.device()
    await first.connect()
    _, slot = await _asked(first, _ENDLESS)
    await first.until(begun(slot), "the beginning of the reply")
    first.cut()
    second = world.another(first, "second")
    await second.connect()
    require(streams(slot, second.replica), "the reply ended before it could be stopped")
    verdict = await second.write(lambda writer: writer.stop(slot, world.principal))
    require(isinstance(verdict, Ack), "stop was refused")
    await second.until(ended(slot), "the end of the stopped reply")
    entry = second.replica.entry(slot)
    require(entry is not None and entry.state is State.STOPPED, "the reply was not stopped")
    require(entry is not None and entry.proof is not None, "a stopped reply has a proof too")


async def answers_once(world: World) -> None:
    """Two devices send the same request, and one of them twice."""
    first, second = await world.pair()
    name, slot, update = first.ask("Once, please.", max_tokens=_SHORT, temperature=0.0)
    second.replica.apply(update)
    for device in (first, second, first):
        require(isinstance(await device.submit(update), Ack), "a request was refused")
    await first.until(ended(slot), "the reply")
    await second.until(ended(slot), "the reply")
    require(first.replica.view() == (name, slot), f"the view is {first.replica.view()}")
    replies = [entry for entry in first.view() if entry.is_slot]
    require(len(replies) == 1, f"{len(replies)} replies to one request")
    await agree([first, second])


async def takes_writes_while_it_answers(world: World) -> None:
    """No lock: what is said during a reply waits its turn and is answered next."""
    first, second = await world.pair()
    _, slot = await _asked(first, _LONG)
    await second.until(begun(slot), "the beginning of the reply")
    name, again, update = second.ask("And now?", max_tokens=_SHORT, temperature=0.0)
    require(isinstance(await second.submit(update), Ack), "a write during a reply was refused")
    await first.until(ended(again), "the answer to what was asked meanwhile")
    shown = first.replica.view()
    require(
        shown.index(slot) < shown.index(name) < shown.index(again),
        "what was said during a reply stands before it",
    )
    _done(first, slot)
    _done(first, again)


async def keeps_the_first_reply(world: World) -> None:
    """Regenerating makes a sibling."""
    first = world.device()
    await first.connect()
    name, slot = await _asked(first, _SHORT)
    await first.until(ended(slot), "the first reply")
    before = first.replica.entry(slot)
    again, born = first.entry(Role.ASSISTANT, after=name, fork=True)
    born = replace(born, params=Params(max_tokens=_SHORT, temperature=1.0, seed=7))

    def regenerate(writer: Writer) -> None:
        writer.add(again, born)
        writer.set_meta("head", again)

    require(isinstance(await first.write(regenerate), Ack), "a fork was refused")
    await first.until(ended(again), "the second reply")
    require(first.replica.entry(slot) == before, "the first reply was changed")
    require(first.replica.view() == (name, again), "the head is not shown")
    first.compose(lambda writer: writer.set_meta("head", slot))
    require(first.replica.view() == (name, slot), "the first reply cannot be shown any more")


async def appends_what_was_written_offline(world: World) -> None:
    """An entry that was written before a reply, and arrives after it, comes after it."""
    first, away = await world.pair()
    _, slot = await _asked(first, _SHORT)
    await away.until(lambda replica: slot in replica.tree, "the request")
    away.cut()
    late, _ = away.say("written on a plane")
    await first.until(ended(slot), "the reply")
    path = tuple(name for name in first.replica.view() if first.replica.tree.is_admitted(name))
    await away.connect()
    await first.until(_admitted(late), "the admission of the late entry")
    shown = first.replica.view()
    require(shown[: len(path)] == path, "a late entry changed what the model had read")
    require(shown[-1] == late, "a late entry is not at the end")


async def takes_a_tool_result_next_week(world: World) -> None:
    """Nothing expires: a tool's answer may come at any time."""
    first = world.device()
    await first.connect()
    _, slot = await _asked(first, _SHORT)
    await first.until(ended(slot), "the reply")
    name, update = first.say("42", role=Role.TOOL, call="call-1")
    await first.send(update)
    await first.until(_admitted(name), "the admission of the tool's result")
    _, again = await _asked(first, _SHORT, "So what is it?")
    await first.until(ended(again), "the reply to it")
    _done(first, again)


async def proves_what_it_said(world: World) -> None:
    """Anyone can recompute the chain."""
    first = world.device()
    await first.connect()
    for _ in range(2):
        _, slot = await _asked(first, _SHORT)
        await first.until(ended(slot), "a reply")
    _proven(world, first, 4)


async def prefills_what_is_new(world: World) -> None:
    """The second turn does not pay for the first one again."""
    first = world.device()
    await first.connect()
    # Like no conversation before it: a node may share what is equal from the start.
    beginning = f"{os.urandom(8).hex()}: " + "a long beginning. " * 30
    _, slot = await _asked(first, _SHORT, beginning)
    await first.until(ended(slot), "the first reply")
    _, again = await _asked(first, _SHORT, "Short.")
    await first.until(ended(again), "the second reply")
    one, two = _done(first, slot).usage, _done(first, again).usage
    require(
        two.reused >= one.prompt, f"only {two.reused} of {two.prompt} prompt tokens were reused"
    )
    require(two.prefilled < one.prefilled, "the second turn computed the first one again")


async def supersedes_what_was_asked_over(world: World) -> None:
    """Asked again before an answer: the last question of a line is answered, and it is said so."""
    first, second = await world.pair()
    _, busy = await _asked(first, _LONG)
    await first.until(begun(busy), "the beginning of the reply")
    _, early = await _asked(first, _SHORT, "First thought.")
    _, late = await _asked(first, _SHORT, "Second thought.")
    await second.until(ended(late), "the reply to the second thought")
    await second.until(ended(early), "the end of the first thought")
    state = second.replica.state(early)
    require(state is State.SUPERSEDED, f"the first thought is {state}")
    _done(second, late)


async def goes_on_after_a_crash(world: World) -> None:
    """Killed in mid-reply: the reply goes on where it was, and nothing is said twice."""
    if world.crash is None:
        return
    first = world.device()
    await first.connect()
    _, slot = await _asked(first, _LONG)
    await first.until(begun(slot, _SOME), "some of the reply")
    seen = first.replica.text(slot)
    first.cut()
    await world.crash()
    await first.connect()
    require(first.replica.text(slot).startswith(seen), "what was shown is gone after a crash")
    await first.until(ended(slot), "the end of the reply")
    entry = _done(first, slot)
    require(entry.content.startswith(seen), "the reply was begun anew")
    require(
        entry.usage is not None and entry.usage.sampled == _LONG, "tokens are missing or doubled"
    )


async def goes_on_after_a_loss(world: World) -> None:
    """A client brings back what was said, what is sealed in it, and half a reply, which goes on."""
    first = world.device()
    await first.connect()
    _, said = await _asked(first, _SHORT)
    await first.until(ended(said), "the end of the first reply")
    _, slot = await _asked(first, _ENDLESS)
    await first.until(_half_said(slot), "the beginning of the second reply")
    whole, half = _done(first, said), _entry(first, slot)
    require(streams(slot, first.replica), "the reply ended before the log could be lost")
    await world.lose_log()
    require_lost(await bring_back(first))
    newcomer = world.another(first, "newcomer")
    opened = await newcomer.connect()
    require(not opened.behind, "the endpoint misses what it has got back")
    require(newcomer.replica.entry(said) == whole, "a reply came back changed")
    now = _entry(newcomer, slot)
    require(now.content.startswith(half.content), "the text of half a reply did not come back")
    sealed = now.sealed[: len(half.sealed)]
    require(sealed == half.sealed, "the hidden fields of half a reply did not come back")
    await newcomer.until(begun(slot, len(half.content) + 1), "more of the reply")
    verdict = await newcomer.write(lambda writer: writer.stop(slot, world.principal))
    require(isinstance(verdict, Ack), "stop was refused after a loss")
    for device in (first, newcomer):
        await device.until(ended(slot), "the end of the stopped reply")
    text = newcomer.replica.text(slot)
    require(text.startswith(half.content), "the reply was begun anew")
    require(newcomer.replica.state(slot) is State.STOPPED, "the reply was not stopped")
    _proven(world, newcomer, 4)
    await agree([first, newcomer])


async def waits_for_the_newer_replica(world: World) -> None:
    """An older replica comes first: it can be read and written to, and no node acts upon it."""
    first = world.device("newer")
    await first.connect()
    _, slot = await _asked(first, _SHORT)
    await first.until(ended(slot), "the first reply")
    older = world.another(first, "older", state=first.replica.diff())
    _, slot = await _asked(first, _SHORT, "And then?")
    await first.until(ended(slot), "the second reply")
    shown = first.replica.view()
    await world.lose_log()
    opened = await bring_back(older)
    require_lost(opened)
    require(opened.behind, "the endpoint does not say that it lost something")
    _, again = await _asked(older, _SHORT, "Anybody there?")
    newcomer = world.another(first, "newcomer")
    opened = await newcomer.connect()
    require(opened.behind, "an older replica was taken for all that there was")
    require(not newcomer.replica.tree.is_admitted(again), "a node acted upon an older replica")
    await bring_back(first)
    for device in (older, newcomer, first):
        await device.until(ended(again), "the reply to what was asked meanwhile")
    require(first.replica.view()[: len(shown)] == shown, "an older replica changed what was said")
    _done(first, again)
    _proven(world, first, 6)
    await agree([older, newcomer, first])


def _half_said(slot: str) -> Any:
    def holds(replica: Conversation) -> bool:
        entry = replica.entry(slot)
        return entry is not None and len(entry.content) >= _SOME and bool(entry.sealed)

    return holds


def _proven(world: World, device: Device, entries: int) -> None:
    checked = 0
    for verdict in verify_path(device.replica, device.replica.view(), world.relay):
        require(verdict.problem is None, f"entry {verdict.entry}: {verdict.problem}")
        checked += 1
    require(checked == entries, f"only {checked} of {entries} entries are in the chain")


def _admitted(name: str) -> Any:
    return lambda replica: replica.tree.is_admitted(name)


def _begun_or_ended(slot: str, characters: int) -> Any:
    def holds(replica: Conversation) -> bool:
        return begun(slot, characters)(replica) or ended(slot)(replica)

    return holds


CASES: Final = (
    Case(
        "reply",
        "a request is answered on every device, with its cost and a proof",
        "no way to tell what a reply cost or whether it is what the model said",
        answers,
        _NODE,
    ),
    Case(
        "device-switch",
        "a reply streams on whoever listens",
        "the stream was lost when I switched to my laptop",
        streams_on_to_another_device,
        _NODE,
    ),
    Case(
        "replay",
        "a resumed stream doubles and rewrites nothing",
        "after a reconnect half of the text stands there twice",
        doubles_nothing_on_a_replay,
        _NODE,
    ),
    Case(
        "stop-resumed",
        "stop works from any device, also on a resumed stream",
        "after a reload the stop button does nothing",
        stops_a_resumed_stream,
        _NODE,
    ),
    Case(
        "one-reply",
        "one request, one reply, however often it is sent",
        "a retry was answered, and billed, twice",
        answers_once,
        _NODE,
    ),
    Case(
        "busy",
        "a write during a reply is accepted and answered next",
        "cannot add messages while a run is active",
        takes_writes_while_it_answers,
        _NODE,
    ),
    Case(
        "regenerate",
        "another reply is a sibling; the first one stays",
        "regenerating overwrote the better answer",
        keeps_the_first_reply,
        _NODE,
    ),
    Case(
        "append-only",
        "a late merge comes after what the model has read",
        "a late message rewrote history and silently killed the cache",
        appends_what_was_written_offline,
        _NODE,
    ),
    Case(
        "late-tool",
        "a tool's result may come at any time",
        "the run expired while the tool was working",
        takes_a_tool_result_next_week,
        _NODE,
    ),
    Case(
        "chain",
        "the chain of admitted entries verifies",
        "nobody can tell whether two copies of a thread are the same",
        proves_what_it_said,
        _NODE,
    ),
    Case(
        "prefill",
        "a turn costs the prefill of what is new",
        "every turn pays for the whole history again",
        prefills_what_is_new,
        _NODE,
    ),
    Case(
        "superseded",
        "of two questions in a row the last is answered, and the other says so",
        "a question was dropped without a word",
        supersedes_what_was_asked_over,
        _NODE,
    ),
    Case(
        "crash-reply",
        "a reply goes on after a crash at the token where it was",
        "the server restarted, and the reply hangs for ever",
        goes_on_after_a_crash,
        _CRASH,
    ),
    Case(
        "lost-log-reply",
        "a client brings back what the endpoint lost, half a reply too, and that goes on",
        "after a loss of data, what the model said cannot be proven and what it was saying is gone",
        goes_on_after_a_loss,
        _WIPE,
    ),
    Case(
        "lost-log-older",
        "an older replica that comes first after a loss waits for the newer one",
        "the first device to come back made its old copy the truth for everybody",
        waits_for_the_newer_replica,
        _WIPE,
    ),
)
