"""The chain: commitments to what an entry says and a digest over everything before it.

Anyone who holds the document can recompute the chain, so divergence is detected, not guessed. The
commitments are salted: when an entry is redacted its text and salt go, the chain still verifies,
and a short secret cannot be found by trying.

Byte-exact definitions (``‖`` is concatenation, integers are big-endian unless said otherwise):

* ``canonical(v)``: maps become arrays of ``[key, canonical(value)]`` sorted by key, arrays keep
  their order, whole numbers are integers, other numbers float64; then MessagePack in its shortest
  form, texts as ``str``, bytes as ``bin``.
* ``content = SHA-256(salt ‖ UTF-8 text)``, ``tokens = SHA-256(salt ‖ ids as uint32
  little-endian)``, ``calls = SHA-256(salt ‖ msgpack(canonical(calls)))``.
* ``root = SHA-256("crdt-llm/1/root" ‖ conversation id)``.
* ``digest = SHA-256("crdt-llm/1/entry" ‖ parent's digest ‖ msgpack([id, canonical(born),
  proof.content, proof.tokens, proof.calls, reads, final state]))`` with nil where absent.
* proof: Ed25519 over ``"crdt-llm/1/proof" ‖ conversation id ‖ epoch (uint64) ‖ digest``, by the
  node of that epoch's lease. The epoch is the one of the entry's place; of a reply that another
  node took over it is the later one under which that node ended it.
* lease: Ed25519 by the relay over ``"crdt-llm/1/lease" ‖ conversation id ‖ epoch (uint64) ‖
  node's public key``.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from crdt_llm.document.keys import verify
from crdt_llm.document.schema import ROOT, Proof, State, normalise
from crdt_llm.errors import BadProof

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.keys import SigningKey
    from crdt_llm.document.schema import Entry


def canonical(value: Any) -> Any:
    """A plain value in the form in which every replica gets the same bytes for it."""
    value = normalise(value)
    if isinstance(value, dict):
        return [[key, canonical(value[key])] for key in sorted(value)]
    if isinstance(value, list):
        return [canonical(item) for item in value]
    return value


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def ids_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as uint32, little-endian."""
    return struct.pack(f"<{len(ids)}I", *ids)


def commit_content(salt: bytes, text: str) -> bytes:
    """The commitment to an entry's text."""
    return hashlib.sha256(salt + text.encode()).digest()


def commit_tokens(salt: bytes, ids: Sequence[int]) -> bytes:
    """The commitment to a reply's token ids."""
    return hashlib.sha256(salt + ids_bytes(ids)).digest()


def commit_calls(salt: bytes, calls: Sequence[Any]) -> bytes:
    """The commitment to a reply's tool calls."""
    return hashlib.sha256(salt + _pack(canonical(list(calls)))).digest()


def root_digest(conversation: str) -> bytes:
    """Where a conversation's chain begins."""
    return hashlib.sha256(b"crdt-llm/1/root" + conversation.encode()).digest()


@dataclass(frozen=True, slots=True)
class Link:
    """What one entry adds to the chain."""

    entry: str
    born: dict[str, Any]  # the plain value, every key of it
    content: bytes | None
    tokens: bytes | None = None
    calls: bytes | None = None
    reads: tuple[str, ...] | None = None
    state: State | None = None

    def digest(self, parent: bytes) -> bytes:
        """The chain digest behind a parent's."""
        said = [
            self.entry,
            canonical(self.born),
            self.content,
            self.tokens,
            self.calls,
            None if self.reads is None else list(self.reads),
            None if self.state is None else self.state.value,
        ]
        return hashlib.sha256(b"crdt-llm/1/entry" + parent + _pack(said)).digest()


def prove(link: Link, *, parent: bytes, conversation: str, epoch: int, key: SigningKey) -> Proof:
    """Sign one entry's link of the chain."""
    return sign(link, link.digest(parent), conversation=conversation, epoch=epoch, key=key)


def sign(link: Link, digest: bytes, *, conversation: str, epoch: int, key: SigningKey) -> Proof:
    """The same, of a link whose digest is known already."""
    signature = key.sign(_proof_message(conversation, epoch, digest))
    return Proof(link.content, link.tokens, link.calls, digest, signature)


def _proof_message(conversation: str, epoch: int, digest: bytes) -> bytes:
    return b"crdt-llm/1/proof" + conversation.encode() + epoch.to_bytes(8) + digest


