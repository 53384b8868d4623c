"""The n-gram model: written with a cache as without one, documents apart, its tables sized by the text, its exports."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quire
from quire.errors import UserError
from quire.generation.reading import PromptMemory
from quire.generation.stream import tokens
from quire.layers.cross_entropy import IGNORED
from quire.layers.kneser_ney import KneserNey
from quire.layers.layer import recording
from quire.layers.matches import Matches
from quire.models import build_model
from quire.models.ngram import NgramSettings

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [4, 4, 9], [1, 2, 3, 11]]


@pytest.fixture
def quire_command(request: pytest.FixtureRequest) -> Any:
    """The fixture `quire`, which runs a command, by a name that leaves the library's to it."""
    return request.getfixturevalue("quire")


@pytest.fixture
def model(small_settings) -> Any:
    """Whose n-gram vectors are large, so that a wrong one shows."""
    torch.manual_seed(1)
    built = build_model(small_settings("ngram")).double().eval()
    for parameter in built.parameters():
        parameter.data = torch.randn_like(parameter) / 3
    built.ngram_embedding.weight.data *= 6
    return built


def written(model: Any, cached: bool, memory: PromptMemory | None = None, prompts=PROMPTS) -> list[list[int]]:
    """What the likeliest tokens are, past the context length; rows swap places and one is written on twice."""
    order, rows, steps = [*range(len(prompts))], [[] for _ in prompts], iter(range(20))

    def choose(logits: torch.Tensor, windows: list[list[int]]) -> tuple[list[int], list[int]]:
        step = next(steps)
        going = {2: [*order[1:], 0], 3: [0, *order[1:-1], 0]}.get(step, order)
        chosen = [int(logits[row].argmax()) for row in going]
        rows[:] = [[*rows[row], token] for row, token in zip(going, chosen, strict=True)]
        return ([], []) if step == 19 else (going, chosen)

    for _ in tokens(model, prompts, choose, CPU, cached=cached, memory=memory):
        pass
    return rows


def test_with_a_cache_it_writes_what_it_writes_without(model):
    plain = written(model, cached=False)
    assert written(model, cached=True) == plain and len({tuple(row) for row in plain}) > 2
    memory = PromptMemory()
    for prompt in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 9, 9]):  # read on; cut back, and read on
        assert written(model, True, memory, [prompt]) == written(model, False, None, [prompt])


def test_no_ngram_reaches_into_the_document_before(small_settings, model):
    apart = build_model(small_settings("ngram", separate_documents=True)).double().eval()
    apart.load_state_dict(model.state_dict())
    first, second = [3, 1, 4, 1, 5], [12, 9, 2, 6, 5, 3]  # 12: the separator
    with torch.no_grad():
        alone = [model(torch.tensor([document]))[0] for document in (first, second)]
        both = torch.tensor([[*first, *second]])
        torch.testing.assert_close(apart(both)[0], torch.cat(alone))
        assert not torch.allclose(model(both)[0], torch.cat(alone))
        cache = apart.new_cache(1)
        pieces = [apart(piece, cache=cache) for piece in both.split([4, 3, 1, 3], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1)[0], torch.cat(alone))


def test_tables_suit_the_length_of_the_text_unless_said():
    rows = [NgramSettings().sized(tokens).ngram_rows for tokens in (1, 8192, 8193 * 8, 1_000_000, 10**9)]
    assert rows == [1024, 1024, 16384, 131072, 131072]
    assert NgramSettings(ngram_rows=7).sized(10**6).ngram_rows == 7


def test_a_run_knows_its_rows_and_grows_with_its_vocabulary(desk: Path, quire_command):
    shape = {
        "kind": "ngram",
        "embedding_size": 16,
        "layers": 1,
        "heads": 2,
        "context_length": 32,
        "ngram_orders": [2, 3],
    }
    common = {"steps": 4, "batch_size": 4, "threads": 1, "device": "cpu", "warmup_steps": 0, "sample_tokens": 0}
    run = quire.train("book.txt", run="run", model=shape, **common)
    assert run.config["model"]["ngram_rows"] == run.settings.ngram_rows == 1024
    (desk / "new.txt").write_text((desk / "book.txt").read_text(encoding="utf-8")[:4000] + "0123456789" * 40)
    tuned = quire.finetune("run", "new.txt", run="tuned", unknown="grow", **common)
    assert tuned.settings.vocabulary_size > run.settings.vocabulary_size
    assert tuned.settings.ngram_rows == 1024
    for to in ("hf", "gguf", "onnx", "json"):
        said = quire_command("export", "run", "--to", to, "--out", "out")
        assert said.code == 2 and "--preset default" in said.plain and "n-gram" in said.plain
        assert not Path("out").exists()


