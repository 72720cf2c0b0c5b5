"""Hidden fields: exact token ids that every replica carries and only a key holder reads.

This module owns the sealed form of a reply's hidden state: which ids the model read and sampled,
of what kind, under which model, renderer and parameters. It knows no tokenizer: ids are numbers.

Byte-exact form of one blob in ``sealed``: MessagePack ``[1, key id, nonce, ciphertext,
signature]``. The cipher is ChaCha20-Poly1305 (RFC 8439) with a random nonce of 12 bytes; the key
is HKDF-SHA256 (RFC 5869) of the master key, no salt, info ``"crdt-llm/1/seal" ‖ conversation id``;
the associated data is ``conversation id ‖ entry id ‖ chunk number (uint32, big-endian)``. The one
blob that replaces the chunks at a reply's end has the chunk number ``2^32 - 1``. The signature is
the node's, over ``"crdt-llm/1/chunk" ‖ conversation id ‖ entry id ‖ parent's digest ‖ epoch
(uint64) ‖ chunk number (uint32) ‖ SHA-256(text so far) ‖ SHA-256(MessagePack of reads, or nil) ‖
SHA-256(key id ‖ nonce ‖ ciphertext)``; the epoch is that of the reply's place, or the later one of
a node that took the reply over. So whoever has no key can still tell that this is what a node
sealed, and that the reply was answered from what it says. The plaintext is the MessagePack map of
:meth:`Hidden.plain`.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from crdt_llm.document.chain import ids_bytes, parent_digest, verify_under_lease
from crdt_llm.errors import BadProof

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.keys import SigningKey
    from crdt_llm.document.schema import Entry

FORMAT: Final = 1
NONCE_BYTES: Final = 12
FINAL_CHUNK: Final = 2**32 - 1
KEY_ID_BYTES: Final = 8


class Kind(StrEnum):
    """Where an id in a reply's segment came from."""

    INJECTED = "injected"  # template tokens that we put there
    SAMPLED = "sampled"  # the model's own, visible
    REASONING = "reasoning"  # the model's own, hidden


@dataclass(frozen=True, slots=True)
class Hidden:
    """A reply's hidden state, or a chunk's part of it; how it is printed says nothing of that.

    Attributes:
        ids: every token id that the entry adds to the model's prompt, in order.
        kinds: a kind for each id.
        logprobs: natural logarithms for each id that is not injected, in order.
        model: the fingerprint of the model that read and sampled them.
        renderer: the id of the renderer that made the injected ones.
        params: the resolved sampling parameters, the seed among them.
    """

    ids: tuple[int, ...] = field(default=(), repr=False)
    kinds: tuple[Kind, ...] = field(default=(), repr=False)
    logprobs: tuple[float, ...] = field(default=(), repr=False)
    model: str = ""
    renderer: str = ""
    params: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def sampled(self) -> tuple[int, ...]:
        """The ids that the model made."""
        pairs = zip(self.ids, self.kinds, strict=True)
        return tuple(item for item, kind in pairs if kind is not Kind.INJECTED)

    @property
    def injected(self) -> tuple[int, ...]:
        """The ids before the first one that the model made: the reply's opening."""
        opening = next((n for n, kind in enumerate(self.kinds) if kind is not Kind.INJECTED), None)
        return self.ids[:opening]

    def __add__(self, later: Hidden) -> Hidden:
        """This chunk and a later one as one; what is said of the whole stands in the first."""
        return Hidden(
            self.ids + later.ids,
            self.kinds + later.kinds,
            self.logprobs + later.logprobs,
            self.model or later.model,
            self.renderer or later.renderer,
            self.params or later.params,
        )

    def plain(self) -> dict[str, Any]:
        """The plaintext: ids as uint32 little-endian, kinds run-length, logprobs as float16."""
        out: dict[str, Any] = {
            "ids": ids_bytes(self.ids),
            "kinds": [[kind.value, len(list(run))] for kind, run in groupby(self.kinds)],
            "logprobs": struct.pack(f"<{len(self.logprobs)}e", *self.logprobs),
        }
        if self.model:
            out |= {"model": self.model, "renderer": self.renderer, "params": self.params}
        return out


def _read_hidden(value: Any) -> Hidden:
    ids: tuple[int, ...] = struct.unpack(f"<{len(value['ids']) // 4}I", value["ids"])
    kinds = tuple(Kind(name) for name, count in value["kinds"] for _ in range(count))
    logprobs = struct.unpack(f"<{len(value['logprobs']) // 2}e", value["logprobs"])
    if len(kinds) != len(ids):
        raise ValueError(f"{len(ids)} ids but {len(kinds)} kinds")
    return Hidden(
        ids,
        kinds,
        logprobs,
        value.get("model", ""),
        value.get("renderer", ""),
        value.get("params", {}),
    )


@dataclass(frozen=True, slots=True)
class Where:
    """Which chunk of which reply a blob belongs to: it opens nowhere else."""

    conversation: str
    entry: str
    parent: bytes  # the parent's chain digest
    epoch: int
    chunk: int
    reads: tuple[str, ...] | None = None  # as the reply says it

    def at(self, chunk: int) -> Where:
        """The place of another chunk of the same reply."""
        return replace(self, chunk=chunk)

    def associated(self) -> bytes:
        """What the cipher binds the blob to."""
        return self.conversation.encode() + self.entry.encode() + self.chunk.to_bytes(4)

    def signed(self, text: str, sealed: bytes) -> bytes:
        """What the node signs: the place, the text as it stood with this chunk, what is sealed.

        Args:
            text: The text.
            sealed: The key id, the nonce and the ciphertext.
        """
        reads: bytes = msgpack.packb(None if self.reads is None else list(self.reads))
        return (
            b"crdt-llm/1/chunk"
            + self.conversation.encode()
            + self.entry.encode()
            + self.parent
            + self.epoch.to_bytes(8)
            + self.chunk.to_bytes(4)
            + hashlib.sha256(text.encode()).digest()
            + hashlib.sha256(reads).digest()
            + hashlib.sha256(sealed).digest()
        )


