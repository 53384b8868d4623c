"""Lightning: the same training as Quire's own, on one process and two, stopped or not; checkpoints and runs."""

import csv
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import quire
from quire import UserError, checkpoint
from quire.config import preset
from quire.data.batches import Batch
from quire.interop import import_model
from quire.interop.lightning import GPT2, LanguageModel, TextData, Trainer, from_run, generate, to_run
from quire.models import MODELS
from quire.models.gpt import GPTSettings
from quire.models.modern import ModernSettings
from quire.tokenizers import KNOWN, CharacterTokenizer
from quire.training.loop import Trainer as OwnTrainer
from quire.training.schedules import cosine, warmed_up

EXERCISE = Path(__file__).with_name("exercise_lightning.py")
exercise = runpy.run_path(str(EXERCISE))
fitted, stopped_and_resumed = exercise["fitted"], exercise["stopped_and_resumed"]
SHAPE, TRAINING, STEPS, BATCH, QUIET = (exercise[name] for name in ("SHAPE", "TRAINING", "STEPS", "BATCH", "QUIET"))

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning advises on logging packages and numbers of workers


@pytest.fixture
def folder(text_folder: Path) -> Path:
    """The working directory, with text.txt."""
    return text_folder


def loaded(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def logged(folder: Path, name: str) -> dict[str, list[float]]:
    """What CSVLogger wrote, by name."""
    with (folder / name / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


def different(one: Any, other: Any, where: str = "") -> list[str]:
    """The places at which two trees of tensors and plain values are not the same bits."""
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict):
        same = [] if one.keys() == other.keys() else [f"{where}: names"]
        return same + [
            each for key in one.keys() & other.keys() for each in different(one[key], other[key], f"{where}.{key}")
        ]
    if isinstance(one, (list, tuple)):
        same = [] if len(one) == len(other) else [f"{where}: length"]
        return same + [each for n, pair in enumerate(zip(one, other)) for each in different(*pair, f"{where}.{n}")]
    return [] if one == other else [where]


def assert_same_training(folder: Path, one: str, other: str) -> None:
    """Weights, optimizer, schedule, place in the text, random generators: everything but Lightning's own counters."""
    first, second = loaded(folder / f"{one}.ckpt"), loaded(folder / f"{other}.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "TextData", "quire", "global_step"):
        assert not different(first[part], second[part], part)


# ---- the training ----


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (4, {}),
        (6, {}),  # the end of an epoch
        (5, {"training": {"optimizer": "muon"}, "val_check_interval": 3, "check_val_every_n_epoch": None}),
        (7, {"accumulate_grad_batches": 1, "model": ModernSettings(kind="modern", **SHAPE, dropout=0.2)}),
        (3, {"precision": "bf16-mixed", "training": {"gradient_checkpointing": True}}),
    ],
    ids=["middle", "epoch", "muon", "modern", "bfloat16"],
)
def test_a_stopped_training_goes_on_bit_for_bit(folder, stop, options):
    fitted(folder, "whole", **options)
    stopped_and_resumed(folder, "parts", stop=stop, **options)
    assert_same_training(folder, "whole", "parts")
    fitted(folder, "other", **{**options, "training": {**options.get("training", {}), "seed": 2}})
    assert different(*(loaded(folder / f"{name}.ckpt")["state_dict"] for name in ("whole", "other")))  # it can fail


def test_a_training_counted_in_epochs_goes_on_bit_for_bit(folder):
    """By Lightning's own Trainer, which saves at the end of each epoch."""
    whole = {"max_steps": -1, "max_epochs": 2, "kind": pl.Trainer}
    fitted(folder, "whole", **whole)
    first = fitted(folder, "first", max_steps=-1, max_epochs=1, kind=pl.Trainer)
    assert first.global_step == 6
    fitted(folder, "parts", **whole, ckpt_path=first.checkpoint_callback.best_model_path)
    assert_same_training(folder, "whole", "parts")


