"""The modern decoder: Llama, Mistral, Qwen2, Qwen3, SmolLM2 and their kin (Touvron et al. 2023; Yang et al. 2025).

RMS norms before each part, rotary positions, SwiGLU, shared key and value heads; the settings say what one family has
and another has not. interop/hugging_face.py reads and writes their checkpoints.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from quire.errors import UserError
from quire.layers.attention import MultiHeadAttention
from quire.layers.blocks import PreNormBlock
from quire.layers.feedforward import SwiGLU
from quire.layers.normalization import RMSNorm
from quire.layers.positions import RotaryPositions, RotaryScaling
from quire.layers.sparsity import Pattern
from quire.models.decoder import Decoder, DecoderSettings


@dataclass(frozen=True)
class ModernSettings(DecoderSettings):
    """Shape and parts of a modern decoder."""

    qkv_bias: bool = False  # biases on queries, keys and values (Qwen2)
    rotary_base: float = 10000.0  # base of the rotary angles, "theta" elsewhere
    rotary_scaling: Literal["none", "linear", "yarn", "llama3"] = "none"  # for texts longer than those trained on
    rotary_factor: float = 1.0  # how many times longer
    rotary_original_context: int = 0  # the context that the scaled model was first trained with
    rotary_low_frequency: float = 0.0  # llama3, yarn: turns in that context below which angles are scaled; 0: 1
    rotary_high_frequency: float = 0.0  # and above which they are not; 0: 4 (llama3), 32 (yarn)
    window: int = 0  # each token looks at so many, itself counted (Mistral); 0: at all before it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rotary()
        if self.window < 0:
            raise UserError(f"--model.window must be at least 1, or 0 for all positions, not {self.window}.")
        if self.rotary_factor < 1 or self.rotary_base <= 1:
            raise UserError("--model.rotary-factor must be at least 1, and --model.rotary-base above 1.")
        if self.rotary_scaling in ("yarn", "llama3") and self.rotary_original_context < 1:
            raise UserError(
                f"--model.rotary-scaling {self.rotary_scaling} needs --model.rotary-original-context:"
                " the context length that the model was first trained with."
            )
        low, high = self.rotary_low_frequency, self.rotary_high_frequency
        if low < 0 or high < 0 or (high and high <= (low or 1)):
            raise UserError("--model.rotary-high-frequency must be above --model.rotary-low-frequency, both above 0.")

    def patterns(self) -> list[Pattern]:
        """What each block's attention looks at, repeated over the blocks."""
        return [Pattern("window", self.window) if self.window else Pattern()]

    def rotary(self) -> RotaryPositions:
        """The rotary positions of all blocks."""
        scaling = RotaryScaling(
            self.rotary_scaling,
            self.rotary_factor,
            self.rotary_original_context,
            self.rotary_low_frequency,
            self.rotary_high_frequency,
        )
        return RotaryPositions(self.head_channels, self.rotary_base, scaling)


class Modern(Decoder):
    """A decoder of RMSNorm, rotary positions, grouped attention and SwiGLU."""

    Settings = ModernSettings

    def __init__(self, settings: ModernSettings) -> None:
        size, rotary = settings.embedding_size, settings.rotary()
        norm = partial(RMSNorm, size, settings.norm_epsilon)

        def block() -> PreNormBlock:
            attention = MultiHeadAttention(
                size,
                settings.heads,
                settings.kv_heads or settings.heads,
                settings.head_channels,
                bias=settings.qkv_bias,
                output_bias=False,
                qk_norm=settings.qk_norm,
                epsilon=settings.norm_epsilon,
                rotary=rotary,
                dropout=settings.dropout,
            )
            hidden = settings.feedforward_size or 4 * size
            return PreNormBlock(attention, SwiGLU(size, hidden), norm, settings.dropout)

        blocks = [block() for _ in range(settings.layers)]
        super().__init__(settings, blocks, norm=norm(), rotary=rotary, patterns=settings.patterns())
