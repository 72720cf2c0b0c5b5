"""A relay and node for the client's tests: a real server in one class, made to misbehave at will.

It speaks the native dialect over real websockets from the codec and the replica alone. It checks
nothing but what a test tells it to, keeps everything in memory, and plays the node's part when a
test asks it to.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from crdt_llm.document.conversation import EMPTY_UPDATE, Conversation
from crdt_llm.document.schema import Place, State, Usage
from crdt_llm.sync.update.structure import find_gap, read_update
from crdt_llm.sync.wire.frames import (
    SUBPROTOCOL,
    VERSION,
    Ack,
    Answer,
    Change,
    Closed,
    Code,
    Draft,
    Hello,
    Leave,
    Listed,
    Nack,
    Open,
    Opened,
    Presence,
    Pull,
    Request,
    Restore,
    Update,
    Watch,
    Welcome,
    decode_from_client,
    encode,
)
from crdt_llm.sync.wire.frames import (
    State as StateFrame,
)
from crdt_llm.sync.wire.y_websocket import decode_state_vector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from websockets.asyncio.server import Server, ServerConnection

    from crdt_llm.document.conversation import Writer
    from crdt_llm.sync.wire.frames import FromClient, FromRelay
    from crdt_llm.sync.wire.y_websocket import AwarenessState

TOKEN = "open sesame"  # noqa: S105 - the key to a server that lives for one test


class Partner:
    """A relay on a port of its own.

    Attributes:
        refusal: close every new channel with this code and reason.
        judge: says of an update whether it is refused, and how; ``None`` takes it.
        acknowledges: whether it answers updates; what it took meanwhile it has.
        heard: every message of a conversation that clients sent, in order.
        frames: the sizes of the frames that they came in.
        hellos: every Hello.
        requests: every request; answered by ``answers``, by name.
        listed: what a watcher is told at first.
    """

    def __init__(self, *, token: str | None = TOKEN) -> None:
        self.token = token
        self.principal = "owner"
        self.key = bytes(32)
        self.log = "log-1"
        self.refusal: tuple[int, str] | None = None
        self.judge: Callable[[Update | Restore], tuple[Code, str, str] | None] = lambda _: None
        self.acknowledges = True
        self.heard: defaultdict[str, list[FromClient]] = defaultdict(list)
        self.frames: defaultdict[str, list[int]] = defaultdict(list)
        self.hellos: list[Hello] = []
        self.requests: list[Request] = []
        self.answers: dict[str, Answer] = {}
        self.listed: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()
        self.connections = 0
        self.paths: list[str] = []
        self._documents: dict[str, Conversation] = {}
        self._lsns: defaultdict[str, int] = defaultdict(int)
        self._channels: defaultdict[str, dict[ServerConnection, int]] = defaultdict(dict)
        self._watchers: set[ServerConnection] = set()
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
        self._server = await serve(
            self._serve,
            "127.0.0.1",
            self._port,
            compression=None,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
        )
        self._port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self, code: int = 1012) -> None:
        """Close every connection, as a relay that restarts does."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close(code=code)
            await server.wait_closed()

    async def drop(self, conversation: str, code: int = 1013, reason: str = "") -> None:
        """Close the connections that a conversation is open on."""
        for socket in tuple(self._channels[conversation]):
            await socket.close(code, reason)

    async def shut(self, conversation: str, code: int, reason: str = "") -> None:
        """Close the channels of one conversation; their connections go on."""
        channels, self._channels[conversation] = self._channels[conversation], {}
        for socket, channel in channels.items():
            await self._say(socket, Closed(channel, code, reason))

    def abort(self, conversation: str) -> None:
        """Break the connections of one conversation without a word."""
        for socket in tuple(self._channels[conversation]):
            socket.transport.abort()

    def forget(self, conversation: str) -> None:
        """Lose everything of a conversation, as a wiped relay has."""
        self._documents.pop(conversation, None)
        self._lsns.pop(conversation, None)
        self.log += "'"

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
        self.change(conversation, writer.change.update)

    def change(self, conversation: str, update: bytes) -> None:
        """Send every client a change, whatever it is."""
        self._lsns[conversation] += 1
        for socket, channel in self._channels[conversation].items():
            frame = Change(channel, self._lsns[conversation], update)
            socket.loop.create_task(self._say(socket, frame))

    def say_presence(self, conversation: str, *states: AwarenessState) -> None:
        """Tell every client who is here."""
        for socket, channel in self._channels[conversation].items():
            socket.loop.create_task(self._say(socket, Presence(channel, states)))

    async def list_more(
        self, *conversations: tuple[str, Mapping[str, Any] | None], whole: bool = False
    ) -> None:
        """Tell every watcher of changes in the list."""
        for socket in self._watchers:
            await self._say(socket, Listed(whole, True, conversations))

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
        opened: dict[int, str] = {}
        try:
            async for frame in socket:
                assert isinstance(frame, bytes)
                await self._hear(socket, opened, frame)
                self._news.set()
        except ConnectionClosed:
            pass  # clients come and go
        finally:
            self._watchers.discard(socket)
            for conversation in opened.values():
                self._channels[conversation].pop(socket, None)
            self._news.set()

    async def _hear(self, socket: ServerConnection, opened: dict[int, str], frame: bytes) -> None:
        message = decode_from_client(frame)
        match message:
            case Hello(_, token):
                self.hellos.append(message)
                if self.token is not None and token != self.token:
                    await socket.close(4401, "unauthenticated: who are you?")
                    return
                welcome = Welcome(VERSION, self.principal, self.key, None, self.log)
                await self._say(socket, welcome)
                return
            case Watch():
                self._watchers.add(socket)
                await self._say(socket, Listed(True, True, self.listed))
                return
            case Request(identity, name):
                self.requests.append(message)
                answer = self.answers.get(name, Answer(identity, None, "unknown", "no such thing"))
                await self._say(socket, replace(answer, id=identity))
                return
            case Open(channel, conversation):
                opened[channel] = conversation
            case _:
                channel = message.channel  # type: ignore[union-attr]
        conversation = opened[channel]
        self.heard[conversation].append(message)
        self.frames[conversation].append(len(frame))
        await self._in_conversation(socket, conversation, message)

    async def _in_conversation(
        self, socket: ServerConnection, conversation: str, message: FromClient
    ) -> None:
        document = self.document(conversation)
        match message:
            case Open(channel, _, log, lsn, state_vector):
                if self.refusal is not None:
                    await self._say(socket, Closed(channel, *self.refusal))
                    return
                self._channels[conversation][socket] = channel
                here = log == self.log and lsn == self._lsns[conversation]
                await self._say(
                    socket,
                    Opened(
                        channel,
                        self.log,
                        self._lsns[conversation],
                        EMPTY_UPDATE if here else document.diff(state_vector),
                        document.state_vector(),
                        "owner",
                        False,
                    ),
                )
            case Update() | Restore():
                await self._take(socket, conversation, message)
            case Pull(channel, state_vector):
                lsn = self._lsns[conversation]
                state = StateFrame(channel, lsn, document.diff(state_vector))
                await self._say(socket, state)
            case Presence(_, states):
                for other, number in tuple(self._channels[conversation].items()):
                    if other is not socket:
                        await self._say(other, Presence(number, states))
            case Leave(channel):
                self._channels[conversation].pop(socket, None)
                await self._say(socket, Closed(channel, 1000, "left"))
            case Draft():
                pass
            case _:
                raise AssertionError(f"a client has no business to send {message}")

    async def _take(
        self, socket: ServerConnection, conversation: str, message: Update | Restore
    ) -> None:
        document = self.document(conversation)
        refused = self.judge(message)
        known = decode_state_vector(document.state_vector())
        if refused is not None:
            nack = Nack(message.channel, message.id, *refused, None, None)
            if refused[0] in {Code.UNAVAILABLE, Code.RATE_LIMITED}:
                nack = replace(nack, retry_ms=10)
            await self._say(socket, nack)
            return
        if find_gap(read_update(message.update), known) is not None:
            have = document.state_vector()
            gap = Nack(message.channel, message.id, Code.GAP, "", "there is a gap", None, have)
            await self._say(socket, gap)
            return
        change = document.apply(message.update)
        if not change.is_empty:
            self._lsns[conversation] += 1
            for other, number in tuple(self._channels[conversation].items()):
                if other is not socket:
                    frame = Change(number, self._lsns[conversation], message.update)
                    await self._say(other, frame)
        if self.acknowledges:
            await self._say(socket, Ack(message.channel, message.id, self._lsns[conversation]))

    @staticmethod
    async def _say(socket: ServerConnection, frame: FromRelay) -> None:
        with suppress(ConnectionClosed):  # it will sync when it comes back
            await socket.send(encode(frame))
