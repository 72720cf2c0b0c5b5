"""Does a conversation hold? The chain, and each reply's text from its sealed tokens.

This module owns what is checked, in which order, and the words for what does not hold. It writes
nothing and must not know where the document came from or how results are printed.

Three things are checked of every admitted entry on a path: that its chain digest and signatures
hold; of a reply, with the master key, that its sealed tokens are the committed ones and were
sealed by the node with this very text; and, with the model's tokenizer, that the text is what these
tokens stand for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from crdt_llm.document.chain import commit_tokens, verify_path
from crdt_llm.document.schema import State
from crdt_llm.document.seal import FINAL_CHUNK, place_of, verify_chunk
from crdt_llm.errors import BadProof

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Entry
    from crdt_llm.document.seal import Hidden, Sealer
    from crdt_llm.inference.prompt.renderer import Renderer
    from crdt_llm.inference.prompt.tokens import Vocabulary


@dataclass(frozen=True, slots=True)
class Problem:
    """The first thing on a path that does not hold."""

    entry: str
    reason: str


@dataclass(slots=True)
class Report:
    """What was checked.

    Attributes:
        chain: entries whose digest and signatures hold.
        tokens: replies whose sealed tokens are the committed ones.
        texts: replies whose text is what their tokens stand for.
        other_model: replies that another model made, whose text this tokenizer cannot check.
        problem: what does not hold, if anything.
    """

    chain: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    other_model: list[str] = field(default_factory=list)
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class Keys:
    """With what there is to check; each of them may be missing.

    Attributes:
        relay: the relay's public key: then the leases are checked too.
        sealer: opens sealed tokens.
        vocabulary: turns them into text.
        renderer: names the model that the vocabulary belongs to.
    """

    relay: bytes | None = None
    sealer: Sealer | None = None
    vocabulary: Vocabulary | None = None
    renderer: Renderer | None = None


def open_hidden(conversation: Conversation, reply: Entry, sealer: Sealer) -> Hidden | None:
    """A reply's hidden state, or ``None`` if it has none (yet, or any more).

    Raises:
        BadProof: what is sealed there does not open.
    """
    if not reply.sealed:
        return None
    return sealer.open_reply(reply.sealed, place_of(conversation, reply, 0))


def verify(conversation: Conversation, path: Sequence[str], keys: Keys, report: Report) -> None:
    """Check a path up to the first problem; what an earlier path had is not checked again."""
    known = frozenset(report.chain)
    for verdict in verify_path(conversation, path, keys.relay):
        if verdict.problem is not None:
            report.problem = Problem(verdict.entry, verdict.problem)
            return
        if verdict.entry not in known:
            report.chain.append(verdict.entry)
            if not _holds(conversation, verdict.entry, keys, report):
                return
    # The walk ends before a reply that still streams; what it has so far is sealed as well.
    last = next((name for name in path if conversation.state(name) is State.STREAMING), None)
    if last is not None and last not in report.tokens:
        _holds(conversation, last, keys, report)


def _holds(conversation: Conversation, name: str, keys: Keys, report: Report) -> bool:
    entry = conversation.entry(name)
    if entry is None or not entry.is_slot or entry.redacted or keys.sealer is None:
        return True
    try:
        hidden = _check_tokens(conversation, entry, keys.sealer, keys.relay)
        if hidden is None:
            return True
        report.tokens.append(name)
        if keys.vocabulary is not None:
            _check_text(entry, hidden, keys.vocabulary, keys.renderer, report)
    except BadProof as error:
        report.problem = Problem(name, str(error))
        return False
    return True


def _check_tokens(
    conversation: Conversation, reply: Entry, sealer: Sealer, relay: bytes | None
) -> Hidden | None:
    if reply.proof is not None and reply.proof.tokens is None:
        return None  # a reply that the node had to give up commits to its text alone
    hidden = open_hidden(conversation, reply, sealer)
    if hidden is None:
        if reply.proof is not None:
            raise BadProof("its sealed tokens are missing")
        return None
    if reply.proof is not None and (
        reply.salt is None or commit_tokens(reply.salt, hidden.ids) != reply.proof.tokens
    ):
        raise BadProof("its sealed tokens are not the ones that were committed to")
    chunk = FINAL_CHUNK if reply.ended else len(reply.sealed) - 1
    where = place_of(conversation, reply, chunk)
    verify_chunk(conversation, reply.sealed[-1], where, reply.content, relay)
    return hidden


def _check_text(
    reply: Entry, hidden: Hidden, vocabulary: Vocabulary, renderer: Renderer | None, report: Report
) -> None:
    from crdt_llm.inference.prompt.tokens import TextStream  # noqa: PLC0415 - an optional dependency

    stop = tuple(hidden.params.get("stop", ()))
    if reply.ended:
        text = vocabulary.text_of(hidden.ids, hidden.kinds, stop)
    else:  # what may be the beginning of a character or a stop string is held back
        _, text = TextStream.resume(vocabulary, stop, hidden.ids, hidden.kinds)
    if text == reply.content:
        report.texts.append(reply.id)
    elif renderer is not None and hidden.renderer != renderer.id:
        report.other_model.append(reply.id)
    else:
        raise BadProof("its text is not what its sealed tokens stand for")
