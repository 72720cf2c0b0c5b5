"""One replica of one conversation: the only doorway to the CRDT library.

This module owns the ``Y.Doc``: applying updates, reading typed entries, writing, and telling
listeners what changed. It must not know sockets, stores or models. One thread alone may touch a
replica.

Everything that happens to the document happens in one of two ways, :meth:`Conversation.apply`
(bytes from elsewhere) and :meth:`Conversation.writing` (our own writes); both end in one
:class:`Change`.
Observers of the library only collect; nothing is read from the document while a transaction is
open, because the library forbids it.

Bytes of hidden fields are written under a client id of their own: appends to ``sealed`` between
appends to the text would break the text into runs and leave tombstones between them.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import finalize, ref

from pycrdt import Array, Doc, Map, Text

from crdt_llm.document.schema import (
    ENDED,
    ENTRY_FIELDS,
    REDACTION_DELETES,
    ROOT,
    Entry,
    Grant,
    Role,
    is_entry_id,
    normalise,
    read_born,
    read_chunks,
    read_meta,
    read_place,
    read_proof,
    read_state,
    read_strings,
    read_usage,
)
from crdt_llm.document.tree import Facts, Tree
from crdt_llm.document.updates import merge
from crdt_llm.errors import LocalMisuse, MalformedMessage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pycrdt import TransactionEvent

    from crdt_llm.document.schema import (
        Birth,
        Born,
        Meta,
        Place,
        Proof,
        State,
        Usage,
    )

EMPTY_UPDATE: Final = b"\x00\x00"
EMPTY_STATE_VECTOR: Final = b"\x00"
CLIENT_ID_BITS: Final = 32  # what every Yjs implementation holds exactly

EPOCH_DIGITS_MAX: Final = 16  # of what JavaScript holds exactly
# Kept entries, and kept texts: more than ever stream at once, less than a long document.
HANDLES_MAX: Final = 256

META: Final = "meta"
ACCESS: Final = "access"
LEASES: Final = "leases"
ENTRIES: Final = "entries"
ROOTS: Final = (META, ACCESS, LEASES, ENTRIES)

_STRUCTURAL: Final = frozenset({"born", "place", "state", "stop", "redacted", "reads"})


@dataclass(frozen=True, slots=True)
class Edit:
    """One key that a transaction set, replaced, removed, or changed inside.

    Attributes:
        root: ``meta``, ``access``, ``leases`` or ``entries``.
        path: the keys (or indexes) from the root to the container; empty at the root itself.
        key: the key in a map; ``None`` for a change inside a text or an array.
        action: ``add``, ``update``, ``delete``; ``text`` or ``array`` for a change inside one.
        old: the plain value before (``None`` for shared types).
        new: the plain value after; for a text or an array the list of its delta.
        shared: the kind of the new value: ``map``, ``text``, ``array``, or ``""`` for plain ones.
    """

    root: str
    path: tuple[str | int, ...]
    key: str | None
    action: str
    old: Any
    new: Any
    shared: str = ""

    @property
    def entry(self) -> str | None:
        """The id of the entry that this edit is about, if it is about one."""
        if self.root != ENTRIES:
            return None
        return str(self.path[0]) if self.path else self.key


@dataclass(frozen=True, slots=True)
class Change:
    """What one transaction did to a replica.

    Attributes:
        update: the transaction's own update bytes, with its own deletions only.
        edits: every key it touched.
        origin: whatever :meth:`Conversation.apply` or ``writing`` was given.
        texts: entries whose text grew or changed.
        structure: entries that are new or whose place in the tree may have changed.
    """

    update: bytes
    edits: tuple[Edit, ...]
    origin: object
    texts: frozenset[str]
    structure: frozenset[str]

    @property
    def is_empty(self) -> bool:
        """Whether the replica is as it was."""
        return self.update == EMPTY_UPDATE

    @property
    def entries(self) -> frozenset[str]:
        """All entries touched."""
        return frozenset(entry for edit in self.edits if (entry := edit.entry) is not None)


def _kind(value: Any) -> str:
    """The kind of shared type that a value is; empty for plain ones."""
    match value:
        case Map():
            return "map"
        case Text():
            return "text"
        case Array():
            return "array"
        case None | bool() | int() | float() | str() | bytes() | bytearray() | dict() | list():
            return ""
        case _:
            return type(value).__name__.lower()  # XML, sub-documents: no part of the schema


def _plain(value: Any) -> tuple[Any, str]:
    """A value of an event as (plain value, kind of shared type)."""
    match kind := _kind(value):
        case "map" | "array":
            return normalise(value.to_py()), kind
        case "text":
            return str(value), kind
        case "":
            return normalise(value), kind
        case _:
            return None, kind


def _edits(root: str, event: Any) -> Iterator[Edit]:
    path = tuple(event.path)
    keys = getattr(event, "keys", None)
    if keys is None:
        kind = "text" if type(event).__name__ == "TextEvent" else "array"
        yield Edit(root, path, None, kind, None, normalise(event.delta), kind)
        return
    for key, change in keys.items():
        new, shared = _plain(change.get("newValue"))
        old = change.get("oldValue")
        # A deleted shared type cannot be read any more.
        before = None if isinstance(old, Map | Text | Array) else _plain(old)[0]
        yield Edit(root, path, key, change["action"], before, new, shared)


class Writer:
    """Typed writes of one transaction; made by :meth:`Conversation.writing`.

    The methods do not ask whether a write is allowed: :mod:`crdt_llm.document.rules` does, on
    every replica that is asked to believe it.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._roots = conversation._roots  # noqa: SLF001 - the writer is the replica's other half
        self._entries = self._roots[ENTRIES]
        self._seals: list[Callable[[Doc[Any]], None]] = []
        self.change: Change | None = None

    # -- meta, access, leases ------------------------------------------------------------------

    def set_meta(self, key: str, value: Any) -> None:
        """Set one key of ``meta`` to a plain value; ``None`` removes it."""
        if value is not None:
            self._roots[META][key] = value
        elif key in self._roots[META]:
            del self._roots[META][key]

    def give_birth(self, birth: Birth, schema: int) -> None:
        """Make this document a conversation."""
        self.set_meta("schema", schema)
        self.set_meta("birth", birth.plain())

    def grant(self, principal: str, grant: Grant | None) -> None:
        """Give a principal a right, or take it away."""
        if grant is not None:
            self._roots[ACCESS][principal] = grant.value
        elif principal in self._roots[ACCESS]:
            del self._roots[ACCESS][principal]

    def add_lease(self, epoch: int, node: bytes, signature: bytes) -> None:
        """Record who may act as the node under an epoch."""
        self._roots[LEASES][str(epoch)] = {"node": node, "signature": signature}

    # -- an author's writes --------------------------------------------------------------------

    def add(self, entry: str, born: Born, content: str | None = None) -> None:
        """Add an entry; a slot has no content of its own yet."""
        fields: dict[str, Any] = {"born": born.plain()}
        if content is not None:
            fields["content"] = content
        self._entries[entry] = Map(fields)

    def set(self, entry: str, key: str, value: Any) -> None:
        """Set one field of an entry to a plain value."""
        self._entries[entry][key] = value

    def remove(self, entry: str, key: str) -> None:
        """Delete one field of an entry, if it is there."""
        if key in self._entries[entry]:
            del self._entries[entry][key]

    def stop(self, slot: str, principal: str) -> None:
        """Ask for the end of a reply."""
        self.set(slot, "stop", principal)

    def redact(self, entry: str, principal: str, at_ms: int) -> None:
        """Withdraw an entry: say so, and delete what it said."""
        self.set(entry, "redacted", {"by": principal, "at": at_ms})
        self.clear(entry)

    def clear(self, entry: str) -> None:
        """Delete what there is of a redacted entry's content and what it could be guessed from."""
        fields = self._entries[entry]
        for key in sorted(REDACTION_DELETES):
            if key in fields:
                del fields[key]

    # -- the node's writes ---------------------------------------------------------------------

    def place(self, entry: str, place: Place) -> None:
        """Admit an entry."""
        self.set(entry, "place", {"parent": place.parent, "epoch": place.epoch})

    def state(self, slot: str, state: State) -> None:
        """Move a slot on."""
        self.set(slot, "state", state.value)

    def usage(self, slot: str, usage: Usage) -> None:
        """Say what a reply cost."""
        self.set(slot, "usage", usage.plain())

    def proof(self, entry: str, salt: bytes | None, proof: Proof) -> None:
        """Commit to an entry's content and place; a redacted entry never gets a salt."""
        if salt is not None:
            self.set(entry, "salt", salt)
        self.set(entry, "proof", proof.plain())

    def open_reply(self, slot: str) -> None:
        """Give a slot the containers that its text and its hidden ids grow in."""
        fields = self._entries[slot]
        fields["content"] = Text()
        fields["sealed"] = Array()

    def append_text(self, slot: str, delta: str) -> None:
        """Append to a reply's text. Offsets in the library are UTF-8 bytes, as ``len`` is."""
        text = self._entries[slot]["content"]
        text.insert(len(text), delta)

    def append_sealed(self, slot: str, blob: bytes) -> None:
        """Append a sealed chunk, under the seal's own client id, in the same update."""
        self._seals.append(lambda doc: _sealed(doc, slot).append(blob))

    def replace_sealed(self, slot: str, blob: bytes) -> None:
        """Put one blob in the place of all chunks, under the seal's own client id."""

        def replace(doc: Doc[Any]) -> None:
            sealed = _sealed(doc, slot)
            if len(sealed):
                del sealed[0 : len(sealed)]
            sealed.append(blob)

        self._seals.append(replace)


