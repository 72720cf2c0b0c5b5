"""An end in the middle of a reply: asked for, or not."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from typing import TYPE_CHECKING

import pytest
from adversity.serving import LONG, SHORT, Serving, end_of, known_to_the_relay, sampled

from crdt_llm.document.schema import State
from crdt_llm.sync.wire.verdict import CloseCode

if TYPE_CHECKING:
    from pathlib import Path

PARAMS = LONG | {"temperature": 0.7, "seed": 9}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_an_end_in_the_middle_of_a_reply_loses_nothing(
    tmp_path: Path, tiny_model_dir: Path, how: signal.Signals
) -> None:
    with Serving(tmp_path, tiny_model_dir) as serving:
        async with serving.client() as client:
            conversation = await client.create()
            await conversation.synced_once()
            async with serving.socket(conversation.id) as socket:
                reply = await conversation.ask("a long story", **PARAMS)
                await sampled(conversation, reply.id)
                worker = os.pidfd_open(*serving.workers)
                serving.running.send_signal(how)
                assert await serving.ended() == (-how if how is signal.SIGKILL else 0)
                code, _, _ = await end_of(socket)
                assert code == (1006 if how is signal.SIGKILL else CloseCode.RESTART)
            # Also if nobody tells it to: readable is what a process is that has ended.
            await asyncio.to_thread(select.select, [worker], [], [])
            os.close(worker)
            before = conversation.entry(reply.id)
            assert before.state is State.STREAMING
            await conversation.send("written while nobody was there")
            serving.start()
            after = await reply.entry()
            assert after.state is State.DONE
            assert after.content.startswith(before.content)
            await known_to_the_relay(conversation, serving)
            undisturbed = await client.create()
            assert after.content == await (await undisturbed.ask("a long story", **PARAMS)).text()
        assert await serving.stop() == 0
        assert "Traceback" not in serving.errors
        assert list(serving.folder.path.glob("log.db-wal")) == []


async def test_an_end_while_the_engine_still_loads(tmp_path: Path, tiny_model_dir: Path) -> None:
    with Serving(tmp_path, tiny_model_dir) as serving:
        serving.running.send_signal(signal.SIGINT)
        assert await serving.ended() == 0
        assert serving.errors.splitlines()[-1] == "stopping"
        assert "Traceback" not in serving.errors


async def test_an_engine_that_is_killed_while_it_loads_is_started_again(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    with Serving(tmp_path, tiny_model_dir) as serving:
        while not (workers := serving.workers):
            pass  # the kernel tells nobody of a new process
        os.kill(workers[0], signal.SIGKILL)
        async with serving.client() as client:
            conversation = await client.create()
            reply = await conversation.ask("hello", **SHORT)
            assert (await reply.entry()).state is State.DONE
            assert (await serving.get("/readyz"))[0] == 200
        assert "the engine does not start" in serving.errors
