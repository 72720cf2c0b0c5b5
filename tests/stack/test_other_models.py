"""A served model that is no Llama: transformers computes it, and everything else is as it was."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from stack.served_process import ServedProcess
from stack.test_end_to_end import die_and_come_back, two_devices, until

from crdt_llm.cli.audit import run_audit
from crdt_llm.cli.replay import NOT_BIT_EXACT, run_replay
from crdt_llm.document.schema import State

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.sync.client.client import Sampling

TOKENS = 300
DIFFERENCE_MAX = 0.5
"""In nats: in bf16 a text that is computed in other chunks has other last bits, of eight."""


@pytest.fixture
def gpt2_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A random GPT-2 with the tokenizer and the template of the tiny model."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 - slow to load

    folder = shutil.copytree(tiny_model_dir, tmp_path / "gpt2")
    torch.manual_seed(4)
    said = json.loads((folder / "config.json").read_text())
    config = GPT2Config(
        vocab_size=said["vocab_size"],
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=1024,
        initializer_range=0.2,
        bos_token_id=said["bos_token_id"],
        eos_token_id=said["eos_token_id"],
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


async def test_a_model_that_is_no_llama_is_served_killed_and_audited(
    gpt2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling: Sampling = {"max_tokens": TOKENS, "temperature": 0.7, "seed": 7, "ignore_eos": True}
    async with (
        ServedProcess(tmp_path, gpt2_dir, lease_ttl_s=1.0) as server,
        two_devices(server, tmp_path) as devices,
    ):
        phone, laptop = devices.both
        reply = await phone.ask("Write about the river.", **sampling)
        await until(phone, lambda: len(phone.entry(reply.id).content) > TOKENS // 4)
        await die_and_come_back(server, devices, reply.id)  # what was sampled stays so
        entry = await reply.entry()
        assert entry.state is State.DONE
        assert len(server.sampled_ids(phone.document, entry)) == TOKENS
        short: Sampling = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
        assert (await (await laptop.ask("and?", **short)).entry()).state is State.DONE
        data = server.folder.path
    model = str(gpt2_dir)
    audited = await asyncio.to_thread(
        run_audit, conversation=None, data=data, model=model, tolerance=DIFFERENCE_MAX, as_json=True
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["difference"] < DIFFERENCE_MAX
    assert all(one["same_model"] for one in facts["replies"])
    assert audited == (0 if facts["agree"] else 1)
    verified = await asyncio.to_thread(
        run_replay, conversation=None, data=data, model=model, as_json=True, check_kv=True
    )
    shown = capsys.readouterr()
    assert NOT_BIT_EXACT in shown.err
    facts = json.loads(shown.out)
    assert verified == 1  # nothing vouches for the KV
    assert {border["same"] for border in facts["borders"]} == {None}
    assert [reply["problem"] for reply in facts["replies"]] == [None, None]
