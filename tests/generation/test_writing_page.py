"""docs/writing.md: its commands work as they stand there."""

import re
import shlex
from pathlib import Path
from typing import Any

from quire.run import Run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "writing.md"


def test_the_commands(tiny: Run, quire: Any) -> None:
    """Every `quire generate` line, on a small run and for a few tokens."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("quire generate runs/book")]
    assert len(commands) >= 9
    Path("prompts.txt").write_text("The owl\nThe night\n")
    for command in commands:
        words = shlex.split(command.replace("runs/book", "tiny"), comments=True)[1:]
        said = quire(*words, "--tokens", "5")
        assert said.code == 0 and said.out, f"{command}\n{said.err}"
