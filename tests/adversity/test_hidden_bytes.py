"""What only a key holder may read stands nowhere else: no log, no answer, no frame, no field.

One conversation that a lot happens to, on real processes: a relay, and a node of its own. Then all
that was said is searched for all that is hidden, in every spelling that :mod:`hidden_bytes` knows.

Where hidden values lie by design, and nothing is searched: the key and token files themselves, and
the node's ``kv`` folder. A checkpoint names the ids whose KV it holds; it never leaves the node's
disk. That the search finds them *there* shows that it can find them.

A node's ``model`` is shown to everybody by its presence, so the fingerprint is not hidden. The
sealed kind ``reasoning`` is reserved: no engine of ours gives it yet.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import struct
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, Final

import msgpack
import psutil  # type: ignore[import-untyped]
import pytest
from adversity.hidden_bytes import FLOATS, PACKINGS, SPELLINGS, Detector
from adversity.serving import ENVIRONMENT, LONG, Serving, end_of, known_to_the_relay, sampled
from adversity.tap import Tap
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pycrdt import Doc, Map
from stack.node_process import NodeProcess, node_token
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from crdt_llm import Client
from crdt_llm.cli.stored import load_stored
from crdt_llm.cli.token import authority_of
from crdt_llm.document.conversation import EMPTY_UPDATE, Conversation
from crdt_llm.document.schema import State
from crdt_llm.document.seal import Sealer, place_of
from crdt_llm.sync.wire.frames import (
    SUBPROTOCOL,
    Hello,
    Nack,
    Open,
    Opened,
    Update,
    Welcome,
    decode_from_relay,
    encode,
)
from crdt_llm.sync.wire.y_websocket import (
    AwarenessState,
    AwarenessUpdate,
    QueryAwareness,
    SyncStep1,
    SyncStep2,
    SyncUpdate,
    decode,
)
from crdt_llm.sync.wire.y_websocket import encode as encode_plain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from websockets.asyncio.client import ClientConnection

    from crdt_llm.document.schema import Entry
    from crdt_llm.document.seal import Hidden
    from crdt_llm.sync.client.client import OpenConversation

HOT: Final[dict[str, Any]] = {"temperature": 1.5, "max_tokens": 40, "ignore_eos": True}
"""Sampled widely: runs of ids that nobody comes to by chance."""

TYPED: Final = "a draft of a letter that is never sent to anybody"
WITHDRAWN: Final = "what I wish I had not said"
DRAFTS_MAX: Final = 30
TYPING_S: Final = 0.1
NEEDLES_MIN: Final = 10_000


# -- the search can find -----------------------------------------------------------------------

IDS: Final = (300, 17, 5, 211, 64, 9, 128, 33, 250, 1)
LOGPROBS: Final = (-1.25, -0.5, -7.75, -2.125, -3.5)


@pytest.mark.parametrize("packing", PACKINGS)
def test_ids_are_found_however_they_are_written(packing: str) -> None:
    detector = Detector()
    detector.know_ids("a reply", IDS)
    packed = b"".join(map(PACKINGS[packing], IDS))
    unknown = b"".join(map(PACKINGS[packing], reversed(IDS)))
    for spell in SPELLINGS.values():
        assert detector.search("a log", b"DEBUG of a reply: " + spell(packed) + b" and so on")
        assert detector.search("a log", b"DEBUG of a reply: " + spell(unknown)) == []


@pytest.mark.parametrize("form", FLOATS)
def test_logprobs_are_found_however_they_are_written(form: str) -> None:
    detector = Detector()
    detector.know_logprobs("a reply", LOGPROBS)
    packed = b"".join(map(FLOATS[form], LOGPROBS))
    for spell in SPELLINGS.values():
        assert detector.search("a log", b"DEBUG of a reply: " + spell(packed))


@pytest.mark.parametrize(
    "written",
    [
        "ids: 300, 17, 5, 211",
        "[300,17,5,211,64]",
        "(300 17 5 211)",
        "tensor([[300,\n          17,\n     5,\n 211]])",
        "300-17-5-211",
        '{"ids": [1, 300, 17, 5, 211]}',
        "['-1.25', '-0.50', '-7.75', '-2.13']",
        "[-1.250001, -0.5, -7.7499, -2.125]",
    ],
)
def test_lists_of_numbers_are_found(written: str) -> None:
    detector = Detector()
    detector.know_ids("a reply", IDS)
    detector.know_logprobs("a reply", LOGPROBS)
    assert detector.search("a log", written.encode())


@pytest.mark.parametrize(
    "written",
    [
        "2026-11-22 05:41:43,123 DEBUG crdt_llm: 300 tokens, 17 reused",
        "a 300 of 17 is not 5 and not 211",
        "1300, 17, 5, 2110",
        "300.0, 17.0, 5.0, 211.0",
    ],
)
def test_other_numbers_are_not_taken_for_hidden_ones(written: str) -> None:
    detector = Detector()
    detector.know_ids("a reply", IDS)
    assert detector.search("a log", written.encode()) == []


def test_a_key_is_found_in_a_field_of_a_document() -> None:
    key = Random(1).randbytes(32)
    detector = Detector()
    detector.know_bytes("a key", key)
    for spell in SPELLINGS.values():
        document = {"title": ["x", spell(key)]}
        assert detector.search("a field", msgpack.packb(document))
        assert detector.search("a field", repr(document).encode())
    for skipped in range(4):  # in the middle of something longer, whatever its beginning
        within = b"\1" * skipped + key + b"\2" * 5
        assert detector.search("a field", SPELLINGS["base64 at 0"](within))
    assert detector.search("a field", Random(2).randbytes(1 << 20)) == []


# -- clients without a key ---------------------------------------------------------------------


@dataclass(slots=True)
class Stock:
    """A stock Yjs client on the plain dialect: it takes whatever it is sent."""

    doc: Doc[Any]
    heard: list[bytes] = field(default_factory=list)

    def take(self, frame: bytes) -> bytes | None:
        """Take a frame; the answer, if it wants one."""
        self.heard.append(frame)
        match decode(frame):
            case SyncStep1():
                return encode_plain(SyncStep2(EMPTY_UPDATE))
            case SyncStep2(update) | SyncUpdate(update):
                self.doc.apply_update(update)
        return None

    @property
    def fields(self) -> dict[str, Any]:
        """Every field of the document as this client reads it."""
        roots = ("meta", "access", "leases", "entries")
        return {name: self.doc.get(name, type=Map).to_py() for name in roots}

    async def listen(self, url: str) -> None:
        """Take part until cancelled, or refused."""
        async with connect(url, compression=None, max_size=None) as socket:
            await socket.send(encode_plain(SyncStep1(self.doc.get_state())))
            state = json.dumps({"device": "stock"})
            hello = AwarenessState(self.doc.client_id, 1, state)
            await socket.send(encode_plain(AwarenessUpdate((hello,))))
            await socket.send(encode_plain(QueryAwareness()))
            with suppress(ConnectionClosed):  # the relay is restarted
                async for frame in socket:
                    assert isinstance(frame, bytes)
                    answer = self.take(frame)
                    if answer is not None:
                        await socket.send(answer)


@asynccontextmanager
async def listening(stock: Stock, url: str) -> AsyncIterator[None]:
    task = asyncio.create_task(stock.listen(url))
    try:
        yield
    finally:
        assert not task.done(), task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Native:
    """A client of the native dialect, by hand: it sends what it should not."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket

    async def send(self, *frames: Hello | Open | Update) -> None:
        for frame in frames:
            await self._socket.send(encode(frame))

    async def read(self, kind: type[Any]) -> Any:
        """The next frame of a kind; others are passed over."""
        while True:
            raw = await self._socket.recv()
            assert isinstance(raw, bytes)
            frame = decode_from_relay(raw)
            if isinstance(frame, kind):
                return frame


