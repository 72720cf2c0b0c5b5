"""What must not be told to whoever reads a terminal, a log or an error."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
from base64 import b64encode, urlsafe_b64encode
from contextlib import suppress
from typing import TYPE_CHECKING

from adversity.serving import ENVIRONMENT, SHORT, Serving, end_of
from websockets.exceptions import InvalidStatus

if TYPE_CHECKING:
    from pathlib import Path


def secrets_of(serving: Serving) -> list[str]:
    """The token and the keys in every form that a log could give them."""
    names = ("master", "node", "relay", "token")
    keys = [serving.folder.key(name).read_bytes() for name in names]
    assert len(list((serving.folder.path / "keys").iterdir())) == len(names)
    forms = [serving.token]
    for key in keys:
        forms += [key.hex(), b64encode(key).decode().rstrip("="), repr(key)[2:-1]]
        forms.append(urlsafe_b64encode(key).decode().rstrip("="))
    return forms


async def test_no_secret_is_logged(tmp_path: Path, tiny_model_dir: Path) -> None:
    with Serving(tmp_path, tiny_model_dir, ("--verbose",)) as serving:
        token = serving.token
        async with serving.client() as client:
            conversation = await client.create()
            await (await conversation.ask("hello", **SHORT)).text()
        async with serving.socket(conversation.id) as socket:
            await socket.send("text")
            assert token not in (await end_of(socket))[1]
        async with serving.socket(f"{token}{token}") as socket:
            assert token not in (await end_of(socket))[1]
        with suppress(InvalidStatus):
            await serving.socket(conversation.id, origin=f"https://{token}.example")
        for path in ("/", f"/{conversation.id}", f"/{token}", "/readyz", f"/?{'x=1&' * 100}"):
            _, body = await serving.get(f"{path}?token={token}")
            assert token not in body
        for junk in (f"{token}\r\n\r\n", f"GET /?token={token} SPAM/1\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", serving.port)
            writer.write(junk.encode())
            assert token.encode() not in await reader.read()
            writer.close()
        for worker in serving.workers:
            os.kill(worker, signal.SIGKILL)
        assert await serving.stop() == 0
        serving.start()
        assert await serving.stop() == 0
        told = serving.errors
        assert "DEBUG" in told  # it was talkative
        assert [form for form in secrets_of(serving) if form in told] == []


def test_the_ready_line_names_the_token_on_a_terminal_alone(tmp_path: Path) -> None:
    serving = Serving(tmp_path, None)
    inside, outside = pty.openpty()
    with subprocess.Popen(  # noqa: S603 - our own program
        serving.command, stdout=outside, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    ) as process:
        os.close(outside)
        with os.fdopen(inside, "rb", buffering=0) as terminal:
            line = b""
            while not line.endswith(b"\n"):
                line += terminal.read(1000)
            process.terminate()
            process.wait()
    assert line.decode().strip().endswith(f"/?token={serving.token}")
    assert process.returncode == 0
    with subprocess.Popen(  # noqa: S603 - our own program
        serving.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
        rest = process.stdout.read()
    assert line.startswith(b"ready http://")
    assert serving.token.encode() not in line + rest
    assert process.returncode == 0
