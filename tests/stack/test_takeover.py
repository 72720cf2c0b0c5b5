"""A relay and two nodes as processes: one is killed in mid-reply, and no token is another one."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

from stack.node_process import NodeProcess, node_token
from stack.served_process import ServedProcess

from crdt_llm import Client
from crdt_llm.cli.verification import Keys, Report, verify
from crdt_llm.document.chain import verify_path
from crdt_llm.document.keys import SigningKey
from crdt_llm.document.schema import State

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.document.conversation import Conversation
    from crdt_llm.document.schema import Entry
    from crdt_llm.sync.client.client import OpenConversation, Sampling

TOKENS: Final = 900  # about a second of the tiny model
LEASE_TTL_S: Final = 2.0  # twice the test waits until one has run out


async def until_written(conversation: OpenConversation, slot: str, characters: int) -> None:
    feed = conversation.changes()
    while len(conversation.entry(slot).content) < characters:
        await conversation.next_of(feed, lambda _: True)


def holder_of(conversation: OpenConversation, slot: str) -> bytes:
    place = conversation.entry(slot).place
    assert place is not None
    lease = conversation.document.lease(place.epoch)
    assert lease is not None
    return lease[0]


async def test_a_killed_node_s_reply_is_ended_by_another_as_if_nothing_had_happened(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    async with AsyncExitStack() as stack:
        server = ServedProcess(
            tmp_path / "relay", tiny_model_dir, node=False, lease_ttl_s=LEASE_TTL_S
        )
        (tmp_path / "relay").mkdir()
        await stack.enter_async_context(server)
        token = await node_token(server, tmp_path / "node.token")
        nodes: dict[bytes, NodeProcess] = {}
        for name in ("ada", "bob"):
            node = NodeProcess(server, token, tmp_path / name, tiny_model_dir)
            await stack.enter_async_context(node)
            nodes[node.public] = node
        client = Client(server.url, token=server.token, data=tmp_path / "phone", device="phone")
        conversation = await (await stack.enter_async_context(client)).create()
        epochs: list[tuple[int, ...]] = []
        for temperature in (0.0, 0.7):
            sampling: Sampling = {
                "max_tokens": TOKENS,
                "temperature": temperature,
                "seed": 7,
                "ignore_eos": True,
            }
            whole = await (await conversation.ask("Write about the river.", **sampling)).entry()
            assert whole.state is State.DONE
            again = await conversation.regenerate(whole.id, **sampling)
            await until_written(conversation, again.id, len(whole.content) // 4)
            victim = nodes[holder_of(conversation, again.id)]
            await victim.kill()
            assert conversation.entry(again.id).state is State.STREAMING, "it was too late"
            reply = await again.entry()
            assert (reply.state, reply.content) == (State.DONE, whole.content)
            stored = server.stored(conversation.id)
            ids = server.sampled_ids(stored, stored_entry(stored, again.id))
            assert ids == server.sampled_ids(stored, stored_entry(stored, whole.id))
            assert len(ids) == TOKENS
            epochs.append(conversation.document.epochs())
            await victim.start()
        assert epochs == [(1, 2), (1, 2, 3)]
        check_everything_holds(server, conversation)


def stored_entry(stored: Conversation, name: str) -> Entry:
    entry = stored.entry(name)
    assert entry is not None
    return entry


def check_everything_holds(server: ServedProcess, conversation: OpenConversation) -> None:
    """The chain over all epochs, and the first entry that does not hold if one is forged."""
    relay = SigningKey(server.folder.key("relay").read_bytes()).public
    document = server.stored(conversation.id)
    for tip in document.tree.tips():
        path = document.tree.path(tip)
        problems = [one.problem for one in verify_path(document, path, relay)]
        assert problems == [None] * len(path)
    report = Report()
    path = document.view()
    forged = path[2]
    with document.writing() as writer:
        writer.set(forged, "salt", bytes(16))
    verify(document, path, Keys(relay=relay), report)
    assert report.problem is not None
    assert report.problem.entry == forged
    assert report.chain == list(path[:2])
