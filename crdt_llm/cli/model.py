"""``crdt-llm model``: bring models to this machine.

This module owns what is printed: progress for people on standard error, the folder for programs on
standard output.
"""

from __future__ import annotations

import json as json_format
import sys

from crdt_llm.inference.models import resolve


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the terminal


def run_fetch(name: str, *, json: bool) -> None:
    """Fetch a model if it is not here yet, and print its folder.

    Raises:
        ModelUnusable: there is no such model, or it cannot be had.
    """
    folder = resolve(name, fetch=True, report=_report).absolute()
    facts = {"model": name, "folder": str(folder)}
    print(json_format.dumps(facts) if json else folder)  # noqa: T201 - the terminal