def _sealed(doc: Doc[Any], slot: str) -> Array[Any]:
    sealed = doc.get(ENTRIES, type=Map)[slot]["sealed"]
    if not isinstance(sealed, Array):
        raise LocalMisuse(f"entry {slot} has no list of sealed chunks: open the reply first")
    return sealed


class Shadow:
    """A second copy of a document that nobody reads: what an update is undone with.

    The library cannot take a change back. Applying an update to a copy without readers costs some
    10 us, making a replica's readings anew costs the document's length, many times over.

    Args:
        client_id: fresh, as for a replica: it becomes one's id.
        update: what to begin with.
    """

    def __init__(self, client_id: int, update: bytes = EMPTY_UPDATE) -> None:
        self._doc: Doc[Any] | None = Doc(client_id=client_id)
        self.apply(update)

    def apply(self, update: bytes) -> None:
        """Follow the replica.

        Raises:
            MalformedMessage: the bytes are no update.
        """
        try:
            self._held().apply_update(update)
        except (ValueError, RuntimeError) as error:
            raise MalformedMessage(f"an update that does not apply: {error}") from error

    def take(self) -> Doc[Any]:
        """Give the document away; the shadow is of no use after that."""
        doc, self._doc = self._held(), None
        return doc

    def _held(self) -> Doc[Any]:
        if self._doc is None:
            raise LocalMisuse("this shadow was given away")
        return self._doc


