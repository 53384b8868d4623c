"""Scores of heads: what they are of heads whose weights are known, and of a head built to do induction."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from quire.inspection.attention import AttentionLayer, record
from quire.inspection.heads import HeadScores, head_scores, induction_scores
from quire.layers.attention import ScaledDotProductAttention
from quire.layers.layer import Layer
from quire.run import Run

T = 9


def scores(weights: np.ndarray, queries: str = "prompt", keys: str = "prompt") -> HeadScores:
    (row,) = head_scores([AttentionLayer("layer", queries, keys, weights[None].astype(np.float32))])
    return row


def shifted(by: int) -> np.ndarray:
    """Every token looks at the one `by` before it, or else at the first."""
    weights = np.zeros((T, T))
    weights[np.arange(T), np.maximum(np.arange(T) - by, 0)] = 1
    return weights


def test_a_previous_token_head() -> None:
    found = scores(shifted(1))
    assert (found.entropy, found.previous_token, found.distance) == (0, 1, pytest.approx((T - 1) / T))
    assert found.first_token == pytest.approx(1 / (T - 1)), "the second token looks at the first"


def test_a_sink_and_a_head_that_looks_at_itself() -> None:
    sink, self_ = scores(shifted(T)), scores(shifted(0))
    assert (sink.entropy, sink.first_token, sink.distance) == (0, 1, pytest.approx((T - 1) / 2))
    assert (self_.distance, self_.first_token, self_.previous_token) == (0, 0, 0)


def test_an_even_head() -> None:
    """Weights of 1/n on the n tokens so far: entropies of ln n."""
    weights = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    found = scores(weights)
    assert found.entropy == pytest.approx(np.mean([math.log(n) for n in range(1, T + 1)]), rel=1e-6)
    assert found.distance == pytest.approx(np.mean([t / 2 for t in range(T)]), rel=1e-6)
    assert found.previous_token == found.first_token == pytest.approx(np.mean([1 / n for n in range(2, T + 1)]))


def test_what_has_no_meaning_is_none() -> None:
    across = scores(np.full((3, 5), 0.2), "written", "prompt")
    assert (across.distance, across.previous_token, across.induction) == (None, None, None)
    assert across.entropy == pytest.approx(math.log(5)) and across.first_token == pytest.approx(0.2)
    alone = scores(np.ones((1, 1)))
    assert (alone.entropy, alone.previous_token, alone.first_token) == (0, None, None)


class Inductor(Layer):
    """Two heads over one-hot tokens: the first looks where the token before was this one, the second at its like."""

    def __init__(self, vocabulary_size: int, context_length: int) -> None:
        super().__init__()
        self.settings = SimpleNamespace(reads_source=False, context_length=context_length)
        self.one_hot = torch.nn.Parameter(torch.eye(vocabulary_size))
        self.attend = ScaledDotProductAttention()

    def forward(self, tokens: Tensor) -> Tensor:
        own = self.one_hot[tokens]  # (B, T, V)
        before = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], 1)
        query, key = torch.stack([own, own], 1) * 1000, torch.stack([before, own], 1)
        self.attend(query, key, key)
        return own


def test_an_induction_head_is_found(tiny: Run) -> None:
    model = Inductor(tiny.settings.vocabulary_size, 32)
    (found,) = induction_scores(tiny, model).values()
    assert found.tolist() == pytest.approx([1, 0], abs=1e-6)
    rows = head_scores([AttentionLayer("attend", "prompt", "prompt", np.ones((2, 1, 1)))], {"attend": found})
    assert [row.induction for row in rows] == pytest.approx([1, 0], abs=1e-6)


def test_induction_by_its_definition(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a trained model, position by position, from the very tokens it was shown."""
    shown = []
    monkeypatch.setattr("quire.inspection.heads.record", lambda m, s: shown.append(s["prompt"]) or record(m, s))
    monkeypatch.setattr(tiny, "prompt_prefix", lambda: [1])
    model = tiny.model("cpu")
    found = induction_scores(tiny, model)["blocks.0.attention"]
    (tokens,) = shown
    length = tokens.shape[1] // 2
    assert length == min(15, tiny.tokenizer.vocabulary_size - 2)
    weights = record(model, {"prompt": tokens})[1]["blocks.0.attention"]
    for head in range(2):
        seen = []
        for row in range(len(tokens)):
            ids = tokens[row].tolist()
            assert ids[0] == 1 and ids[1 : length + 1] == ids[length + 1 :] and len({*ids}) == length + 1
            for t in range(length + 1, 2 * length + 1):
                earlier = ids.index(ids[t])
                seen.append(float(weights[row, head, t, earlier + 1]))
        assert found[head] == pytest.approx(np.mean(seen), rel=1e-5)
    again = induction_scores(tiny, model)["blocks.0.attention"]
    assert found.tolist() == again.tolist(), "the same tokens each time"


def test_no_induction_where_nothing_can_repeat(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "prompt_prefix", lambda: [1] * 30)
    assert induction_scores(tiny, tiny.model("cpu")) == {}
