"""A stack: a language model whose layers are listed one by one, in TOML or in Python, any mix of them.

    [[model.stack]]
    kind = "embedding"
    size = 128

STACK has the kinds; an entry's fields are its settings. Sizes follow from the layer before, or are given and checked.
The map from the last layer to the vocabulary is not listed: every stack ends in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import tyro
from torch import nn

from quire.config import from_table
from quire.errors import UserError, choose
from quire.layers.activations import ACTIVATIONS
from quire.layers.attention import MultiHeadAttention
from quire.layers.dropout import Dropout
from quire.layers.feedforward import FeedForward, SwiGLU
from quire.layers.layer import Layer
from quire.layers.linear import Linear, OutputHead
from quire.layers.positions import LearnedPositions, RotaryPositions, SinusoidalPositions
from quire.layers.recurrent import CELLS
from quire.models.parts import NORMALIZATIONS, AttentionPart, Part, PartsModel, PositionPart, RecurrentPart
from quire.models.settings import ModelSettings

Normalization = Literal["none", "layernorm", "rmsnorm"]


@dataclass(frozen=True)
class Entry:
    """One layer of the list; those below add their own settings, and make the layer."""

    resizes: ClassVar[bool] = False  # whether it may give another number of channels than it reads

    kind: str  # a name in STACK
    inputs: int = 0  # channels it reads; 0: as many as the layer before gives
    size: int = 0  # channels it gives; 0: as many as it reads

    def parts(self, inputs: int, size: int, context_length: int) -> list[Part]:
        """What it is made of, for so many channels in and out."""
        raise NotImplementedError

    def complaint(self, inputs: int, before: str) -> str:
        """What is wrong with its settings, as the end of a sentence that begins with its name; '' if nothing.

        `before` names the layer that gives the channels it reads.
        """
        return ""


@dataclass(frozen=True)
class Wrapped(Entry):
    """A layer with what usually stands around one: dropout(layer(norm(x))), and + x."""

    normalization: Normalization = "none"  # of what it reads
    dropout: float = 0.0  # on what it gives
    residual: bool = False  # what it reads is added to what it gives

    def complaint(self, inputs: int, before: str) -> str:
        return "" if 0 <= self.dropout < 1 else f"must have a dropout of at least 0 and below 1, not {self.dropout}."

    def around(self, inner: Layer, inputs: int, part: type[Part] = Part) -> Part:
        """The layer with these around it."""
        return part(inner, normalized(self.normalization, inputs), self.dropout, self.residual)


@dataclass(frozen=True)
class TokenEmbedding(Entry):
    """A vector for each token: the first layer, and the first alone."""


@dataclass(frozen=True)
class Positions(Entry):
    """Adds a vector for each position: learned, or of fixed waves."""

    def parts(self, inputs: int, size: int, context_length: int) -> list[Part]:
        learned = self.kind == "positional-embedding"
        return [PositionPart(LearnedPositions(context_length, size) if learned else SinusoidalPositions(size))]


@dataclass(frozen=True)
class Dense(Wrapped):
    """activation(W x + b), each position by itself."""

    resizes = True

    activation: str = "none"  # none, or a name in ACTIVATIONS
    bias: bool = True  # whether there is a b

    def complaint(self, inputs: int, before: str) -> str:
        return super().complaint(inputs, before) or unknown(self.activation, ["none", *ACTIVATIONS])

    def parts(self, inputs: int, size: int, context_length: int) -> list[Part]:
        linear = Linear(inputs, size, self.bias)
        bend = [] if self.activation == "none" else [ACTIVATIONS[self.activation]()]
        return [self.around(Chain(linear, *bend), inputs)]


@dataclass(frozen=True)
class Feedforward(Wrapped):
    """Two linear maps with a curve between them, each position by itself; or SwiGLU."""

    hidden_size: int = 0  # channels between the two; 0: four times what it reads
    activation: str = "gelu"  # swiglu, or a name in ACTIVATIONS
    bias: bool = False  # biases of its maps

    def complaint(self, inputs: int, before: str) -> str:
        if self.hidden_size < 0:
            return f"must have a hidden_size of at least 0, not {self.hidden_size}."
        return super().complaint(inputs, before) or unknown(self.activation, ["swiglu", *ACTIVATIONS])

    def parts(self, inputs: int, size: int, context_length: int) -> list[Part]:
        hidden = self.hidden_size or 4 * inputs
        if self.activation == "swiglu":
            return [self.around(SwiGLU(inputs, hidden, self.bias), inputs)]
        return [self.around(FeedForward(inputs, hidden, self.activation, self.bias), inputs)]


@dataclass(frozen=True)
class Attention(Wrapped):
    """Causal self-attention."""

    heads: int = 4  # of queries
    kv_heads: int = 0  # of keys and values, a divisor of heads; 0: as many as heads
    head_size: int = 0  # channels of a head; 0: what it reads, divided by heads
    rotary: bool = False  # turn queries and keys by their positions
    rotary_base: float = 10000.0  # base of the angles
    qk_norm: bool = False  # RMS-normalize each head's queries and keys
    bias: bool = False  # biases of its maps

    def complaint(self, inputs: int, before: str) -> str:
        if self.heads < 1 or self.kv_heads < 0 or self.head_size < 0:
            return "must have at least one head, and kv_heads and head_size of at least 0."
        if self.heads % (self.kv_heads or self.heads):
            return f"has {self.heads} heads, {self.kv_heads} kv_heads: the second must divide the first."
        if not self.head_size and inputs % self.heads:
            return (
                f"cannot divide the {inputs} channels of {before} among {self.heads} heads:"
                " choose other heads, or give head_size."
            )
        if self.rotary and (self.head_size or inputs // self.heads) % 2:
            return "turns pairs of channels, being rotary: its head size must be even."
        return super().complaint(inputs, before)

    def parts(self, inputs: int, size: int, context_length: int) -> list[Part]:
        head_size = self.head_size or inputs // self.heads
        rotary = RotaryPositions(head_size, self.rotary_base) if self.rotary else None
        attention = MultiHeadAttention(
            inputs,
            self.heads,
            self.kv_heads or self.heads,
            head_size,
            bias=self.bias,
            qk_norm=self.qk_norm,
            rotary=rotary,
            dropout=self.dropout,
        )
        return [self.around(attention, inputs, AttentionPart)]


@dataclass(frozen=True)
class AttentionBlock(Attention):
    """A Transformer's block: attention, then feedforward, both residual and after a norm."""

    normalization: Normalization = "rmsnorm"  # before each half
    residual: bool = True  # each half is added to what it read
    rotary: bool = True  # turn queries and keys by their positions
    hidden_size: int = 0  # channels inside the feedforward; 0: four times what it reads
    activation: str = "swiglu"  # the feedforward's: swiglu, or a name in ACTIVATIONS

    def complaint(self, inputs: int, before: str) -> str:
        return super().complaint(inputs, before) or self._second_half().complaint(inputs, before)

    def parts(self, inputs: int, size: int, context_length: int) -> list[Part]:
        return [
            *super().parts(inputs, size, context_length),
            *self._second_half().parts(inputs, size, context_length),
        ]

    def _second_half(self) -> Feedforward:
        around = (self.normalization, self.dropout, self.residual)
        return Feedforward("feedforward", 0, 0, *around, self.hidden_size, self.activation, self.bias)


