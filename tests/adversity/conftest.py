"""One server on the tiny model for a whole module: what one test does, the next must not feel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from adversity.serving import Serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def serving(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("serving"), tiny_model_dir) as served:
        yield served
        assert served.running.poll() is None, served.errors
        assert "Traceback" not in served.errors
