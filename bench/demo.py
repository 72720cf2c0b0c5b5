"""The main job, played on the real model without anyone typing.

Two devices hold one conversation with a language model through a relay and a node that this
program starts as a user would, and kills as a crash would. It prints what each turn cost and ends
with the claims it checked; the exit code is 0 only if every one of them held.

    python bench/demo.py [--model smollm2-135m] [--keep]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdt_llm import Client
from crdt_llm.document.chain import verify_path
from crdt_llm.document.schema import State
from crdt_llm.document.seal import Sealer, place_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from crdt_llm.document.schema import Entry, Usage
    from crdt_llm.sync.client.client import OpenConversation, Reply

STARTUP_S_MAX = 180  # a cold disk and two busy cores
STEP_S_MAX = 180  # no single reply takes longer, or something hangs
TURN_BYTES_MAX = 600  # on an open connection, besides 1.2 x the text
TEXT_FACTOR = 1.2
RECONNECT_BYTES_MAX = 600  # a state vector, an empty answer, presence
KILL_TOKENS = 160  # some seconds of a reply: the kill comes well before its end
KILL_CHARACTERS = 40


@dataclass
class Server:
    """``crdt-llm serve`` in a process of its own."""

    data: Path
    model: str
    port: int = 0
    url: str = ""
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it says that it is ready."""
        command = [sys.executable, "-m", "crdt_llm", "serve", "--data", str(self.data)]
        command += ["--port", str(self.port), "--model", self.model]
        log = (self.data.parent / "serve.log").open("ab")
        with log:
            self.process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=log
            )
        async with asyncio.timeout(STARTUP_S_MAX):
            line = (await _output(self.process).readline()).decode()
        if not line.startswith("ready "):
            raise SystemExit(f"the server did not start: see {log.name}")
        self.url = line.split()[1]
        self.port = int(self.url.rstrip("/").rsplit(":", 1)[1])

    @property
    def token(self) -> str:
        """The owner's token, which the first start made."""
        return (self.data / "owner.token").read_text().strip()

    async def end(self, how: signal.Signals) -> None:
        """Send it a signal and wait until it is gone."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(how)
            await self.process.wait()

    def lose_log(self) -> None:
        """Lose every conversation and all KV; the register and the keys stay."""
        for file in self.data.glob("log.db*"):
            file.unlink()
        shutil.rmtree(self.data / "kv", ignore_errors=True)


def _output(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    if process.stdout is None:
        raise RuntimeError("the server was started without a pipe for its output")
    return process.stdout


def entries_of(conversation: OpenConversation) -> dict[str, Entry]:
    """All that a device has of a conversation's entries."""
    return {name: conversation.entry(name) for name in conversation.document.tree.entries}


def _cost(reply: Entry) -> Usage:
    if reply.usage is None:
        raise RuntimeError(f"reply {reply.id} has ended without saying what it cost")
    return reply.usage


