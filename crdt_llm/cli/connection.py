"""How a command reaches the relay: an address, a token, and news of every attempt.

This module owns the wiring of a client for the command line. A client goes on trying for ever; a
person in front of a terminal wants to hear that nobody is there. It must not know what the client
is used for.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from enum import Enum
from typing import TYPE_CHECKING

from crdt_llm.cli.folders import read_token
from crdt_llm.errors import CrdtLlmError, StoreFailed, Unavailable
from crdt_llm.sync.transport.dial import Address, native_dial

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from crdt_llm.sync.client.client import OpenConversation
    from crdt_llm.sync.transport.dial import Dial, Socket


class Standing(Enum):
    """How a conversation and the relay stand, for people."""

    CONNECTING = "connecting"
    ONLINE = "online"
    AWAY = "offline"
    REFUSED = "refused"


class Door:
    """A dial that remembers how the last attempt went.

    Args:
        url: the relay's address, for people.
        dial: opens sockets.
        token: who we are to the relay.
    """

    def __init__(self, url: str, dial: Dial, token: str | None = None) -> None:
        self.url = url
        self.token = token
        self._dial = dial
        self._failure: Exception | None = None
        self._is_away = False  # since the last failure, until a conversation is online again
        self._tried = asyncio.Event()
        self._news = asyncio.Event()

    @asynccontextmanager
    async def dial(self) -> AsyncIterator[Socket]:
        """As the dial inside; what happens is taken down."""
        try:
            async with self._dial() as socket:
                self._note(None)
                yield socket
        except Exception as error:
            # A bug too: whoever waits for the end of an attempt would wait for ever.
            self._note(error)
            raise

    def _note(self, failure: Exception | None) -> None:
        self._failure = failure
        self._is_away |= failure is not None
        self._tried.set()
        self._news.set()

    async def news(self) -> None:
        """Wait until an attempt ends, or a connection; one listener only."""
        await self._news.wait()
        self._news.clear()

    def standing(self, conversation: OpenConversation) -> Standing:
        """How things stand now."""
        if conversation.refused is not None:
            return Standing.REFUSED
        if conversation.online:
            self._is_away = False
            return Standing.ONLINE
        return Standing.AWAY if self._is_away else Standing.CONNECTING

    async def reached(self, meanwhile: str) -> None:
        """Wait for the end of the first attempt.

        Args:
            meanwhile: what to say if nobody answered.

        Raises:
            Unavailable: nobody answered. A refusal is not raised: the conversation tells of it.
        """
        await self._tried.wait()
        told_elsewhere = isinstance(self._failure, CrdtLlmError | None)
        if isinstance(self._failure, Unavailable) or not told_elsewhere:
            raise Unavailable(f"no relay answers at {self.url}: {meanwhile}") from self._failure


def door_to(url: str, token_file: Path) -> Door:
    """A door to the relay at ``url``.

    Args:
        url: its address; a ``?token=`` in it is used instead of the file.
        token_file: who we are.

    Raises:
        LocalMisuse: the address or the token has not the form of one.
        AuthenticationFailed: there is no token in the file.
    """
    address = Address.parse(url)
    token = address.token if address.token is not None else read_token(token_file)
    return Door(address.base, native_dial(address), token)


async def known(conversation: OpenConversation, door: Door) -> None:
    """Wait until this device has a conversation, if it was never here.

    Raises:
        Unavailable: nobody answers.
        Refused: the relay does not let us in.
        StoreFailed: the relay has no such conversation.
    """
    if conversation.document.id is not None:
        return
    await door.reached(
        f"conversation {conversation.id} is not on this device; start the relay with"
        " `crdt-llm serve`, or name it with --url"
    )
    await conversation.synced_once()
    if conversation.document.id is None:
        raise StoreFailed(f"the relay at {door.url} has no conversation {conversation.id}")
