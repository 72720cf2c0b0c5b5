"""A relay and node for the client's tests: a real server in one class, made to misbehave at will.

It speaks the plain dialect over real websockets from the codec and the replica alone. It checks
nothing, keeps everything in memory, and plays the node's part when a test asks it to.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

from crdt_llm.document.conversation import Conversation
from crdt_llm.document.schema import Place, State, Usage
from crdt_llm.sync.structure import find_gap, read_update
from crdt_llm.sync.wire import (
    AuthDenied,
    AwarenessUpdate,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
    decode_state_vector,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from websockets.asyncio.server import Server, ServerConnection

    from crdt_llm.document.conversation import Writer
    from crdt_llm.sync.wire import Message

TOKEN = "open sesame"  # noqa: S105 - the key to a server that lives for one test


class Partner:
    """A relay on a port of its own.

    Attributes:
        refusal: close every new connection with this code and reason, after the auth message.
        heard: every message that clients sent, per conversation, in order.
        frames: the sizes of the frames that they came in.
    """

    def __init__(self, *, token: str | None = TOKEN) -> None:
        self.token = token
        self.refusal: tuple[int, str] | None = None
        self.heard: defaultdict[str, list[Message]] = defaultdict(list)
        self.frames: defaultdict[str, list[int]] = defaultdict(list)
        self.connections = 0
        self.paths: list[str] = []
        self._documents: dict[str, Conversation] = {}
        self._sockets: defaultdict[str, set[ServerConnection]] = defaultdict(set)
        self._server: Server | None = None
        self._port = 0
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._port}/"

    async def start(self) -> None:
        """Listen, on the port of the last time."""
        self._server = await serve(self._serve, "127.0.0.1", self._port, compression=None)
        self._port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self, code: int = 1012) -> None:
        """Close every connection, as a relay that restarts does."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close(code=code)
            await server.wait_closed()

    async def drop(self, conversation: str, code: int = 1013, reason: str = "") -> None:
        """Close the connections of one conversation."""
        for socket in tuple(self._sockets[conversation]):
            await socket.close(code, reason)

    def abort(self, conversation: str) -> None:
        """Break the connections of one conversation without a word."""
        for socket in tuple(self._sockets[conversation]):
            socket.transport.abort()

    def forget(self, conversation: str) -> None:
        """Lose everything of a conversation, as a wiped relay has."""
        self._documents.pop(conversation, None)

    def document(self, conversation: str) -> Conversation:
        if conversation not in self._documents:
            self._documents[conversation] = Conversation(len(self._documents) + 1)
        return self._documents[conversation]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that clients sent makes ``condition`` true."""
        while not condition():
            self._news.clear()
            await self._news.wait()

    # -- the node's part -----------------------------------------------------------------------

    def write(self, conversation: str, compose: Callable[[Writer], None]) -> None:
        """Write to the document, and send it to every client."""
        with self.document(conversation).writing() as writer:
            compose(writer)
        assert writer.change is not None
        self.send(conversation, SyncUpdate(writer.change.update))

    def send(self, conversation: str, message: Message) -> None:
        frame = encode(message)
        for socket in self._sockets[conversation]:
            socket.loop.create_task(self._deliver(socket, frame))

    def admit(self, conversation: str, *entries: str) -> None:
        """Place entries one after the other at the end of their line."""
        for entry in entries:
            parent = self.document(conversation).tree.up(entry)
            self.write(conversation, lambda w, e=entry, p=parent: w.place(e, Place(p, 1)))  # type: ignore[misc]

    def start_reply(self, conversation: str, slot: str) -> None:
        tree = self.document(conversation).tree
        self.admit(conversation, *(e for e in tree.path(slot) if not tree.is_admitted(e)))

        def compose(writer: Writer) -> None:
            writer.open_reply(slot)
            writer.state(slot, State.STREAMING)

        self.write(conversation, compose)

    def stream(self, conversation: str, slot: str, delta: str) -> None:
        self.write(conversation, lambda writer: writer.append_text(slot, delta))

    def end_reply(
        self, conversation: str, slot: str, state: State = State.DONE, usage: Usage | None = None
    ) -> None:
        def compose(writer: Writer) -> None:
            writer.state(slot, state)
            writer.usage(slot, usage or Usage(prompt=3, prefilled=1, sampled=2, finish="end"))

        self.write(conversation, compose)

    def answer(self, conversation: str, slot: str, text: str) -> None:
        self.start_reply(conversation, slot)
        self.stream(conversation, slot, text)
        self.end_reply(conversation, slot)

    # -- one connection ------------------------------------------------------------------------

    async def _serve(self, socket: ServerConnection) -> None:
        assert socket.request is not None
        self.connections += 1
        self.paths.append(socket.request.path)
        conversation = socket.request.path[1:]
        given = socket.request.headers.get("Authorization")
        try:
            if self.token is not None and given != f"Bearer {self.token}":
                await self._refuse(socket, 4401, "unauthenticated: who are you?")
            elif self.refusal is not None:
                await self._refuse(socket, *self.refusal)
            else:
                self._sockets[conversation].add(socket)
                await self._converse(socket, conversation)
        except ConnectionClosed:
            pass  # clients come and go
        finally:
            self._sockets[conversation].discard(socket)
            self._news.set()

    @staticmethod
    async def _refuse(socket: ServerConnection, code: int, reason: str) -> None:
        await socket.send(encode(AuthDenied(reason)))
        await socket.close(code, reason[:100])

    async def _converse(self, socket: ServerConnection, conversation: str) -> None:
        self._news.set()
        await socket.send(encode(SyncStep1(self.document(conversation).state_vector())))
        asked: bytes | None = None
        checked = False
        async for frame in socket:
            assert isinstance(frame, bytes)
            message = decode(frame)
            self.heard[conversation].append(message)
            self.frames[conversation].append(len(frame))
            match message:
                case SyncStep1(state_vector):
                    asked = state_vector
                case SyncStep2(update) | SyncUpdate(update):
                    await self._merge(socket, conversation, update)
                    checked = True
                case AwarenessUpdate():
                    for other in tuple(self._sockets[conversation]):
                        await self._deliver(other, frame)
                case _:
                    raise AssertionError(f"a client has no business to send {message}")
            if checked and asked is not None:
                answer = SyncStep2(self.document(conversation).diff(asked))
                await socket.send(encode(answer))
                asked = None
            self._news.set()

    async def _merge(self, socket: ServerConnection, conversation: str, update: bytes) -> None:
        document = self.document(conversation)
        known = decode_state_vector(document.state_vector())
        if find_gap(read_update(update), known) is not None:
            await socket.send(encode(SyncStep1(document.state_vector())))
            return
        change = document.apply(update)
        if not change.is_empty:
            for other in self._sockets[conversation] - {socket}:
                await self._deliver(other, encode(SyncUpdate(update)))

    @staticmethod
    async def _deliver(socket: ServerConnection, frame: bytes) -> None:
        with suppress(ConnectionClosed):  # it will sync when it comes back
            await socket.send(frame)
