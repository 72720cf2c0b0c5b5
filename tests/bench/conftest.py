"""Benches are programs beside the package: their folder is where they find each other."""

from __future__ import annotations

import sys
from pathlib import Path

# Behind everything else: a bench has a name that something installed may have too.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
