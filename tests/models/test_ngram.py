"""The n-gram model: written with a cache as without one, documents apart, its tables sized by the text, its exports."""

from pathlib import Path
from typing import Any

import pytest
import torch

import quire
from quire.errors import UserError
from quire.generation.reading import PromptMemory
from quire.generation.stream import tokens
from quire.models import build_model
from quire.models.ngram import NgramSettings
from quire.run import Run

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
    for to in ("hf", "gguf", "onnx"):
        said = quire_command("export", "run", "--to", to, "--out", "out")
        assert said.code == 2 and "--preset default" in said.plain and "n-gram" in said.plain
        assert not Path("out").exists()
    assert quire_command("export", "run", "--to", "json", "--out", "out.json").code == 0
    assert quire_command("import", "out.json", "--run", "again").code == 0
    one, other = (Run(name).model("cpu").ngram_embedding.weight for name in ("run", "again"))
    assert torch.equal(one, other) and one.any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ngram_orders": ()}, "ngram-orders"),
        ({"ngram_orders": (1, 2)}, "from 2 to 32"),
        ({"ngram_orders": (3, 3)}, "different"),
        ({"ngram_rows": -1}, "ngram-rows"),
        ({"ngram_dropout": 1.0}, "ngram-dropout"),
    ],
)
def test_impossible_tables_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        NgramSettings(**settings)