# -- one conversation, and what happens to it --------------------------------------------------


@dataclass(slots=True)
class Scene:
    """Who takes part, and what they are known to have heard.

    Attributes:
        root: a folder of its own.
        serving: the relay.
        node: the node.
        tap: what everybody but the node is connected through.
        tokens: those of the two who were let in: one who writes, and one who reads.
        hidden: what was sealed, by the id of the reply and of its slot's parameters.
        heard: what was said, by who said it.
    """

    root: Path
    serving: Serving
    node: NodeProcess
    tap: Tap
    tokens: Mapping[str, str]
    hidden: dict[str, tuple[Entry, Hidden]] = field(default_factory=dict)
    heard: dict[str, bytes] = field(default_factory=dict)

    @property
    def sealer(self) -> Sealer:
        return Sealer(self.serving.folder.key("master").read_bytes(), os.urandom)

    def client(self, name: str) -> Client:
        token = self.tokens.get(name, self.serving.token)
        return Client(self.tap.url, token=token, device=name, data=self.root / "devices" / name)

    def plain_url(self, conversation: str, name: str) -> str:
        return f"ws://127.0.0.1:{self.tap.port}/{conversation}?token={self.tokens[name]}"

    def uncover(self, document: Conversation) -> None:
        """Read what is sealed, with the key."""
        for name in document.tree.entries:
            entry = document.entry(name)
            if entry is not None and entry.sealed:
                place = place_of(document, entry)
                self.hidden[name] = entry, self.sealer.open_reply(entry.sealed, place)

    # -- the acts ------------------------------------------------------------------------------

    async def type_and_send(self, conversation: OpenConversation) -> None:
        """Until the node has read of a draft what was then sent: so hints do get there."""
        for turn in range(DRAFTS_MAX):
            text = f"question {turn}, and then some more words of it"
            conversation.draft(text)
            await asyncio.sleep(turn * TYPING_S)  # longer each time, for a node that is busy
            entry = await (await conversation.ask(text, **HOT | {"max_tokens": 12})).entry()
            assert entry.usage is not None
            if entry.usage.drafted:
                conversation.draft(TYPED)
                return
        pytest.fail("the node has read no draft")

    async def stop_one(self, conversation: OpenConversation) -> Entry:
        reply = await conversation.ask("a long story", **LONG | {"temperature": 1.5})
        await sampled(conversation, reply.id)
        await conversation.stop(reply.id)
        entry = await reply.entry()
        assert entry.state is State.STOPPED
        return entry

    async def kill_engine(self, conversation: OpenConversation) -> None:
        """In the middle of a reply, which goes on with the next engine."""
        reply = await conversation.ask("a deadly story", **LONG | {"temperature": 1.5})
        await sampled(conversation, reply.id)
        (engine,) = psutil.Process(self.node.process_id).children()
        os.kill(engine.pid, signal.SIGKILL)
        assert (await reply.entry()).state is State.DONE
        assert "the engine died" in self.node.messages

    async def restart(self, conversation: OpenConversation) -> None:
        """Kill the node in the middle of a reply, and restart the relay too."""
        reply = await conversation.ask("a story of a restart", **LONG | {"temperature": 1.5})
        await sampled(conversation, reply.id)
        await self.node.kill()
        assert await self.serving.stop() == 0
        self.serving.start()
        await self.node.start()
        assert (await reply.entry()).state is State.DONE

    async def withdraw(self, conversation: OpenConversation) -> None:
        entry = await (await conversation.ask(WITHDRAWN, **HOT)).entry()
        self.uncover(conversation.document)
        assert entry.id in self.hidden
        await conversation.redact(entry.id)
        await known_to_the_relay(conversation, self.serving)

    async def be_refused(self, conversation: Conversation, slot: str) -> None:
        """Write what only a node may, as somebody who may write; and anything, as who may not."""
        written = conversation.entry(slot)
        assert written is not None
        assert conversation.id is not None
        for name, rule in (("ada", "node-field"), ("ben", "forbidden")):
            replica = Conversation(len(self.heard) + 1, seal_client_id=21)
            replica.apply(conversation.diff())
            with replica.writing() as writer:
                if name == "ada":
                    writer.append_sealed(slot, written.sealed[0])
                else:
                    writer.set_meta("title", "mine")
            assert writer.change is not None
            protocol = Subprotocol(SUBPROTOCOL)
            address = f"ws://127.0.0.1:{self.tap.port}/"
            async with connect(address, compression=None, subprotocols=[protocol]) as socket:
                native = Native(socket)
                await native.send(Hello(1, self.tokens[name], "by hand", None))
                await native.read(Welcome)
                await native.send(Open(1, conversation.id, None, 0, b"\0"))
                await native.read(Opened)
                await native.send(Update(1, 1, writer.change.update))
                nack: Nack = await native.read(Nack)
                assert nack.rule == rule
                self.heard[f"a refusal of {name}"] = repr(nack).encode()

    async def send_junk(self, conversation: str) -> None:
        """Malformed frames, in both dialects."""
        protocol = Subprotocol(SUBPROTOCOL)
        address = f"ws://127.0.0.1:{self.tap.port}/"
        for junk in (b"\xc1", msgpack.packb([99, "x"]), msgpack.packb([2, 1, "1", b""]), "text"):
            async with connect(address, compression=None, subprotocols=[protocol]) as socket:
                native = Native(socket)
                await native.send(Hello(1, self.tokens["ada"], "by hand", None))
                await native.read(Welcome)
                await native.send(Open(1, conversation, None, 0, b"\0"))
                await native.read(Opened)
                await socket.send(junk)
                with pytest.raises(ConnectionClosed) as closed:
                    await native.read(Nack)
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 4400
        for junk in (b"\x07", b"\0\2\xff", b"\0\2\3abc", "text"):
            url = self.plain_url(conversation, "ada")
            async with connect(url, compression=None, max_size=None) as socket:
                await socket.send(junk)
                code, _, messages = await end_of(socket)
                assert code == 4400
                self.heard[f"what became of {junk!r}"] = repr(messages).encode()

    async def ask_by_http(self, conversation: str) -> None:
        """Pages, and what is none. Their bytes are in what the tap heard."""
        token = self.serving.token
        paths = ("/", "/metrics", "/healthz", "/readyz", "/.well-known/crdt-llm.json", "/kv")
        for path in (*paths, f"/{conversation}", f"/c/{conversation}", f"/x/{token}", "/%ff%00"):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.tap.port)
            question = f"GET {path}?token={token} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
            writer.write(question.encode())
            assert (await reader.read()).startswith(b"HTTP/1.1 ")
            writer.close()

    # -- what is left --------------------------------------------------------------------------

    async def run(self, *words: str) -> bytes:
        """What a command of the command line says."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "crdt_llm",
            *words,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=ENVIRONMENT,
        )
        said, _ = await process.communicate()
        self.heard[" ".join(words)] = said
        return said

    async def look_without_key(self, conversation: str, model_dir: Path) -> None:
        """What the commands show of the relay's log to who has no key, and to who has another."""
        without, another = self.root / "without", self.root / "another"
        for folder in (without, another):
            (folder / "keys").mkdir(parents=True)
            for file in self.serving.folder.path.glob("log.db*"):
                shutil.copy(file, folder)
        key = another / "keys" / "master.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(32))
        await asyncio.gather(
            *(
                self.look_into(folder, problem, conversation, model_dir)
                for folder, problem in ((without, b"key"), (another, b"sealed with key"))
            )
        )
        for form in ("json", "markdown", "document"):
            file = self.root / f"exported.{form}"
            words = ("export", conversation, "--data", str(without), "--format", form)
            await self.run(*words, "--output", str(file), "--verbose")
            self.heard[f"the export as {form}"] = file.read_bytes()

    async def look_into(
        self, folder: Path, problem: bytes, conversation: str, model_dir: Path
    ) -> None:
        data = (conversation, "--data", str(folder), "--verbose")
        model = ("--model", str(model_dir))
        assert problem in await self.run("inspect", *data, "--hidden", "--all")
        assert b'"state": "done"' in await self.run("inspect", *data, "--json", "--all")
        await self.run("inspect", *data, "--verify", "--all", *model)
        assert problem in await self.run("replay", *data, *model)

    async def look_from_afar(self, conversation: str) -> None:
        token = self.root / "ada.token"
        token.write_text(self.tokens["ada"])
        far = ("--url", self.tap.url, "--token-file", str(token), "--data", str(self.root / "no"))
        said = await self.run("inspect", conversation, *far, "--all", "--json", "--verbose")
        assert conversation.encode() in said
        await self.run("inspect", conversation, *far, "--all", "--hidden", "--verbose")
        await self.run("export", conversation, *far, "--format", "json", "--verbose")

    def collect_files(self) -> None:
        """All that lies on a disk of somebody who is not the node, but for the secrets."""
        folder = self.serving.folder
        secret = {folder.token, *(folder.path / "keys").iterdir()}
        for root in (folder.path, self.root / "devices"):
            for file in root.rglob("*"):
                if file.is_file() and file not in secret:
                    self.heard[str(file.relative_to(self.root))] = file.read_bytes()


