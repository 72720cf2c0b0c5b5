from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import pytest

from crdt_llm.cli.connection import Door, Standing, door_to
from crdt_llm.errors import (
    AuthenticationFailed,
    ConnectionLost,
    LocalMisuse,
    Unavailable,
)
from crdt_llm.sync.client.client import Client

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.sync.transport.dial import Socket


class Failing(AbstractAsyncContextManager["Socket"]):
    """A socket that cannot be had."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def __aenter__(self) -> Socket:
        raise self._error

    async def __aexit__(self, *_: object) -> None:
        """It was never entered."""


def failing(error: Exception) -> Door:
    def dial() -> AbstractAsyncContextManager[Socket]:
        return Failing(error)

    return Door("ws://relay/", dial)


async def test_nobody_answering_is_told_with_what_follows() -> None:
    door = failing(ConnectionLost("nobody"))
    async with Client("ws://relay/", dial=door.dial) as client:
        conversation = await client.create()
        with pytest.raises(Unavailable, match="ws://relay/: it is kept"):
            await door.reached("it is kept")
        assert door.standing(conversation) is Standing.AWAY


async def test_a_bug_in_the_dial_keeps_nobody_waiting() -> None:
    door = failing(ZeroDivisionError("a bug"))
    async with Client("ws://relay/", dial=door.dial) as client:
        await client.create()
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match="it is kept"):
                await door.reached("it is kept")


async def test_a_refusal_is_the_conversation_s_to_tell() -> None:
    door = failing(AuthenticationFailed("unauthenticated", "no"))
    async with Client("ws://relay/", dial=door.dial) as client:
        conversation = await client.create()
        await door.reached("never said")
        changes = conversation.changes()
        while conversation.refused is None:
            await anext(changes)
        assert door.standing(conversation) is Standing.REFUSED


async def test_before_the_first_attempt_nothing_is_known() -> None:
    door = failing(ConnectionLost("nobody"))
    async with Client("ws://relay/", dial=door.dial) as client:
        conversation = await client.create()
        conversation.pause()
        assert door.standing(conversation) is Standing.CONNECTING


async def test_news_come_after_every_attempt() -> None:
    door = failing(ConnectionLost("nobody"))
    for _ in range(2):
        with pytest.raises(ConnectionLost):
            async with door.dial():
                pass
        await door.news()


def test_a_token_in_the_address_needs_no_file(tmp_path: Path) -> None:
    door = door_to("http://127.0.0.1:1/?token=secret", tmp_path / "none")
    assert door.url == "ws://127.0.0.1:1/"  # nothing that is shown holds the secret
    with pytest.raises(AuthenticationFailed):
        door_to("http://127.0.0.1:1/", tmp_path / "none")


def test_what_is_no_address_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(LocalMisuse, match="address"):
        door_to("nowhere", tmp_path / "none")