@dataclass(frozen=True)
class RecurrentLayer(Wrapped):
    """An RNN, LSTM or GRU: the states it comes to, position by position."""

    resizes = True

    def parts(self, inputs: int, size: int, context_length: int) -> list[Part]:
        return [self.around(CELLS[self.kind](inputs, size), inputs, RecurrentPart)]


@dataclass(frozen=True)
class Normalized(Entry):
    """A normalization of the stream itself."""

    epsilon: float = 1e-5  # added to the variance

    def complaint(self, inputs: int, before: str) -> str:
        right = 0 < self.epsilon < float("inf")
        return "" if right else f"must have a finite epsilon above 0, not {self.epsilon}."

    def parts(self, inputs: int, size: int, context_length: int) -> list[Part]:
        return [Part(NORMALIZATIONS[self.kind](size, epsilon=self.epsilon))]


@dataclass(frozen=True)
class Dropped(Entry):
    """Dropout on the stream itself."""

    probability: float = 0.1  # of each number to be zeroed in training

    def complaint(self, inputs: int, before: str) -> str:
        right = 0 <= self.probability < 1
        return "" if right else f"must have a probability of at least 0 and below 1, not {self.probability}."

    def parts(self, inputs: int, size: int, context_length: int) -> list[Part]:
        return [Part(Dropout(self.probability))]


@dataclass(frozen=True)
class Activation(Entry):
    """A curve, element by element."""

    def parts(self, inputs: int, size: int, context_length: int) -> list[Part]:
        return [Part(ACTIVATIONS[self.kind]())]


STACK: dict[str, type[Entry]] = {
    "embedding": TokenEmbedding,
    "positional-embedding": Positions,
    "sinusoidal-positions": Positions,
    "attention": Attention,
    "block": AttentionBlock,
    "rnn": RecurrentLayer,
    "lstm": RecurrentLayer,
    "gru": RecurrentLayer,
    "dense": Dense,
    "feedforward": Feedforward,
    "layernorm": Normalized,
    "rmsnorm": Normalized,
    "dropout": Dropped,
    **dict.fromkeys(ACTIVATIONS, Activation),
}


class Chain(Layer):
    """One layer after another, as one."""

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, grad: Any) -> Any:
        for layer in reversed(self.layers):
            assert isinstance(layer, Layer)
            grad = layer.backward(grad)
        return grad


def normalized(name: str, size: int) -> Layer | None:
    """A fresh normalization of that name; None for "none"."""
    return None if name == "none" else NORMALIZATIONS[name](size)


def unknown(name: str, choices: list[str]) -> str:
    """A complaint about an activation that there is not."""
    return "" if name in choices else f"has the activation {name!r}. Choices: {', '.join(choices)}."