async def play(scene: Scene) -> str:
    """Let all of it happen to one conversation, with all clients listening. Its id."""
    early, late = Stock(Doc(client_id=11)), Stock(Doc(client_id=12))
    async with scene.client("phone") as phone, scene.client("ada") as laptop:
        conversation = await phone.create("a talk")
        await conversation.share("ada", "writer")
        await conversation.share("ben", "reader")
        await (await conversation.ask("hello", **HOT)).text()
        seen = await laptop.open(conversation.id)
        async with listening(early, scene.plain_url(conversation.id, "ben")):
            await scene.type_and_send(conversation)
            stopped = await scene.stop_one(conversation)
            await (await conversation.regenerate(stopped.id, **HOT)).text()
            await (await conversation.fork(conversation.path()[0], "hello again", **HOT)).text()
            await scene.kill_engine(conversation)
            await scene.withdraw(conversation)
            await scene.be_refused(conversation.document, stopped.id)
            await scene.send_junk(conversation.id)
            await scene.ask_by_http(conversation.id)
        await scene.restart(conversation)
        async with listening(late, scene.plain_url(conversation.id, "ben")):
            last = await (await seen.ask("and what now?", **HOT)).entry()
            await scene.ask_by_http(conversation.id)
            assert last.state is State.DONE
        for name, replica in (("phone", conversation), ("ada", seen)):
            entries = [replica.document.entry(entry) for entry in replica.document.tree.entries]
            told = (entries, replica.meta, replica.refused, replica.refused_writes, replica.node)
            scene.heard[f"what {name} reads"] = repr(told).encode()
    for name, stock in (("early", early), ("late", late)):
        assert stock.fields["entries"]
        assert stock.heard
        scene.heard[f"what the {name} stock client reads"] = repr(stock.fields).encode()
        scene.heard[f"frames of the {name} stock client"] = b"\n".join(stock.heard)
    return conversation.id


