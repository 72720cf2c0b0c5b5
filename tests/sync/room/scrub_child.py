"""A relay that says a secret, withdraws it, and kills itself at a seam: see test_scrubbing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from random import Random

from sync.device import CONVERSATION, Device

from crdt_llm.store.register import SqliteRegister
from crdt_llm.store.sqlite import SqliteLog
from crdt_llm.sync.relay.hub import Hub

SAID = "nobody must read this again"


def withdraw(device: Device) -> bytes:
    (entry,) = device.replica.view()
    with device.replica.writing() as writer:
        writer.redact(entry, "owner", 12)
    assert writer.change is not None
    return writer.change.update


async def main(folder: Path, seam: str) -> None:
    armed = False

    def fault(passed: str) -> None:
        if armed and passed == seam:
            os.kill(os.getpid(), signal.SIGKILL)

    log = await SqliteLog.open(folder / "log.db", faults=fault)
    register = await SqliteRegister.open(folder / "register.db", faults=fault)
    hub, device = Hub(log, register=register), Device(Random(7))
    member = await hub.join(CONVERSATION, "owner", deliver=lambda _: None)
    await member.submit(device.give_birth())
    await member.submit(device.say(SAID))
    armed = True
    await member.submit(withdraw(device))
    sys.stdout.write("withdrawn\n")
    sys.stdout.flush()
    armed = seam != "never"
    while (row := await register.load(CONVERSATION)) is not None and row.scrub_owed:
        hub.tick()
        await asyncio.sleep(0)
    await hub.close()
    await log.close()
    await register.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
