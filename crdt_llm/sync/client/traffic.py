"""What a conversation costs on the wire.

This module owns the count of frames and bytes. It must not know what a frame says beyond its kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from crdt_llm.sync.wire.frames import Ack, Change, Draft, Nack, Update

if TYPE_CHECKING:
    from crdt_llm.sync.wire.frames import Frame

_LIVE: Final = (Update, Change, Ack, Nack, Draft)


@dataclass(slots=True)
class Count:
    """Frames and bytes one way and the other, websocket framing included, TCP and TLS not."""

    sent_frames: int = 0
    sent_bytes: int = 0
    received_frames: int = 0
    received_bytes: int = 0

    def sent(self, payload: int) -> None:
        """Count a frame with so many bytes of payload on its way out."""
        self.sent_frames += 1
        self.sent_bytes += framed_bytes(payload, masked=True)

    def received(self, payload: int) -> None:
        """Count a frame with so many bytes of payload that came in."""
        self.received_frames += 1
        self.received_bytes += framed_bytes(payload, masked=False)


@dataclass(slots=True)
class Traffic:
    """What a conversation cost on the wire since it was opened.

    Attributes:
        sync: opening, coming back, staying there, and presence.
        live: what was written while connected: turns and replies, and their acknowledgements.
    """

    sync: Count = field(default_factory=Count)
    live: Count = field(default_factory=Count)

    def of(self, frame: Frame) -> Count:
        """The count that a frame belongs to."""
        return self.live if isinstance(frame, _LIVE) else self.sync


def framed_bytes(payload: int, *, masked: bool) -> int:
    """Bytes of one unfragmented websocket frame (RFC 6455, 5.2); clients mask, servers do not."""
    length = 0 if payload < 126 else 2 if payload < 2**16 else 8  # noqa: PLR2004 - the RFC's steps
    return 2 + length + (4 if masked else 0) + payload
