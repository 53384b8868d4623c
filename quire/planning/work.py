"""What a decoder and its optimizer ask of any card, in plain numbers.

Parameters are counted on the model itself; what forward keeps for backward follows from its shape.
"""

from dataclasses import dataclass, replace

from quire.layers.head_loss import WORTH_IT
from quire.layers.sparsity import NEAR, Pattern
from quire.models.decoder import DecoderSettings
from quire.planning.cost import numbers_of
from quire.training.settings import Settings

FLOAT, LOW = 4, 2  # bytes of a number in float32, and in bfloat16


@dataclass(frozen=True)
class Work:
    """What a model and its optimizer ask of any card, in plain numbers."""

    parameters: dict[str, int]  # by part
    multiplied: int  # of them in matrix products: all but the rows that are only looked up
    attended: int  # over all blocks: channels of the heads, times the positions that a token looks at
    optimizer: int  # numbers that the optimizer keeps
    orthogonalizing: int  # Muon's operations of a step
    blocks: int
    block: int  # parameters of one
    width: int  # channels of the stream
    context: int
    vocabulary: int
    kept: dict[str, int]  # bytes that one block keeps of each token for its gradient, by part
    kept_beside: int  # bytes of each token that are kept outside the blocks

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def flops_per_token(self) -> int:
        """Forward and backward (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B)."""
        return 6 * self.multiplied + 12 * self.attended


def work_of(settings: Settings) -> Work:
    """The numbers of a decoder whose vocabulary is known."""
    shape, training = settings.model, settings.training
    assert isinstance(shape, DecoderSettings)
    parameters, _, kept = numbers_of(shape, training)
    one, two = (sum(numbers_of(replace(shape, layers=count), training)[0].values()) for count in (1, 2))
    looked_up = parameters["embeddings"] - (shape.vocabulary_size * shape.embedding_size if shape.tied else 0)
    patterns = shape.patterns() if hasattr(shape, "patterns") else [Pattern()]
    seen = sum(positions(patterns[layer % len(patterns)], shape.context_length) for layer in range(shape.layers))
    muon = training.optimizer == "muon"
    return Work(
        parameters=parameters,
        multiplied=sum(parameters.values()) - looked_up,
        attended=seen * shape.heads * shape.head_channels,
        optimizer=kept,
        orthogonalizing=shape.layers * sum(newton_schulz(*matrix) for matrix in matrices(shape)) if muon else 0,
        blocks=shape.layers,
        block=two - one,
        width=shape.embedding_size,
        context=shape.context_length,
        vocabulary=shape.vocabulary_size,
        kept=kept_by_block(shape, LOW),
        kept_beside=kept_beside(shape, LOW),
    )


def positions(pattern: Pattern, context: int) -> int:
    """How many positions a token looks at, at most: the later half of a causal row is counted as if it were seen."""
    if pattern.rule == "full":
        return context
    return min(context, pattern.size) if pattern.rule in NEAR else -(-context // pattern.size)


def matrices(shape: DecoderSettings) -> list[tuple[int, int]]:
    """The matrices of one block, outputs by inputs."""
    channels, hidden = shape.embedding_size, shape.feedforward_size or 4 * shape.embedding_size
    queries, keys = (count * shape.head_channels for count in (shape.heads, shape.kv_heads or shape.heads))
    attention = [(queries, channels), (keys, channels), (keys, channels), (channels, queries)]
    return attention + [(hidden, channels)] * (2 if gated(shape) else 1) + [(channels, hidden)]


def newton_schulz(rows: int, columns: int, rounds: int = 5) -> int:
    """Operations of orthogonalizing a matrix: X X^T, that squared, and both times X, in each round (Muon)."""
    short, long = sorted((rows, columns))
    return rounds * (4 * short * short * long + 2 * short**3)


def gated(shape: DecoderSettings) -> bool:
    """Whether the feedforward is SwiGLU."""
    return getattr(shape, "feedforward", "swiglu") == "swiglu"


def kept_by_block(shape: DecoderSettings, low: int) -> dict[str, int]:
    """Bytes that one block keeps of each token for its gradient, by part; `low` of a number in a matrix product.

    Korthikanti et al. (2022, equation 2 without the part in T^2, which a fused attention kernel makes again) count 34
    for each channel of a GPT. Here GPT-2's block keeps 40: without dropout 2 fewer; 4 more since the stream stays in
    float32, and 4 more since autocast gives queries, keys and values each their own copy of their input.
    """
    channels, hidden = shape.embedding_size, shape.feedforward_size or 4 * shape.embedding_size
    heads, kv_heads = shape.heads, shape.kv_heads or shape.heads
    both = (heads + kv_heads) * shape.head_channels  # queries and keys
    mask = channels if shape.dropout else 0  # a byte for each number
    copies = (3, 2) if low < FLOAT else (1, 1)  # of an input that several products share
    curve = getattr(shape, "feedforward", "swiglu")
    part = {
        "norms": 2 * norm_bytes(shape),
        "input of queries, keys, values": copies[0] * low * channels,
        "queries, keys, values": low * (both + kv_heads * shape.head_channels),
        "attention's result and its sums": low * heads * shape.head_channels + FLOAT * heads,
        # normalized in float32: what came in, what came out, and a factor for each head
        "norms of queries and keys": FLOAT * (2 * both + heads + kv_heads) if shape.qk_norm else 0,
        "input of the feedforward": (copies[1] if gated(shape) else 1) * low * channels,
        # SwiGLU keeps gate, its curve, up and their product; relu's result says what came in; others keep both
        "feedforward": low * hidden * (4 if gated(shape) else 1 if curve == "relu" else 2),
        "dropout": 2 * mask,
    }
    return {name: size for name, size in part.items() if size}


def norm_bytes(shape: DecoderSettings) -> int:
    """What a norm of the stream keeps of each token: LayerNorm its input, mean and deviation; RMSNorm its input, that
    normalized, and one factor."""
    if getattr(shape, "normalization", "rmsnorm") == "layernorm":
        return FLOAT * (shape.embedding_size + 2)
    return FLOAT * (2 * shape.embedding_size + 1)


def kept_beside(shape: DecoderSettings, low: int) -> int:
    """Bytes of each token kept outside the blocks: its id, the last norm, and the loss's gradient by its vector, or
    where the vocabulary is small the vector itself."""
    last = norm_bytes(shape) if getattr(shape, "norm_placement", "pre") == "pre" else 0
    mask = shape.embedding_size if shape.dropout else 0
    return 8 + last + mask + (FLOAT if shape.vocabulary_size >= WORTH_IT else low) * shape.embedding_size
