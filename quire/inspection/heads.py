"""Each head in a few numbers: how widely it looks, how far, and whether it does one of the known jobs.

H heads, T positions that look (queries), S positions that are looked at (keys), w the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quire.inspection.attention import PROMPT, WRITTEN, AttentionLayer, record, sequences_of
from quire.run import Run

REPEATED = 50  # tokens of the random sequence that stands twice
ROWS = 4  # random sequences


@dataclass(frozen=True)
class HeadScores:
    """One head's numbers; None where a measure has no meaning, as a distance has none between two sequences.

    `entropy` (nats): mean over the queries of -sum w ln w; 0 looks at one token, ln n evenly at n.
    `distance` (tokens): mean over the queries of sum w |t - s|.
    `previous_token`: mean weight on the token just before, over all queries but the first.
    `first_token`: mean weight on the first token, over all queries but the first; high in an attention sink
    (Xiao et al. 2023).
    `induction`: on random tokens that stand twice in a row, the mean weight from each token of the second half on the
    token that came after it in the first half (Olsson et al. 2022).
    """

    layer: str
    head: int
    entropy: float
    distance: float | None
    previous_token: float | None
    first_token: float | None
    induction: float | None


def head_scores(layers: Sequence[AttentionLayer], induction: dict[str, np.ndarray] | None = None) -> list[HeadScores]:
    """The numbers of every head, layer by layer; `induction` as `induction_scores` gives it."""
    rows = []
    for layer in layers:
        repeated = (induction or {}).get(layer.name)
        for head, weights in enumerate(layer.weights.astype(np.float64)):
            own = layer.queries == layer.keys
            rows.append(
                HeadScores(
                    layer.name,
                    head,
                    entropy=entropy(weights),
                    distance=distance(weights) if own else None,
                    previous_token=_mean(np.diagonal(weights, -1)) if own else None,
                    first_token=_mean(weights[1:, 0]),
                    induction=None if repeated is None else float(repeated[head]),
                )
            )
    return rows


def entropy(weights: np.ndarray) -> float:
    """Mean entropy of the rows of `weights` (T, S), in nats; 0 ln 0 is 0."""
    logarithms = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    return float(-(weights * logarithms).sum(-1).mean()) + 0.0  # no -0


def distance(weights: np.ndarray) -> float:
    """How many tokens away the rows of `weights` (T, T) look, on average."""
    places = np.arange(len(weights))
    return float((weights * np.abs(places[:, None] - places)).sum(-1).mean())


def induction_scores(run: Run, model: Any, seed: int = 1337) -> dict[str, np.ndarray]:
    """For every layer that looks back on its own sequence, the induction score of each head (H).

    Four random sequences of up to 50 different tokens each, as many as the context holds twice, read twice in a row;
    after the run's prompt prefix, where it has one. An encoder-decoder has them as source and as tokens. Empty where
    the context holds no two tokens twice.
    """
    prefix = run.prompt_prefix()
    usable = sorted(set(range(run.tokenizer.vocabulary_size)) - run.tokenizer.reserved())
    length = min(REPEATED, (run.settings.context_length - len(prefix)) // 2, len(usable))
    if length < 2:
        return {}
    draw = np.random.default_rng(seed)
    halves = np.stack([draw.choice(usable, length, replace=False) for _ in range(ROWS)])  # (B, length)
    before = np.tile(np.array(prefix, dtype=np.int64), (ROWS, 1))
    tokens = torch.from_numpy(np.concatenate([before, halves, halves], 1))
    reads_source = model.settings.reads_source
    sequences = dict.fromkeys((PROMPT, WRITTEN) if reads_source else (PROMPT,), tokens)
    last = list(sequences)[-1]
    second = np.arange(len(prefix) + length, len(prefix) + 2 * length)
    return {
        name: weights.numpy()[:, :, second, second - length + 1].mean((0, 2), dtype=np.float64)
        for name, weights in record(model, sequences)[1].items()
        if sequences_of(name, reads_source) == (last, last)
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
