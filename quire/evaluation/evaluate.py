"""How well a run's model predicts text: its own held-out text, or any other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quire.config import from_table
from quire.data.encode import stream
from quire.data.reading import DataSettings, read
from quire.data.shards import token_type
from quire.data.spool import Corpus
from quire.devices import choose_device
from quire.errors import UserError
from quire.evaluation.loss import total_loss
from quire.run import Run
from quire.tokenizers import Tokenizer
from quire.tokenizers.tokenizer import BytesTokenizer, Unknown


@dataclass(frozen=True)
class Evaluation:
    """`validation_loss` in nats per token, `bits_per_byte` over the UTF-8 bytes of the text; both over all of it."""

    validation_loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    context_length: int
    stride: int | None = None  # None: windows side by side, the standard measure
    unknown: int | None = None  # characters that were skipped or replaced: the figures are for the rest; None: none


def evaluate(
    run: Run | str,
    texts: Sequence[str] = (),
    *,
    unknown: Unknown = "error",
    stride: int | None = None,
    encoding: str = "utf-8",
    device: str = "auto",
) -> Evaluation:
    """Measure a run's best model on its held-out text, or on the whole of `texts` (files, folders, addresses ...).

    Documents are what they were for the run; `encoding` is that of `texts`.
    """
    run = run if isinstance(run, Run) else Run(run)
    if texts:
        settings = replace(from_table(DataSettings, run.config.get("data", {}), "data"), encoding=encoding)
        tokens, size, lost = _encoded(run.tokenizer, read(texts, settings), unknown)
    else:
        tokens, size, lost = run.validation_tokens(), run.manifest["validation"]["bytes"], 0
    where = choose_device(device)
    found = measure(run.model(where), run.settings.context_length, run.tokenizer, tokens, size, where, stride)
    return replace(found, unknown=lost or None)


def measure(
    model: Any,
    context_length: int,
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    size: int,
    device: Any,
    stride: int | None = None,
) -> Evaluation:
    """The figures of a model on a token stream whose text has `size` UTF-8 bytes."""
    total, count = total_loss(model, tokens, context_length, tokenizer.vocabulary_size, device, stride)
    loss = total / count
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, bits_per_byte(total, size), count, size, context_length, stride)


def bits_per_byte(total: float, size: int) -> float:
    """Nats over a text, as bits for each of its `size` bytes: comparable between tokenizers."""
    return total / math.log(2) / size


def _encoded(tokenizer: Tokenizer, corpus: Corpus, unknown: Unknown) -> tuple[np.ndarray, int, int]:
    """The token stream of a corpus, the bytes of what was encoded, and the characters left out of it or replaced."""
    kind, parts = token_type(tokenizer.vocabulary_size), []
    size = corpus.documents.sizes[0] if unknown == "error" else 0
    for part in stream(tokenizer, corpus.documents.pieces(), unknown):
        parts.append(part.astype(kind))
        if unknown != "error":
            size += len(tokenizer.decode(part).encode())
    lost = 0
    if unknown != "error" and not isinstance(tokenizer, BytesTokenizer):  # which lose nothing
        lost = sum(tokenizer.unknown(text).total() for text in corpus.documents.texts())
    corpus.close()
    if not size:
        raise UserError("Nothing of this text is in the model's vocabulary: there is nothing to measure.")
    return np.concatenate(parts), size, lost
