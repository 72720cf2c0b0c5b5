"""crdt_llm: a replicated conversation store for language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crdt_llm.sync.client.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    """Import the client when asked for it: an engine's process needs neither CRDTs nor sockets."""
    if name == "Client":
        from crdt_llm.sync.client.client import Client  # noqa: PLC0415 - as said

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
