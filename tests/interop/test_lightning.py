"""Lightning: the same training as Quire's own, on one process and two, stopped or not; checkpoints and runs."""

import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import quire
from quire import UserError, checkpoint
from quire.config import preset
from quire.interop import import_model
from quire.interop.lightning import GPT2, LanguageModel, TextData, Trainer, from_run, generate, to_run
from quire.models import MODELS
from quire.models.gpt import GPTSettings
from quire.models.modern import ModernSettings
from quire.training.loop import Trainer as OwnTrainer
from quire.training.schedules import cosine, warmed_up

EXERCISE = Path(__file__).with_name("exercise_lightning.py")
exercise = runpy.run_path(str(EXERCISE))
fitted, stopped_and_resumed = exercise["fitted"], exercise["stopped_and_resumed"]
SHAPE, TRAINING, STEPS, BATCH, QUIET = (exercise[name] for name in ("SHAPE", "TRAINING", "STEPS", "BATCH", "QUIET"))
loaded, logged, different, assert_same_training = (
    exercise[name] for name in ("loaded", "logged", "different", "assert_same_training")
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning advises on logging packages and numbers of workers


@pytest.fixture
def folder(text_folder: Path) -> Path:
    """The working directory, with text.txt."""
    return text_folder


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
    for whole, parts in (("whole", "parts"), ("shuffled", "shuffled-parts"), ("apart", "apart-parts")):
        assert_same_training(folder / "two", whole, parts)
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


# ---- GPT-2 and tokens ----


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
