"""The Python client: conversations on this device, in sync with a relay whenever there is one.

This module owns what a program does with a conversation: open, write, read, ask for replies and
listen. It must not know sockets, frames, disks or models. It works offline first: a write is on
this device's disk when the call returns, and travels when there is a connection. Nothing here waits
for the network but what says so.

    async with Client("ws://127.0.0.1:8765/", token=token, data=folder) as client:
        conversation = await client.create("Groceries")
        reply = await conversation.ask("What goes into a lasagne?", max_tokens=200)
        async for delta in reply:
            print(delta, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from random import SystemRandom
from typing import TYPE_CHECKING, Any, Final, Self, TypedDict, Unpack

from crdt_llm.document import rules
from crdt_llm.document.schema import (
    NONCE_BYTES,
    PARAMS_STOP_CHARACTERS_MAX,
    PARAMS_STOP_MAX,
    PRINCIPAL_CHARACTERS_MAX,
    ROOT,
    SCHEMA_VERSION,
    TEXT_BYTES_MAX,
    TITLE_CHARACTERS_MAX,
    Birth,
    Born,
    Params,
    Role,
    State,
    conversation_id,
    entry_id,
    is_conversation_id,
    is_entry_id,
    read_params,
)
from crdt_llm.errors import ConnectionLost, Gap, LocalMisuse, Refused, ReplyFailed
from crdt_llm.sync.changes import Changed, Feeds
from crdt_llm.sync.dial import Address, websocket_dial
from crdt_llm.sync.link import DEVICE_CHARACTERS_MAX
from crdt_llm.sync.local_replica import LocalReplica
from crdt_llm.sync.replica_file import ReplicaFile
from crdt_llm.sync.uplink import Uplink

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path
    from random import Random

    from crdt_llm.document.conversation import Change, Conversation, Writer
    from crdt_llm.document.schema import Entry, Meta
    from crdt_llm.sync.changes import Feed
    from crdt_llm.sync.dial import Dial
    from crdt_llm.sync.link import Traffic

_ULID_RANDOM_BYTES: Final = 10
_NOTHING_ASKED: Final = Params()
_AUTHORS_ROLES: Final = frozenset({Role.SYSTEM, Role.USER, Role.TOOL})


class Sampling(TypedDict, total=False):
    """What a request for a reply may ask of the sampler; what is left out is up to the node."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: Iterable[str]
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Branch:
    """One line of a conversation's tree.

    Attributes:
        tip: its last entry; give it to :meth:`OpenConversation.look` or ``set_head``.
        first: the entry that it begins with; ``""`` for the main line.
        parent: the entry that it leaves another line after; ``""`` for the main line.
        shown: whether this device looks at it.
    """

    tip: str
    first: str
    parent: str
    shown: bool


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _checked_text(text: str, what: str, *, characters_max: int | None = None) -> str:
    """``text``, if it can be stored: UTF-8 must be able to write it."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise LocalMisuse(f"{what} holds a lone surrogate, which is no text") from None
    if characters_max is not None and len(text) > characters_max:
        raise LocalMisuse(f"{what} has {len(text)} characters; {characters_max} are the limit")
    if size > TEXT_BYTES_MAX:
        raise LocalMisuse(f"{what} has {size} bytes; {TEXT_BYTES_MAX} are the limit")
    return text


def _params(asked: Sampling, before: Params = _NOTHING_ASKED) -> Params:
    """Checked parameters: what was asked for, else what an earlier slot had."""
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if "stop" in given:
        if isinstance(given["stop"], str):
            given["stop"] = (given["stop"],)
        given["stop"] = tuple(_checked_text(text, "a stop string") for text in given["stop"])
        if len(given["stop"]) > PARAMS_STOP_MAX:
            raise LocalMisuse(f"at most {PARAMS_STOP_MAX} stop strings, not {len(given['stop'])}")
        if not all(0 < len(text) <= PARAMS_STOP_CHARACTERS_MAX for text in given["stop"]):
            raise LocalMisuse(f"a stop string has 1 to {PARAMS_STOP_CHARACTERS_MAX} characters")
    try:
        params = replace(before, **given)
    except TypeError:
        raise LocalMisuse(f"unknown parameters: {', '.join(sorted(given))}") from None
    # Every replica reads them so; what would count as absent there is a mistake here.
    read = read_params(params.plain())
    wrong = [name for name in given if getattr(read, name) != getattr(params, name)]
    if wrong:
        raise LocalMisuse(f"{wrong[0]}={given[wrong[0]]!r} is out of range")
    return params


class Reply:
    """A reply that was asked for: its text as it comes, and its end.

    Every iteration starts at the beginning of the text. It ends when the slot has ended, however
    that was: look at ``(await reply.entry()).state``, or call :meth:`text`, which raises.
    """

    def __init__(self, conversation: OpenConversation, slot: str) -> None:
        self.id = slot
        self._conversation = conversation

    def __aiter__(self) -> AsyncIterator[str]:
        return self._deltas()

    async def _deltas(self) -> AsyncIterator[str]:
        shown = ""
        feed = self._conversation.changes()
        while True:
            text, ended = self._conversation.document.text(self.id), self.ended
            if text.startswith(shown):
                if len(text) > len(shown):
                    delta, shown = text[len(shown) :], text
                    yield delta
                    continue  # the consumer took its time: look again before anything else
            else:
                ended = True  # what was shown was withdrawn; a redaction ends the reply too
            if ended:
                return
            await self._conversation.next_of(feed, lambda changed: changed.touches(self.id))

    @property
    def ended(self) -> bool:
        """Whether nothing more will come: it has ended, was withdrawn, or will not be answered.

        The last is a slot that was stopped before the node took it up, or that a later request on
        the same line took over.
        """
        document = self._conversation.document
        entry = document.entry(self.id)
        if entry is None:
            return False  # another device asked, and it has not come here yet
        return entry.ended or entry.redacted or document.tree.is_end(self.id)

    async def entry(self) -> Entry:
        """The slot once it has ended, with its state, usage and proof. Never raises for a failure.

        Raises:
            Refused: the relay does not let this conversation in; the text so far stays readable.
            ConnectionLost: the conversation was closed on this device.
        """
        feed = self._conversation.changes()
        while not self.ended:
            await self._conversation.next_of(feed, lambda _: True)
        return self._conversation.entry(self.id)

    async def text(self) -> str:
        """The whole text once the reply has ended; of a stopped one, what there is.

        Raises:
            ReplyFailed: the node could not finish it.
            Refused: the relay does not let this conversation in.
            ConnectionLost: the conversation was closed on this device.
        """
        entry = await self.entry()
        if entry.state is State.FAILED:
            usage = entry.usage
            code = usage.error_code if usage is not None else None
            said = usage.error_message if usage is not None else None
            raise ReplyFailed(code or "failed", said or "the node could not finish this reply")
        return entry.content


class OpenConversation:
    """A conversation that this device has open. Made by :class:`Client`."""

    def __init__(self, client: Client, replica: LocalReplica, dial: Dial) -> None:
        self._client = client
        self._replica = replica
        self._feeds = Feeds()
        self._look: str | None = None  # None: where the shared head is
        self._closing: asyncio.Task[None] | None = None
        self._uplink = Uplink(
            replica,
            dial,
            device=client.device,
            random=client.random,
            announce=lambda: self._feeds.announce(Changed(connection=True)),
        )
        replica.on_change(self._changed)

    # -- reading -------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The conversation's id."""
        return self._replica.conversation_id

    @property
    def document(self) -> Conversation:
        """The replica, for reading. Ask again after every ``await``: it may be built anew."""
        return self._replica.document

    @property
    def meta(self) -> Meta:
        """Title, shared head, policy and the like."""
        return self.document.meta

    @property
    def title(self) -> str:
        """The title, or ``""``."""
        return self.meta.title

    def entry(self, entry: str) -> Entry:
        """One entry as it is now.

        Raises:
            LocalMisuse: there is none by that id (here, yet).
        """
        found = self.document.entry(entry)
        if found is None:
            raise LocalMisuse(f"conversation {self.id} has no entry {entry}")
        return found

    def path(self) -> tuple[str, ...]:
        """The ids of what this device shows, in order."""
        return self.document.view(self._head())

    def view(self) -> tuple[Entry, ...]:
        """What this device shows, in order: the line it looks at, pending entries included."""
        document = self.document
        entries = (document.entry(entry) for entry in document.view(self._head()))
        return tuple(entry for entry in entries if entry is not None)

    def branches(self) -> tuple[Branch, ...]:
        """Every line of the conversation, the main line first."""
        tree = self.document.tree
        shown = tree.line(self._head())
        return tuple(
            Branch(
                tip=tip,
                first=line,
                parent=tree.up(line) if line != ROOT else ROOT,
                shown=line == shown,
            )
            for tip in tree.tips()
            for line in (tree.line(tip),)
        )

    def siblings(self, entry: str) -> tuple[str, ...]:
        """The alternatives that stand in the same place as an entry, itself included, in order."""
        tree = self.document.tree
        if entry not in tree:
            raise LocalMisuse(f"conversation {self.id} has no entry {entry}")
        beside = tree.children(tree.up(entry))
        return tuple(other for other in beside if other == entry or not tree.is_end(other))

    def reply(self, slot: str) -> Reply:
        """The reply in a slot that another device asked for, even before it has come here.

        Raises:
            LocalMisuse: that is no entry's id, or the entry is no reply.
        """
        found = self.document.entry(slot)
        if not is_entry_id(slot) or (found is not None and not found.is_slot):
            raise LocalMisuse(f"entry {slot} is no reply")
        return Reply(self, slot)

    def changes(self) -> Feed:
        """What happens from now on, as an asynchronous iterator.

        A slow listener gets what it missed as one change. Ends when the conversation is closed.
        """
        return self._feeds.open()

    async def next_of(self, feed: Feed, wanted: Callable[[Changed], bool]) -> Changed:
        """The next change of a feed that is ``wanted``; for those who wait for the relay.

        Raises:
            Refused: the relay does not let this conversation in, so nothing more will come.
            ConnectionLost: the conversation was closed on this device.
        """
        while True:
            if self._uplink.refused is not None:
                raise _again(self._uplink.refused)
            try:
                changed = await anext(feed)
            except StopAsyncIteration:
                raise ConnectionLost(
                    f"conversation {self.id} was closed on this device; a reply goes on without it"
                ) from None
            if wanted(changed):
                return changed

    # -- writing -------------------------------------------------------------------------------

    async def send(self, text: str, *, role: str = "user", call: str | None = None) -> str:
        """Add an entry to the line that this device looks at, without asking for a reply.

        Args:
            text: what it says.
            role: ``user``, ``system`` or ``tool``.
            call: the id of the tool call that a ``tool`` entry answers.

        Returns:
            The entry's id, once it is on this device's disk.

        Raises:
            LocalMisuse: the model's words are not ours to write; the text is too long or no text.
            StoreFailed: the disk did not take it; it was not written.
        """
        kind = _author_role(role)
        if (kind is Role.TOOL) != (call is not None):
            raise LocalMisuse("an entry with the role tool needs the call it answers, others none")
        if call is not None and not _checked_text(
            call, "the call", characters_max=rules.CALL_CHARACTERS_MAX
        ):
            raise LocalMisuse("a call has an id")
        _checked_text(text, "the text")
        entry = self._new_id()

        def compose(document: Conversation, writer: Writer) -> None:
            after = document.tree.last(self._head(document))
            writer.add(entry, replace(self._born(document, kind, after), call=call), text)

        await self._write(compose)
        return entry

    async def ask(self, text: str, *, role: str = "user", **sampling: Unpack[Sampling]) -> Reply:
        """Add an entry and ask for a reply to it, in one transaction.

        Returns:
            The reply, once the request is on this device's disk.

        Raises:
            LocalMisuse: the text or a parameter is out of bounds.
            StoreFailed: the disk did not take it; it was not written.
        """
        kind, params = _author_role(role), _params(sampling)
        _checked_text(text, "the text")
        entry, slot = self._new_id(), self._new_id()

        def compose(document: Conversation, writer: Writer) -> None:
            born = self._born(document, kind, document.tree.last(self._head(document)))
            writer.add(entry, born, text)
            writer.add(slot, self._slot(born, entry, params))

        await self._write(compose)
        return Reply(self, slot)

    async def request(self, **sampling: Unpack[Sampling]) -> Reply:
        """Ask for a reply to what is there: a slot after the last entry of the line."""
        params, slot = _params(sampling), self._new_id()

        def compose(document: Conversation, writer: Writer) -> None:
            after = document.tree.last(self._head(document))
            born = self._born(document, Role.ASSISTANT, after)
            writer.add(slot, replace(born, params=params))

        await self._write(compose)
        return Reply(self, slot)

    async def regenerate(
        self, slot: str | None = None, *, switch: bool = True, **sampling: Unpack[Sampling]
    ) -> Reply:
        """Ask for another reply in the place of one; the old one stays as a branch.

        Args:
            slot: the reply to have an alternative to; the last one shown by default.
            switch: look at the new branch, and move the shared head there.
            **sampling: replace the old reply's parameters, of which the seed is dropped.
        """
        old = self._slot_or_last(slot)
        before = replace(old.born.params, seed=None)
        params, new = _params(sampling, before), self._new_id()

        def compose(document: Conversation, writer: Writer) -> None:
            after = document.tree.up(old.id)
            born = self._born(document, Role.ASSISTANT, after)
            writer.add(new, replace(born, fork=True, params=params))
            if switch:
                writer.set_meta("head", new)

        await self._write_and_look(compose, new if switch else None)
        return Reply(self, new)

    async def fork(
        self, entry: str, text: str, *, switch: bool = True, **sampling: Unpack[Sampling]
    ) -> Reply:
        """Edit an entry: say something else in its place, and ask for a reply to that.

        Args:
            entry: the entry to edit, not a reply; it stays as a branch.
            text: what the new one says.
            switch: look at the new branch, and move the shared head there.
            **sampling: parameters of the reply.
        """
        old = self.entry(entry)
        if old.is_slot:
            raise LocalMisuse("the model's words cannot be edited; regenerate the reply instead")
        params = _params(sampling)
        _checked_text(text, "the text")
        new, slot = self._new_id(), self._new_id()

        def compose(document: Conversation, writer: Writer) -> None:
            born = self._born(document, old.born.role, document.tree.up(old.id))
            born = replace(born, fork=True, call=old.born.call)
            writer.add(new, born, text)
            writer.add(slot, self._slot(born, new, params))
            if switch:
                writer.set_meta("head", slot)

        await self._write_and_look(compose, slot if switch else None)
        return Reply(self, slot)

    async def extend(self, slot: str | None = None, **sampling: Unpack[Sampling]) -> Reply:
        """Go on where a reply was cut off (by its token limit, a stop, or a failure).

        Args:
            slot: the reply to go on with; the last one shown by default. If something stands
                after it already, the continuation is a branch, which this device then looks at.
            **sampling: replace the cut reply's parameters.

        Raises:
            LocalMisuse: the reply has not ended, or the model never began it.
        """
        cut = self._slot_or_last(slot)
        if not cut.ended or not self.document.tree.is_admitted(cut.id):
            raise LocalMisuse(f"reply {cut.id} was not cut off: there is nothing to go on from")
        params, new = _params(sampling, replace(cut.born.params, extend=True)), self._new_id()
        fork = self.document.tree.last(cut.id) != cut.id

        def compose(document: Conversation, writer: Writer) -> None:
            born = self._born(document, Role.ASSISTANT, cut.id)
            writer.add(new, replace(born, fork=fork, params=params))
            if fork:
                writer.set_meta("head", new)

        await self._write_and_look(compose, new if fork else None)
        return Reply(self, new)

    async def stop(self, slot: str | None = None) -> str | None:
        """Ask for the end of a reply. Works offline, and takes effect when the node hears of it.

        Args:
            slot: the reply to stop; by default the one shown that has not ended.

        Returns:
            The slot that was stopped, or ``None`` if none was running.
        """
        if slot is None:
            running = (entry for entry in reversed(self.view()) if not entry.ended)
            slot = next((entry.id for entry in running if entry.stop is None), None)
            if slot is None:
                return None
        stopped = self._slot_or_last(slot).id
        await self._write(lambda _, writer: writer.stop(stopped, self._client.principal))
        return stopped

    async def rename(self, title: str) -> None:
        """Give the conversation a title."""
        _checked_text(title, "the title", characters_max=TITLE_CHARACTERS_MAX)
        await self._write(lambda _, writer: writer.set_meta("title", title))

    async def set_head(self, entry: str) -> None:
        """Show the line of an entry on every device that does not look elsewhere."""
        self.entry(entry)
        await self._write_and_look(lambda _, writer: writer.set_meta("head", entry), None)
        self.look(None)

    def look(self, entry: str | None) -> None:
        """Look at the line of an entry on this device only; ``None`` follows the shared head."""
        if entry is not None:
            self.entry(entry)
        if entry != self._look:
            self._look = entry
            self._feeds.announce(Changed(look=True))

    async def _write(self, compose: Callable[[Conversation, Writer], None]) -> None:
        """Write what the relay will take.

        It refuses a write as a whole, and with it whatever is sent together with it: each time
        anew, so that this device could never sync again.
        """
        try:
            await self._replica.write(compose, self._check)
        except Refused as refused:
            raise LocalMisuse(f"the relay would refuse this: {refused}") from refused

    def _check(self, change: Change, document: Conversation) -> None:
        # What has not come here yet is no offence: the relay has it, or asks for it.
        with suppress(Gap):
            rules.check(
                change,
                document,
                conversation_id=self.id,
                author=rules.Author(self._client.principal),
            )

    async def _write_and_look(
        self, compose: Callable[[Conversation, Writer], None], entry: str | None
    ) -> None:
        await self._write(compose)
        if entry is not None:
            self.look(entry)

    # -- connection ----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether this device has let go of it, or is about to."""
        return self._closing is not None

    @property
    def online(self) -> bool:
        """Whether there is a connection to the relay now."""
        return self._uplink.online

    @property
    def synced(self) -> bool:
        """Whether this device has everything that the relay had when they connected, and since."""
        return self._uplink.synced

    @property
    def refused(self) -> Refused | None:
        """Why the relay does not let this conversation in, if so; :meth:`resume` asks once more."""
        return self._uplink.refused

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the other devices that are connected now."""
        return self._uplink.devices

    @property
    def traffic(self) -> Traffic:
        """What this conversation cost on the wire since it was opened; a live count."""
        return self._uplink.traffic

    async def synced_once(self) -> None:
        """Wait until this device is in sync with the relay; returns at once if it is now.

        Raises:
            Refused: the relay does not let this conversation in.
            ConnectionLost: the conversation was closed on this device.
        """
        feed = self.changes()
        while not self.synced:
            await self.next_of(feed, lambda changed: changed.connection)

    def pause(self) -> None:
        """Go offline on purpose. Everything but the network goes on."""
        self._uplink.pause()

    def resume(self) -> None:
        """Go online again, also after a refusal."""
        if self.closed:
            raise LocalMisuse(f"conversation {self.id} is closed on this device")
        self._uplink.resume()

    async def close(self) -> None:
        """Send and save what waits for that, and let go of the conversation on this device."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"close {self.id}")
        # One caller's cancellation must not leave the file with half a close.
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            await self._uplink.close()
            await self._replica.close()
        finally:
            self._feeds.end()
            # Only now: two replicas of one conversation must never share a log.
            self._client.forget(self)

    # -- parts ---------------------------------------------------------------------------------

    def _head(self, document: Conversation | None = None) -> str:
        """The entry whose line this device looks at."""
        document = self.document if document is None else document
        if self._look is not None and self._look in document.tree:
            return self._look
        return document.meta.head

    def _new_id(self) -> str:
        return entry_id(self._client.clock(), self._client.random.randbytes(_ULID_RANDOM_BYTES))

    def _born(self, document: Conversation, role: Role, after: str) -> Born:
        return Born(
            role=role,
            author=self._client.principal,
            device=self._client.device,
            at=self._client.clock(),
            clock=document.tree.clock + 1,
            after=after,
        )

    @staticmethod
    def _slot(born: Born, after: str, params: Params) -> Born:
        """A slot that follows a new entry in the same transaction."""
        return replace(
            born,
            role=Role.ASSISTANT,
            clock=born.clock + 1,
            after=after,
            fork=False,
            call=None,
            params=params,
        )

    def _slot_or_last(self, slot: str | None) -> Entry:
        if slot is not None:
            if not self.entry(slot).is_slot:
                raise LocalMisuse(f"entry {slot} is no reply")
            return self.entry(slot)
        last = next((entry for entry in reversed(self.view()) if entry.is_slot), None)
        if last is None:
            raise LocalMisuse(f"conversation {self.id} shows no reply yet")
        return last

    def _changed(self, change: Change | None) -> None:
        if change is None:
            self._feeds.announce(Changed(everything=True))
            return
        entries = change.entries
        if change.structure:
            # A new place or slot can end or revive other requests of its line.
            entries |= frozenset(self.document.tree.pending) | self.document.tree.superseded
        meta = any(edit.root != "entries" for edit in change.edits)
        self._feeds.announce(Changed() | Changed(entries=entries, meta=meta))


