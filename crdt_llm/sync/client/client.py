"""The Python client: this device's conversations, in sync with a relay whenever there is one.

This module owns which conversations a program has open, and the list of them. It must not know
frames, disks or models. It works offline first: see :mod:`crdt_llm.sync.client.open_conversation`.

    async with Client("ws://127.0.0.1:8765/", token=token, data=folder) as client:
        conversation = await client.create("Groceries")
        reply = await conversation.ask("What goes into a lasagne?", max_tokens=200)
        async for delta in reply:
            print(delta, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import time
from random import SystemRandom
from typing import TYPE_CHECKING, Self
from urllib.parse import urlencode

from crdt_llm.document.schema import (
    NONCE_BYTES,
    PRINCIPAL_CHARACTERS_MAX,
    TITLE_CHARACTERS_MAX,
    Birth,
    conversation_id,
    is_conversation_id,
)
from crdt_llm.errors import AuthenticationFailed, LocalMisuse
from crdt_llm.sync.client.acquaintance import FILE_NAME, Acquaintances
from crdt_llm.sync.client.asked_reply import Reply
from crdt_llm.sync.client.connection import Connection
from crdt_llm.sync.client.local_replica import LocalReplica
from crdt_llm.sync.client.open_conversation import Branch, Invitation, OpenConversation
from crdt_llm.sync.client.pen import Pen
from crdt_llm.sync.client.presence import DEVICE_CHARACTERS_MAX
from crdt_llm.sync.client.replica_file import ReplicaFile
from crdt_llm.sync.client.wording import Sampling, checked_text
from crdt_llm.sync.transport.dial import Address, native_dial

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

    from crdt_llm.document.conversation import Change
    from crdt_llm.sync.client.listing import Listing, Watch
    from crdt_llm.sync.client.traffic import Traffic
    from crdt_llm.sync.transport.dial import Dial
    from crdt_llm.sync.wire.frames import Welcome

OWNER: str = "owner"
"""Who one is to a relay of one's own, before it has said so."""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Client:
    """This device's conversations, as an asynchronous context manager.

    All of them share one connection. It is made when the first conversation is opened, and comes
    back by itself.

    Args:
        url: the relay: ``ws://host:port/`` or ``http://host:port/`` (``wss``, ``https``); a
            ``?token=`` in it is taken out and used.
        token: who we are to the relay; sent in the first frame, never in an address.
        data: the folder that keeps the replicas, locked while it is open; ``None`` keeps them in
            memory alone.
        device: this device's name, for the people who share the conversation.
        principal: the name that the token stands for; it is the author of what is written here. By
            default what the relay last said, and ``owner`` before it has said anything.
        drafts: whether :meth:`OpenConversation.draft` tells the node what is being typed.
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
        principal: str | None = None,
        drafts: bool = True,
        clock: Callable[[], int] = _now_ms,
        random: Random | None = None,
        dial: Dial | None = None,
    ) -> None:
        self.device = checked_text(device, "device", characters_max=DEVICE_CHARACTERS_MAX)
        if principal is not None:
            checked_text(principal, "principal", characters_max=PRINCIPAL_CHARACTERS_MAX)
            if not principal:
                raise LocalMisuse("a principal has a name")
        self.drafts = drafts
        self.clock = clock
        self.random = SystemRandom() if random is None else random
        self.pen = Pen(lambda: self.principal, device, self.clock, self.random)
        self._address = Address.parse(url)
        self._given = principal
        self._data = data
        self._relays = Acquaintances(None)
        self._expires_at: int | None = None
        self._file: ReplicaFile | None = None
        self._open: dict[str, asyncio.Task[OpenConversation]] = {}
        self.connection = Connection(
            native_dial(self._address) if dial is None else dial,
            token=self._address.token if token is None else token,
            device=device,
            random=self.random,
            greeted=self._greeted,
        )

    async def __aenter__(self) -> Self:
        """Open the data folder.

        Raises:
            DataFolderBusy: another client has it open.
            Corrupt: a file in it is not an intact one of ours.
            StoreFailed: it cannot be opened.
        """
        if self._file is not None:
            raise LocalMisuse("this client is open already")
        self._file = await ReplicaFile.open(self._data, self.clock)
        try:
            if self._data is not None:
                self._relays = Acquaintances(self._data / FILE_NAME)
        except BaseException:
            await self._file.close()
            raise
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
            await self.connection.close()
            await file.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    # -- who we are ----------------------------------------------------------------------------

    @property
    def principal(self) -> str:
        """Who writes here."""
        return self._given or self._relays.principal(self._address.base) or OWNER

    @property
    def online(self) -> bool:
        """Whether there is a connection to the relay."""
        return self.connection.online

    @property
    def traffic(self) -> Traffic:
        """What the connection cost beside its conversations."""
        return self.connection.traffic

    @property
    def token_expires_at(self) -> int | None:
        """When the token ends, ms since 1970, as the relay said; ``None`` if it does not."""
        return self._expires_at

    def renew(self, token: str) -> None:
        """Use another token of the same principal from now on, without reconnecting."""
        self.connection.renew(token)

    def _greeted(self, welcome: Welcome) -> None:
        """Look at what the relay says of itself and of us."""
        if self._given is not None and welcome.principal != self._given:
            raise AuthenticationFailed(
                "principal",
                f"this token stands for {welcome.principal}, and what is written here is by"
                f" {self._given}: use the token of {self._given}",
            )
        self._relays.meet(self._address.base, welcome.relay, welcome.principal)
        self._expires_at = welcome.expires_at

    # -- conversations -------------------------------------------------------------------------

    async def create(self, title: str | None = None) -> OpenConversation:
        """Begin a conversation. Needs no connection: the id follows from us and a nonce.

        Raises:
            StoreFailed: the disk did not take it.
        """
        if title is not None:
            checked_text(title, "the title", characters_max=TITLE_CHARACTERS_MAX)
        birth = Birth(self.principal, self.random.randbytes(NONCE_BYTES))
        conversation = await self._open_replica(conversation_id(birth), online=False)
        try:
            await conversation._write(self.pen.birth(birth, title))  # noqa: SLF001 - its other half
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
        """The ids of the conversations that this device has, last used first. Needs no relay.

        Raises:
            StoreFailed: the list cannot be read now.
        """
        return await self._opened().conversations()

    async def list(self) -> tuple[Listing, ...]:
        """All conversations that the relay has for us, the last changed first. Waits for the relay.

        Raises:
            Refused: the relay does not let us in.
            ConnectionLost: the client was closed.
        """
        return await anext(self.watch())

    def watch(self) -> Watch:
        """The list of :meth:`list` now, and again each time it changes, as an async iterator.

        Who is slow misses steps, never the last one. Iterating raises what :meth:`list` raises.
        """
        self._opened()
        self.connection.watch()
        return self.connection.listings.watch()

    async def archive(self, conversation: str, *, archived: bool = True) -> None:
        """Put a conversation away in our own list, or take it out again.

        Raises:
            Refused: the relay will not.
            ConnectionLost: the connection ended before the answer.
        """
        self._opened()
        arguments = {"conversation": conversation, "archived": archived}
        await self.connection.request("archive", arguments)

    def link_to(self, conversation: str, token: str) -> str:
        """A link that a browser opens a conversation with; the token never reaches a log."""
        scheme, _, rest = self._address.base.partition("://")
        page = {"ws": "http", "wss": "https"}[scheme] + "://" + rest
        return f"{page}#{urlencode({'c': conversation, 'token': token})}"

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

        def touch(change: Change | None) -> None:
            if change is not None:  # else it was built anew, and nobody used it
                file.touch(conversation)

        replica.on_change(touch)
        opened = OpenConversation(self, replica)
        if online:
            opened.resume()
        return opened

    def _opened(self) -> ReplicaFile:
        if self._file is None:
            raise LocalMisuse("open the client first: async with Client(...) as client")
        return self._file


__all__ = ["Branch", "Client", "Invitation", "OpenConversation", "Reply", "Sampling"]