@dataclass
class Report:
    """Rows of turns, and claims."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    claims: list[tuple[bool, str]] = field(default_factory=list)
    totals: dict[str, int] = field(
        default_factory=lambda: {"sent": 0, "reused": 0, "prefilled": 0, "again": 0, "sampled": 0}
    )

    def claim(self, text: str, *, holds: bool) -> None:
        """Record whether something held; a failure is shown at once."""
        self.claims.append((holds, text))
        if not holds:
            print(f"  DOES NOT HOLD: {text}", flush=True)

    def row(self, *cells: object) -> None:
        """Print a row of the table."""
        widths = (34, 8, 7, 7, 10, 7, 8, 8)
        padded = [str(cell) for cell in cells]
        first = padded[0].ljust(widths[0])
        rest = (c.rjust(w) for c, w in zip(padded[1:], widths[1:], strict=False))
        print(first, *rest, flush=True)


class Demo:
    """The play."""

    def __init__(self, server: Server, report: Report, phone: Client, laptop: Client) -> None:
        self.server = server
        self.report = report
        self.clients = {"phone": phone, "laptop": laptop}
        self.at: dict[str, OpenConversation] = {}

    # -- measuring -----------------------------------------------------------------------------

    @asynccontextmanager
    async def counted(self, device: str, text: str, what: str) -> AsyncIterator[list[int]]:
        """Count what a device sends while it asks; ``text`` is what a person typed."""
        conversation = self.at[device]
        await conversation.synced_once()
        before = conversation.traffic.live.sent_bytes
        sent = [0]
        yield sent
        sent[0] = conversation.traffic.live.sent_bytes - before
        limit = TURN_BYTES_MAX + TEXT_FACTOR * len(text.encode())
        self.report.claim(
            f"{what}: {sent[0]} bytes sent, at most {limit:.0f}", holds=0 < sent[0] <= limit
        )

    def account(self, what: str, device: str, sent: object, reply: Entry, again: int) -> None:
        """A row of the table."""
        usage = _cost(reply)
        totals = self.report.totals
        totals["reused"] += usage.reused
        totals["prefilled"] += usage.prefilled
        totals["sampled"] += usage.sampled
        totals["again"] += again
        if isinstance(sent, int):
            totals["sent"] += sent
        ttft = "-" if usage.ttft_ms is None else usage.ttft_ms
        self.report.row(
            what, device, sent, usage.reused, usage.prefilled, again, ttft, usage.sampled
        )

    def again(self, reply: Entry) -> int:
        """Earlier tokens that were prefilled again for a reply: all that its last ancestor knew.

        When a reply ends, the KV of its prompt and of all but its last token is there; whatever of
        that is not reused was computed twice.
        """
        conversation = self.at["phone"].document
        for name in reversed(conversation.tree.path(reply.id)[:-1]):
            entry = conversation.entry(name)
            if entry is not None and entry.is_slot and entry.usage is not None:
                known = entry.usage.prompt + entry.usage.sampled - 1
                return max(0, known - _cost(reply).reused)
        return 0

    async def finish(self, reply: Reply) -> Entry:
        """Wait for a reply on the device that asked for it."""
        async with asyncio.timeout(STEP_S_MAX):
            return await reply.entry()

    async def everywhere(self, holds: Callable[[OpenConversation], bool]) -> None:
        """Wait until something holds on both devices."""
        async with asyncio.timeout(STEP_S_MAX):
            for conversation in self.at.values():
                feed = conversation.changes()
                while not holds(conversation):
                    await conversation.next_of(feed, lambda _: True)

    async def half_said(self, slot: str) -> None:
        """Wait until a good part of a reply has come to both devices."""
        await self.everywhere(lambda c: len(c.document.text(slot)) > KILL_CHARACTERS)

    async def turn(self, device: str, text: str, what: str, **sampling: Any) -> Entry:
        """Ask on one device; see the same reply on the other."""
        async with self.counted(device, text, what) as sent:
            reply = await self.at[device].ask(text, **sampling)
            entry = await self.finish(reply)
        await self.everywhere(lambda c: c.reply(reply.id).ended)
        same = {conversation.entry(reply.id).content for conversation in self.at.values()}
        self.report.claim(f"{what}: both devices show the same reply", holds=len(same) == 1)
        again = self.again(entry)
        self.report.claim(f"{what}: {again} earlier tokens prefilled again", holds=again == 0)
        self.account(what, device, sent[0], entry, again)
        return entry

    def sampled_ids(self, reply: Entry) -> tuple[int, ...]:
        """A reply's exact token ids, opened with the key from the data folder."""
        master = (self.server.data / "keys" / "master.key").read_bytes()
        where = place_of(self.at["phone"].document, reply)
        return Sealer(master, os.urandom).open_reply(reply.sealed, where).sampled

    # -- the acts ------------------------------------------------------------------------------

    async def open(self) -> None:
        """A conversation is born on the phone; the laptop joins."""
        self.at["phone"] = await self.clients["phone"].create("A weekend in Lisbon")
        await self.at["phone"].synced_once()
        self.at["laptop"] = await self.clients["laptop"].open(self.at["phone"].id)
        await self.at["laptop"].synced_once()

    async def chat(self) -> None:
        """Turns on alternating devices."""
        turns = (
            ("phone", "I have two days in Lisbon. What should I see first?"),
            ("laptop", "I like old trams and quiet streets. Which part of the town is that?"),
            ("phone", "And where would I eat there without spending much?"),
            ("laptop", "Thanks. Name one thing that tourists usually miss."),
        )
        for number, (device, text) in enumerate(turns, 1):
            await self.turn(device, text, f"turn {number}", max_tokens=48)

    async def offline_merge(self) -> None:
        """The laptop goes offline; both write; they merge."""
        laptop, phone = self.at["laptop"], self.at["phone"]
        laptop.pause()
        offline = await laptop.ask("Offline: is the castle worth the climb?", max_tokens=32)
        online = await phone.ask("Online: what is the weather like in May?", max_tokens=32)
        first = await self.finish(online)
        again = self.again(first)
        self.account("phone goes on alone", "phone", "-", first, again)
        self.report.claim("the phone goes on while the laptop is away", holds=again == 0)
        before = self.sent("laptop")
        laptop.resume()
        await laptop.synced_once()
        second = await self.finish(offline)
        await self.everywhere(lambda c: c.reply(offline.id).ended)
        sent = self.sent("laptop") - before
        again = self.again(second)
        self.account("offline merge, with the reconnect", "laptop", sent, second, again)
        self.report.claim("an offline merge prefills nothing again", holds=again == 0)
        views = {conversation.path() for conversation in self.at.values()}
        self.report.claim("after the merge both devices show one order", holds=len(views) == 1)
        order = phone.path()
        self.report.claim(
            "what was written offline comes after what happened since",
            holds=order.index(offline.id) > order.index(online.id),
        )

    async def at_once(self) -> None:
        """Both devices send while a reply streams: one reply for the slots that wait together."""
        phone, laptop = self.at["phone"], self.at["laptop"]
        busy = await phone.ask("Tell me a short story about a tram.", max_tokens=40)
        await self.everywhere(lambda c: bool(c.document.text(busy.id)))
        one = await phone.ask("Both at once, from the phone: is it hilly?", max_tokens=24)
        two = await laptop.ask("Both at once, from the laptop: is it safe?", max_tokens=24)
        await self.everywhere(lambda c: c.reply(one.id).ended and c.reply(two.id).ended)
        states = sorted(str(phone.entry(slot).state) for slot in (one.id, two.id))
        self.report.claim(
            f"two devices at once: one reply for both ({', '.join(states)})",
            holds=states == [State.DONE, State.SUPERSEDED],
        )
        answered = next(s for s in (one.id, two.id) if phone.entry(s).state is State.DONE)
        again = self.again(phone.entry(answered))
        self.account("both at once", "both", "-", phone.entry(answered), again)
        self.report.claim("both at once: nothing prefilled again", holds=again == 0)
        views = {conversation.path() for conversation in self.at.values()}
        self.report.claim("both at once: the same order everywhere", holds=len(views) == 1)

    async def branches(self) -> None:
        """An edit, a regeneration and a stop."""
        phone = self.at["phone"]
        first_user = next(entry for entry in phone.view() if not entry.is_slot)
        main = phone.path()
        text = "I have one day in Porto. What should I see first?"
        async with self.counted("phone", text, "edit as a fork") as sent:
            entry = await self.finish(
                await phone.fork(first_user.id, text, max_tokens=32, temperature=0.0)
            )
        self.account("edit as a fork", "phone", sent[0], entry, self.again(entry))
        self.report.claim(
            "a fork leaves the main line as it was",
            holds=phone.document.tree.view(main[-1]) == main,
        )
        async with self.counted("phone", "", "regenerate") as sent:
            entry = await self.finish(await phone.regenerate(max_tokens=32, temperature=0.9))
        self.account("regenerate", "phone", sent[0], entry, _cost(entry).prefilled)
        self.report.claim("a regeneration prefills nothing", holds=_cost(entry).prefilled == 0)
        long = await phone.ask("Count as far as you can.", max_tokens=400, ignore_eos=True)
        await self.everywhere(lambda c: bool(c.document.text(long.id)))
        await self.at["laptop"].stop(long.id)
        entry = await self.finish(long)
        self.account("stop, from the other device", "laptop", "-", entry, self.again(entry))
        self.report.claim(
            f"a stop ends a reply of 400 tokens after {_cost(entry).sampled}",
            holds=entry.state is State.STOPPED and _cost(entry).sampled < 400,
        )

    async def kill(self, temperature: float) -> None:
        """SIGKILL in mid-reply; the reply ends token for token as it would have without."""
        phone = self.at["phone"]
        name = "greedy" if temperature == 0 else f"temperature {temperature}"
        sampling: dict[str, Any] = {"max_tokens": KILL_TOKENS, "temperature": temperature}
        sampling |= {"seed": 7, "ignore_eos": True}
        whole = await self.turn(
            "phone", "Write about the river.", f"undisturbed, {name}", **sampling
        )
        again = await phone.regenerate(whole.id, **sampling)
        await self.half_said(again.id)
        await self.server.end(signal.SIGKILL)
        cut, sent = phone.entry(again.id), self.sent("phone")
        self.report.claim(
            f"SIGKILL, {name}: the reply was cut after {len(cut.content)} characters",
            holds=cut.state is State.STREAMING,
        )
        await self.server.start()
        entry = await self.finish(again)
        await self.everywhere(lambda c: c.reply(again.id).ended)
        sent = self.sent("phone") - sent
        replayed = _cost(entry).prefilled
        self.account(f"killed in mid-reply, {name}", "phone", sent, entry, replayed)
        expected, got = self.sampled_ids(whole), self.sampled_ids(entry)
        self.report.claim(
            f"SIGKILL, {name}: it ended with {len(got)} tokens, each as without the kill",
            holds=got == expected and entry.content == whole.content and len(got) == KILL_TOKENS,
        )
        self.report.claim(
            f"SIGKILL, {name}: at most one replay of the path, by the node",
            holds=_cost(entry).reused + replayed == _cost(entry).prompt,
        )
        history = sum(len(one.content.encode()) for one in phone.view())
        self.report.claim(
            f"SIGKILL, {name}: the phone resent nothing ({sent} bytes to be in sync again)",
            holds=sent <= min(RECONNECT_BYTES_MAX, history),
        )

    async def lose(self) -> None:
        """SIGKILL in mid-reply, and the log is lost: the first device that comes has everything."""
        phone, laptop = self.at["phone"], self.at["laptop"]
        sampling: dict[str, Any] = {"max_tokens": KILL_TOKENS, "temperature": 0.7}
        sampling |= {"seed": 11, "ignore_eos": True}
        whole = await self.turn("laptop", "Write about the sea.", "undisturbed", **sampling)
        again = await phone.regenerate(whole.id, **sampling)
        await self.half_said(again.id)
        await self.server.end(signal.SIGKILL)
        laptop.pause()  # the phone is the first, and for a while the only one
        self.server.lose_log()
        cut, before = phone.entry(again.id), entries_of(phone)
        had = self.sampled_ids(cut)
        shown = [cut.content]  # each step of the text, from what was there on

        async def look_on() -> None:
            feed = phone.changes()
            while not phone.reply(again.id).ended:
                await phone.next_of(feed, lambda _: True)
                shown.append(phone.document.text(again.id))

        looking = asyncio.create_task(look_on())
        resent = self.sent("phone")
        await self.server.start()
        entry = await self.finish(again)
        await looking
        await phone.synced_once()
        resent = self.sent("phone") - resent
        self.report.claim(
            f"log lost: the reply was cut after {len(had)} tokens, and is said to be on its way",
            holds=cut.state is State.STREAMING and 0 < len(had) < KILL_TOKENS,
        )
        self.account("killed, log lost", "phone", resent, entry, _cost(entry).prefilled)
        await self.check_restored(again.id, before)
        expected, got = self.sampled_ids(whole), self.sampled_ids(entry)
        self.report.claim(
            "log lost: the reply went on at its next token, behind what the phone had of it",
            holds=got[: len(had)] == had
            and all(after.startswith(text) for text, after in pairwise(shown)),
        )
        self.report.claim(
            f"log lost: it ended with {len(got)} tokens, each as without the loss",
            holds=got == expected and entry.content == whole.content and len(got) == KILL_TOKENS,
        )
        resent = self.sent("laptop")
        laptop.resume()
        await laptop.synced_once()
        await self.everywhere(lambda c: c.reply(again.id).ended)
        resent = self.sent("laptop") - resent
        self.report.claim(
            f"log lost: the laptop, which comes later, resends nothing ({resent} bytes)",
            holds=0 < resent <= RECONNECT_BYTES_MAX,
        )

    async def check_restored(self, cut: str, before: dict[str, Entry]) -> None:
        """What a device that has never been here gets from the relay after the loss."""
        async with Client(
            self.server.url, token=self.server.token, device="a new tablet"
        ) as client:
            tablet = await client.open(self.at["phone"].id)
            await tablet.synced_once()
            after = entries_of(tablet)
        whole = {name: entry for name, entry in before.items() if name != cut}
        self.report.claim(
            f"log lost: the phone brought all {len(before)} entries back, to the last field",
            holds={name: after.get(name) for name in whole} == whole and cut in after,
        )
        replies = [entry for entry in whole.values() if entry.sealed]
        opened = [self.sampled_ids(after[one.id]) == self.sampled_ids(one) for one in replies]
        self.report.claim(
            f"log lost: the exact ids of {len(replies)} ended replies came with it, sealed",
            holds=bool(opened) and all(opened),
        )

    def sent(self, device: str) -> int:
        """All bytes that a device has sent."""
        traffic = self.at[device].traffic
        return traffic.sync.sent_bytes + traffic.live.sent_bytes

    async def check_all(self) -> None:
        """What must hold of the whole document, on both devices."""
        phone, laptop = (conversation.document for conversation in self.at.values())
        await self.everywhere(
            lambda c: c.document.state_vector() == phone.state_vector() or c is self.at["phone"]
        )
        self.report.claim(
            "both devices hold the same document",
            holds=[phone.entry(e) for e in sorted(phone.tree.entries)]
            == [laptop.entry(e) for e in sorted(laptop.tree.entries)],
        )
        verdicts = [
            v for tip in phone.tree.tips() for v in verify_path(phone, phone.tree.path(tip))
        ]
        self.report.claim(
            f"every link of the chain holds ({len({v.entry for v in verdicts})} entries)",
            holds=bool(verdicts) and all(v.problem is None for v in verdicts),
        )
        size = len(phone.diff())
        text = sum(len(phone.text(e).encode()) for e in phone.tree.entries)
        print(
            f"\nthe document: {size:,} bytes for {text:,} bytes of text, {len(phone.tree)} entries"
        )