def known(scene: Scene, conversation: str) -> Detector:
    """Everything that is hidden, as it is."""
    detector = Detector()
    relay, node = scene.serving.folder, scene.node.folder
    keys = {name: relay.key(name).read_bytes() for name in ("master", "relay", "token", "node")}
    keys["the node's own"] = (node / "node.key").read_bytes()
    info = b"crdt-llm/1/seal" + conversation.encode()
    keys["the conversation's"] = HKDF(SHA256(), 32, None, info).derive(keys["master"])
    for name, key in keys.items():
        detector.know_bytes(f"the key {name}", key)
    tokens = {"owner": scene.serving.token, "node": (scene.root / "node.token").read_text().strip()}
    for name, token in (tokens | dict(scene.tokens)).items():
        detector.know_bytes(f"the token of {name}", token.encode())
        detector.know_bytes(f"the signature of {name}'s token", token.split(".")[-1].encode())
    detector.know_bytes("a draft", TYPED.encode())
    for name, (entry, hidden) in scene.hidden.items():
        detector.know_ids(f"ids of {name}", hidden.ids)
        detector.know_logprobs(f"logprobs of {name}", hidden.logprobs)
        detector.know_bytes("the renderer", hidden.renderer.encode())
        assert hidden.params["seed"] is not None
        for written in (msgpack.packb(hidden.params), json.dumps(hidden.params).encode()):
            detector.know_bytes(f"parameters of {name}", written)
        detector.know_bytes(f"parameters of {name}", repr(hidden.params).encode())
        if entry.born.params.seed is None:
            seed = hidden.params["seed"]
            for form in (">Q", "<Q"):
                detector.know_bytes(f"the seed of {name}", struct.pack(form, seed))
            detector.know_bytes(f"the seed of {name}", f"{seed:020}".lstrip("0").encode())
    return detector


