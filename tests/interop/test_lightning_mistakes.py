"""Lightning's Trainer as Quire has it, and the sentences for what cannot be."""

import importlib
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch.utils.data import DataLoader

from quire import UserError, processes
from quire.cli.main import call
from quire.data.batches import Batches, Cursor
from quire.interop.lightning import GPT2, LanguageModel, TextData, Trainer, generate, to_run
from quire.interop.lightning_module import check_strategy
from quire.models.gpt import GPTSettings
from quire.tokenizers import KNOWN, CharacterTokenizer

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
    assert Trainer(max_steps=21, accelerator="cpu", devices=1).checkpoint_callback._every_n_train_steps == 11
    assert Trainer(max_steps=5003, accelerator="cpu", devices=1).val_check_interval == 501
    assert Trainer(accelerator="cpu", devices=1, barebones=True).barebones


def test_a_training_is_measured_and_saved_as_often_as_is_said_and_at_its_end(folder):
    """25 steps have no half; an epoch of 12 batches ends with half a step less than its share of them."""
    measured, saved = [], []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer, module):
            measured.append(trainer.global_step)

        def on_save_checkpoint(self, trainer, module, checkpoint):
            saved.append(trainer.global_step)

    trainer = fitted(folder, "run", max_steps=25, callbacks=[Watch()], num_sanity_val_steps=0)
    assert measured == [13, 25] and saved == [13, 25, 25]  # the last one by `fitted`
    assert trainer.checkpoint_callback.best_model_path.endswith("step=25.ckpt")


def test_strategy_dp_and_missing_devices_get_a_sentence():
    with pytest.raises(UserError, match=r'dropped the strategy "dp".*strategy="ddp"'):
        Trainer(strategy="dp")
    with pytest.raises(UserError, match="devices"):
        Trainer(accelerator="cpu", devices=0)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        with pytest.raises(UserError, match=r"gpu.*(devices=N|torch)"):
            Trainer(accelerator="gpu", devices=2)
    for arguments in (
        {"max_steps": None},
        {"accumulate_grad_batches": {0: 2}},
        {"accelerator": "xyz"},
        {"max_step": 3},
    ):
        with pytest.raises(UserError, match=f"Lightning's Trainer: .*{next(iter(arguments))}"):
            Trainer(**arguments)
    with pytest.raises(UserError, match="max_steps") as raised:
        Trainer(max_steps=-5, accelerator="cpu")
    assert "GPU" not in str(raised.value)


def test_strategies_that_would_train_another_model_are_refused():
    for strategy in (FSDPStrategy(), ModelParallelStrategy(), object.__new__(DeepSpeedStrategy)):
        with pytest.raises(UserError, match=r'not by \w+Strategy\. Take strategy="ddp".*--parallel fsdp'):
            check_strategy(strategy)
    for strategy in (DDPStrategy(), SingleDeviceStrategy()):
        check_strategy(strategy)


def test_one_of_the_processes_that_lightning_starts_speaks(monkeypatch):
    """Before there are processes, it is the only one; later Lightning sets LOCAL_RANK, and the user NODE_RANK."""
    for environment, leads in (({}, True), ({"LOCAL_RANK": "0"}, True), ({"LOCAL_RANK": "1"}, False),
                               ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False)):  # fmt: skip
        for name in ("LOCAL_RANK", "NODE_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert processes.leads() == leads


def test_a_process_reads_its_part_of_a_batch(folder):
    """Two of them together what one has, and nothing else."""
    data = TextData("text.txt", tokenizer="character", batch_size=5)
    data.fitted(GPTSettings(**SHAPE))
    data.batches = Batches(data.loaded[0].training, 16, 0)
    (whole, first, second) = (taken_by(data, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2)))
    assert len(first[1]) == 2 and len(second[1]) == 3
    assert torch.equal(torch.cat([first[0], second[0]]), whole[0])
    assert first[1] + second[1] == whole[1]


def taken_by(data: TextData, rank: int, world: int) -> tuple[torch.Tensor, list[int]]:
    """The first batch of a process, and where in the text it was read."""
    read = []

    class Watched(type(data.loaded[0].training)):
        def __getitem__(self, place):
            read.append(place.start // 16 * 16)
            return super().__getitem__(place)

    data.batches.tokens = Watched(data.loaded[0].training.parts)
    data.cursor, data.taken = Cursor(), 0
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, num_training_batches=7)
    return next(iter(data.train_dataloader()))["tokens"], [*dict.fromkeys(read)]


def test_a_training_that_ends_in_the_warm_up_says_so(folder, capsys):
    for training in ({"warmup_steps": 2}, {"warmup_steps": 1}):
        fitted(folder, "run", max_steps=2, training=training)
        assert ("grows over 2 steps" in capsys.readouterr().err) == (training["warmup_steps"] == 2)


