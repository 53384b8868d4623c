"""Lightning on loaders of a user's own: every token weighs the same, and a training goes on with the next batch."""

import runpy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import quire
from quire import UserError
from quire.data.batches import Batch
from quire.interop.lightning import GPT2, LanguageModel, Trainer, generate, to_run
from quire.layers.cross_entropy import IGNORED
from quire.tokenizers import KNOWN, CharacterTokenizer

exercise = runpy.run_path(str(Path(__file__).with_name("exercise_lightning.py")))
fitted, logged, assert_same_training = (exercise[name] for name in ("fitted", "logged", "assert_same_training"))
QUIET = exercise["QUIET"]

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning advises on logging packages and numbers of workers


@pytest.fixture
def folder(text_folder: Path) -> Path:
    """The working directory, with text.txt."""
    return text_folder


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


class Seen(pl.Callback):
    """Weights and gradient of each step, as any callback sees them."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        named = dict(module.model.named_parameters())
        grads = {name: p.grad.to_dense().clone() for name, p in named.items()}
        self.steps.append(({name: p.detach().clone() for name, p in named.items()}, grads))


@pytest.mark.parametrize("kind", ["gpt", "ngram"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_torchs_own_loss_is_the_oracle_on_a_ragged_loader(kind, precision, folder, small_settings):
    """Three batches in steps of two: what is logged, seen and clipped is of the mean over all tokens of a step."""
    batches = [*exercise["ragged"](1)][:3]
    sgd = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "schedule": "constant",
           "learning_rate": 1.0, "gradient_clip": 0.125}  # fmt: skip
    settings = small_settings(kind, vocabulary_size=9, separator=-1, context_length=16)
    model, seen = LanguageModel(settings, sgd), Seen()
    logger = {"logger": pl.loggers.CSVLogger(folder), "log_every_n_steps": 1}
    trainer = Trainer(
        max_steps=2, accumulate_grad_batches=2, precision=precision, callbacks=[seen], **{**QUIET, **logger}
    )
    trainer.fit(model, DataLoader(batches, batch_size=None))
    after = [*(weights for weights, _ in seen.steps[1:]), dict(model.model.named_parameters())]
    for number, (step, (weights, grads)) in enumerate(zip((batches[:2], batches[2:]), seen.steps, strict=True)):
        oracle = LanguageModel(settings, sgd).model
        oracle.load_state_dict(weights, strict=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            logits = [oracle(tokens).float().flatten(0, 1) for tokens, _ in step]
        targets = torch.cat([row.flatten() for _, row in step])
        loss = F.cross_entropy(torch.cat(logits), targets, ignore_index=IGNORED)
        loss.backward()
        assert logged(folder, ".")["loss"][number] == pytest.approx(float(loss.detach()), rel=1e-5)
        wanted = {name: p.grad.to_dense() for name, p in oracle.named_parameters()}
        apart, whole = (
            torch.cat([each.flatten() for each in every]).norm()
            for every in ([grads[name] - wanted[name] for name in wanted], wanted.values())
        )
        assert apart <= (1e-5 if precision == "32-true" else 1e-2) * whole
        clipped = [name for name in wanted if "ngram" not in name]
        norm = torch.stack([wanted[name].norm() for name in clipped]).norm()
        moved = torch.stack([(after[number][name] - weights[name]).norm() for name in clipped]).norm()
        assert norm > 0.125 and float(moved.detach()) == pytest.approx(0.125, rel=1e-3)


class Stream(IterableDataset):
    """A loader's rows, whose number it does not know."""

    def __iter__(self):
        return iter(exercise["rows"]().dataset)


OWN_LOADERS = {
    "in order": lambda: exercise["rows"](),
    "shuffled": lambda: exercise["rows"](shuffle=True),
    "seeded": lambda: exercise["rows"](shuffle=True, generator=torch.Generator().manual_seed(7)),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
}


@pytest.mark.parametrize("name", OWN_LOADERS)
def test_a_plain_loader_goes_on_bit_for_bit(name, folder):
    """In the middle of the first epoch and of the second one, and at the end of the first: of 8 batches, 4 steps."""
    options = {"max_steps": 7, "kind": pl.Trainer}
    each = pl.callbacks.ModelCheckpoint(save_top_k=-1, dirpath=folder / "each", every_n_train_steps=1)
    fitted(folder, "whole", callbacks=[each], loader=OWN_LOADERS[name](), **options)
    for step in (1, 6) if name == "stream" else (1, 4, 6):  # Lightning begins a stream once more at its end
        (path,) = (folder / "each").glob(f"*step={step}.ckpt")
        fitted(folder, f"from-{step}", ckpt_path=path, loader=OWN_LOADERS[name](), **options)
        assert_same_training(folder, "whole", f"from-{step}")
    with pytest.raises(UserError, match="fewer batches than the 4"):
        fitted(folder, "less", ckpt_path=path, loader=DataLoader([*exercise["rows"]().dataset][:3]), **options)