async def play(folder: Path, model: str) -> Report:
    """All acts."""
    report, server = Report(), Server(folder / "server", model)
    server.data.mkdir()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.end, signal.SIGTERM)
        await server.start()
        clients = [
            await stack.enter_async_context(
                Client(server.url, token=server.token, data=folder / device, device=device)
            )
            for device in ("phone", "laptop")
        ]
        demo = Demo(server, report, *clients)
        report.row("", "device", "sent B", "reused", "prefilled", "again", "TTFT ms", "sampled")
        await demo.open()
        await demo.chat()
        await demo.offline_merge()
        await demo.at_once()
        await demo.branches()
        await demo.kill(0.0)
        await demo.kill(0.7)
        await demo.lose()
        await demo.turn("laptop", "Thank you. Goodbye.", "a last turn", max_tokens=16)
        await demo.check_all()
    return report


def main() -> int:
    """Play, report, and say by the exit code whether every claim held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep", action="store_true", help="keep the folder with all data")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="crdt-llm-demo-"))
    report = asyncio.run(play(folder, options.model))
    totals = report.totals
    print(
        f"totals: {totals['sent']:,} bytes sent, {totals['reused']:,} prompt tokens reused, "
        f"{totals['prefilled']:,} prefilled ({totals['again']} again, after the kills), "
        f"{totals['sampled']} sampled\n"
    )
    for holds, text in report.claims:
        print("holds " if holds else "FAILED", text)
    failed = sum(not holds for holds, _ in report.claims)
    print(f"\n{len(report.claims) - failed} claims held, {failed} failed")
    if options.keep:
        print(f"data: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
