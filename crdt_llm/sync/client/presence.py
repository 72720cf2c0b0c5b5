"""Who else is in a conversation: the other devices, and the node.

This module owns what a client says of itself and what it makes of what others say. It must not know
sockets, time or documents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.sync.wire.y_websocket import AwarenessState

if TYPE_CHECKING:
    from collections.abc import Iterable

DEVICES_MAX: Final = 256
"""Other devices remembered as present. A person has a handful; a crowd is for a dashboard."""

DEVICE_CHARACTERS_MAX: Final = 64
"""Characters of a device's name that others show: it is sent anew every 15 seconds."""


@dataclass(frozen=True, slots=True)
class NodePresence:
    """What the conversation's node says of itself; ``None`` where it does not say.

    Attributes:
        model: the name of the model.
        doing: ``idle``, ``queued``, ``prefilling`` or ``generating``.
        warm: tokens of the conversation whose KV is ready.
        tokens: tokens of the whole prompt.
        queue: how many stand before this conversation.
    """

    model: str | None = None
    doing: str | None = None
    warm: int | None = None
    tokens: int | None = None
    queue: int | None = None


class Company:
    """Who is here, as far as this device has heard.

    Args:
        client: the client id that this device speaks under.
        device: this device's name.
    """

    def __init__(self, client: int, device: str) -> None:
        self._client = client
        self._device = device[:DEVICE_CHARACTERS_MAX]
        self._clock = 0
        self._present: dict[int, tuple[int, Any]] = {}  # client -> (clock, state)

    def announcement(self) -> tuple[AwarenessState, ...]:
        """What this device says of itself, anew."""
        self._clock += 1  # peers ignore a state at clock 0
        state = json.dumps({"device": self._device}, ensure_ascii=False, separators=(",", ":"))
        return (AwarenessState(self._client, self._clock, state),)

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the other devices that are here now, sorted."""
        names = (_device_of(state) for _, state in self._present.values())
        return tuple(sorted(name for name in names if name is not None))

    @property
    def node(self) -> NodePresence | None:
        """The node, if it is here."""
        nodes = (_node_of(state) for _, state in self._present.values())
        return next((node for node in nodes if node is not None), None)

    def hear(self, states: Iterable[AwarenessState]) -> bool:
        """Take what others say; whether anything is different now."""
        before = self.devices, self.node
        for state in states:
            if state.client == self._client:
                continue  # a relay may echo us
            known = self._present.get(state.client)
            if known is not None and state.clock < known[0]:
                continue
            if state.state_json is None:
                self._present.pop(state.client, None)
            elif known is not None or len(self._present) < DEVICES_MAX:
                # The codec has checked that it is JSON.
                self._present[state.client] = (state.clock, json.loads(state.state_json))
        return (self.devices, self.node) != before


def _device_of(state: Any) -> str | None:
    """The name in a state; a node has none, other clients may show other things, or nothing."""
    if not isinstance(state, dict):
        return ""
    name = state.get("device")
    if isinstance(name, str):
        return name[:DEVICE_CHARACTERS_MAX]
    return None if isinstance(state.get("node"), dict) else ""


def _node_of(state: Any) -> NodePresence | None:
    said = state.get("node") if isinstance(state, dict) else None
    if not isinstance(said, dict):
        return None
    model, doing = said.get("model"), said.get("doing")
    warm, tokens, queue = (
        number if type(number := said.get(name)) is int else None
        for name in ("warm", "tokens", "queue")
    )
    return NodePresence(
        model if isinstance(model, str) else None,
        doing if isinstance(doing, str) else None,
        warm,
        tokens,
        queue,
    )