async def test_what_is_hidden_stands_nowhere_else(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "crdt_llm")
    with Serving(tmp_path / "relay", None, ("--verbose",)) as serving:
        with authority_of(serving.folder) as (authority, _):
            tokens = {name: authority.issue(name)[0] for name in ("ada", "ben")}
        token = await node_token(serving, tmp_path / "node.token")
        node = NodeProcess(serving, token, tmp_path / "node", tiny_model_dir, ("--verbose",))
        async with Tap(lambda: serving.port) as tap, node:
            scene = Scene(tmp_path, serving, node, tap, tokens)
            conversation = await play(scene)
            await scene.look_from_afar(conversation)
            await node.stop()
            scene.heard["the node's output"] = await node.rest_of_output()
        assert await serving.stop() == 0
    document = load_stored(serving.folder.log, conversation)
    scene.uncover(document)
    await scene.look_without_key(conversation, tiny_model_dir)
    scene.collect_files()
    scene.heard |= {
        "the relay's output": serving.said,
        "the relay's log": serving.log.read_bytes(),
        "the log of the node and its engine": node.messages.encode(),
        "the clients' log": caplog.text.encode(),
    }
    scene.heard |= {f"connection {n}": bytes(heard) for n, heard in enumerate(tap.heard)}
    for talkative in ("the relay's log", "the log of the node and its engine"):
        assert b"DEBUG" in scene.heard[talkative]
    assert "INFO" in caplog.text

    detector = known(scene, conversation)
    assert len(detector) > NEEDLES_MIN
    leaks = [leak for place, said in scene.heard.items() for leak in detector.search(place, said)]
    assert leaks == []

    kept = [file.read_bytes() for file in (node.folder / "kv").rglob("*") if file.is_file()]
    found = {leak.what for said in kept for leak in detector.search("the node's disk", said)}
    assert any(what.startswith("ids of ") for what in found)
    assert all(what.startswith("ids of ") for what in found)


