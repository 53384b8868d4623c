"""Recurrent language models: a stack of RNN, LSTM or GRU layers (Elman 1990; Zaremba et al. 2014; Cho et al. 2014)."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from quire.errors import UserError
from quire.layers.normalization import RMSNorm
from quire.layers.recurrent import CELLS
from quire.models.parts import Part, PartsModel, RecurrentPart
from quire.models.settings import ModelSettings


@dataclass(frozen=True)
class RecurrentSettings(ModelSettings):
    """Shape of a recurrent model."""

    kind: str = "recurrent"  # which architecture: a name in MODELS
    cell: Literal["rnn", "lstm", "gru"] = "lstm"  # what reads a position: tanh, LSTM or GRU
    embedding_size: int = 256  # channels of a token's vector
    hidden_size: int = 0  # channels of a layer's state; 0: embedding_size
    layers: int = 2  # recurrent layers, one on top of the other
    residual: bool = True  # each layer reads its input normalized and adds to it; false: as in torch.nn
    tied: bool = False  # the output head shares the token embedding's weights
    dropout: float = 0.0  # on every layer's output but the last one's

    def __post_init__(self) -> None:
        for name, least in (("embedding_size", 1), ("hidden_size", 0), ("layers", 1), ("context_length", 2)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise UserError(f"--model.{flag} must be at least {least}, not {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--model.dropout must be at least 0 and below 1, not {self.dropout}.")
        if self.tied and self.state_size != self.embedding_size:
            raise UserError(
                f"--model.tied needs states of the embedding's size: --model.hidden-size {self.hidden_size} is not"
                f" --model.embedding-size {self.embedding_size}. Make them equal, or give --model.tied False."
            )

    @property
    def state_size(self) -> int:
        """Channels of a layer's state, H."""
        return self.hidden_size or self.embedding_size


class Recurrent(PartsModel):
    """Tokens (B, T) in; logits (B, T, V) out, or the mean loss where targets are given.

    A residual model is x + cell(norm(x)) layer by layer, with a norm before the head, so that gradients reach the
    first layer however many there are; its first layer has no x to add where it changes the size.
    """

    Settings = RecurrentSettings

    def __init__(self, settings: RecurrentSettings) -> None:
        parts: list[Part] = []
        for layer in range(settings.layers):
            inputs = settings.state_size if layer else settings.embedding_size
            parts.append(
                RecurrentPart(
                    CELLS[settings.cell](inputs, settings.state_size),
                    RMSNorm(inputs) if settings.residual else None,
                    settings.dropout if layer < settings.layers - 1 else 0.0,
                    settings.residual and inputs == settings.state_size,
                )
            )
        if settings.residual:
            parts.append(Part(RMSNorm(settings.state_size)))
        super().__init__(settings, settings.embedding_size, parts, settings.state_size, settings.tied)
        # A norm brings small vectors to size, and they learn fast; without one they must have it from the start.
        nn.init.normal_(self.token_embedding.weight, std=0.02 if settings.tied or settings.residual else 1.0)
