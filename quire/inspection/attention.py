"""What every head of a model attends to while it reads a prompt.

H heads, T positions that look (queries), S positions that are looked at (keys), V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quire.errors import UserError
from quire.generation.alternatives import Alternative, alternatives
from quire.generation.stream import tokens
from quire.layers.attention import ScaledDotProductAttention
from quire.run import Run
from quire.tokenizers.tokenizer import Unknown

LONGEST = 512  # tokens: beyond that neither a picture nor a page can be read
CELLS = 1 << 25  # at most so many weights over all layers and heads

PROMPT, WRITTEN = "prompt", "written"


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's `weights` (H, T, S), float32, each row of S summing to 1.

    `name` is the path of its module; `queries` and `keys` name the sequences that look and are looked at.
    """

    name: str
    queries: str
    keys: str
    weights: np.ndarray


@dataclass(frozen=True)
class Attention:
    """All layers in the model's order, and the sequences of tokens they speak of.

    Of most models that is one sequence, "prompt". An encoder-decoder reads the "prompt" and attends from what it has
    "written": the separator it starts from, and what it then writes greedily. `ids` and `tokens`, the ids and how to
    show them, are by sequence. `alternatives` are, for each token of the sequence `predicted`, the likeliest next
    tokens. `left_out` counts the tokens cut off the front of a prompt that was too long.
    """

    layers: list[AttentionLayer]
    ids: dict[str, list[int]]
    tokens: dict[str, list[str]]
    predicted: str
    alternatives: list[list[Alternative]]
    left_out: int


def attention(
    run: Run | str, prompt: str, *, unknown: Unknown = "error", device: str = "auto", model: Any = None
) -> Attention:
    """The attention weights of a run's model, loaded unless it is given, as it reads `prompt`.

    A prompt longer than the context, or than can be shown, loses its beginning; an empty one, and a model without
    attention, are UserErrors.

    >>> attention("runs/shakespeare", "To be, or not").layers[0].weights.shape  # doctest: +SKIP
    (6, 13, 13)
    """
    run = run if isinstance(run, Run) else Run(run)
    model = model if model is not None else run.model(device)
    refuse_without_attention(run, model)
    ids = run.tokenizer.encode(prompt, unknown, "text")
    if not ids:
        raise UserError("The prompt is empty: attention needs a token to start from. Give some text as --prompt.")
    prefix = run.prompt_prefix()
    room = longest(model, run.tokenizer.separator) - len(prefix)
    left_out = max(0, len(ids) - room)
    sequences = {PROMPT: prefix + ids[left_out:]}
    if model.settings.reads_source:
        sequences[WRITTEN] = written(model, sequences[PROMPT], run.tokenizer.separator, room)
    logits, weights = record(model, sequences)
    return Attention(
        layers=[
            AttentionLayer(name, *sequences_of(name, model.settings.reads_source), rows[0].numpy())
            for name, rows in weights.items()
        ],
        ids=sequences,
        tokens={name: [run.tokenizer.name(i) for i in row] for name, row in sequences.items()},
        predicted=list(sequences)[-1],
        alternatives=alternatives(logits[0], run.tokenizer),
        left_out=left_out,
    )


def refuse_without_attention(run: Run, model: nn.Module) -> None:
    """A UserError where the model has no attention layer."""
    if not any(isinstance(module, ScaledDotProductAttention) for module in model.modules()):
        raise UserError(
            f"{run.path} is a model of the kind {run.settings.kind!r} without attention: there is none to show."
            f" Its weights can be looked at: quire look {run.path}"
        )


def longest(model: Any, token: int) -> int:
    """How many tokens can be shown: the context, or less where there are many heads. `token` is any."""
    names = (PROMPT, WRITTEN) if model.settings.reads_source else (PROMPT,)
    sequences = {name: [token] for name in names}
    heads = sum(rows.shape[1] for rows in record(model, sequences)[1].values())
    return min(model.settings.context_length, LONGEST, math.isqrt(CELLS // heads))


@torch.no_grad()
def record(model: Any, sequences: dict[str, list[int]] | dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the model once; its logits (B, T, V) and every attention layer's weights (B, H, T, S), on the CPU.

    `sequences` are ids (T) or rows of them (B, T): the tokens are the last one; where there are two, the first is the
    source. The layers are named by the paths of their modules, less a last ".attend", in the order of model.modules().
    Nothing but those layers is recorded, and each lets go at once of what it read.
    """
    device = next(model.parameters()).device
    rows = [torch.as_tensor(ids, device=device) for ids in sequences.values()]
    rows = [row if row.dim() == 2 else row.unsqueeze(0) for row in rows]
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, ScaledDotProductAttention)}
    found: dict[str, Tensor] = {}

    def keep(layer: ScaledDotProductAttention, inputs: Any, output: Any) -> None:
        name = next(name for name, other in layers.items() if other is layer)
        query, key, *_, visible = layer.saved()
        found[name.removesuffix(".attend")] = layer.weights(query, key, visible).float().cpu()

    hooks = [layer.register_forward_hook(keep) for layer in layers.values()]
    before = [layer.tape for layer in layers.values()]
    training = model.training
    try:
        model.eval()
        for layer in layers.values():
            layer.tape = []
        named = {} if len(rows) == 1 else {"source": rows[0]}
        logits = model(rows[-1], **named).float().cpu()
    finally:
        model.train(training)
        for layer, hook, tape in zip(layers.values(), hooks, before, strict=True):
            hook.remove()
            layer.tape = tape
    order = [name.removesuffix(".attend") for name in layers]
    return logits, {name: found[name] for name in order if name in found}


def written(model: Any, source: list[int], separator: int, room: int) -> list[int]:
    """The separator, and what an encoder-decoder writes greedily after `source`, up to the next separator."""

    def choose(logits: Tensor, windows: list[list[int]]) -> list[int]:
        return [int(logits[0].argmax())]

    ids, device = [separator], next(model.parameters()).device
    for (token,) in tokens(model, [ids], choose, device, sources=[tuple(source)]):
        if token == separator or len(ids) == room:
            break
        ids.append(token)
    return ids


def sequences_of(layer: str, reads_source: bool) -> tuple[str, str]:
    """The sequences that look and are looked at in a layer, by the path of its module."""
    if not reads_source or layer.startswith("encoder."):
        return PROMPT, PROMPT
    return WRITTEN, PROMPT if "cross_attention" in layer else WRITTEN
