"""``crdt-llm audit`` and ``crdt-llm replay`` on what a served conversation left behind."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from stack.test_turn_costs import Stack, done, two_devices

from crdt_llm.cli.audit import run_audit
from crdt_llm.cli.replay import run_replay
from crdt_llm.inference.process import EngineProcess

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


async def test_replies_of_a_served_conversation_agree_with_themselves(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        await EngineProcess.start(tiny_model_dir, threads=1) as process,
        Stack(tmp_path, tiny_model_dir, process) as stack,
        two_devices(stack) as (phone, _),
    ):
        data = stack.folder.path
        await done(await phone.ask("hello", max_tokens=20, temperature=0.7))
        await done(await phone.ask("and?", max_tokens=20, temperature=0.0))
    model = str(tiny_model_dir)
    code = await asyncio.to_thread(
        run_audit, conversation=None, data=data, model=model, tolerance=0.0, as_json=True
    )
    facts = json.loads(capsys.readouterr().out)
    assert code == 0
    assert facts["agree"] is True
    assert facts["difference"] == 0
    assert len(facts["replies"]) == 2
    code = await asyncio.to_thread(
        run_audit, conversation=None, data=data, model=model, tolerance=0.0, as_json=False
    )
    assert code == 0
    assert capsys.readouterr().out.endswith("choices changed 0: agrees\n")
    code = await asyncio.to_thread(
        run_replay, conversation=None, data=data, model=model, as_json=True
    )
    assert code == 0
    assert json.loads(capsys.readouterr().out)["exact"] is True