def place_of(conversation: Conversation, reply: Entry, chunk: int = 0) -> Where:
    """What a chunk of a reply is bound to.

    Raises:
        BadProof: the reply has no place, or its parent no proof.
    """
    if reply.place is None:
        raise BadProof("it has no place")
    parent = parent_digest(conversation, reply.place.parent)
    return Where(conversation.id or "", reply.id, parent, reply.place.epoch, chunk, reply.reads)


class Sealer:
    """Seals and opens with one master key; ``repr`` never shows it.

    Args:
        master: 32 bytes.
        random: where nonces come from.
    """

    def __init__(self, master: bytes, random: Callable[[int], bytes]) -> None:
        self._master = master
        self._random = random
        self.key_id = hashlib.sha256(b"crdt-llm/1/key" + master).digest()[:KEY_ID_BYTES].hex()
        self._ciphers: dict[str, ChaCha20Poly1305] = {}

    def __repr__(self) -> str:
        return f"Sealer(key_id={self.key_id!r})"

    def _cipher(self, conversation: str) -> ChaCha20Poly1305:
        cipher = self._ciphers.get(conversation)
        if cipher is None:
            info = b"crdt-llm/1/seal" + conversation.encode()
            hkdf = HKDF(algorithm=SHA256(), length=32, salt=None, info=info)
            cipher = self._ciphers[conversation] = ChaCha20Poly1305(hkdf.derive(self._master))
        return cipher

    def seal(self, hidden: Hidden, where: Where, text: str, key: SigningKey) -> bytes:
        """One blob. ``text`` is the reply's whole text so far, which the signature covers."""
        nonce = self._random(NONCE_BYTES)
        plain: bytes = msgpack.packb(hidden.plain(), use_bin_type=True)
        sealed = self._cipher(where.conversation).encrypt(nonce, plain, where.associated())
        signature = key.sign(where.signed(text, self.key_id.encode() + nonce + sealed))
        blob: bytes = msgpack.packb([FORMAT, self.key_id, nonce, sealed, signature])
        return blob

    def open(self, blob: bytes, where: Where) -> Hidden:
        """Open one blob.

        Raises:
            BadProof: it was sealed with another key, for another place, or was changed.
        """
        parts = _parts(blob)
        key_id, nonce, sealed = parts.key_id, parts.nonce, parts.ciphertext
        if key_id != self.key_id:
            raise BadProof(f"sealed with key {key_id}, ours is {self.key_id}")
        try:
            plain = self._cipher(where.conversation).decrypt(nonce, sealed, where.associated())
            return _read_hidden(msgpack.unpackb(plain))
        except InvalidTag as error:
            raise BadProof("a sealed field does not open here") from error
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise BadProof(f"a sealed field holds no hidden state: {error}") from error

    def open_reply(self, blobs: Sequence[bytes], where: Where) -> Hidden:
        """Open all of a reply's blobs: its chunks in order, or the one that replaced them.

        Args:
            blobs: the field ``sealed``.
            where: the reply; its ``chunk`` is ignored.

        Raises:
            BadProof: as :meth:`open`, or there are none.
        """
        if not blobs:
            raise BadProof("nothing is sealed here")
        if len(blobs) == 1 and (whole := self._final(blobs[0], where)) is not None:
            return whole
        hidden = Hidden()
        for chunk, blob in enumerate(blobs):
            hidden += self.open(blob, where.at(chunk))
        return hidden

    def _final(self, blob: bytes, where: Where) -> Hidden | None:
        try:
            return self.open(blob, where.at(FINAL_CHUNK))
        except BadProof:
            return None  # then it must be chunk 0, and `open` says what is wrong if it is not


class _Parts(NamedTuple):
    """One blob, taken apart."""

    key_id: str
    nonce: bytes
    ciphertext: bytes
    signature: bytes

    @property
    def sealed(self) -> bytes:
        """What its signature covers of it."""
        return self.key_id.encode() + self.nonce + self.ciphertext


def _parts(blob: bytes) -> _Parts:
    try:
        parts = msgpack.unpackb(blob)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadProof("a sealed field is no MessagePack") from error
    match parts:
        # Of other lengths, bytes could move from one to the other, and the signature over all of
        # them would hold.
        case [int(form), str(key_id), bytes(nonce), bytes(), bytes()] if (
            form is not True
            and form == FORMAT
            and len(key_id) == 2 * KEY_ID_BYTES
            and len(nonce) == NONCE_BYTES
        ):
            return _Parts(*parts[1:])
        case _:
            raise BadProof("a sealed field has not the form of one")


def verify_chunk(
    conversation: Conversation, blob: bytes, where: Where, text: str, relay: bytes | None = None
) -> int:
    """Check that a node signed this blob for this place with this text, under a lease.

    Args:
        conversation: the replica that holds the leases.
        blob: one of the field ``sealed``.
        where: its place, with the epoch of the reply's place.
        text: the reply's text as it stood with this blob.
        relay: the relay's public key, if it is known: then the lease's signature is checked too.

    Returns:
        The epoch under which it was signed: the place's, or a later one.

    Raises:
        BadProof: no node did.
    """
    parts = _parts(blob)
    return verify_under_lease(
        conversation,
        lambda epoch: replace(where, epoch=epoch).signed(text, parts.sealed),
        parts.signature,
        first=where.epoch,
        relay=relay,
    )
