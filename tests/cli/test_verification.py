from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest_asyncio
from cli.scripted_server import Server

from crdt_llm.cli.stored import fresh_client_id, list_stored, load_stored
from crdt_llm.cli.verification import Keys, Problem, Report, open_hidden, verify
from crdt_llm.document.chain import Link, commit_content, commit_tokens, prove
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.schema import SALT_BYTES, State
from crdt_llm.document.seal import FINAL_CHUNK, Hidden, Sealer, place_of
from crdt_llm.inference.prompt.renderer import Renderer
from crdt_llm.inference.prompt.tokens import Vocabulary
from crdt_llm.sync.client.client import Client

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.document.schema import Entry

SALT = bytes(SALT_BYTES)


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation as the store has it, and every key there is."""

    document: Conversation
    keys: Keys
    node: SigningKey
    sealer: Sealer

    @property
    def path(self) -> tuple[str, ...]:
        return self.document.view()

    def entry(self, number: int) -> Entry:
        entry = self.document.entry(self.path[number])
        assert entry is not None
        return entry

    def check(self) -> Report:
        report = Report()
        verify(self.document, self.path, self.keys, report)
        return report

    def set(self, number: int, key: str, value: object) -> None:
        with self.document.writing() as writer:
            writer.set(self.path[number], key, value)

    def forge(
        self, number: int, *, text: str, hidden: Hidden, committed: Hidden | None = None
    ) -> None:
        """Let the node itself sign and seal a reply anew."""
        reply = self.entry(number)
        ids = (committed or hidden).ids
        link = Link(
            reply.id,
            self.document.born_plain(reply.id),
            commit_content(SALT, text),
            commit_tokens(SALT, ids),
            state=reply.state,
        )
        where = place_of(self.document, reply, FINAL_CHUNK)
        proof = prove(
            link,
            parent=where.parent,
            conversation=where.conversation,
            epoch=where.epoch,
            key=self.node,
        )
        self.seal(number, self.sealer.seal(hidden, where, text, self.node))
        with self.document.writing() as writer:
            writer.set(reply.id, "content", text)
            writer.proof(reply.id, SALT, proof)

    def seal(self, number: int, *blobs: bytes) -> None:
        reply = self.path[number]
        with self.document.writing() as writer:
            sealed = writer._entries[reply]["sealed"]
            del sealed[0 : len(sealed)]
            sealed.extend(blobs)


def _case(server: Server) -> Case:
    (stored,) = list_stored(server.folder.log)
    document = load_stored(server.folder.log, stored.conversation)
    sealer = Sealer(server.folder.key("master").read_bytes(), os.urandom)
    vocabulary = Vocabulary.load(server.model_dir)
    keys = Keys(
        relay=SigningKey(server.folder.key("relay").read_bytes()).public,
        sealer=sealer,
        vocabulary=vocabulary,
        renderer=Renderer.learn(server.model_dir, vocabulary),
    )
    return Case(document, keys, SigningKey(server.folder.key("node").read_bytes()), sealer)


@pytest_asyncio.fixture
async def case(tmp_path: Path) -> Case:
    """Two questions with two replies."""
    async with Server(tmp_path, ["The first line.", "The second line."]) as server:
        token = server.folder.token.read_text().strip()
        async with Client(server.url, token=token) as client:
            conversation = await client.create()
            await (await conversation.ask("one", stop=["never"])).text()
            await (await conversation.ask("two")).text()
        return _case(server)


@pytest_asyncio.fixture
async def half(tmp_path: Path) -> Case:
    """A reply that was cut by the end of the server."""
    async with Server(tmp_path, ["The first line."]) as server:
        server.engine.go.clear()
        token = server.folder.token.read_text().strip()
        async with Client(server.url, token=token) as client:
            conversation = await client.create()
            reply = await conversation.ask("one")
            assert await anext(aiter(reply))
        return _case(server)


def test_an_honest_conversation_holds(case: Case) -> None:
    report = case.check()
    assert report.problem is None
    assert report.chain == list(case.path)
    assert report.tokens == report.texts == [case.path[1], case.path[3]]


def test_what_was_checked_on_one_path_is_not_checked_again(case: Case) -> None:
    report = case.check()
    verify(case.document, case.path, case.keys, report)
    assert len(report.chain) == 4
    assert len(report.texts) == 2


def test_other_text_of_the_user_does_not_hold(case: Case) -> None:
    case.set(2, "content", "something else")
    report = case.check()
    assert report.problem == Problem(case.path[2], "the text is not the one that was committed to")
    assert report.chain == list(case.path[:2])


def test_other_text_of_the_model_does_not_hold(case: Case) -> None:
    case.set(1, "content", "something else")
    assert case.check().problem == Problem(
        case.path[1], "the text is not the one that was committed to"
    )


def test_a_text_that_its_tokens_do_not_stand_for_does_not_hold(case: Case) -> None:
    hidden = open_hidden(case.document, case.entry(3), case.sealer)
    assert hidden is not None
    case.forge(3, text="something else", hidden=hidden)
    report = case.check()
    assert report.problem == Problem(
        case.path[3], "its text is not what its sealed tokens stand for"
    )
    assert report.texts == [case.path[1]]


def test_tokens_that_were_not_committed_to_do_not_hold(case: Case) -> None:
    hidden = open_hidden(case.document, case.entry(3), case.sealer)
    assert hidden is not None
    case.forge(3, text=case.entry(3).content, hidden=hidden, committed=Hidden())
    assert case.check().problem == Problem(
        case.path[3], "its sealed tokens are not the ones that were committed to"
    )


def test_missing_tokens_do_not_hold(case: Case) -> None:
    case.seal(1)
    assert case.check().problem == Problem(case.path[1], "its sealed tokens are missing")


def test_tokens_of_another_reply_do_not_hold(case: Case) -> None:
    case.seal(1, *case.entry(3).sealed)
    problem = case.check().problem
    assert problem is not None
    assert problem.entry == case.path[1]
    assert "does not open here" in problem.reason


def test_tokens_that_a_stranger_sealed_do_not_hold(case: Case) -> None:
    reply = case.entry(1)
    hidden = open_hidden(case.document, reply, case.sealer)
    assert hidden is not None
    where = place_of(case.document, reply, FINAL_CHUNK)
    stranger = SigningKey(bytes(32))
    case.seal(1, case.sealer.seal(hidden, where, reply.content, stranger))
    assert case.check().problem == Problem(case.path[1], "a signature does not hold")


def test_without_the_master_key_the_chain_is_checked(case: Case) -> None:
    case.seal(1)
    report = Report()
    verify(case.document, case.path, Keys(relay=case.keys.relay), report)
    assert report.problem is None
    assert (len(report.chain), report.tokens) == (4, [])


def test_half_a_reply_holds_as_far_as_it_goes(half: Case) -> None:
    assert half.entry(1).state is State.STREAMING
    report = half.check()
    assert report.problem is None
    assert report.chain == [half.path[0]]
    assert report.tokens == report.texts == [half.path[1]]


def test_other_text_in_half_a_reply_does_not_hold(half: Case) -> None:
    half.set(1, "content", "something else")
    assert half.check().problem == Problem(half.path[1], "a signature does not hold")


def test_a_redacted_reply_holds_without_its_text(case: Case) -> None:
    state = case.document.diff()
    redacted = Conversation(fresh_client_id(), update=state)
    with redacted.writing() as writer:
        fields = writer._entries[case.path[1]]
        for key in ("content", "salt", "sealed"):
            del fields[key]
        writer.set(case.path[1], "redacted", {"by": "owner", "at": 1})
    report = Report()
    verify(redacted, redacted.view(), case.keys, report)
    assert report.problem is None
    assert len(report.chain) == 4
    assert report.texts == [case.path[3]]
