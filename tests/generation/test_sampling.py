"""Each way of sampling against transformers' processor of that name, and what is true of all of them."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quire.errors import UserError
from quire.generation.sampling import (
    SamplingSettings,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_presence,
    penalize_repetition,
    sample,
)

V = 23
few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32)
shares = st.floats(0.01, 0.99)


def random_logits(seed: int) -> torch.Tensor:
    """Logits of one row; some sharp, some flat, some with a token ruled out."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(V, generator=generator) * (1 + seed % 7)
    if seed % 3 == 0:
        logits[seed % V] = -torch.inf
    return logits


def theirs(processor: object, logits: torch.Tensor, context: tuple[int, ...] = ()) -> torch.Tensor:
    """What a processor of transformers makes of one row."""
    return processor(torch.tensor([context], dtype=torch.long), logits.clone()[None])[0]  # type: ignore[operator]


@given(seeds, st.integers(1, V + 3))
@few
def test_top_k(seed: int, k: int) -> None:
    logits = random_logits(seed)
    assert torch.equal(keep_top_k(logits, k), theirs(TopKLogitsWarper(k), logits))


@given(seeds, shares)
@few
def test_top_p(seed: int, p: float) -> None:
    logits = random_logits(seed)
    assert torch.equal(keep_top_p(logits, p), theirs(TopPLogitsWarper(p), logits))


@given(seeds, shares)
@few
def test_min_p(seed: int, p: float) -> None:
    logits = random_logits(seed)
    assert torch.equal(keep_min_p(logits, p), theirs(MinPLogitsWarper(p), logits))


@given(seeds, st.floats(0.2, 5), st.lists(st.integers(0, V - 1), min_size=1, max_size=40))
@few
def test_repetition_penalty(seed: int, penalty: float, context: list[int]) -> None:
    logits = random_logits(seed)
    expected = theirs(RepetitionPenaltyLogitsProcessor(penalty), logits, tuple(context))
    assert torch.equal(penalize_repetition(logits, context, penalty), expected)


@given(seeds, st.floats(-2, 2), st.lists(st.integers(0, V - 1), max_size=40))
@few
def test_presence_penalty(seed: int, penalty: float, written: list[int]) -> None:
    """transformers has none; OpenAI's and vLLM's definition is logit - penalty * [the token was written before]."""
    logits = random_logits(seed)
    expected = [float(logits[token]) - penalty * (1 if token in written else 0) for token in range(V)]
    assert penalize_presence(logits, written, penalty).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_prompt_counts_for_repetition_and_not_for_presence() -> None:
    logits, generator = torch.tensor([2.0, 1.9, 0.0]), torch.Generator()
    presence = SamplingSettings(temperature=0, presence_penalty=0.5)
    assert sample(logits, [0, 0], presence, generator) == 0
    assert sample(logits, [0, 0], presence, generator, written=[0]) == 1
    assert sample(logits, [0, 0], SamplingSettings(temperature=0, repetition_penalty=1.5), generator) == 1


EDGES: list[tuple[object, Callable[[torch.Tensor], torch.Tensor]]] = [
    (TopKLogitsWarper(1), lambda row: keep_top_k(row, 1)),
    (TopKLogitsWarper(V), lambda row: keep_top_k(row, V)),
    (TopPLogitsWarper(1e-9), lambda row: keep_top_p(row, 1e-9)),
    (MinPLogitsWarper(0.0), lambda row: keep_min_p(row, 0.0)),
    (MinPLogitsWarper(1.0), lambda row: keep_min_p(row, 1.0)),
    (RepetitionPenaltyLogitsProcessor(1e4), lambda row: penalize_repetition(row, [0, 3], 1e4)),
]