# ---- reading a list ----


def fitted(tables: Sequence[Any]) -> list[tuple[Entry, int, int]]:
    """Each table's entry with the channels it reads and gives; a UserError where something is wrong, or two do not
    fit, names them by number and kind."""
    if not tables:
        raise UserError("A stack needs layers: [[model.stack]] tables in a --config file, the first an embedding.")
    layers: list[tuple[Entry, int, int]] = []
    for number, table in enumerate(tables, 1):
        entry = read_entry(number, table)
        name, before = f"Layer {number} ({entry.kind})", f"layer {number - 1} ({layers[-1][0].kind})" if layers else ""
        given = layers[-1][2] if layers else 0
        if isinstance(entry, TokenEmbedding) == bool(layers):
            other = f"{before} gives {given} channels" if layers else "the first layer reads tokens"
            raise UserError(f"{name} does not fit: {other}. A stack has one embedding, and begins with it.")
        if entry.inputs < 0 or entry.size < 0:
            raise UserError(f"{name} must have sizes of at least 0.")
        if not layers and (not entry.size or entry.inputs):
            raise UserError(f"{name} needs a size, the channels of a token's vector, and takes no inputs.")
        size = entry.size or given
        wanted = entry.inputs or (given if entry.resizes or not layers else size)
        if wanted != given:
            raise UserError(
                f"{name} takes {wanted} channels, but {before} gives {given}."
                " Make them equal, or leave the size out: it follows from the layer before."
            )
        if layers and size != given and not entry.resizes:
            raise UserError(f"{name} gives as many channels as it reads: {given} from {before}, not {size}.")
        if layers and size != given and isinstance(entry, Wrapped) and entry.residual:
            raise UserError(
                f"{name} is residual: it adds the {size} channels it gives to the {given} of {before}."
                " Make them equal, or leave out residual."
            )
        if complaint := entry.complaint(given, before):
            raise UserError(f"{name} {complaint}")
        layers.append((entry, given, size))
    return layers


def read_entry(number: int, table: Any) -> Entry:
    """The entry that a table spells."""
    where = f"Layer {number} of the stack"
    if not isinstance(table, dict):
        raise UserError(f"{where} must be a table, [[model.stack]] with its settings below, not {table!r}.")
    if not isinstance(table.get("kind"), str):
        raise UserError(f'{where} needs a kind, as in kind = "lstm". Choices: {", ".join(STACK)}.')
    kind = choose(f"{where}: the kind", table["kind"], list(STACK))
    return from_table(STACK[kind], table, f"layer {number} ({kind})")


@dataclass(frozen=True)
class StackSettings(ModelSettings):
    """The list of a stack's layers."""

    kind: str = "stack"  # which architecture: a name in MODELS
    stack: tyro.conf.Suppress[tuple[dict[str, Any], ...]] = ()  # its layers, each a table: docs/custom-stacks.md
    tied: bool = False  # the output head shares the token embedding's weights

    def __post_init__(self) -> None:
        if self.context_length < 2:
            raise UserError(f"--model.context-length must be at least 2, not {self.context_length}.")
        object.__setattr__(
            self, "stack", tuple(dict(table) if isinstance(table, dict) else table for table in self.stack)
        )
        layers = fitted(self.stack)
        first, last = layers[0][2], layers[-1][2]
        if self.tied and first != last:
            raise UserError(
                f"A tied head needs the embedding's size: layer 1 (embedding) has {first} channels, but layer"
                f" {len(layers)} ({layers[-1][0].kind}) gives {last}. Make them equal, or give --model.tied False."
            )


class Stack(PartsModel):
    """Tokens (B, T) in; logits (B, T, V) out, or the mean loss where targets are given."""

    Settings = StackSettings
    settings: StackSettings

    def __init__(self, settings: StackSettings) -> None:
        layers = fitted(settings.stack)
        parts = [
            part for entry, inputs, size in layers[1:] for part in entry.parts(inputs, size, settings.context_length)
        ]
        super().__init__(settings, layers[0][2], parts, layers[-1][2], settings.tied)
        self.initialize()

    def initialize(self) -> None:
        """Linear maps normal with deviation 1 / sqrt(inputs); the last map of a residual attention or feedforward zero,
        so that it begins as the identity (as in modded-nanogpt). Recurrent layers begin as their file says. A norm
        brings a small embedding to size, and it learns fast; without one it must have size 1 from the start."""
        first = next((part for part in self.blocks if not isinstance(part.inner, LearnedPositions)), None)
        small = self.settings.tied or (isinstance(first, Part) and first.normalization is not None)
        nn.init.normal_(self.token_embedding.weight, std=0.02 if small else 1.0)
        for module in self.blocks.modules():
            if isinstance(module, Linear) and not isinstance(module, OutputHead):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        for part in self.blocks:
            if isinstance(part, Part) and part.residual:
                last = {MultiHeadAttention: "output", FeedForward: "down", SwiGLU: "down"}.get(type(part.inner))
                if last:
                    nn.init.zeros_(getattr(part.inner, last).weight)
