"""What the conversations of one node share, as a contract: its engine, its room, and who it is.

This module owns the contract, and what all its users ask of an engine alike. The parts of a sitting
take the node as this and must not know the node itself; what reading ahead takes of it stands in
:mod:`crdt_llm.inference.node.ahead`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from crdt_llm.errors import Unavailable
from crdt_llm.inference.node.ahead import Reader

if TYPE_CHECKING:
    from crdt_llm.inference.node.fed import Fed
    from crdt_llm.inference.node.figures import Figures
    from crdt_llm.inference.node.reply import Identity
    from crdt_llm.inference.node.seat import Surroundings
    from crdt_llm.inference.node.turns import Turns
    from crdt_llm.inference.prompt.renderer import Renderer
    from crdt_llm.inference.prompt.tokens import Vocabulary

BUSY_S: Final = 0.2  # before an engine is asked again that had no room


class Shared(Reader, Protocol):
    """What the desks of one node share."""

    surroundings: Surroundings
    renderer: Renderer
    vocabulary: Vocabulary
    identity: Identity
    turns: Turns
    figures: Figures

    @property
    def capacity(self) -> int:
        """How many more replies may be started now."""
        ...

    @property
    def running(self) -> int:
        """How many replies run."""
        ...

    def occupy(self, change: int) -> None:
        """So many more (or fewer) replies run."""
        ...

    def stand_in_line(self, conversation: str, *, waits: bool) -> int:
        """Where a conversation stands among those where a reply waits for room; 1 is next.

        Args:
            conversation: its id.
            waits: whether a reply waits there now; if not, it leaves the line, and 0 is returned.
        """
        ...

    def fed(self, conversation: str) -> Fed:
        """What engines were given of a conversation; outlives a sitting."""
        ...


def positions_of(shared: Shared) -> int:
    """How many tokens the model can read.

    Raises:
        Unavailable: there is no engine that could say so just now.
    """
    engine = shared.engine
    if engine is None:
        raise Unavailable("the engine is being restarted")
    return engine.capabilities.positions
