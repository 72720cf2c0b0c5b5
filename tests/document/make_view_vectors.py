"""Makes ``protocol/vectors/view.json``: documents' facts and the views that follow from them.

Made by the naive writing of the rules, with fixed seeds, so that making it twice gives equal files.
Run it after a change of the rules: ``python tests/document/make_view_vectors.py``.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
FILE = TESTS.parent / "protocol" / "vectors" / "view.json"
CASES = 60
ABOUT = (
    "The view of SCHEMA.md, section 5, over what it reads of each entry: `place` is null without "
    "one, `ended` is whether it has ended. `views` has the view for each head, an unknown one "
    "included; `pending` are the pending entries by (clock, id), `ends` the unplaced ends."
)


def case(seed: int) -> dict[str, Any]:
    """Random facts: hostile ones in every third case, else what honest peers leave behind."""
    from document.naive_view import ROOT, NaiveView  # noqa: PLC0415 - when run as a program

    from crdt_llm.document.tree import Facts  # noqa: PLC0415 - as above

    draw = random.Random(seed)
    hostile = seed % 3 == 0
    facts: dict[str, Facts] = {}
    for entry in draw.sample("ABCDEFGH", draw.randint(1, 8)):
        known = [*facts, ROOT]
        names = [*"ABCDEFGH", ROOT, "missing"] if hostile else known
        after = draw.choice(names)
        clock = 1 + max((one.clock for one in facts.values()), default=0)
        parent = draw.choice(names) if hostile and draw.random() < 0.4 else None
        facts[entry] = Facts(
            id=entry,
            clock=draw.randint(1, 5) if hostile else draw.choice((clock, max(1, clock - 1))),
            slot=draw.random() < 0.5,
            fork=draw.random() < 0.3,
            after=after,
            parent=parent,
            epoch=draw.randint(1, 2) if parent is not None else 0,
            ended=draw.random() < 0.2,
        )
        if not hostile and draw.random() < 0.6:  # the node admits what comes next
            view = NaiveView(facts.values())
            ready = [one for one in view.pending() if view.is_admitted(view.up(one))]
            for one in ready[:1]:
                old = facts[one]
                facts[one] = Facts(
                    old.id, old.clock, old.slot, old.fork, old.after, view.up(one), 1, old.ended
                )
    view = NaiveView(facts.values())
    return {
        "entries": [
            {
                "id": one.id,
                "clock": one.clock,
                "slot": one.slot,
                "mode": "fork" if one.fork else "continue",
                "after": one.after,
                "place": None if one.parent is None else {"parent": one.parent, "epoch": one.epoch},
                "ended": one.ended,
            }
            for one in facts.values()
        ],
        "views": {head: list(view.view(head)) for head in (ROOT, *sorted(facts), "missing")},
        "pending": list(view.pending()),
        "ends": sorted(filter(view.is_end, facts)),
        "admitted": sorted(filter(view.is_admitted, facts)),
    }


def vectors() -> str:
    """The whole file."""
    cases = ",\n".join(json.dumps(case(seed)) for seed in range(CASES))
    return f'{{"about": {json.dumps(ABOUT)}, "cases": [\n{cases}\n]}}\n'


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    FILE.write_text(vectors(), encoding="utf-8")