async def test_a_relay_with_a_node_in_its_process_tells_no_more(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    heard: dict[str, bytes] = {}
    with Serving(tmp_path, tiny_model_dir, ("--verbose",)) as serving:
        async with Tap(lambda: serving.port) as tap:
            async with Client(tap.url, token=serving.token, device="phone") as client:
                conversation = await client.create()
                await (await conversation.ask("hello", **HOT)).text()
                reply = await conversation.ask("a deadly story", **LONG | {"temperature": 1.5})
                await sampled(conversation, reply.id)
                (engine,) = serving.workers
                os.kill(engine, signal.SIGKILL)
                entry = await reply.entry()
            for page in ("metrics", "healthz", "readyz"):
                heard[page] = repr(await serving.get(f"/{page}")).encode()
        assert await serving.stop() == 0
    heard |= {"the log": serving.log.read_bytes(), "the output": serving.said}
    heard |= {f"connection {n}": bytes(said) for n, said in enumerate(tap.heard)}
    assert b"crdt_llm_node_sampled_tokens" in heard["metrics"]
    assert b"the engine died" in heard["the log"]
    document = load_stored(serving.folder.log, conversation.id)
    sealer = Sealer(serving.folder.key("master").read_bytes(), os.urandom)
    hidden = sealer.open_reply(entry.sealed, place_of(document, entry))
    detector = Detector()
    detector.know_ids("ids", hidden.ids)
    detector.know_logprobs("logprobs", hidden.logprobs)
    assert len(detector) > NEEDLES_MIN
    leaks = [leak for place, said in heard.items() for leak in detector.search(place, said)]
    assert leaks == []
