"""A hundred thousand hostile updates against a room: what became of each kind, and what they cost.

The updates are generated from a seed, each kind breaking one rule (``tests/hostile_updates.py``).
They go into a real room, one after the other, from members of all sorts: a writer, the owner, a
reader, a node that lost its lease, one that never had it. None may be taken, none may end the room
or keep it for long, and afterwards the document must be byte for byte what it was. Waiting after
many refusals is off: here the checks themselves are measured.

    python bench/hostile.py [--count 100000] [--seed 1]

The last line is the result as JSON; the exit code is 0 only if nothing was taken, nothing went
wrong and memory stayed bounded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import resource
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hostile_updates import KINDS, a_world, is_same, send

MEMORY_MIB_MAX: Final = 100
"""How much the process may grow by: generators and allocators keep some, a leak keeps each one."""

WARM_UP: Final = 3_000


def _mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def measure(count: int, seed: int) -> dict[str, Any]:
    """Send them; what became of them, by kind."""
    world, rng = await a_world(), Random(seed)
    names = tuple(KINDS)
    codes: dict[str, Counter[str]] = {name: Counter() for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    before_mib = 0.0
    for number in range(count):
        if number == min(WARM_UP, count // 2):
            before_mib = _mib()
        name = names[number % len(names)]
        who, update = KINDS[name](world, rng)
        start = time.perf_counter()
        code = await send(world, who, update)
        spent[name].append((time.perf_counter() - start) * 1e3)
        codes[name][code or "no-op"] += 1
    return {
        "codes": codes,
        "spent": spent,
        "same_document": is_same(world.room.diff(), world.document),
        "grown_mib": round(_mib() - before_mib, 1),
    }


def main() -> int:
    """Run, print a line for each kind, and say whether all of it held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # a line for each refusal
    found = asyncio.run(measure(arguments.count, arguments.seed))
    print(f"{'kind':<36}{'sent':>7}{'taken':>7}{'p50 ms':>8}{'max ms':>8}  refused as")
    taken = unreadable = 0
    everything: list[float] = []
    for name, codes in found["codes"].items():
        spent = found["spent"][name]
        everything += spent
        taken += codes["TAKEN"]
        unreadable += codes["unreadable"]
        said = ", ".join(f"{code} {count}" for code, count in codes.most_common(4))
        print(
            f"{name:<36}{sum(codes.values()):>7}{codes['TAKEN']:>7}"
            f"{statistics.median(spent):>8.2f}{max(spent):>8.1f}  {said}"
        )
    held = taken == 0 and found["same_document"] and found["grown_mib"] <= MEMORY_MIB_MAX
    result = {
        "bench": "hostile",
        "sent": arguments.count,
        "kinds": len(found["codes"]),
        "taken": taken,
        "unreadable": unreadable,
        "same_document": found["same_document"],
        "p50_ms": round(statistics.median(everything), 3),
        "p99_ms": round(statistics.quantiles(everything, n=100)[98], 2),
        "max_ms": round(max(everything), 1),
        "grown_mib": found["grown_mib"],
    }
    print(json.dumps(result))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
