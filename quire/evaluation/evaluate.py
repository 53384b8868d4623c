"""How well a run's model predicts text: its own held-out text, or any other."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from quire.config import from_table
from quire.data.encode import stream
from quire.data.pairs import Examples, Pairs
from quire.data.reading import DataSettings, read
from quire.data.shards import token_type
from quire.data.spool import Corpus
from quire.devices import choose_device
from quire.errors import UserError
from quire.evaluation.loss import total_loss
from quire.evaluation.translations import scored, translate
from quire.evaluation.translations import texts as texts_of
from quire.generation.generate import Writer
from quire.progress import say
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
    pairs: int | None = None  # of a source and a target, where it is those that were measured; tokens are the targets'
    exact_match: float | None = None  # with `translations`: share of what the model writes that is the target itself
    bleu: float | None = None
    chrf: float | None = None


def evaluate(
    run: Run | str,
    texts: Sequence[str] = (),
    *,
    unknown: Unknown = "error",
    stride: int | None = None,
    encoding: str = "utf-8",
    device: str = "auto",
    pairs: str = "",
    translations: bool = False,
    beams: int = 1,
) -> Evaluation:
    """Measure a run's best model on its held-out text, or on the whole of `texts` (files, folders, addresses ...), or
    on a file of `pairs`.

    Documents are what they were for the run; `encoding` is that of `texts`. With `translations` the model also writes
    a target for each source, by a search with so many `beams`: they are compared with the targets there are.
    """
    run = run if isinstance(run, Run) else Run(run)
    examples, size, lost = _examples(run, texts, pairs, unknown, encoding)
    if translations and not isinstance(examples, Pairs):
        raise UserError(f"--translations needs pairs of a source and a target: quire evaluate {run.path} --pairs FILE")
    where = choose_device(device)
    model = run.model(where)
    found = measure(model, run.settings.context_length, run.tokenizer, examples, size, where, stride)
    found = replace(found, unknown=lost or None)
    if isinstance(examples, Pairs):
        found = replace(found, pairs=examples.examples())
        if translations:
            writer = Writer(run, where, model)
            sources, references = texts_of(writer, examples)
            found = replace(found, **asdict(scored(translate(writer, sources, beams), references)))
    return found


def _examples(run: Run, texts: Sequence[str], pairs: str, unknown: Unknown, encoding: str) -> tuple[Examples, int, int]:
    """What is measured: a token stream or pairs, the bytes of what is predicted, and the characters lost."""
    if texts and pairs:
        raise UserError(f"TEXT ({texts[0]}) and --pairs {pairs} both name what to measure on. Choose one.")
    if texts and run.settings.reads_source:
        raise UserError(f"{run.path} has an encoder, and is measured on pairs of a source and a target: --pairs FILE")
    examples: Examples
    if texts or pairs:
        settings = from_table(DataSettings, run.config.get("data", {}), "data")
        settings = replace(settings, encoding=encoding, text=tuple(texts), pairs=pairs)
        examples, size, lost = _encoded(run.tokenizer, read(settings.named, settings), unknown)
        if pairs:
            examples = run.in_pairs(examples)
    else:
        examples, size, lost = run.examples(run.validation_tokens()), run.manifest["validation"]["bytes"], 0
    return examples, (target_bytes(examples, run.tokenizer, pairs) if isinstance(examples, Pairs) else size), lost


def target_bytes(pairs: Pairs, tokenizer: Tokenizer, name: str) -> int:
    """The UTF-8 bytes of the targets; says how many pairs are too long for the model."""
    if not pairs.examples():
        raise UserError(f"No pair of {name} fits the model's context length of {pairs.context_length} tokens.")
    if pairs.left_out:
        fit = "pair does not fit" if pairs.left_out == 1 else "pairs do not fit"
        say(f"{pairs.left_out:,} {fit} the context length of {pairs.context_length} tokens: left out.")
    return pairs.target_bytes(tokenizer)


def measure(
    model: Any,
    context_length: int,
    tokenizer: Tokenizer,
    tokens: Examples,
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
