from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from crdt_llm.cli import model
from crdt_llm.inference.forward.native import library

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def resolving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model that is fetched with two lines of progress."""

    def resolve(name: str, *, fetch: bool, report: Callable[[str], None]) -> Path:
        assert (name, fetch) == ("some/model", True)
        report("downloading")
        report("checking")
        return tmp_path

    monkeypatch.setattr(model, "resolve", resolve)
    return tmp_path


def test_people_see_progress_and_programs_the_folder(
    resolving: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.run_fetch("some/model", json=False)
    assert capsys.readouterr() == (
        f"{resolving}\n",
        "downloading\nchecking\npreparing the native kernels\n",
    )


def test_json_names_both(resolving: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.run_fetch("some/model", json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"model": "some/model", "folder": str(resolving)}


def test_a_model_is_fetched_where_kernels_cannot_be_built(
    resolving: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(model, "library", lambda: library.__wrapped__(resolving / "kernels"))
    model.run_fetch("some/model", json=False)
    shown = capsys.readouterr()
    assert shown.out == f"{resolving}\n"
    *_, last = shown.err.splitlines()
    assert last.startswith("the native kernels cannot be used (")
    assert last.endswith("): replies will be slower")
