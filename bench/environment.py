"""Environments of other servers: made once, with their own pip, and kept beside ours.

This module owns where they lie and when one is good. A server that cannot be installed here is
skipped with its reason; nothing of it gets into the environment of this project.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from peer import Skipped, root_cause

INSTALL_S_MAX = 1800  # vLLM brings a few GB
FOLDER = Path(sys.prefix) / "peers"


@dataclass(frozen=True, slots=True)
class Environment:
    """What a server needs.

    Attributes:
        name: Of the folder.
        requirements: For pip, pinned.
        without: What pip installs along with them, and what must go again.
    """

    name: str
    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()

    def python(self) -> Path:
        """The interpreter, after the environment was made if need be.

        Raises:
            Skipped: It cannot be made here.
        """
        folder = FOLDER / self.name
        python = folder / "bin" / "python"
        ready = folder / "ready.json"
        wanted = hashlib.sha256(json.dumps([self.requirements, self.without]).encode()).hexdigest()
        if ready.exists() and json.loads(ready.read_text()) == wanted:
            return python
        sys.stderr.write(f"installing {' '.join(self.requirements)} into {folder}, once\n")
        run([sys.executable, "-m", "venv", "--clear", str(folder)])
        run([str(python), "-m", "pip", "install", "--quiet", *self.requirements])
        if self.without:
            run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *self.without])
        ready.write_text(json.dumps(wanted))
        return python


def run(words: list[str]) -> None:
    """Run a command to its end.

    Raises:
        Skipped: It failed.
    """
    try:
        subprocess.run(words, check=True, capture_output=True, timeout=INSTALL_S_MAX)  # noqa: S603 - our own words
    except subprocess.CalledProcessError as error:
        why = root_cause(error.stderr.decode(errors="replace"))
        raise Skipped(f"{' '.join(words[1:4])} failed: {why}") from error
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"it was not installed within {INSTALL_S_MAX} s") from error
