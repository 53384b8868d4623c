"""Sparse attention: a modern decoder whose blocks look at a part of what came before (Child et al. 2019).

Local layers cost the same at any length, and their caches keep no more than they look at; some layers that look far
carry over what is beyond. The rules are in layers/sparsity.py.
"""

from dataclasses import dataclass

from quire.errors import UserError, choose
from quire.layers.sparsity import RULES, Pattern
from quire.models.modern import Modern, ModernSettings


@dataclass(frozen=True)
class SparseSettings(ModernSettings):
    """Which part of what came before each block looks at."""

    window: int = 128  # positions of a window, a block or a stride
    attention: tuple[str, ...] = ("window", "full")  # full, window, block-local, columns or strided; by turns

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2:
            raise UserError(f"--model.window must be at least 2 in a sparse model, not {self.window}.")
        if not self.attention:
            raise UserError(f"--model.attention names no kind of attention. Choices: {', '.join(RULES)}.")
        for rule in self.attention:
            choose("--model.attention", rule, list(RULES))

    def patterns(self) -> list[Pattern]:
        return [Pattern(rule, 0 if rule == "full" else self.window) for rule in self.attention]


class Sparse(Modern):
    """A modern decoder whose blocks take turns at kinds of attention."""

    Settings = SparseSettings
