"""``crdt-llm audit`` and ``crdt-llm replay`` on what a served conversation left behind."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from stack.test_turn_costs import Stack, done, two_devices

from crdt_llm.cli.app import FAILED, run
from crdt_llm.cli.audit import run_audit
from crdt_llm.cli.replay import run_replay
from crdt_llm.inference.engine.process import EngineProcess

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from crdt_llm.inference.node.digests import Border


async def test_replies_of_a_served_conversation_agree_with_themselves(
    tmp_path: Path,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        await EngineProcess.start(tiny_model_dir, threads=1) as process,
        Stack(tmp_path, tiny_model_dir, process) as stack,
        two_devices(stack) as (phone, _),
    ):
        data = stack.folder.path
        monkeypatch.setattr(stack.engine, "digest", process.digest, raising=False)
        await done(await phone.ask("hello", max_tokens=20, temperature=0.7))
        last = await done(await phone.ask("and?", max_tokens=20, temperature=0.0))
        digests = stack.node.digests
        assert digests is not None
        recorded, note = asyncio.Event(), digests.note

        def watched(conversation: str, border: Border, kv: bytes) -> None:
            note(conversation, border, kv)
            if border.entry == last.id:
                recorded.set()

        monkeypatch.setattr(digests, "note", watched)
        known = {border.entry for border in digests.load(phone.id)}
        if last.id not in known:
            await recorded.wait()
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
    file = next((data / "kv" / "digests").iterdir())
    for change, expected in ((lambda text: text, 0), (turn_a_digit, 1), (lambda _: "", 1)):
        file.write_text(change(file.read_text()))
        code = await asyncio.to_thread(
            run_replay, conversation=None, data=data, model=model, as_json=True, check_kv=True
        )
        facts = json.loads(capsys.readouterr().out)
        assert code == expected
        assert facts["exact"] is True
        assert facts["same_kv"] is (expected == 0)
        assert len(facts["borders"]) == 4
    assert [border["same"] for border in facts["borders"]] == [None] * 4


async def test_other_weights_and_another_device_are_what_computes(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        await EngineProcess.start(tiny_model_dir, threads=1) as process,
        Stack(tmp_path, tiny_model_dir, process) as stack,
        two_devices(stack) as (phone, _),
    ):
        await done(await phone.ask("hello", max_tokens=20, temperature=0.0))
    words = ["--data", str(stack.folder.path), "--model", str(tiny_model_dir), "--json"]
    differences = {}
    for weights in ("int8", "float32"):  # it was int8
        same = weights == "int8"
        await asyncio.to_thread(run, ["audit", *words, "--weights", weights])
        audited = json.loads(capsys.readouterr().out)
        differences[weights] = audited["difference"]
        assert [reply["same_model"] for reply in audited["replies"]] == [same]
        await asyncio.to_thread(run, ["replay", *words, "--weights", weights])
        replayed = json.loads(capsys.readouterr().out)
        assert [reply["same_model"] for reply in replayed["replies"]] == [same]
    assert differences["int8"] == 0 < differences["float32"]
    for command in ("audit", "replay"):
        assert await asyncio.to_thread(run, [command, *words, "--device", "abacus"]) == FAILED
        assert "abacus" in capsys.readouterr().err


def turn_a_digit(text: str) -> str:
    """Another digest at the first border."""
    first, *rest = text.splitlines()
    return "\n".join([first[:-1] + ("0" if first[-1] != "0" else "1"), *rest])