@pytest.fixture
def counting(model) -> Any:
    """The model, given counts of a text in which 5 follows 3."""
    model.counts = KneserNey.count(np.array([3, 5, 1, 2] * 40 + [0, 4, 6, 7]), model.settings.vocabulary_size, 4)
    return model


def test_counts_have_their_share_of_what_is_written_and_measured(counting):
    tokens = torch.tensor([[1, 2, 3, 5, 1, 2], [0, 0, 4, 6, 2, 3]])
    mask = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    targets = torch.tensor([[2, 3, 5, 1, 2, 3], [IGNORED, IGNORED, 6, 7, 3, 5]])
    share, counts = counting.settings.count_share, counting.counts
    counting.counts = None
    network = counting(tokens, mask=mask).softmax(-1)
    counting.counts = counts
    expected = (1 - share) * network + share * counts.distribution(tokens.masked_fill(~mask, -1), 6)
    torch.testing.assert_close(counting(tokens, mask=mask).exp(), expected)
    assert counting(tokens, mask=mask)[0, 2].argmax() == 5
    chosen = expected.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)[targets != IGNORED]
    torch.testing.assert_close(counting(tokens, targets, mask=mask), -chosen.log().mean())
    assert written(counting, cached=True) == written(counting, cached=False)


def test_the_window_votes_for_what_it_read(model):
    model.settings = replace(model.settings, match_length=2)
    tokens = torch.tensor([[1, 2, 3, 5, 1, 2, 3, 5, 1, 2], [6, 6, 4, 1, 2, 7, 4, 1, 2, 7]])
    targets = tokens.roll(-1, 1)
    model.settings = replace(model.settings, match_length=0)
    network = model(tokens).softmax(-1)
    model.settings = replace(model.settings, match_length=2)
    found = Matches.find(tokens, 10, 2)
    expected = (network + found.of_each(network.shape[-1])) / (1 + found.all().unsqueeze(-1))
    torch.testing.assert_close(model(tokens).exp(), expected)
    assert model(tokens)[:, -1].argmax(-1).tolist() == [3, 4]
    chosen = expected.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(model(tokens, targets), -chosen.log().mean())
    assert written(model, cached=True) == written(model, cached=False)


def test_the_network_is_trained_as_if_there_were_no_counts(counting):
    tokens, targets = torch.tensor([[1, 2, 3, 5]]), torch.tensor([[2, 3, 5, 1]])
    with recording(counting):
        recorded = counting(tokens, targets)
    trained = counting.train()(tokens, targets)
    counting.counts = None
    torch.testing.assert_close(counting(tokens, targets), trained)
    torch.testing.assert_close(recorded, trained)


def test_a_run_keeps_its_counts_and_refuses_damaged_ones(desk: Path, quire_command):
    shape = {"kind": "ngram", "embedding_size": 16, "layers": 1, "heads": 2, "context_length": 32, "ngram_orders": []}
    common = {"batch_size": 4, "threads": 1, "device": "cpu", "warmup_steps": 0, "sample_tokens": 0}
    run = quire.train("book.txt", run="run", model=shape, steps=4, **common)
    kept = desk / "run" / "data" / "counts.safetensors"
    assert set(run.model("cpu").counts.tables()) == {f"{part}.{n}" for part in ("keys", "counts") for n in range(1, 9)}
    assert quire.evaluate(run).validation_loss == pytest.approx(run.metrics()[-1]["validation_loss"], abs=1e-5)
    none = quire.train("book.txt", run="none", model={**shape, "count_order": 0}, steps=4, **common)
    assert none.metrics()[-1]["validation_loss"] > run.metrics()[-1]["validation_loss"] + 0.3
    assert none.metrics()[-1]["train_loss"] == run.metrics()[-1]["train_loss"]
    data = bytearray(kept.read_bytes())
    data[-5] ^= 1
    kept.write_bytes(data)
    said = quire_command("generate", "run", "--prompt", "a", "--tokens", "3")
    assert said.code == 2 and "counts.safetensors is damaged" in said.plain
    kept.unlink()
    assert "counts.safetensors is missing" in quire_command("evaluate", "run").plain


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count_order": -1}, "count-order"),
        ({"count_share": 1.0}, "count-share"),
        ({"match_length": -1}, "match-length"),
        ({"ngram_orders": (1, 2)}, "from 2 to 32"),
        ({"ngram_orders": (3, 3)}, "different"),
        ({"ngram_rows": -1}, "ngram-rows"),
        ({"ngram_dropout": 1.0}, "ngram-dropout"),
    ],
)
def test_impossible_tables_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        NgramSettings(**settings)
