"""What README.md tells a newcomer to type works, as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DEFAULT_URL = "http://127.0.0.1:8765/"
COMMAND_S_MAX = 240

pytestmark = [pytest.mark.real_model, pytest.mark.xdist_group("readme")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def shell_lines() -> list[str]:
    """Every line of a shell block, without its comment."""
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [re.sub(r"\s+# .*", "", line) for line in lines if line]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environment(home: Path, real_model_dir: Path) -> dict[str, str]:
    variables = dict(os.environ)
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        variables.pop(name, None)
    return variables | {"HOME": str(home), "CRDT_LLM_MODELS": str(real_model_dir.parent)}


@pytest.fixture(scope="module")
def url(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as `make serve` starts it, but for the port: tests run beside each other."""
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with log.open("wb") as errors:
        server = subprocess.Popen(
            [sys.executable, "-m", "crdt_llm", "serve", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    with server:
        assert server.stdout is not None
        ready = server.stdout.readline()
        assert ready.startswith("ready http://127.0.0.1:"), log.read_text()
        yield ready.split()[1]
        server.terminate()
        assert server.wait() == 0


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    targets = [line for line in shell_lines() if line.startswith("make ")]
    assert targets == ["make serve", "make demo"]
    for line in targets:
        done = subprocess.run(  # noqa: S603 - a dry run of our own Makefile
            ["make", "--dry-run", line.split()[1]],  # noqa: S607 - whichever make is installed
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_the_commands_of_the_terminal_work_in_their_order(
    url: str, environment: dict[str, str]
) -> None:
    commands = [line for line in shell_lines() if ".venv/bin/crdt-llm" in line]
    assert len(commands) == 6
    for command in commands:
        ours = command.replace(".venv/bin/crdt-llm", f"{sys.executable} -m crdt_llm")
        ours = ours.replace("crdt_llm chat", f"crdt_llm chat --url {url}")
        done = subprocess.run(  # noqa: S602 - the line is a shell's, as a reader would type it
            ours,
            shell=True,
            input="What is the capital of France?",
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert done.stdout.strip(), command


@pytest.mark.usefixtures("url")  # tokens are issued beside a relay that runs
def test_the_commands_for_operators_work(environment: dict[str, str]) -> None:
    commands = [line for line in shell_lines() if line.startswith("crdt-llm token ")]
    assert len(commands) == 3
    for command in commands:
        words, _, _ = command.partition(" > ")
        done = subprocess.run(  # noqa: S602 - as above
            words.replace("crdt-llm", f"{sys.executable} -m crdt_llm"),
            shell=True,
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip(), command


def test_the_python_program_works(url: str, environment: dict[str, str], tmp_path: Path) -> None:
    (program,) = blocks("python")
    assert DEFAULT_URL in program
    done = subprocess.run(  # noqa: S603 - our own README
        [sys.executable, "-c", program.replace(DEFAULT_URL, url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_ready_line_is_the_one_that_is_shown(url: str) -> None:
    shown = f"ready {DEFAULT_URL}"
    assert shown in README
    assert re.sub(r":\d+/", ":8765/", url) == DEFAULT_URL


def test_the_map_names_every_folder() -> None:
    drawn = README[README.index("## The map") :]
    for folder in sorted((ROOT / "crdt_llm").iterdir()):
        if (folder / "__init__.py").exists():
            assert f"  {folder.name}/" in drawn
    for name in ("protocol", "web", "bench", "tests"):
        assert f"{name}/" in drawn
        assert (ROOT / name).is_dir()
    assert shutil.which("make") is not None
