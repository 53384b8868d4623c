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
from quire.layers.attention import ScaledDotProductAttention
from quire.run import Run
from quire.tokenizers import Tokenizer
from quire.tokenizers.tokenizer import Unknown

LONGEST = 512  # tokens: beyond that neither a picture nor a page can be read
CELLS = 1 << 25  # at most so many weights over all layers and heads
ALTERNATIVES = 5

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
    tokens with their probabilities. `left_out` counts the tokens cut off the front of a prompt that was too long.
    """

    layers: list[AttentionLayer]
    ids: dict[str, list[int]]
    tokens: dict[str, list[str]]
    predicted: str
    alternatives: list[list[tuple[str, float]]]
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
        layers=[_layer(name, rows[0].numpy(), sequences) for name, rows in weights.items()],
        ids=sequences,
        tokens={name: [run.tokenizer.name(i) for i in row] for name, row in sequences.items()},
        predicted=list(sequences)[-1],
        alternatives=_likeliest(logits[0], run.tokenizer),
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
    Attention is spelled out while its layers record, and each leaves its weights alone; nothing else is recorded.
    """
    device = next(model.parameters()).device
    rows = [torch.as_tensor(ids, device=device) for ids in sequences.values()]
    rows = [row if row.dim() == 2 else row.unsqueeze(0) for row in rows]
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, ScaledDotProductAttention)}
    found: dict[str, Tensor] = {}

    def keep(layer: ScaledDotProductAttention, inputs: Any, output: Any) -> None:
        name = next(name for name, other in layers.items() if other is layer)
        _query, _key, _value, weights, *_ = layer.saved()
        found[name.removesuffix(".attend")] = weights.float().cpu()

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


@torch.no_grad()
def written(model: Any, source: list[int], separator: int, room: int) -> list[int]:
    """The separator, and what an encoder-decoder writes greedily after `source`, up to the next separator."""
    device = next(model.parameters()).device
    ids = [separator]
    while len(ids) < room:
        rows = torch.tensor([ids], device=device)
        logits = model(rows, source=torch.tensor([source], device=device))
        if (token := int(logits[0, -1].argmax())) == separator:
            break
        ids.append(token)
    return ids


def _layer(name: str, weights: np.ndarray, sequences: dict[str, list[int]]) -> AttentionLayer:
    """Name the two sequences of a layer: by its path, or where that cannot be (T, S) by their lengths."""
    if WRITTEN not in sequences:
        return AttentionLayer(name, PROMPT, PROMPT, weights)
    kinds = [(WRITTEN, WRITTEN), (PROMPT, PROMPT), (WRITTEN, PROMPT)]
    parts = name.split(".")
    if any(part.startswith("cross") for part in parts):
        kinds.insert(0, (WRITTEN, PROMPT))
    elif any(part.startswith("encoder") for part in parts):
        kinds.insert(0, (PROMPT, PROMPT))
    queries, keys = next(
        (queries, keys)
        for queries, keys in kinds
        if weights.shape[1:] == (len(sequences[queries]), len(sequences[keys]))
    )
    return AttentionLayer(name, queries, keys, weights)


def _likeliest(logits: Tensor, tokenizer: Tokenizer) -> list[list[tuple[str, float]]]:
    """The likeliest next tokens and their probabilities, for each row of logits (T, V)."""
    best = torch.softmax(logits, -1).topk(min(ALTERNATIVES, logits.shape[-1]), -1)
    return [
        [(tokenizer.name(token), p) for token, p in zip(ids, row, strict=True)]
        for ids, row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