def lease_message(conversation: str, epoch: int, node: bytes) -> bytes:
    """What a relay signs to make a key the node's of a conversation under an epoch."""
    return b"crdt-llm/1/lease" + conversation.encode() + epoch.to_bytes(8) + node


@dataclass(frozen=True, slots=True)
class Verdict:
    """What :func:`verify_path` found of one entry; ``problem`` is ``None`` where all holds."""

    entry: str
    digest: bytes | None
    problem: str | None


def verify_entry(
    conversation: Conversation, entry: Entry, parent: bytes, relay: bytes | None
) -> None:
    """Check one admitted entry against the chain.

    Args:
        conversation: the replica that holds it.
        entry: the entry.
        parent: its parent's digest.
        relay: the relay's public key, if it is known: then the lease's signature is checked too.

    Raises:
        BadProof: what does not hold.
    """
    identity, proof, place = conversation.id or "", entry.proof, entry.place
    if place is None or proof is None:
        raise BadProof("no proof")
    if not entry.redacted and (
        entry.salt is None or commit_content(entry.salt, entry.content) != proof.content
    ):
        raise BadProof("the text is not the one that was committed to")
    link = Link(
        entry.id,
        conversation.born_plain(entry.id),
        proof.content,
        proof.tokens,
        proof.calls,
        entry.reads,
        entry.state if entry.is_slot else None,
    )
    if link.digest(parent) != proof.digest:
        raise BadProof("the digest does not follow from the entries before it")
    digest = proof.digest
    verify_under_lease(
        conversation,
        lambda epoch: _proof_message(identity, epoch, digest),
        proof.signature,
        first=place.epoch,
        last=None if entry.is_slot else place.epoch,
        relay=relay,
    )


def verify_under_lease(  # noqa: PLR0913 - a signature, and everything that it depends on
    conversation: Conversation,
    message: Callable[[int], bytes],
    signature: bytes,
    *,
    first: int,
    last: int | None = None,
    relay: bytes | None = None,
) -> int:
    """Check that the node of a lease signed something.

    Args:
        conversation: the replica that holds the leases.
        message: what was signed, given the epoch.
        signature: the signature.
        first: the first epoch that comes into question; it must have a lease.
        last: the last one; without it any later lease will do: a reply may be taken over.
        relay: the relay's public key, if it is known: then the lease's signature is checked too.

    Returns:
        The epoch under which it was signed.

    Raises:
        BadProof: none of these nodes signed it, or the relay did not make its signer a node.
    """
    if conversation.lease(first) is None:
        raise BadProof(f"no lease for epoch {first}")
    for epoch in conversation.epochs(first):
        lease = conversation.lease(epoch)
        if lease is None or (last is not None and epoch > last):
            break
        node, granted = lease
        try:
            verify(node, signature, message(epoch))
        except BadProof:
            continue  # the node of another lease may have signed it
        if relay is not None:
            verify(relay, granted, lease_message(conversation.id or "", epoch, node))
        return epoch
    raise BadProof("a signature does not hold")


def verify_path(
    conversation: Conversation, path: Sequence[str], relay: bytes | None = None
) -> Iterator[Verdict]:
    """Walk a path from the root and say of each admitted entry whether it holds.

    Pending entries and a reply that is still streaming have no proof yet; the walk ends there.
    """
    digest = root_digest(conversation.id or "")
    for name in path:
        entry = conversation.entry(name)
        if entry is None or not conversation.tree.is_admitted(name):
            return
        if entry.is_slot and entry.state is State.STREAMING:
            return
        try:
            verify_entry(conversation, entry, digest, relay)
        except BadProof as error:
            yield Verdict(name, entry.proof.digest if entry.proof else None, str(error))
            return
        if entry.proof is not None:
            digest = entry.proof.digest
        yield Verdict(name, digest, None)


def parent_digest(conversation: Conversation, parent: str) -> bytes:
    """The digest that a child of ``parent`` builds on.

    Raises:
        BadProof: the parent has not ended yet.
    """
    if parent == ROOT:
        return root_digest(conversation.id or "")
    entry = conversation.entry(parent)
    if entry is None or entry.proof is None:
        raise BadProof(f"entry {parent} has no proof yet")
    return entry.proof.digest