def test_a_shuffled_loader_of_torchs_own_goes_on_at_the_end_of_an_epoch(folder):
    """It draws its order from the random generator, which is put back before there is a loader."""
    rows = torch.randint(9, (16, 17), generator=torch.Generator().manual_seed(1))
    loader = DataLoader([(row[:-1], row[1:]) for row in rows], batch_size=2, shuffle=True)
    options = {"loader": loader, "max_steps": -1, "max_epochs": 3, "training": {"steps": 0}}
    fitted(folder, "whole", callbacks=[pl.callbacks.ModelCheckpoint(save_top_k=-1, dirpath=folder / "each")], **options)
    fitted(folder, "parts", ckpt_path=folder / "each" / "epoch=1-step=8.ckpt", **options)
    first, second = (loaded(folder / f"{name}.ckpt") for name in ("whole", "parts"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "quire", "global_step"):
        assert not different(first[part], second[part], part)


def test_the_place_in_the_text_follows_each_batch(folder):
    """Also in the middle of a step; beyond the end of the first epoch of 34 windows the second one begins."""
    places = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *rest):
            places.append(trainer.datamodule.state_dict())

    fitted(folder, "run", callbacks=[Watch()])
    assert [place["epoch"] for place in places] == [0] * 11 + [1] * 7
    assert [place["position"] for place in places] == [*range(3, 34, 3), *range(2, 21, 3)]
    assert [place["taken"] for place in places] == [*range(1, 13), *range(1, 7)]


