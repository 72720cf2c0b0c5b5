"""``crdt-llm model``: bring models to this machine, and what computes them.

This module owns what is printed: progress for people on standard error, the folder for programs on
standard output.
"""

from __future__ import annotations

import json as json_format
import sys

from crdt_llm.inference.forward.native import KernelsUnavailable, library
from crdt_llm.inference.models.folders import resolve


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the terminal


def run_fetch(name: str, *, json: bool) -> None:
    """Fetch a model if it is not here yet, build the kernels, and print the model's folder.

    Kernels that cannot be built are no failure: the node then computes in torch.

    Raises:
        ModelUnusable: there is no such model, or it cannot be had.
    """
    folder = resolve(name, fetch=True, report=_report).absolute()
    _report("preparing the native kernels")
    try:
        library()
    except KernelsUnavailable as error:
        _report(f"the native kernels cannot be used ({error}): replies will be slower")
    facts = {"model": name, "folder": str(folder)}
    print(json_format.dumps(facts) if json else folder)  # noqa: T201 - the terminal
