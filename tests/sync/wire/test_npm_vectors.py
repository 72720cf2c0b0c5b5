from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PEERS = Path(__file__).parents[2] / "js"


@pytest.mark.npm
def test_real_yjs_agrees_with_the_vectors() -> None:
    node = shutil.which("node")
    if node is None or not (PEERS / "node_modules").is_dir():
        pytest.skip("needs node and `npm ci` in tests/js")
    run = subprocess.run(  # noqa: S603 - our own program, found by name
        [node, "--test", "vectors.test.mjs"],
        cwd=PEERS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