@pytest.mark.parametrize("processor, ours", EDGES)
@pytest.mark.parametrize("row", ["one left", "far apart", "zeros and negative ones"])
def test_edges(processor: object, ours: Callable[[torch.Tensor], torch.Tensor], row: str) -> None:
    """The ends of each setting, on logits of which one is left, that lie far apart, that are 0 or below."""
    logits = torch.linspace(-1e4, 1e4, V)
    if row == "one left":
        logits = torch.full((V,), -torch.inf).index_fill(0, torch.tensor(3), -2.0)
    elif row == "zeros and negative ones":
        logits = -torch.arange(V).float()
    assert torch.equal(ours(logits), theirs(processor, logits, (0, 3)))


@given(seeds, st.floats(0.05, 5))
@few
def test_temperature(seed: int, temperature: float) -> None:
    """The drawn token is that of transformers' logits and the same random numbers."""
    logits = random_logits(seed)
    expected = torch.softmax(theirs(TemperatureLogitsWarper(temperature), logits), -1)
    drawn = torch.multinomial(expected, 1, generator=torch.Generator().manual_seed(seed))
    chosen = sample(logits, [], SamplingSettings(temperature=temperature), torch.Generator().manual_seed(seed))
    assert chosen == int(drawn)


@given(seeds, st.floats(0.1, 3), st.integers(0, V), shares, st.floats(0, 0.9), st.floats(0.5, 2))
@few
def test_together(seed: int, temperature: float, k: int, p: float, min_p: float, penalty: float) -> None:
    """All at once, in transformers' order; the likeliest is never ruled out, a ruled-out token never drawn."""
    logits, context = random_logits(seed), [1, 2, 2, 5]
    row = theirs(RepetitionPenaltyLogitsProcessor(penalty), logits, tuple(context))
    row = theirs(TemperatureLogitsWarper(temperature), row)
    row = theirs(TopKLogitsWarper(k), row) if k else row
    row = theirs(TopPLogitsWarper(p), row)
    row = theirs(MinPLogitsWarper(min_p), row)
    asked = SamplingSettings(temperature, k, p, min_p, penalty)
    for draw in range(5):
        drawn = torch.multinomial(torch.softmax(row, -1), 1, generator=torch.Generator().manual_seed(draw))
        chosen = sample(logits, context, asked, torch.Generator().manual_seed(draw))
        assert chosen == int(drawn) and logits[chosen] > -math.inf


@given(seeds)
@few
def test_the_functions_leave_the_logits_alone(seed: int) -> None:
    logits = random_logits(seed)
    before = logits.clone()
    for function in (keep_top_k, keep_top_p, keep_min_p):
        for value in (1, 0.5) if function is not keep_top_k else (1, 5):
            kept = function(logits, value)
            assert kept[logits.argmax()] == logits.max()
            assert torch.isin(kept[kept > -math.inf], logits).all()
    penalize_repetition(logits, [0, 1], 2.0)
    assert torch.equal(logits, before)


@given(seeds, st.integers(0, V), shares)
@few
def test_temperature_0_is_the_likeliest_whatever_else_is_asked(seed: int, k: int, p: float) -> None:
    logits = random_logits(seed)
    asked = SamplingSettings(temperature=0, top_k=k, top_p=p)
    assert sample(logits, [], asked, torch.Generator().manual_seed(seed)) == int(logits.argmax())


def test_draws_follow_the_probabilities() -> None:
    logits, generator = torch.tensor([0.7, 0.2, 0.1]).log(), torch.Generator().manual_seed(0)
    drawn = [sample(logits, [], SamplingSettings(), generator) for _ in range(2000)]
    for token, probability in enumerate((0.7, 0.2, 0.1)):
        deviation = math.sqrt(probability * (1 - probability) / len(drawn))
        assert abs(drawn.count(token) / len(drawn) - probability) < 4 * deviation


@pytest.mark.parametrize(
    "name, value",
    [("temperature", -0.1), ("temperature", math.inf), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1),
     ("min_p", 1.5), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan), ("presence_penalty", math.nan),
     ("presence_penalty", -math.inf)],
)  # fmt: skip
def test_impossible_settings_name_their_flag(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be"):
        SamplingSettings(**{name: value})
