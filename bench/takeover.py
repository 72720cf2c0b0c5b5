"""Plays schedules of nodes that crash, hang, get cut off and come back; prints what came of them.

    python bench/takeover.py [--schedules 1000] [--first 0]

Each schedule is a seed: the production code of lease desk, rooms, links and nodes, under simulated
clocks (the relay's runs up to twice or half as fast), wires that hold or lose what was sent,
crashes of nodes and relay, and an embedded node that comes and goes. A schedule fails if a reply is
not exactly the one that it must be, if one is missing, if an earlier node wrote after a later one,
or if the chain does not verify. A failing seed is printed and replays with ``--first SEED
--schedules 1``. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests")]

from stack.simulated_takeover import House  # noqa: E402 - the tests' folder is no package


def main() -> int:
    """Play, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # who was lost and found again is what this is about
    began, totals, failed = time.perf_counter(), Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        house = House(Path(folder))
        for seed in range(arguments.first, arguments.first + arguments.schedules):
            try:
                report = house.run(seed)
            except Exception as error:  # noqa: BLE001 - the seed is what matters
                failed.append(seed)
                print(f"seed {seed}: {type(error).__name__}: {error}")
                continue
            totals["schedules"] += 1
            totals["replies"] += report.replies
            totals["replies of several nodes"] += report.resumed
            totals["takeovers"] += report.takeovers
            totals["late writes refused"] += report.refused_late
            totals.update({f"events: {name}": count for name, count in report.events.items()})
    for name, count in sorted(totals.items()):
        print(f"{name:<32}{count:>10}")
    facts = {"failed": failed, "seconds": round(time.perf_counter() - began, 1), **totals}
    print(json.dumps(facts))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
