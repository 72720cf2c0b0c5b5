"""How a command reaches the relay: an address, a token, and news of the first attempt.

This module owns the wiring of a client for the command line. A client goes on trying for ever; a
person in front of a terminal wants to hear that nobody is there. It must not know what the client
is used for.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from crdt_llm.errors import CrdtLlmError, Unavailable
from crdt_llm.sync.dial import Address, websocket_dial

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from crdt_llm.sync.dial import Dial, Socket

DEFAULT_URL: Final = "http://127.0.0.1:8765/"


class Door:
    """A dial that remembers how the last attempt went.

    Args:
        dial: opens sockets.
        tried: called after every attempt that ended, and every connection that did.
    """

    def __init__(self, dial: Dial, tried: Callable[[], None] = lambda: None) -> None:
        self.tried = tried
        self._dial = dial
        self._failure: CrdtLlmError | None = None
        self._first = asyncio.Event()

    @property
    def failure(self) -> CrdtLlmError | None:
        """Why there is no connection, if the last attempt failed."""
        return self._failure

    @asynccontextmanager
    async def dial(self, conversation: str) -> AsyncIterator[Socket]:
        """As the dial inside; what happens is taken down."""
        try:
            async with self._dial(conversation) as socket:
                self._note(None)
                yield socket
        except CrdtLlmError as error:
            self._note(error)
            raise

    def _note(self, failure: CrdtLlmError | None) -> None:
        self._failure = failure
        self._first.set()
        self.tried()

    async def reached(self) -> None:
        """Wait for the end of the first attempt.

        Raises:
            Unavailable: nobody answered. A refusal is not raised: the conversation tells of it.
        """
        await self._first.wait()
        if isinstance(self._failure, Unavailable):
            raise self._failure


def door_to(url: str, token: str) -> Door:
    """A door to the relay at ``url``.

    Raises:
        LocalMisuse: the address or the token has not the form of one.
    """
    return Door(websocket_dial(Address.parse(url), token))
