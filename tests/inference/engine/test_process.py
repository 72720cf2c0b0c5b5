"""How the parent starts the engine's process; what the two do together is in `test_worker.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crdt_llm.inference.engine.process import EngineProcess

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

KV_BYTES = 1 << 24


async def test_nothing_in_the_current_folder_is_imported(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("numpy", "torch", "argparse", "crdt_llm"):
        (tmp_path / f"{module}.py").write_text("open('was-run', 'w'); raise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    async with await EngineProcess.start(
        tiny_model_dir, threads=1, kv_memory_bytes=KV_BYTES
    ) as engine:
        assert (await engine.warm([1, 2, 3])).prompt == 3
    assert not (tmp_path / "was-run").exists()
