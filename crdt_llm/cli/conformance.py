"""``crdt-llm conformance``: does an endpoint keep the protocol's promises?

This module owns the commands that crash or wipe an endpoint, and what is printed; what is tried is
:mod:`crdt_llm.conformance`'s.
"""

from __future__ import annotations

import asyncio
import json as json_format
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from crdt_llm.cli.folders import read_token
from crdt_llm.cli.printable import one_line
from crdt_llm.conformance.connection import Broken, Endpoint, Native
from crdt_llm.conformance.run import CASES, run
from crdt_llm.errors import CrdtLlmError, LocalMisuse, StoreFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from crdt_llm.conformance.run import Result

RETRY_S: Final = 0.1
"""Between two attempts to reach an endpoint that starts."""

_SCHEMES: Final = {"http": "ws", "ws": "ws", "https": "wss", "wss": "wss"}


def endpoint_of(url: str, token: str, deadline_s: float) -> Endpoint:
    """Where a URL points.

    Raises:
        LocalMisuse: it is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.netloc:
        raise LocalMisuse(f"{url!r} is no address of a relay: write http://host:port/")
    return Endpoint(f"{_SCHEMES[parts.scheme]}://{parts.netloc}", token, deadline_s)


def run_conformance(  # noqa: PLR0913 - the options of a command
    url: str,
    *,
    token_file: Path,
    only: Sequence[str],
    crash: str | None,
    wipe: str | None,
    deadline_s: float,
    report: Path | None,
    json: bool,
) -> int:
    """Run the suite and print a table.

    Returns:
        The exit code: 1 if a case failed.

    Raises:
        LocalMisuse: there is no such case.
        StoreFailed: the report cannot be written there.
        CrdtLlmError: the endpoint cannot be reached.
    """
    unknown = sorted(set(only) - {case.id for case in CASES})
    if unknown:
        raise LocalMisuse(f"there is no case {unknown[0]}: {', '.join(case.id for case in CASES)}")
    endpoint = endpoint_of(url, read_token(token_file), deadline_s)
    if report is not None:
        report = report.expanduser()
        _try_to_write(report)
    ways = {
        name: None if command is None else _restarting(f"--{name}", command, endpoint)
        for name, command in (("crash", crash), ("wipe", wipe))
    }
    results = asyncio.run(_run(run(endpoint, only=only, **ways), quiet=json))
    facts = _facts(url, results)
    if report is not None:
        report.write_text(json_format.dumps(facts, indent=2) + "\n")
    if json:
        print(json_format.dumps(facts))  # noqa: T201 - the terminal
    else:
        counts = facts["counts"]
        print(  # noqa: T201 - the terminal
            f"{counts['pass']} of {len(results)} cases hold, {counts['fail']} do not,"
            f" {counts['skip']} were skipped"
        )
    return 1 if facts["counts"]["fail"] else 0


def _try_to_write(path: Path) -> None:
    """Fail before the run and not after it. What is there stays as it is.

    Raises:
        StoreFailed: nothing can be written there.
    """
    is_new = not path.exists()
    try:
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise StoreFailed(f"the report {path} cannot be written ({error.strerror})") from error


async def _run(coming: AsyncIterator[Result], *, quiet: bool) -> list[Result]:
    results = []
    async for result in coming:
        results.append(result)
        if not quiet:
            detail = f"  {one_line(result.detail, 200)}" if result.detail else ""
            print(  # noqa: T201 - the terminal
                f"{result.outcome}  {result.case.id:<16} {result.seconds:6.2f} s"
                f"  {result.case.promise}{detail}",
                flush=True,
            )
    return results


def _restarting(option: str, command: str, endpoint: Endpoint) -> Callable[[], Awaitable[None]]:
    """Run a command of the user's own, then wait until the endpoint is back."""

    async def restart() -> None:
        process = await asyncio.create_subprocess_shell(
            command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        if code := await process.wait():
            raise Broken(f"the command of {option} failed with exit code {code}")
        async with asyncio.timeout(endpoint.deadline_s):
            while True:
                try:
                    wire = await Native.connect(endpoint)
                    await wire.hello(endpoint.token)
                except CrdtLlmError:
                    await asyncio.sleep(RETRY_S)  # the endpoint starts; nothing tells when
                else:
                    await wire.close()
                    return

    return restart


def _facts(url: str, results: Sequence[Result]) -> dict[str, Any]:
    outcomes = [result.outcome for result in results]
    return {
        "endpoint": url,
        "counts": {name: outcomes.count(name) for name in ("pass", "fail", "skip")},
        "cases": [
            {
                "id": result.case.id,
                "promise": result.case.promise,
                "report": result.case.report,
                "outcome": result.outcome,
                "detail": result.detail,
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }
