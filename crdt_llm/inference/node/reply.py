"""One reply in the making: its ids, its text, and the document writes that they become.

This module owns what a placed slot has so far and how a flush, an end and a resume look in the
document. It must not decide anything: when to flush, stop or end is the node's business, and what
the engine makes arrives as events.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.document.chain import Link, commit_content, commit_tokens, prove
from crdt_llm.document.schema import SALT_BYTES, State, Usage, seed_of
from crdt_llm.document.seal import FINAL_CHUNK, Hidden, Kind
from crdt_llm.errors import BadProof, LocalMisuse, PromptTooLong
from crdt_llm.inference.contract import SamplingParams
from crdt_llm.inference.prompt.tokens import TextStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.document.conversation import Conversation, Writer
    from crdt_llm.document.keys import SigningKey
    from crdt_llm.document.schema import Entry
    from crdt_llm.document.seal import Sealer, Where
    from crdt_llm.errors import CrdtLlmError
    from crdt_llm.inference.prompt.tokens import Vocabulary

# What a slot gets that names nothing else.
MAX_TOKENS: Final = 512  # a long answer; keeps a model that never ends from filling the document
TEMPERATURE: Final = 0.7
TOP_P: Final = 0.95
TOP_P_MIN: Final = 1e-6  # 0 asks for the most likely id alone, and no engine takes it


@dataclass(frozen=True, slots=True)
class Identity:
    """With what a node reads, signs and seals.

    Attributes:
        key: the node's signing key.
        sealer: seals hidden fields.
        random: where salts come from.
        model: the fingerprint of the model.
        renderer: the id of the renderer.
    """

    key: SigningKey
    sealer: Sealer
    random: Callable[[int], bytes]
    model: str
    renderer: str


def resolve(slot: Entry) -> dict[str, Any]:
    """A slot's parameters with every default filled in: what the hidden fields keep."""
    asked = slot.born.params
    return {
        "max_tokens": MAX_TOKENS if asked.max_tokens is None else asked.max_tokens,
        "temperature": TEMPERATURE if asked.temperature is None else asked.temperature,
        "top_p": TOP_P if asked.top_p is None else max(asked.top_p, TOP_P_MIN),
        "top_k": 0 if asked.top_k is None else asked.top_k,
        "seed": seed_of(slot.id) if asked.seed is None else asked.seed,
        "stop": list(asked.stop),
        "ignore_eos": asked.ignore_eos,
    }


def sampling(params: dict[str, Any], end_ids: frozenset[int]) -> SamplingParams:
    """What the engine needs of resolved parameters; stop strings are ours to watch."""
    return SamplingParams(
        temperature=params["temperature"],
        top_p=params["top_p"],
        top_k=params["top_k"],
        seed=params["seed"],
        max_tokens=params["max_tokens"],
        end_ids=end_ids,
        ignore_eos=params["ignore_eos"],
    )


def describe(error: CrdtLlmError) -> tuple[str, str]:
    """A failure as ``usage.error`` says it: a code for programs, a sentence for people."""
    codes: dict[type[CrdtLlmError], str] = {
        PromptTooLong: "context-full",
        BadProof: "unreadable",
        LocalMisuse: "bad-request",
    }
    return codes.get(type(error), "failed"), str(error)


def fail(writer: Writer, slot: str, code: str, message: str) -> None:
    """Write that a slot failed; see :func:`describe`."""
    writer.state(slot, State.FAILED)
    writer.usage(slot, Usage(finish="error", error_code=code, error_message=message))


