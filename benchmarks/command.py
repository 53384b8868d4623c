"""What the benchmarks share: a command of Quire, run as a person would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def quire(words: list[str], folder: str | Path) -> dict[str, Any]:
    """What `quire WORDS`, called in a folder, prints as JSON."""
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "quire", *words], cwd=folder, env={**os.environ, "PYTHONPATH": places},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)