def _author_role(role: str) -> Role:
    if role not in _AUTHORS_ROLES:
        raise LocalMisuse(f"an entry of ours is user, system or tool, not {role!r}")
    return Role(role)


def _again(refused: Refused) -> Refused:
    """A copy to raise: every waiter gets a traceback of its own."""
    return type(refused)(refused.code, refused.reason)


class Client:
    """This device's conversations, as an asynchronous context manager.

    Args:
        url: the relay: ``ws://host:port/`` or ``http://host:port/`` (``wss``, ``https``); a
            ``?token=`` in it is taken out and used.
        token: who we are to the relay; sent in a header, never in an address.
        data: the folder that keeps the replicas, locked while it is open; ``None`` keeps them in
            memory alone.
        device: this device's name, for the people who share the conversation.
        principal: the name that the token stands for; it is the author of what is written here.
        clock: milliseconds since 1970.
        random: draws ids, nonces and waiting times; must not be predictable outside of tests.
        dial: opens sockets; by default to ``url``.

    Raises:
        LocalMisuse: an argument is malformed.
    """

    def __init__(  # noqa: PLR0913 - everything outside is an argument
        self,
        url: str,
        *,
        token: str | None = None,
        data: Path | None = None,
        device: str = "python",
        principal: str = "owner",
        clock: Callable[[], int] = _now_ms,
        random: Random | None = None,
        dial: Dial | None = None,
    ) -> None:
        self.device = _checked_text(device, "device", characters_max=DEVICE_CHARACTERS_MAX)
        self.principal = _checked_text(
            principal, "principal", characters_max=PRINCIPAL_CHARACTERS_MAX
        )
        if not principal:
            raise LocalMisuse("a principal has a name")
        self.clock = clock
        self.random = SystemRandom() if random is None else random
        self._data = data
        self._dial = websocket_dial(Address.parse(url), token) if dial is None else dial
        self._file: ReplicaFile | None = None
        self._open: dict[str, asyncio.Task[OpenConversation]] = {}

    async def __aenter__(self) -> Self:
        """Open the data folder.

        Raises:
            DataFolderBusy: another client has it open.
            Corrupt: the file in it is not an intact one of ours.
            StoreFailed: it cannot be opened.
        """
        if self._file is not None:
            raise LocalMisuse("this client is open already")
        self._file = await ReplicaFile.open(self._data, self.clock)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Send and save what waits for that, and let others have the folder."""
        file, self._file = self._opened(), None
        opening = tuple(self._open.values())
        try:
            found = await asyncio.gather(*opening, return_exceptions=True)
            closing = [one.close() for one in found if isinstance(one, OpenConversation)]
            results = await asyncio.gather(*closing, return_exceptions=True)
        finally:
            await file.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def create(self, title: str | None = None) -> OpenConversation:
        """Begin a conversation. Needs no connection: the id follows from us and a nonce.

        Raises:
            StoreFailed: the disk did not take it.
        """
        if title is not None:
            _checked_text(title, "the title", characters_max=TITLE_CHARACTERS_MAX)
        birth = Birth(self.principal, self.random.randbytes(NONCE_BYTES))
        conversation = await self._open_replica(conversation_id(birth), online=False)

        def compose(_: Conversation, writer: Writer) -> None:
            writer.give_birth(birth, SCHEMA_VERSION)
            writer.set_meta("created_at", self.clock())
            if title:
                writer.set_meta("title", title)

        try:
            await conversation._write(compose)  # noqa: SLF001 - one class in two halves
        except BaseException:
            await conversation.close()
            raise
        conversation.resume()
        return conversation

    async def open(self, conversation: str) -> OpenConversation:
        """Open a conversation: from this device's file at once, in sync in the background.

        Opening what is open gives the same object.

        Raises:
            LocalMisuse: that is no conversation's id.
            Corrupt: this device's copy is damaged.
            StoreFailed: it cannot be read now.
        """
        if not is_conversation_id(conversation):
            raise LocalMisuse(f"{conversation!r} is no conversation's id (22 letters and digits)")
        return await self._open_replica(conversation)

    async def conversations(self) -> tuple[str, ...]:
        """The ids of the conversations that this device has, last used first.

        Raises:
            StoreFailed: the list cannot be read now.
        """
        return await self._opened().conversations()

    def forget(self, conversation: OpenConversation) -> None:
        """Called by a conversation that was closed."""
        self._open.pop(conversation.id, None)

    async def _open_replica(self, conversation: str, *, online: bool = True) -> OpenConversation:
        """Whoever comes while it is being opened waits for the same object."""
        while True:
            task = self._open.get(conversation)
            if task is None:
                task = asyncio.create_task(self._load(conversation, self._opened(), online=online))
                self._open[conversation] = task
            try:
                opened = await asyncio.shield(task)
            except Exception:
                if self._open.get(conversation) is task:
                    del self._open[conversation]
                raise
            if not opened.closed:
                return opened
            await opened.close()

    async def _load(
        self, conversation: str, file: ReplicaFile, *, online: bool
    ) -> OpenConversation:
        replica = await LocalReplica.open(conversation, file.log, self.random)
        opened = OpenConversation(self, replica, self._dial)
        if online:
            opened.resume()
        return opened

    def _opened(self) -> ReplicaFile:
        if self._file is None:
            raise LocalMisuse("open the client first: async with Client(...) as client")
        return self._file