class Conversation:
    """A replica.

    Args:
        client_id: this replica's id, 32 bits, fresh per process and never used again.
        seal_client_id: a second one, for a node: its hidden fields are written under it.
        update: state to begin with, e.g. from a store.
    """

    def __init__(
        self, client_id: int, *, seal_client_id: int | None = None, update: bytes = EMPTY_UPDATE
    ) -> None:
        for given in (client_id, seal_client_id):
            if given is not None and not 0 < given < 2**CLIENT_ID_BITS:
                raise LocalMisuse(f"client id {given} is not in 1..2^{CLIENT_ID_BITS} - 1")
        self.tree = Tree()
        self._seal_client_id = seal_client_id
        self._seal: Doc[Any] | None = None
        self._born: dict[str, Born] = {}
        self._reads: dict[str, tuple[str, ...]] = {}
        self._redacted: set[str] = set()
        self._states: dict[str, State] = {}
        # Asking the library costs ten times an answer kept here, and the checks of each streamed
        # token ask often. All are forgotten when a change touches what they say.
        self._handles: dict[str, Any] = {}  # of entries
        self._texts: dict[str, Text] = {}  # of replies
        self._meta: Meta | None = None
        self._listeners: list[Callable[[Change], None]] = []
        self._collected: list[Edit] = []
        self._updates: list[bytes] = []
        self._failure: Exception | None = None
        self._busy = False
        self._release: Callable[[], object] = lambda: None  # lets go of the document
        self._hold(Doc(client_id=client_id))
        if update != EMPTY_UPDATE:
            self.apply(update)

    def _hold(self, doc: Doc[Any]) -> None:
        self._doc = doc
        self._roots: dict[str, Any] = {name: doc.get(name, type=Map) for name in ROOTS}
        # The library's subscriptions are not seen by the garbage collector: one that held this
        # replica would keep it for ever, and each keeps its document until it is ended.
        me = ref(self)
        held = [
            (root, root.observe_deep(_collector(me, name))) for name, root in self._roots.items()
        ]
        held.append((doc, doc.observe(_update_collector(me))))
        self._release()
        release = self._release = finalize(self, _unobserve, held)
        release.atexit = False

    def revert(self, shadow: Shadow, touched: Iterable[str]) -> None:
        """Go back to what a shadow holds, under its client id; no listener hears of it.

        Args:
            shadow: a copy of this replica from before what is to be undone. It is used up.
            touched: the entries that may differ: a change's ``entries``.
        """
        self._check_idle()
        self._seal = None
        self._forget_all()
        self._collected, self._updates, self._failure = [], [], None
        self._hold(shadow.take())
        for entry in touched:
            self._refresh(entry)

    # -- what happened -------------------------------------------------------------------------

    def _collect(self, root: str, events: list[Any]) -> None:
        try:
            for event in events:
                self._collected.extend(_edits(root, event))
        except Exception as error:  # noqa: BLE001 - raised again outside the library's callback
            self._failure = error

    def _collect_update(self, event: TransactionEvent) -> None:
        self._updates.append(bytes(event.update))

    def _settle(self, origin: object) -> Change:
        edits, updates = tuple(self._collected), tuple(self._updates)
        self._collected, self._updates = [], []
        failure, self._failure = self._failure, None
        if failure is not None:
            self._forget_all()  # what changed is not known
            raise MalformedMessage(f"an update that cannot be read: {failure}") from failure
        texts: set[str] = set()
        structure: set[str] = set()
        for edit in edits:
            self._forget(edit)
            entry = edit.entry
            if entry is None:
                continue
            field = edit.key if len(edit.path) == 1 else None
            if not edit.path or field in _STRUCTURAL:
                structure.add(entry)
            if not edit.path or field == "content" or edit.path[1:] == ("content",):
                texts.add(entry)
        for entry in structure:
            self._refresh(entry)
        update = merge(updates or (EMPTY_UPDATE,))
        change = Change(update, edits, origin, frozenset(texts), frozenset(structure))
        if not change.is_empty:
            for listener in tuple(self._listeners):
                listener(change)
        return change

    def _forget(self, edit: Edit) -> None:
        """Drop what was kept of the library's answers and may be another now."""
        if edit.root == META:
            self._meta = None
        elif edit.root == ENTRIES and not edit.path:
            self._handles.pop(str(edit.key), None)
            self._texts.pop(str(edit.key), None)
        elif edit.key == "content" and edit.entry is not None:
            self._texts.pop(edit.entry, None)

    def _forget_all(self) -> None:
        self._handles.clear()
        self._texts.clear()
        self._meta = None

    def _refresh(self, entry: str) -> None:
        fields = self._fields(entry)
        born = read_born(fields["born"]) if fields is not None and "born" in fields else None
        redacted = fields is not None and _is_redaction(fields)
        (self._redacted.add if redacted else self._redacted.discard)(entry)
        reads = None if fields is None else read_strings(normalise(fields.get("reads")))
        if fields is None or born is None:
            self._born.pop(entry, None)
            self._reads.pop(entry, None)
            self._states.pop(entry, None)
            self.tree.drop(entry)
            return
        self._born[entry] = born
        slot = born.role is Role.ASSISTANT
        if slot and reads is not None:
            self._reads[entry] = reads
        else:
            self._reads.pop(entry, None)
        place = read_place(fields["place"]) if "place" in fields else None
        state = read_state(fields["state"]) if slot and "state" in fields else None
        if state is None:
            self._states.pop(entry, None)
        else:
            self._states[entry] = state
        self.tree.put(
            Facts(
                id=entry,
                clock=born.clock,
                slot=slot,
                fork=born.fork,
                after=born.after,
                parent=None if place is None else place.parent,
                epoch=0 if place is None else place.epoch,
                ended=state in ENDED
                or redacted
                or (slot and "stop" in fields and isinstance(fields["stop"], str)),
            )
        )

    def subscribe(self, listener: Callable[[Change], None]) -> Callable[[], None]:
        """Call ``listener`` after every change; the answer ends that.

        Listeners run in the order of subscription, after the transaction, and may read but not
        write.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # -- the two ways in -----------------------------------------------------------------------

    def apply(self, update: bytes, origin: object = None) -> Change:
        """Merge an update from elsewhere.

        The bytes must have passed a structure check, and must not build on what is not here: on
        hostile bytes and on gaps the library can crash, or show values of a state never written.

        Raises:
            MalformedMessage: the bytes are no update. The replica must then be thrown away.
        """
        self._check_idle()
        try:
            self._doc.apply_update(update)
        except BaseException as error:
            # A panic of the library is no Exception; unhandled it would end the whole process.
            if type(error).__name__ != "PanicException" and not isinstance(
                error, ValueError | RuntimeError
            ):
                raise
            self._collected, self._updates, self._failure = [], [], None
            self._forget_all()
            raise MalformedMessage(f"an update that does not apply: {error}") from error
        change = self._settle(origin)
        if self._seal is not None and not change.is_empty:
            self._seal.apply_update(update)
        return change

    @contextmanager
    def writing(self, origin: object = None) -> Iterator[Writer]:
        """Write in one transaction; afterwards ``writer.change`` holds what was written.

        Everything written inside becomes one update: replicas see all of it or nothing.
        """
        self._check_idle()
        writer = Writer(self)
        self._busy = True
        try:
            with self._doc.transaction():
                yield writer
        finally:
            # Also when the caller raised: the library keeps what was written until then, so the
            # tree and the listeners must hear of it.
            self._busy = False
            if writer._seals:  # noqa: SLF001 - the writer is this class's other half
                self._write_seals(writer._seals)  # noqa: SLF001 - as above
            elif self._seal is not None and self._updates:
                self._seal.apply_update(self._updates[-1])
            writer.change = self._settle(origin)

    def _write_seals(self, seals: Sequence[Callable[[Doc[Any]], None]]) -> None:
        seal = self._seal
        if seal is None:
            seal = self._seal = self._second()
        elif self._updates:
            seal.apply_update(self._updates[-1])
        sealed: list[bytes] = []
        subscription = seal.observe(lambda event: sealed.append(bytes(event.update)))
        with seal.transaction():
            for write in seals:
                write(seal)
        seal.unobserve(subscription)
        for update in sealed:
            self._doc.apply_update(update)

    def _second(self) -> Doc[Any]:
        """A copy under the seal's own client id."""
        if self._seal_client_id is None:
            raise LocalMisuse("this replica was opened without a client id for sealed fields")
        seal: Doc[Any] = Doc(client_id=self._seal_client_id)
        seal.apply_update(self._doc.get_update())
        return seal

    def hold_seal(self) -> None:
        """Make the second replica that sealed fields are written in before it is needed.

        It costs what the document has grown to, and a reply is best begun without that.
        """
        self._check_idle()
        if self._seal is None:
            self._seal = self._second()

    def release_seal(self) -> None:
        """Let go of the second replica that sealed fields are written in, until it is needed."""
        self._seal = None

    def _check_idle(self) -> None:
        if self._busy:
            raise LocalMisuse("a replica was used while one of its transactions was open")

    # -- replication ---------------------------------------------------------------------------

    @property
    def client_id(self) -> int:
        """The id that this replica writes under."""
        return self._doc.client_id

    def state_vector(self) -> bytes:
        """What this replica has, in the wire form of a Yjs state vector."""
        return bytes(self._doc.get_state())

    def diff(self, state_vector: bytes = EMPTY_STATE_VECTOR) -> bytes:
        """All that a replica with ``state_vector`` lacks; without one, the whole document.

        Raises:
            MalformedMessage: the bytes are no state vector.
        """
        self._check_idle()
        try:
            return bytes(self._doc.get_update(state_vector))
        except (ValueError, RuntimeError) as error:
            raise MalformedMessage(f"not a state vector: {error}") from error

    # -- reading -------------------------------------------------------------------------------

    def _fields(self, entry: str) -> Any | None:
        fields = self._handles.get(entry)
        if fields is not None and not self._busy:
            return fields
        fields = self._roots[ENTRIES].get(entry)
        if not isinstance(fields, Map) or not is_entry_id(entry):
            return None
        if not self._busy:
            if len(self._handles) >= HANDLES_MAX:
                self._handles.clear()
            self._handles[entry] = fields
        return fields

    @property
    def meta(self) -> Meta:
        """The root ``meta``."""
        if self._busy:  # within a transaction, what is kept may be old
            return read_meta(self.meta_plain())
        if self._meta is None:
            self._meta = read_meta(self.meta_plain())
        return self._meta

    def meta_plain(self) -> dict[str, Any]:
        """The root ``meta`` as plain values."""
        plain: dict[str, Any] = normalise(self._roots[META].to_py() or {})
        return plain

    @property
    def id(self) -> str | None:
        """The conversation's id, or ``None`` while it has no birth."""
        return self.meta.conversation

    def grant_of(self, principal: str) -> Grant | None:
        """What a principal may do here."""
        birth = self.meta.birth
        if birth is not None and birth.owner == principal:
            return Grant.OWNER
        given = self._roots[ACCESS].get(principal)
        known = isinstance(given, str) and given in Grant.__members__.values()
        return Grant(given) if known else None

    def access(self) -> Mapping[str, str]:
        """The root ``access`` as plain values."""
        plain: dict[str, str] = self._roots[ACCESS].to_py() or {}
        return plain

    def lease(self, epoch: int) -> tuple[bytes, bytes] | None:
        """The node's public key and the relay's signature under an epoch."""
        value = normalise(self._roots[LEASES].get(str(epoch)))
        if not isinstance(value, dict):
            return None
        node, signature = value.get("node"), value.get("signature")
        if not isinstance(node, bytes) or not isinstance(signature, bytes):
            return None
        return node, signature

    def epochs(self, since: int = 0) -> tuple[int, ...]:
        """The epochs with a recorded lease, from ``since`` on, in order."""
        names: list[str] = list(self._roots[LEASES].keys())
        found = {
            int(name)
            for name in names
            if name.isascii() and name.isdecimal() and len(name) <= EPOCH_DIGITS_MAX
        }
        return tuple(
            epoch for epoch in sorted(found) if epoch >= since and self.lease(epoch) is not None
        )

    def born(self, entry: str) -> Born | None:
        """An entry's ``born``, or ``None`` if there is no such well-formed entry. O(1)."""
        return self._born.get(entry)

    def reads(self, slot: str) -> tuple[str, ...] | None:
        """The entries that a slot says it was answered from. O(1)."""
        return self._reads.get(slot)

    def is_redacted(self, entry: str) -> bool:
        """Whether an entry was withdrawn. O(1)."""
        return entry in self._redacted

    def born_plain(self, entry: str) -> dict[str, Any]:
        """An entry's ``born`` as plain values, every key of it: what the chain commits to."""
        fields = self._fields(entry)
        value = normalise(fields["born"]) if fields is not None and "born" in fields else {}
        return value if isinstance(value, dict) else {}

    def text(self, entry: str) -> str:
        """An entry's text; empty where there is none."""
        fields = self._fields(entry)
        if fields is None or "content" not in fields:
            return ""
        value = fields["content"]
        return str(value) if isinstance(value, str | Text) else ""

    def state(self, entry: str) -> State | None:
        """A slot's state. O(1)."""
        if not self._busy:
            return self._states.get(entry)
        born = self._born.get(entry)
        if born is None or born.role is not Role.ASSISTANT:
            return None
        fields = self._fields(entry)
        return read_state(fields.get("state")) if fields is not None else None

    def has(self, entry: str, field: str) -> bool:
        """Whether an entry carries a field."""
        fields = self._fields(entry)
        return fields is not None and field in fields

    def plain(self, entry: str, field: str) -> Any:
        """A field's plain value; ``None`` without the field, and for shared types."""
        fields = self._fields(entry)
        value = fields[field] if fields is not None and field in fields else None
        return None if _kind(value) else normalise(value)

    def kind(self, entry: str, field: str) -> str | None:
        """The shared type that holds a field, as in :class:`Edit`; ``None`` without the field."""
        fields = self._fields(entry)
        return _kind(fields[field]) if fields is not None and field in fields else None

    def text_bytes(self, entry: str) -> int:
        """The length of an entry's text in UTF-8 bytes; of a reply's without reading it."""
        kept = self._texts.get(entry)
        if kept is not None and not self._busy:
            return len(kept)
        fields = self._fields(entry)
        value = fields.get("content") if fields is not None else None
        if isinstance(value, Text):
            if not self._busy:
                if len(self._texts) >= HANDLES_MAX:
                    self._texts.clear()
                self._texts[entry] = value
            return len(value)
        return len(value.encode()) if isinstance(value, str) else 0

    def entry(self, entry: str) -> Entry | None:
        """A typed snapshot of an entry, or ``None`` if there is no such well-formed one."""
        fields, born = self._fields(entry), self._born.get(entry)
        if fields is None or born is None:
            return None
        plain = {key: fields[key] for key in fields if key in ENTRY_FIELDS}
        content, sealed, calls = plain.get("content"), plain.get("sealed"), plain.get("calls")
        slot = born.role is Role.ASSISTANT
        return Entry(
            id=entry,
            born=born,
            content=str(content) if isinstance(content, str | Text) else "",
            stop=stop if isinstance(stop := plain.get("stop"), str) and slot else None,
            place=read_place(normalise(plain.get("place"))),
            state=read_state(plain.get("state")) if slot else None,
            calls=tuple(normalise(calls)) if isinstance(calls, list) else None,
            reads=read_strings(normalise(plain.get("reads"))),
            sealed=read_chunks(sealed.to_py()) if isinstance(sealed, Array) else (),
            usage=read_usage(normalise(plain.get("usage"))),
            salt=bytes(salt) if isinstance(salt := plain.get("salt"), bytes | bytearray) else None,
            proof=read_proof(normalise(plain.get("proof"))),
            redacted=_is_redaction(fields),
        )

    def view(self, head: str | None = None) -> tuple[str, ...]:
        """The entries that a reader sees, in order; ``head`` overrides the shared one."""
        return self.tree.view(self.meta.head if head is None else head)


def _is_redaction(fields: Any) -> bool:
    return "redacted" in fields and isinstance(fields["redacted"], dict)


__all__ = ["EMPTY_STATE_VECTOR", "EMPTY_UPDATE", "ROOT", "Change", "Conversation", "Edit", "Writer"]


def _collector(to: ref[Conversation], root: str) -> Callable[[list[Any]], None]:
    def collect(events: list[Any]) -> None:
        replica = to()
        if replica is not None:
            replica._collect(root, events)  # noqa: SLF001 - the replica's own callback

    return collect


def _unobserve(held: list[tuple[Any, Any]]) -> None:
    for observed, subscription in held:
        observed.unobserve(subscription)


def _update_collector(to: ref[Conversation]) -> Callable[[TransactionEvent], None]:
    def collect(event: TransactionEvent) -> None:
        replica = to()
        if replica is not None:
            replica._collect_update(event)  # noqa: SLF001 - as above

    return collect