@dataclass(slots=True)
class Reply:
    """A placed reply that has not ended.

    Attributes:
        slot: its entry id.
        where: the place that its hidden fields are bound to.
        prompt: the ids that it answers, its own opening included.
        params: its resolved parameters.
        hidden: its hidden state so far.
        text: its text in the document plus what waits for the next flush.
        stream: the text function, one id at a time.
        chunk: the number of the next sealed chunk.
        misled: whether something that it read was withdrawn before it could be resumed.
    """

    slot: str
    where: Where
    prompt: tuple[int, ...]
    params: dict[str, Any]
    hidden: Hidden
    stream: TextStream
    text: str = ""
    chunk: int = 0
    waiting_text: str = ""
    waiting: list[tuple[int, float]] = field(default_factory=list)
    prefilled: int = 0
    drafted: int = 0
    asked_at_ms: int | None = None
    first_at_ms: int | None = None
    misled: bool = False

    # -- beginning -----------------------------------------------------------------------------

    @classmethod
    def begin(  # noqa: PLR0913 - all that a reply begins from
        cls,
        slot: Entry,
        where: Where,
        before: tuple[int, ...],
        opened: Hidden,
        vocabulary: Vocabulary,
        *,
        withdrawn: int = 0,
    ) -> Reply:
        """A reply whose slot is being admitted.

        Args:
            slot: the slot.
            where: its place.
            before: the ids of the path to its parent.
            opened: its hidden state, the opening only.
            vocabulary: turns ids into text.
            withdrawn: how many of the entries that it reads are read as withdrawn.
        """
        params = resolve(slot) | {"withdrawn": withdrawn}
        stream = TextStream(vocabulary, params["stop"])
        return cls(slot.id, where, before + opened.ids, params, opened, stream)

    @classmethod
    def resume(
        cls,
        slot: Entry,
        where: Where,
        before: tuple[int, ...],
        hidden: Hidden,
        vocabulary: Vocabulary,
    ) -> Reply:
        """A reply that a document says is streaming, at the token where it is.

        Raises:
            BadProof: the text in the document is not the one that its ids stand for.
        """
        stop = tuple(hidden.params["stop"])
        stream, text = TextStream.resume(vocabulary, stop, hidden.ids, hidden.kinds)
        if text != slot.content:
            raise BadProof(f"the text of {slot.id} is not what its sealed ids stand for")
        prompt = before + hidden.injected
        chunks = len(slot.sealed)
        return cls(slot.id, where, prompt, hidden.params, hidden, stream, text, chunk=chunks)

    # -- going on ------------------------------------------------------------------------------

    @property
    def ids(self) -> tuple[int, ...]:
        """Everything that the engine has to read: the prompt and what was sampled."""
        return (*self.prompt, *self.hidden.sampled, *(token for token, _ in self.waiting))

    @property
    def own_ids(self) -> tuple[int, ...]:
        """The ids that this reply adds to the prompt, as far as it got."""
        return (*self.hidden.ids, *(token for token, _ in self.waiting))

    @property
    def withdrawn(self) -> int:
        """How many of the entries that it reads were withdrawn when it began."""
        return int(self.params.get("withdrawn", 0))

    @property
    def sampled(self) -> int:
        """How many ids the model has made."""
        return len(self.hidden.sampled) + len(self.waiting)

    def feed(self, token: int, logprob: float, now_ms: int) -> bool:
        """Take an id from the engine. Says whether a stop string is complete."""
        if self.first_at_ms is None:
            self.first_at_ms = now_ms
        self.waiting.append((token, logprob))
        self.waiting_text += self.stream.feed(token)
        return self.stream.stopped

    def finished(self, end_ids: frozenset[int]) -> str | None:
        """Why a reply that is to be resumed has in truth ended already, if it has."""
        sampled = self.hidden.sampled
        if self.stream.stopped:
            return "stop"
        if sampled and sampled[-1] in end_ids and not self.params["ignore_eos"]:
            return "end"
        return "length" if len(sampled) >= self.params["max_tokens"] else None

    def _take_waiting(self, identity: Identity) -> Hidden:
        """Move what waits into the reply; returns it as a chunk."""
        tokens, self.waiting = self.waiting, []
        chunk = Hidden(
            ids=tuple(token for token, _ in tokens),
            kinds=(Kind.SAMPLED,) * len(tokens),
            logprobs=tuple(logprob for _, logprob in tokens),
        )
        if self.chunk == 0:
            chunk = self._whole(self.hidden, identity) + chunk
            self.hidden = chunk
        else:
            self.hidden += chunk
        self.text += self.waiting_text
        return chunk

    def _whole(self, hidden: Hidden, identity: Identity) -> Hidden:
        return Hidden(
            hidden.ids,
            hidden.kinds,
            hidden.logprobs,
            hidden.model or identity.model,
            hidden.renderer or identity.renderer,
            hidden.params or self.params,
        )

    def flush(self, writer: Writer, identity: Identity) -> None:
        """Write what waits: text and sealed ids, in one transaction."""
        chunk = self._take_waiting(identity)
        if self.waiting_text:
            writer.append_text(self.slot, self.waiting_text)
            self.waiting_text = ""
        place = self.where.at(self.chunk)
        writer.append_sealed(self.slot, identity.sealer.seal(chunk, place, self.text, identity.key))
        self.chunk += 1

    # -- ending --------------------------------------------------------------------------------

    def end(  # noqa: PLR0913 - the end of a reply is all of these, once
        self,
        writer: Writer,
        conversation: Conversation,
        identity: Identity,
        *,
        state: State,
        finish: str,
        now_ms: int,
        error: tuple[str, str] | None = None,
    ) -> None:
        """Write the rest of the text, one sealed blob, the cost and the proof, in one transaction.

        A reply that was redacted meanwhile gets no text, salt or hidden fields any more; its proof
        commits to them all the same.
        """
        entry = conversation.entry(self.slot)
        redacted = entry is not None and entry.redacted
        self.waiting_text += self.stream.finish()
        self._take_waiting(identity)
        self.hidden = self._whole(self.hidden, identity)
        salt = identity.random(SALT_BYTES)
        link = Link(
            self.slot,
            conversation.born_plain(self.slot),
            commit_content(salt, self.text),
            commit_tokens(salt, self.hidden.ids),
            reads=entry.reads if entry is not None else None,
            state=state,
        )
        proof = prove(
            link,
            parent=self.where.parent,
            conversation=self.where.conversation,
            epoch=self.where.epoch,
            key=identity.key,
        )
        if not redacted:
            if self.waiting_text:
                writer.append_text(self.slot, self.waiting_text)
            place = self.where.at(FINAL_CHUNK)
            blob = identity.sealer.seal(self.hidden, place, self.text, identity.key)
            writer.replace_sealed(self.slot, blob)
        writer.proof(self.slot, None if redacted else salt, proof)
        self.waiting_text = ""
        writer.state(self.slot, state)
        writer.usage(self.slot, self._usage(finish, now_ms, error))

    def _usage(self, finish: str, now_ms: int, error: tuple[str, str] | None) -> Usage:
        asked, first = self.asked_at_ms, self.first_at_ms
        return Usage(
            prompt=len(self.prompt),
            prefilled=min(self.prefilled, len(self.prompt)),
            drafted=min(self.drafted, self.prefilled, len(self.prompt)),
            sampled=len(self.hidden.sampled),
            ttft_ms=None if asked is None or first is None else first - asked,
            total_ms=None if asked is None else now_ms - asked,
            finish=finish,
            error_code=error[0] if error else None,
            error_message=error[1] if error else None,
        )
