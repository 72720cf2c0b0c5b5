"""A llama.cpp server, run by the interpreter of its own environment: model, port."""

from __future__ import annotations

import sys
from typing import Any


def main() -> None:
    """Serve until standard input closes."""
    import xllamacpp  # type: ignore[import-not-found]  # noqa: PLC0415 - only that interpreter has it

    model, port, threads, slots = sys.argv[1], *map(int, sys.argv[2:5])
    params: Any = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 8192 * slots
    params.n_parallel = slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.hostnames = ["127.0.0.1"]
    params.port = port
    server = xllamacpp.Server(params)
    sys.stdout.write(f"ready {server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
