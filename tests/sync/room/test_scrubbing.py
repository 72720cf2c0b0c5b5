"""What was withdrawn leaves the disk: whenever the process dies, and once for many."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, cast

import pytest
from sync.device import CONVERSATION, Device
from sync.room.scrub_child import SAID, withdraw
from sync.rooms import Place, born, turns

from crdt_llm.document.conversation import Conversation
from crdt_llm.errors import StoreFailed
from crdt_llm.store.register import SqliteRegister
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.room.scrubbing import Scrubber

if TYPE_CHECKING:
    from crdt_llm.store.log import UpdateLog

SEAMS = (
    "before-commit",
    "after-commit",
    "register-before-commit",
    "register-after-commit",
    "compact-before-commit",
    "compact-after-commit",
    "scrub-before-vacuum",
    "scrub-after-vacuum",
)


def traces(folder: Path) -> list[str]:
    """Files that still hold the secret."""
    return [file.name for file in sorted(folder.iterdir()) if SAID.encode() in file.read_bytes()]


async def paid(folder: Path) -> Conversation:
    """Start again, as the next process does, until nothing is owed; what is then stored."""
    log = await SqliteLog.open(folder / "log.db")
    register = await SqliteRegister.open(folder / "register.db")
    hub = Hub(log, register=register)
    hub.tick()
    member = await hub.join(CONVERSATION, "owner", deliver=lambda _: None)
    replica = Conversation(1, update=member.state)
    if not replica.is_redacted(
        next(iter(replica.tree.entries))
    ):  # the withdrawal itself was not committed: once more
        device = Device(Random(8))
        device.merge(member.state)
        await member.submit(withdraw(device))
    while (row := await register.load(CONVERSATION)) is not None and row.scrub_owed:
        hub.tick()
        await asyncio.sleep(0)
    found = Conversation(1, update=(await hub.join(CONVERSATION, "owner", deliver=print)).state)
    await hub.close()
    await log.close()
    await register.close()
    return found


@pytest.mark.parametrize("seam", ["never", *SEAMS])
def test_a_secret_leaves_the_disk_whenever_the_process_dies(tmp_path: Path, seam: str) -> None:
    child = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-m", "sync.room.scrub_child", str(tmp_path), seam],
        capture_output=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        timeout=60,
    )
    assert child.returncode == (0 if seam == "never" else -9), child.stderr.decode()
    if seam == "never":
        assert traces(tmp_path) == []
    elif seam != "scrub-after-vacuum":
        assert traces(tmp_path)  # there was something to make good
    replica = asyncio.run(paid(tmp_path))
    (entry,) = replica.tree.entries
    assert replica.is_redacted(entry)
    assert traces(tmp_path) == []


class SlowLog:
    """Counts scrubs; each waits for the test."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_end = asyncio.Event()
        self.failing = False

    async def scrub(self) -> None:
        self.begun += 1
        await self.may_end.wait()
        if self.failing:
            raise StoreFailed("no space")


async def test_many_withdrawals_share_a_scrub() -> None:
    log = SlowLog()
    scrubber = Scrubber(cast("UpdateLog", log))  # only its scrub is asked for
    first = [asyncio.ensure_future(scrubber.scrub()) for _ in range(5)]
    await turns()
    assert log.begun == 1
    # These came after it had begun: it may have passed by what they are about.
    later = [asyncio.ensure_future(scrubber.scrub()) for _ in range(5)]
    await turns()
    assert log.begun == 1
    log.may_end.set()
    await asyncio.gather(*first, *later)
    assert log.begun == 2


async def test_a_scrub_that_fails_fails_for_all_who_share_it() -> None:
    log = SlowLog()
    scrubber = Scrubber(cast("UpdateLog", log))
    log.failing = True
    log.may_end.set()
    outcomes = await asyncio.gather(*(scrubber.scrub() for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StoreFailed] * 3
    log.failing = False
    await scrubber.scrub()


async def test_a_withdrawal_compacts_and_scrubs_and_the_mark_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    scrubs = 0

    async def scrub() -> None:
        nonlocal scrubs
        scrubs += 1
        assert place.rows[CONVERSATION].scrub_owed

    monkeypatch.setattr(place.log, "scrub", scrub)
    await owner.membership.submit(device.say(SAID))
    assert not place.rows[CONVERSATION].scrub_owed
    await owner.membership.submit(withdraw(device))
    await turns(50)
    assert scrubs == 1
    assert not place.rows[CONVERSATION].scrub_owed
    stored = place.disk.conversations[CONVERSATION]
    assert stored.updates == ()
    assert SAID.encode() not in (stored.snapshot or b"")
    room = place.hub._rooms[CONVERSATION]
    assert room.since(room.lsn - 1) is None  # nor does whoever comes back get it from memory


async def test_a_scrub_that_fails_stays_owed_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    failing = True

    async def scrub() -> None:
        if failing:
            raise StoreFailed("no space")

    monkeypatch.setattr(place.log, "scrub", scrub)
    await owner.membership.submit(device.say(SAID))
    await owner.membership.submit(withdraw(device))
    await turns(50)
    assert place.rows[CONVERSATION].scrub_owed
    assert "is not scrubbed" in caplog.text
    assert owner.lost == []
    place.hub.tick()
    await turns(50)
    assert place.rows[CONVERSATION].scrub_owed
    failing = False
    place.hub.tick()
    await turns(50)
    assert not place.rows[CONVERSATION].scrub_owed
    assert await place.hub._register.owed() == ()


async def test_a_room_that_owes_a_scrub_is_opened_by_the_next_process() -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    await owner.membership.submit(device.say(SAID))
    row = place.rows[CONVERSATION]
    await owner.membership.submit(withdraw(device))
    await turns(50)
    place.rows[CONVERSATION] = replace(place.rows[CONVERSATION], scrub_owed=True, lsn=row.lsn)
    place.open_hub(seed=3)
    place.hub.tick()
    await turns(100)
    assert not place.rows[CONVERSATION].scrub_owed


@pytest.mark.parametrize("is_noted", [True, False])
async def test_who_comes_back_after_a_restart_does_not_get_what_is_owed_to_be_wiped(
    monkeypatch: pytest.MonkeyPatch, *, is_noted: bool
) -> None:
    place = Place(leased=True)
    owner, device = await born(place)
    here = place.hub._rooms[CONVERSATION].lsn
    await owner.membership.submit(device.say(SAID))
    before = place.rows[CONVERSATION]

    async def compact(*_: object) -> None:
        raise StoreFailed("no space")

    monkeypatch.setattr(place.log, "compact", compact)
    await owner.membership.submit(withdraw(device))
    if not is_noted:  # the process ended before the register heard of it
        place.rows[CONVERSATION] = before
    place.open_hub(seed=3)
    monkeypatch.setattr(place.log, "compact", compact)
    await place.join()
    room = place.hub._rooms[CONVERSATION]
    assert place.rows[CONVERSATION].scrub_owed
    assert room.since(here) is None
    assert SAID.encode() not in room.diff()
