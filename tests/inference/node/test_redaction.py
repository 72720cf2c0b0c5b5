"""A redaction at the node: nothing of what was withdrawn is left, and nothing is built on it."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
from lent_engine import running
from local_room import LocalRoom

from crdt_llm.document.chain import verify_path
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import Params, State
from crdt_llm.inference.node import generation
from crdt_llm.inference.node.digests import Digests
from crdt_llm.inference.prompt.renderer import REDACTED_TEXT
from crdt_llm.inference.prompt.transcript import Transcript

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.document.schema import Entry
    from crdt_llm.inference.engine.process import EngineProcess
    from crdt_llm.inference.node.node import Node

pytestmark = pytest.mark.asyncio(loop_scope="module")

WITHDRAWN = "the code is 7391"
GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
LONG = {"temperature": 0.0, "max_tokens": 1500, "ignore_eos": True}


def redact(room: LocalRoom, entry: str) -> None:
    since = room.replica.state_vector()
    with room.replica.writing() as writer:
        writer.redact(entry, "owner", 1)
    room._tell(room.replica, since)


async def settled(room: LocalRoom, node: Node) -> None:
    """Until the node has nothing left to do, and no task of its own runs."""
    node.notice(room.id)
    desk, _ = node._desks[room.id]
    while True:
        desk.settled.clear()
        desk.wake()
        await desk.settled.wait()
        sitting = desk._sitting
        if sitting is not None and not sitting._ahead.busy and not desk._dirty.is_set():
            return
        await asyncio.sleep(0)


def prompt_of(room: LocalRoom, node: Node, entry: str) -> tuple[int, ...]:
    return Transcript(room.replica, node.renderer, node.identity.sealer).ids(entry)


async def resident(engine: EngineProcess, ids: tuple[int, ...]) -> int:
    """How many of the ids the engine has; they are computed by asking."""
    return (await engine.warm(ids)).reused


def reachable(start: object, *but: object) -> list[Any]:
    """Everything that an object leads to, without code and without what is named."""
    gc.collect()
    this = asyncio.current_task()
    assert this is not None
    outside = (asyncio.get_running_loop(), this, this.get_coro(), sys.modules, globals())
    seen = {id(one) for one in (*outside, *but)}
    found, stack = [], [start]
    while stack:
        one = stack.pop()
        if id(one) in seen or issubclass(type(one), types.ModuleType | type | types.FrameType):
            continue
        seen.add(id(one))
        found.append(one)
        stack.extend(gc.get_referents(one))
    return found


def holds(objects: list[Any], text: str, ids: tuple[int, ...]) -> list[Any]:
    """Those that hold a text, or so many ids in a row."""
    row = ",".join(map(str, ids))
    return [
        one
        for one in objects
        # By its type alone: whatever stands in the way of a library may warn when it is asked.
        if (issubclass(type(one), str) and text in one)
        or (issubclass(type(one), bytes | bytearray) and text.encode() in one)
        or (
            issubclass(type(one), tuple | list)
            and len(one) >= len(ids)
            and all(issubclass(type(item), int) for item in one)
            and row in ",".join(map(str, one))
        )
    ]


async def test_what_was_withdrawn_is_nowhere_at_the_node(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom(1)
    async with running(room, tiny_model_dir, engine) as node:
        first = await room.ended(room.ask("hello", **GREEDY))
        reply = await room.ended(room.ask(WITHDRAWN, **GREEDY))
        assert reply.place is not None
        secret = reply.place.parent
        await settled(room, node)
        ids = tuple(node.vocabulary.encode_text(WITHDRAWN))
        before, path = prompt_of(room, node, first.id), prompt_of(room, node, reply.id)
        assert holds(reachable(node, room), WITHDRAWN, ids), "else this test looks in a wrong place"
        assert await resident(engine, path) >= len(path) - 1

        redact(room, secret)
        await settled(room, node)
        assert holds(reachable(node, room), WITHDRAWN, ids) == []
        desk, _ = node._desks[room.id]
        assert desk._sitting is not None
        replica = desk._sitting.work.conversation
        assert WITHDRAWN.encode() not in replica.diff()
        # Rows that another text shares are no secret; the secret's own are gone.
        marked = prompt_of(room, node, reply.id)
        shared = next(
            n for n, pair in enumerate(zip(path, marked, strict=False)) if len({*pair}) == 2
        )
        assert await resident(engine, path) <= shared
        await engine.forget(path, len(before))

        after = await room.ended(room.ask("go on", **GREEDY))
        assert after.state is State.DONE
        problems = [verdict.problem for verdict in verify_path(room.replica, room.replica.view())]
        assert problems == [None] * len(room.replica.view())
        assert REDACTED_TEXT in node.vocabulary.spell(prompt_of(room, node, after.id))


async def test_no_digest_of_what_was_withdrawn_stays_on_the_disk(
    tiny_model_dir: Path, engine: EngineProcess, tmp_path: Path
) -> None:
    """Whoever has the model could guess a short text from the digest of its KV."""
    room = LocalRoom(7)
    async with running(room, tiny_model_dir, engine) as node:
        node.digests = Digests(tmp_path / "digests")
        first = await room.ended(room.ask("hello", **GREEDY))
        reply = await room.ended(room.ask("7391", **GREEDY))
        await settled(room, node)
        assert reply.place is not None
        secret = reply.place.parent
        before = node.digests.load(room.id)
        assert {border.entry for border in before} == set(room.replica.view())
        redact(room, secret)
        await settled(room, node)
        after = node.digests.load(room.id)
        left = (tmp_path / "digests" / room.id).read_bytes()
        for border, kv in before.items():
            behind = border.entry in {secret, reply.id}
            assert (kv.encode() in left) is not behind
        # What is read behind the marker is recorded anew.
        assert {border.entry for border in after} == set(room.replica.view())
        assert first.id in {border.entry for border in after}


async def test_what_was_withdrawn_while_no_node_ran_is_forgotten_by_the_next_one(
    tiny_model_dir: Path, engine: EngineProcess, tmp_path: Path
) -> None:
    """The engine stands for the files that one leaves behind: it has what the last node read."""
    room = LocalRoom(8)
    async with running(room, tiny_model_dir, engine) as node:
        await room.ended(room.ask("hello", **GREEDY))
        reply = await room.ended(room.ask(WITHDRAWN, **GREEDY))
        await settled(room, node)
        path = prompt_of(room, node, reply.id)
    assert reply.place is not None
    redact(room, reply.place.parent)
    before = room.replica.tree.path(reply.id)[1]
    async with running(room, tiny_model_dir, engine) as node:
        node.digests = Digests(tmp_path)
        node.notice(room.id)
        await settled(room, node)
        kept = len(prompt_of(room, node, before))
        assert node.digests.forgotten(room.id) == {reply.place.parent}
        marked = prompt_of(room, node, reply.id)
        shared = next(n for n in range(len(path)) if path[n] != marked[n])
        assert kept <= shared < len(path)
        assert await resident(engine, path) <= shared
        await engine.forget(path, kept)


async def test_a_short_secret_cannot_be_guessed_from_what_is_left(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom(2)
    async with running(room, tiny_model_dir, engine) as node:
        reply = await room.ended(room.ask("7391", **GREEDY))
        assert reply.place is not None
        left = room.entry(reply.place.parent)
        assert left.salt is not None
        assert guess(left, left.salt) == "7391"
        redact(room, left.id)
        await settled(room, node)
        left = room.entry(left.id)
        assert (left.content, left.salt) == ("", None)
        document = room.replica.diff()
        assert b"7391" not in document
        # Every 16 bytes that are left, tried as the salt.
        salts = {document[n : n + 16] for n in range(len(document) - 15)}
        assert all(guess(left, salt) is None for salt in (b"", *salts))


def guess(entry: Entry, salt: bytes) -> str | None:
    assert entry.proof is not None
    for number in range(7300, 7400):
        if hashlib.sha256(salt + str(number).encode()).digest() == entry.proof.content:
            return str(number)
    return None


async def test_a_reply_that_reads_what_is_withdrawn_is_stopped(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom(3)
    async with running(room, tiny_model_dir, engine) as node:
        before = await room.ended(room.ask(WITHDRAWN, **GREEDY))
        assert before.place is not None
        slot = room.ask("tell me more", **LONG)
        await room.until(lambda: bool(room.entry(slot).sealed))
        redact(room, before.place.parent)
        reply = await room.ended(slot)
        assert reply.state is State.STOPPED
        assert reply.usage is not None
        assert reply.usage.finish == "redacted"
        await settled(room, node)
        again = await room.ended(room.ask("and now?", **GREEDY))
        assert again.state is State.DONE


async def test_a_reply_on_another_branch_goes_on(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    room = LocalRoom(4)
    async with running(room, tiny_model_dir, engine):
        before = await room.ended(room.ask(WITHDRAWN, **GREEDY))
        assert before.place is not None
        fork = room.write("something else", after="", fork=True)
        slot = room.write(
            None, after=fork, params=Params(temperature=0.0, max_tokens=200, ignore_eos=True)
        )
        await room.until(lambda: bool(room.entry(slot).sealed))
        redact(room, before.place.parent)
        assert (await room.ended(slot)).state is State.DONE


async def test_what_was_written_beside_a_redaction_is_deleted(
    tiny_model_dir: Path, engine: EngineProcess
) -> None:
    """Withdrawn on a device that did not know yet that the node had admitted and answered it."""
    room = LocalRoom(5)
    slot = room.ask(WITHDRAWN, **GREEDY)
    question = room.replica.tree.up(slot)
    offline = Conversation(77, update=room.replica.diff())
    since = offline.state_vector()
    with offline.writing() as writer:
        writer.redact(question, "owner", 1)
        writer.redact(slot, "owner", 1)
    late = offline.diff(since)
    async with running(room, tiny_model_dir, engine) as node:
        await room.ended(slot)
        room.replica.apply(late)
        for seat in room.seats:
            seat.deliver(late)
        assert room.entry(question).salt is not None
        await room.until(lambda: room.entry(question).salt is None)
        await settled(room, node)
        for name in (question, slot):
            entry = room.entry(name)
            assert entry.redacted
            assert (entry.content, entry.salt, entry.sealed, entry.calls) == ("", None, (), None)
        path = room.replica.view()
        assert [verdict.problem for verdict in verify_path(room.replica, path)] == [None] * len(
            path
        )


async def test_a_reply_is_not_resumed_from_what_was_withdrawn_meanwhile(
    tiny_model_dir: Path, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "window_s", lambda _: 0.0)
    room = LocalRoom(6)
    before = room.write(WITHDRAWN)
    slot = room.ask("tell me more", **LONG)
    async with running(room, tiny_model_dir, engine):
        await room.until(lambda: len(room.entry(slot).sealed) > 1)
    assert room.replica.state(slot) is State.STREAMING
    redact(room, before)
    async with running(room, tiny_model_dir, engine) as node:
        reply = await room.ended(slot)
        assert reply.state is State.STOPPED
        assert reply.usage is not None
        assert reply.usage.finish == "redacted"
        # One that begins behind the redaction reads the marker, and is resumed like any other.
        later = room.ask("and now?", **{**LONG, "max_tokens": 1200})
        await room.until(lambda: len(room.entry(later).sealed) > 1)
        await node.close()
    async with running(room, tiny_model_dir, engine):
        assert (await room.ended(later)).state is State.DONE