def test_two_processes_train_as_one(folder):
    """The same losses, also of batches whose parts have different numbers of targets; and the same exact resume."""
    (folder / "two").mkdir()
    exercise["write_text"](folder / "two")
    command = [sys.executable, str(EXERCISE), str(folder / "two"), "2"]
    paths = os.pathsep.join(filter(None, [str(Path(quire.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_training(folder / "two", "whole", "parts")
    drawn = loaded(folder / "two" / "whole.ckpt")["quire"]["random"]["cpu"]
    assert len(drawn) == 2 and not torch.equal(*drawn)  # each process has dropout of its own
    exercise["curves"](folder, 1)
    for name in ("curve", "ngram", "ragged"):
        one, two = logged(folder, name), logged(folder / "two", name)
        assert len(one["loss"]) >= 3
        for key in one:
            assert one[key] == pytest.approx(two[key], rel=1e-5), (name, key)


def test_quires_own_trainer_is_the_oracle(folder, monkeypatch):
    """The same settings and seed there: the same losses, step by step, and the same held-out loss."""
    losses, step_optimizers = [], OwnTrainer.step_optimizers
    monkeypatch.setattr(
        OwnTrainer, "step_optimizers", lambda self, loss: losses.append(loss) or step_optimizers(self, loss)
    )
    own = {"tokenizer": "character", "batch_size": BATCH, "accumulation_steps": 2, "device": "cpu", "threads": 1}
    model = {**SHAPE, "dropout": 0.0}
    run = quire.train("text.txt", run="own", preset="gpt-mini", model=model, **TRAINING, **own)
    fitted(folder, "lightning", dropout=0.0, val_check_interval=2 * STEPS, check_val_every_n_epoch=None)
    found = logged(folder, "lightning")
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert found["loss"] == pytest.approx(losses, rel=1e-5)
    last = run.metrics()[-1]
    assert found["validation_loss"] == pytest.approx([last["validation_loss"]], rel=1e-5)
    assert found["validation_bits_per_byte"] == pytest.approx([last["validation_bits_per_byte"]], rel=1e-5)
    assert found["gradient_norm"][-1] == pytest.approx(last["gradient_norm"], rel=1e-4)


def test_what_is_logged(folder):
    trainer = fitted(folder, "run", val_check_interval=6, check_val_every_n_epoch=None)
    found = logged(folder, "run")
    assert found["perplexity"] == pytest.approx([math.exp(loss) for loss in found["loss"]], rel=1e-5)
    rates = [0.01 * warmed_up(cosine, step, 3, step / STEPS, 0.1, 0.2) for step in range(STEPS)]
    assert found["learning_rate"] == pytest.approx(rates, rel=1e-6)
    assert len(found["gradient_norm"]) == STEPS and min(found["gradient_norm"]) > 0
    assert found["validation_perplexity"] == pytest.approx([math.exp(x) for x in found["validation_loss"]], rel=1e-5)
    assert len(found["validation_bits_per_byte"]) == 3
    measured = trainer.validate(trainer.lightning_module, trainer.datamodule, verbose=False)[0]
    assert measured["validation_loss"] < found["validation_loss"][0]
    assert measured["validation_loss"] == pytest.approx(
        quire.evaluate(to_run("run.ckpt", "out")).validation_loss, rel=1e-5
    )


def test_the_trainers_clipping_goes_before_the_models(folder):
    """SGD without momentum moves by rate times gradient: its norm, where that is clipped, is what was asked for."""
    sgd = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "schedule": "constant",
        "learning_rate": 1.0,
    }
    for options, norm in (({"gradient_clip_val": 0.25}, 0.25), ({"training": {"gradient_clip": 0.125}}, 0.125)):
        training = {**sgd, **options.pop("training", {})}
        trainer = fitted(folder, f"clip-{norm}", training=training, max_steps=1, **options)
        moved = dict(trainer.lightning_module.model.named_parameters())
        begun = dict(LanguageModel(trainer.lightning_module.settings, training).model.named_parameters())
        change = torch.stack([(moved[name] - begun[name]).norm() for name in moved]).norm()
        assert float(change) == pytest.approx(norm, rel=1e-4)
        assert trainer.callback_metrics["gradient_norm"] > norm


# ---- checkpoints and runs ----


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_becomes_a_run_and_comes_back(kind, small_settings, folder, pairs):
    settings = small_settings(kind, vocabulary_size=0, separator=-1, context_length=24, dropout=0.1)
    answers = settings.reads_source
    data = TextData(
        *([] if answers else ["text.txt"]), pairs=str(pairs) if answers else "", tokenizer="character", batch_size=4
    )
    module = LanguageModel(data.fitted(settings), {"warmup_steps": 0, "learning_rate": 0.01})
    trainer = Trainer(max_steps=2, val_check_interval=2, check_val_every_n_epoch=None, **QUIET)
    trainer.fit(module, data)
    trainer.save_checkpoint("model.ckpt")
    tensors = checkpoint.model_tensors(module.model)

    again = LanguageModel.load_from_checkpoint("model.ckpt")
    assert not different(checkpoint.model_tensors(again.model), tensors)
    run = import_model("model.ckpt", "run")
    assert not different(checkpoint.model_tensors(run.model("cpu")), tensors)
    measured = quire.evaluate(run, device="cpu")
    metrics = trainer.callback_metrics
    assert measured.validation_loss == pytest.approx(float(metrics["validation_loss"]), rel=1e-5)
    assert measured.bits_per_byte == pytest.approx(float(metrics["validation_bits_per_byte"]), rel=1e-5)
    text = quire.generate(run, "a", tokens=12, temperature=0.5, device="cpu")[0].text
    for each in (module, again, from_run(run)):
        assert generate(each, "a", max_new_tokens=12, temperature=0.5) == text
        assert each.model.training
    back = to_run(from_run(run), "back")
    assert not different(checkpoint.model_tensors(back.model("cpu")), tensors)
    assert quire.evaluate(back, device="cpu") == measured
    assert back.config["model"] == run.config["model"]


def test_a_run_of_quires_trains_on_under_lightning(folder, tiny):
    module = from_run(tiny)
    before = quire.evaluate(tiny).validation_loss
    Trainer(max_steps=20, **QUIET).fit(module, TextData("book.txt", tokenizer="tiny", batch_size=4))
    run = to_run(module, "further")
    assert run.config["data"]["text"] == ["book.txt"]
    assert quire.evaluate(run).validation_loss < before
    with pytest.raises(UserError, match="finetune"):
        quire.resume(run)
    tuned = quire.finetune(run, "book.txt", run="tuned", steps=2)
    assert tuned.metrics()[0]["validation_loss"] == pytest.approx(quire.evaluate(run).validation_loss, rel=1e-5)


def test_a_tied_weight_is_once_in_optimizer_and_checkpoint(folder):
    trainer = fitted(folder, "run", max_steps=1)
    network = trainer.lightning_module.model
    assert network.head.weight is network.token_embedding.weight
    trained = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert sorted(trained) == sorted(map(id, network.parameters()))
    state = loaded(folder / "run.ckpt")["state_dict"]
    assert "model.token_embedding.weight" in state and "model.head.weight" not in state
    again = LanguageModel.load_from_checkpoint(folder / "run.ckpt").model
    assert again.head.weight is again.token_embedding.weight


# ---- GPT-2 and other loaders ----


def test_gpt2_is_the_preset():
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    model = GPT2(num_layers=1)
    assert torch.equal(torch.get_rng_state(), drawn)
    own = preset("gpt2")
    wanted = {**own["model"], "layers": 1, "separator": 50256, "dropout": 0.0, "bias": True, "tied": True}
    assert {name: getattr(model.settings, name) for name in wanted} == wanted
    assert {name: getattr(model.training_settings, name) for name in own["training"]} == own["training"]
    assert model.training_settings.steps == 600_000 and model.training_settings.warmup_steps == 2000
    with pytest.raises(UserError, match="model_dim 512 is not emb_dim 768"):
        GPT2(model_dim=512)
    with pytest.raises(UserError, match="learning_rate"):
        GPT2(num_layers=1, learning_rat=1e-3)


@pytest.mark.parametrize("form", ["tuple", "dictionary", "batch"])
def test_gpt2_on_any_loader(form, folder, monkeypatch):
    """As a user of Lightning would: fit, load without arguments, write, with the tokenizer that 50,257 tokens imply."""
    characters = CharacterTokenizer("".join(map(chr, range(0x20, 0x20 + 50257 - 2))))
    assert characters.vocabulary_size == 50257
    monkeypatch.setitem(KNOWN, "gpt2", lambda: characters)
    tokens = torch.randint(50257, (8, 13), generator=torch.Generator().manual_seed(1))
    collate = {
        "tuple": None,
        "dictionary": lambda rows: dict(zip(("tokens", "targets"), map(torch.stack, zip(*rows)))),
        "batch": lambda rows: Batch(*map(torch.stack, zip(*rows)), counted=24),
    }[form]
    loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=2, collate_fn=collate)
    model = GPT2(max_len=12, emb_dim=8, num_layers=1, num_heads=2, vocab_size=50257, weight_decay=0.2, warmup_steps=0)
    with torch.no_grad():
        first = sum(model(tokens[row : row + 2, :-1], tokens[row : row + 2, 1:]) for row in (0, 2)) / 2
    trainer = Trainer(max_steps=2, accumulate_grad_batches=2, **{**QUIET, "logger": True, "enable_checkpointing": True},
                      log_every_n_steps=1)  # fmt: skip
    trainer.fit(model, loader)
    assert logged(folder, ".")["loss"][0] == pytest.approx(float(first), rel=1e-5)
    path = trainer.checkpoint_callback.best_model_path
    again = GPT2.load_from_checkpoint(path)
    assert again.training_settings.weight_decay == 0.2 and again.training_settings.warmup_steps == 0
    text = generate(again, prompt="Hello", max_new_tokens=5, temperature=0.8)
    assert text == generate(model, prompt="Hello", max_new_tokens=5, temperature=0.8) and len(text) == 5
    run = to_run(path, "run")
    assert quire.generate(run, "Hello", tokens=5, temperature=0.8)[0].text == text
    with pytest.raises(UserError, match="without a held-out text"):
        quire.evaluate(run)


def test_targets_weigh_the_same_wherever_they_stand(folder):
    """A step over all windows, one of them short and in the second of two batches, is the mean over all tokens."""
    data = TextData("text.txt", tokenizer="character", batch_size=17)
    module = LanguageModel(data.fitted(GPTSettings(**SHAPE)), TRAINING)
    tokens = torch.from_numpy(data.loaded[0].training[:].astype("int64"))
    windows = [tokens[start : start + 17] for start in range(0, len(tokens) - 1, 16)]
    assert len(windows) == 34 and len(windows[-1]) < 17
    with torch.no_grad():
        total = sum(float(module(row[None, :-1], row[None, 1:])) * (len(row) - 1) for row in windows)
    trainer = Trainer(max_steps=1, accumulate_grad_batches=2, **QUIET)
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(total / (len(tokens) - 1), rel=1e-6)
