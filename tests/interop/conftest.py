"""Little models of random weights: as runs of Quire's, and as transformers makes them."""

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.interop.imported import Foreign, create
from quire.models import MODELS, build_model
from quire.run import Run
from quire.tokenizers import ByteBPETokenizer, CharacterTokenizer, Tokenizer

TEXT = "The owl calls upon the night, and café or 森 are none of its 1234 concerns.\n" * 30


@pytest.fixture(scope="session")
def byte_bpe() -> ByteBPETokenizer:
    """A little byte-level BPE, of 320 tokens at most."""
    return ByteBPETokenizer.train([TEXT], 320)


@pytest.fixture
def random_run(tmp_path: Path, byte_bpe: ByteBPETokenizer) -> Callable[..., Run]:
    """random_run(kind="modern", layers=1, ...) makes a run of those settings, as if it had been imported."""

    def make(tokenizer: Tokenizer | None = None, prefix: tuple[int, ...] = (), **settings: Any) -> Run:
        known = tokenizer or byte_bpe
        shape = {
            "layers": 2,
            "embedding_size": 64,
            "heads": 4,
            "feedforward_size": 96,
            "context_length": 64,
            "ngram_rows": 64,
        }
        known_fields = {field.name for field in dataclasses.fields(MODELS[settings["kind"]].Settings)}
        table = {name: value for name, value in shape.items() if name in known_fields} | settings
        own = {"vocabulary_size": known.vocabulary_size, "separator": known.separator}
        torch.manual_seed(len(settings))
        model = build_model(MODELS[table["kind"]].Settings(**table, **own))
        tensors = [(name, torch.randn_like(weight) * 0.15) for name, weight in model.named_parameters()]
        tensors = [(name, weight + 1 if "norm" in name and "weight" in name else weight) for name, weight in tensors]
        origin = {"format": "test", "path": "elsewhere", "bytes": 1, "sha256": "0"}
        return create(
            Foreign(table, tensors, known, origin, list(prefix)), tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        )

    return make


@pytest.fixture(scope="session")
def characters() -> CharacterTokenizer:
    """The characters of that text."""
    return CharacterTokenizer.train([TEXT])


@pytest.fixture
def text_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the text.txt of exercise_lightning.py."""
    runpy.run_path(str(Path(__file__).with_name("exercise_lightning.py")))["write_text"](tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


def logits(run: Run, ids: list[int]) -> torch.Tensor:
    """What the run's model gives for a row of tokens, (T, V)."""
    with torch.no_grad():
        return run.model("cpu")(torch.tensor([ids]))[0]
