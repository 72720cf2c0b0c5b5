"""Models for all tests, one folder each for a whole run, and how Hypothesis runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from crdt_llm.inference.models import folders

# Hypothesis would fail an example that takes 200 ms: a timing assertion, and the machine is shared.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama with random weights, small enough to build on the spot."""
    from tiny_model import build_tiny_model  # noqa: PLC0415 - loads torch, which few tests need

    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent  # a worker's own folder lies in the run's
    return build_tiny_model(run / "tiny-model")


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """The folder of the default model; fetched if it is not here yet."""
    cache = Path(os.environ.get("CRDT_LLM_MODELS") or REPOSITORY / ".venv" / "models")
    return folders.resolve(folders.DEFAULT_MODEL, cache, fetch=True)