def test_a_prepared_text_has_its_own_tokenizer(folder):
    assert call(["prepare", "text.txt", "--tokenizer", "character", "--out", "shelf"]) == 0
    assert TextData("shelf/index.json").tokenizer.kind == "character"
    with pytest.raises(UserError, match="a tokenizer of its own"):
        TextData("shelf/index.json", tokenizer="byte-bpe", vocabulary_size=300).fitted({"kind": "gpt"})


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
    "no such text": (lambda: TextData("no.txt", tokenizer="character").fitted(GPTSettings(**SHAPE)), r"no\.txt"),
    "a loader alone": (lambda: TextData("text.txt").train_dataloader(), r"trainer\.fit\(model, data\)"),
    "other tokenizer": (lambda: fit(model_of({"vocabulary_size": 5})), "has 11 tokens, and the model 5.*data.fitted"),
    "small batch": (lambda: fit(model_of(), batch_size=0), "batch-size"),
    "other module": (lambda: fit(BoringModel()), "not a BoringModel"),
    "pairs": (lambda: fit(model_of({"kind": "encoder-decoder"})), "pairs"),
    "endless schedule": (lambda: fit(model_of(), max_epochs=-1), r"max_steps=N"),
    "batches": (lambda: fit_batch(torch.arange(4)), "gives a Tensor"),
    "floats": (lambda: fit_batch((ROW.float(), ROW)), r"its tokens are float32 \(2, 16\)"),
    "one dimension": (lambda: fit_batch((ROW[0], ROW[0])), r"its tokens are int64 \(16,\)"),
    "no tensor": (lambda: fit_batch((ROW.tolist(), ROW)), "its tokens are list"),
    "unequal": (lambda: fit_batch((ROW, ROW[:, 1:])), r"one target, but a batch has \(2, 16\) and \(2, 15\)"),
    "too long": (lambda: fit_batch((ROW.repeat(1, 2),) * 2), "32 long, and the model's context length is 16"),
    "no such token": (lambda: fit_batch((ROW + 1, ROW)), r"11 is among the tokens .* from 0 to 10"),
    "no such target": (lambda: fit_batch((ROW, ROW - 1)), r"-1 is among the targets .* or -100"),
    "GPT-2 offline": (lambda: generate(model_of({"vocabulary_size": 50257})), "50,257 implies GPT-2's.*tokenizer=PATH"),
    "GPT-2's text offline": (lambda: TextData("text.txt").tokenizer, "has it by default.*tokenizer=PATH"),
    "tokenizer unknown": (lambda: generate(model_of()), "tokenizer=PATH"),
    "wrong tokenizer": (lambda: generate(model_of(), tokenizer=CharacterTokenizer("abc")), "has 5 tokens"),
    "run there": (lambda: to_run(model_of(), "."), "exists already"),
    "no checkpoint": (lambda: to_run("no.ckpt", "run"), "no checkpoint no.ckpt"),
    "no checkpoint to load": (lambda: GPT2.load_from_checkpoint("no.ckpt"), "no checkpoint no.ckpt"),
}  # fmt: skip


def offline() -> CharacterTokenizer:
    raise UserError("It is not on this machine yet.")


ROW = torch.arange(11).repeat(3)[:32].reshape(2, 16)


def fit_batch(batch: Any) -> None:
    Trainer(max_steps=1, **QUIET).fit(model_of(warmup_steps=0), DataLoader([batch], batch_size=None))


def fit(module: pl.LightningModule, batch_size: int = 4, **arguments: Any) -> None:
    data = TextData("text.txt", tokenizer="character", batch_size=batch_size)
    Trainer(**{"max_steps": -1 if arguments else 1, **QUIET, **arguments}).fit(module, data)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integers_are_tokens(dtype):
    fit_batch((ROW.to(dtype), ROW.to(dtype)))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_a_sentence(name, folder, monkeypatch):
    monkeypatch.setitem(KNOWN, "gpt2", offline)
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
    trainer = fitted(folder, "run", max_steps=1)
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
    for name, sentence in {**sentences, "missing": "no checkpoint"}.items():
        with pytest.raises(UserError, match=sentence):
            fitted(folder, "on", ckpt_path=folder / f"{name}.ckpt", max_steps=2, kind=pl.Trainer)
    with pytest.raises(UserError, match="checksum"):
        trainer.validate(trainer.lightning_module, trainer.datamodule, ckpt_path=folder / "damaged.ckpt")
    with pytest.raises(UserError, match=r"another model: layers 1 \(here 2\).*load_from_checkpoint"):
        fitted(folder, "on", ckpt_path=folder / "run.ckpt", model=GPTSettings(**{**SHAPE, "layers": 2}))


def test_checkpoints_through_a_plugin_are_checked_too(folder):
    """Lightning's own asynchronous writer: it goes on writing, and is closed."""
    trainer = fitted(folder, "run", max_steps=1, plugins=[AsyncCheckpointIO()])
    flipped = bytearray(Path(trainer.checkpoint_callback.best_model_path).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (folder / "flipped.ckpt").write_bytes(flipped)
    with pytest.raises(UserError, match="damaged"):
        fitted(folder, "on", ckpt_path=folder / "flipped.ckpt", max_steps=2, plugins=[AsyncCheckpointIO()])


def test_any_checkpoint_is_one_of_a_language_model(folder):
    """Also that of a GPT2; but not the other way round."""
    small = GPT2(max_len=16, emb_dim=16, num_layers=1, num_heads=2, vocab_size=11, warmup_steps=0)
    for name, module in (("gpt2", small), ("model", model_of(warmup_steps=0))):
        trainer = Trainer(max_steps=1, **QUIET)
        trainer.fit(module, DataLoader([(ROW, ROW)], batch_size=None))
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        again = LanguageModel.load_from_checkpoint(folder / f"{name}.ckpt")
        assert (again.settings, again.training_settings) == (module.settings, module.training_settings)
        assert all(torch.equal(*pair) for pair in zip(again.parameters(), module.parameters(), strict=True))
    with pytest.raises(UserError, match=r"of a LanguageModel, not of a GPT2: LanguageModel\.load_from"):
        GPT2.load_from_checkpoint(folder / "model.ckpt")


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    for name in [name for name in sys.modules if name.startswith("quire.interop.lightning")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"quire\[lightning\]"):
        importlib.import_module("quire.interop.lightning")
