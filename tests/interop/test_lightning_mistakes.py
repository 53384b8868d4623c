"""Lightning's Trainer as Quire has it, and the sentences for what cannot be."""

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from quire import UserError
from quire.interop.lightning import GPT2, LanguageModel, TextData, Trainer, generate, to_run
from quire.models.gpt import GPTSettings
from quire.tokenizers import CharacterTokenizer

exercise = runpy.run_path(str(Path(__file__).with_name("exercise_lightning.py")))
fitted, SHAPE, QUIET = (exercise[name] for name in ("fitted", "SHAPE", "QUIET"))

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning advises on logging packages and numbers of workers


@pytest.fixture
def folder(text_folder: Path) -> Path:
    """The working directory, with text.txt."""
    return text_folder


# ---- the Trainer ----


def test_the_trainers_own_defaults():
    trainer = Trainer(max_steps=600_000, accumulate_grad_batches=10, accelerator="cpu", devices=1, logger=False)
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (600_000, None)  # batches: 60,000 steps
    assert trainer.checkpoint_callback._every_n_train_steps == 60_000
    assert trainer.log_every_n_steps == 10
    own = pl.callbacks.ModelCheckpoint()
    given = Trainer(
        max_steps=25, callbacks=own, check_val_every_n_epoch=2, log_every_n_steps=3, accelerator="cpu", devices=1
    )
    assert given.checkpoint_callbacks == [own] and given.check_val_every_n_epoch == 2 and given.log_every_n_steps == 3
    assert Trainer(max_steps=21, accelerator="cpu", devices=1).checkpoint_callback._every_n_train_steps == 21
    assert Trainer(accelerator="cpu", devices=1, barebones=True).barebones


def test_strategy_dp_and_missing_devices_get_a_sentence():
    with pytest.raises(UserError, match=r'dropped the strategy "dp".*strategy="ddp"'):
        Trainer(strategy="dp")
    with pytest.raises(UserError, match="devices"):
        Trainer(accelerator="cpu", devices=0)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        with pytest.raises(UserError, match=r"gpu.*(devices=N|torch)"):
            Trainer(accelerator="gpu", devices=2)


# ---- mistakes ----


def model_of(settings: dict[str, Any] | None = None, **training: Any) -> LanguageModel:
    shape = {"kind": "gpt", **SHAPE, "vocabulary_size": 11, **(settings or {})}
    return LanguageModel(shape, training)


MISTAKES = {
    "no vocabulary": (lambda: model_of({"vocabulary_size": 0}), r"data\.fitted\(settings\)"),
    "no separator": (lambda: model_of({"separate_documents": True}), r"data\.fitted\(settings\)"),
    "engine": (lambda: model_of(engine="manual"), "engine manual"),
    "curriculum": (lambda: model_of(curriculum=("1:8",)), "curriculum"),
    "minutes": (lambda: model_of(minutes=3.0), "not minutes"),
    "unknown setting": (lambda: model_of({"layer": 3}), "Did you mean layers"),
    "standard input": (lambda: TextData("-"), "standard input"),
    "no such text": (lambda: TextData("no.txt").fitted(GPTSettings(**SHAPE)), r"no\.txt"),
    "a loader alone": (lambda: TextData("text.txt").train_dataloader(), r"trainer\.fit\(model, data\)"),
    "other tokenizer": (lambda: fit(model_of({"vocabulary_size": 5})), "has 11 tokens, and the model 5.*data.fitted"),
    "small batch": (lambda: fit(model_of(), batch_size=0), "batch-size"),
    "other module": (lambda: fit(BoringModel()), "not a BoringModel"),
    "pairs": (lambda: fit(model_of({"kind": "encoder-decoder"})), "pairs"),
    "endless schedule": (lambda: fit(model_of(), max_epochs=-1), r"max_steps=N"),
    "batches": (lambda: Trainer(max_steps=1, **QUIET).fit(model_of(), DataLoader(range(4))), "a Tensor"),
    "tokenizer unknown": (lambda: generate(model_of()), "tokenizer=PATH"),
    "wrong tokenizer": (lambda: generate(model_of(), tokenizer=CharacterTokenizer("abc")), "has 5 tokens"),
    "run there": (lambda: to_run(model_of(), "."), "exists already"),
    "no checkpoint": (lambda: to_run("no.ckpt", "run"), "no checkpoint no.ckpt"),
    "no checkpoint to load": (lambda: GPT2.load_from_checkpoint("no.ckpt"), "no checkpoint no.ckpt"),
}  # fmt: skip


def fit(module: pl.LightningModule, batch_size: int = 4, **arguments: Any) -> None:
    data = TextData("text.txt", tokenizer="character", batch_size=batch_size)
    Trainer(**{"max_steps": -1 if arguments else 1, **QUIET, **arguments}).fit(module, data)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_a_sentence(name, folder):
    act, sentence = MISTAKES[name]
    with pytest.raises(UserError, match=sentence):
        act()


def test_a_model_stays_with_its_tokenizer(folder):
    CharacterTokenizer("hgfedcba ").save(folder / "other.json")
    data = TextData("text.txt", tokenizer="other.json", batch_size=4)
    trainer = fitted(folder, "run", max_steps=1)
    with pytest.raises(UserError, match="another tokenizer"):
        Trainer(max_steps=2, **QUIET).fit(trainer.lightning_module, data)


def test_damaged_and_foreign_checkpoints_are_refused(folder):
    fitted(folder, "run", max_steps=1)
    whole = (folder / "run.ckpt").read_bytes()
    table = torch.load(folder / "run.ckpt", weights_only=True)
    place = whole.index(table["state_dict"]["model.token_embedding.weight"].numpy().tobytes()[:64])
    torch.save(table | {"quire": 1}, folder / "other.ckpt")
    torch.save(table | {"more": Path("x")}, folder / "code.ckpt")
    torch.save({**table, "state_dict": dict(list(table["state_dict"].items())[1:])}, folder / "less.ckpt")
    (folder / "damaged.ckpt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.ckpt").write_text("The owl calls")
    (folder / "empty.ckpt").write_bytes(b"")
    sentences = {
        "damaged": "does not match its checksum",
        "cut": "cut off",
        "text": "no checkpoint",
        "empty": "no checkpoint",
        "other": "Quire's part is not there",
        "code": "more than plain values",
        "less": "token_embedding",
    }
    for name, sentence in sentences.items():
        with pytest.raises(UserError, match=sentence):
            to_run(folder / f"{name}.ckpt", "exported")
        assert not Path("exported").exists()
    for name in ("damaged", "cut", "text", "empty"):
        with pytest.raises(UserError, match=sentences[name]):
            LanguageModel.load_from_checkpoint(folder / f"{name}.ckpt")


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    for name in [name for name in sys.modules if name.startswith("quire.interop.lightning")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"quire\[lightning\]"):
        importlib.import_module("quire.interop.lightning")
