"""Attention that does not cross documents: a packed window is its documents, each read alone."""

import copy
from itertools import chain, islice, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.generation.stream import tokens
from quire.layers.cross_entropy import IGNORED
from quire.layers.layer import recording
from quire.models.gpt import GPT, GPTSettings

CPU = torch.device("cpu")
SEPARATOR = 3

KINDS: dict[str, dict[str, Any]] = {
    "learned": {"positions": "learned"},
    "learned, grouped heads": {"positions": "learned", "kv_heads": 2, "tied": False},
    "sinusoidal": {"positions": "sinusoidal", "norm_placement": "post"},
    "rotary, grouped heads": {"positions": "rotary", "kv_heads": 1, "qk_norm": True, "normalization": "rmsnorm"},
}


def separating(kind: str, **settings: Any) -> GPT:
    """A GPT in float64 with random weights, large enough that a glimpse of another document shows."""
    size = {"vocabulary_size": 13, "context_length": 14, "embedding_size": 8, "layers": 2, "heads": 4}
    documents = {"separator": SEPARATOR, "separate_documents": True}
    model = GPT(GPTSettings(**{**size, **documents, **KINDS[kind], **settings})).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 3
    return model


def crossing(model: GPT) -> GPT:
    """The same weights in a model that knows of no documents: the oracle, which reads them one at a time."""
    plain = GPT(GPTSettings(**{**vars(model.settings), "separate_documents": False})).double()
    plain.load_state_dict(model.state_dict())
    return plain


def document(length: int, seed: int, begun: bool = True) -> list[int]:
    """So many tokens, a separator first; or the end of a document, whose beginning the window does not hold."""
    text = torch.randint(4, 13, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [SEPARATOR, *text[1:]] if begun else text


# Rows of 14 tokens: a document from outside the window, one of nothing but its separator, one that fills the row.
ROWS = [
    [document(4, 1, begun=False), document(6, 2), document(4, 3)],
    [document(5, 4), document(1, 5), document(1, 6), document(7, 7)],
    [document(14, 8)],
    [document(3, 9, begun=False), document(11, 10)],
]


def padded(side: str) -> tuple[Tensor, Tensor | None, list[list[slice]]]:
    """The rows as one batch, its mask, and where each document lies; the padding looks like separators."""
    lengths = [14, 12, 9, 5] if side != "none" else [14] * 4
    window, mask, places = torch.full((4, 14), SEPARATOR), torch.zeros(4, 14, dtype=torch.bool), []
    for row, (parts, length) in enumerate(zip(ROWS, lengths, strict=True)):
        first = 14 - length if side == "left" else 0
        window[row, first : first + length] = torch.tensor([*chain(*parts)])[:length]
        mask[row, first : first + length] = True
        places.append([])
        start = 0
        for part in parts:
            stop = min(start + len(part), length)
            if stop > start:
                places[-1].append(slice(first + start, first + stop))
            start += len(part)
    return window, None if side == "none" else mask, places


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("engine", ["autograd", "manual"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_window_is_its_documents_one_at_a_time(kind, engine, side):
    model = separating(kind)
    plain = crossing(model)
    window, mask, places = padded(side)
    targets = torch.randint(13, window.shape, generator=torch.Generator().manual_seed(20))
    if mask is not None:
        targets = targets.masked_fill(~mask, IGNORED)

    counted = int((targets != IGNORED).sum())
    logits, total = torch.zeros(4, 14, 13, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row, slices in enumerate(places):
        for place in slices:
            logits[row, place] = plain(window[row : row + 1, place])[0].detach()
            share = (place.stop - place.start) / counted
            total = total + share * plain(window[row : row + 1, place], targets[row : row + 1, place])
    total.backward()
    total = total.detach()

    found = model(window, mask=mask).detach()
    real = torch.ones_like(window, dtype=torch.bool) if mask is None else mask
    assert float((found - logits)[real].abs().max()) < 1e-10
    assert float((crossing(model)(window, mask=mask).detach() - logits)[real].abs().max()) > 1e-2  # it matters
    if engine == "autograd":
        loss = model(window, targets, mask=mask)
        loss.backward()
    else:
        with torch.no_grad(), recording(model):
            loss = model(window, targets, mask=mask)
            model.backward()
    assert float(loss.detach()) == pytest.approx(float(total), rel=1e-12)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert float((ours.grad - theirs.grad).abs().max()) < 1e-10, name


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_knows_where_documents_began(kind):
    model = separating(kind).eval()
    window, _, _ = padded("none")
    whole = model(window)
    for cuts in [(0, 4, 5, 14), (0, 1, 2, 3, 11, 14), range(15)]:
        cache = model.new_cache(4)
        pieces = [model(window[:, a:b], cache=cache) for a, b in pairwise(cuts)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole)
    for length in (9, 4, 0):
        cache.cut(length)
        order = torch.tensor([3, 0, 0])
        picked, copied = cache.reordered(order), cache.copy()
        torch.testing.assert_close(model(window[order, length:], cache=picked), whole[order, length:])
        torch.testing.assert_close(model(window[:, length:], cache=copied), whole[:, length:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_of_padded_rows_knows_it_too(kind):
    model = separating(kind).eval()
    window, mask, _ = padded("left")
    whole = model(window, mask=mask)
    cache = model.new_cache(4)
    pieces = [model(window[:, :10], cache=cache, mask=mask[:, :10]), model(window[:, 10:], cache=cache)]
    torch.testing.assert_close(torch.cat(pieces, 1)[mask], whole[mask])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_written_after_a_prompt_sees_its_own_document_alone(kind):
    """The likeliest tokens, but a separator at every fifth place, from prompts of several lengths at once."""
    model = separating(kind, context_length=12).eval()
    prompts = [document(4, 1, begun=False), [*document(3, 2), *document(4, 3)], document(12, 4), [SEPARATOR]]

    def choose(logits: Tensor, windows: list[list[int]]) -> list[int]:
        chosen = logits.argmax(-1).tolist()
        return [SEPARATOR if len(window) % 5 == 4 else token for window, token in zip(windows, chosen, strict=True)]

    plain, count, expected = crossing(model), 30, []
    for prompt in prompts:
        window, written = list(prompt), []
        for _ in range(count):
            begun = [place for place, token in enumerate(window) if token == SEPARATOR]
            own = window[begun[-1] if begun else 0 :]
            written += choose(plain(torch.tensor([own]))[:, -1], [window])
            window.append(written[-1])
            window = window if len(window) <= 12 else window[-6:]
        expected.append(written)
    for cached in (True, False):
        together = list(islice(tokens(copy.deepcopy(model), prompts, choose, CPU, cached), count))
        assert [list(row) for row in zip(*together, strict=True)] == expected
