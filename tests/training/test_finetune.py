"""Fine-tuning takes weights and tokenizer, and nothing else; new characters become tokens where that is said."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import quire
from quire import checkpoint, files
from quire.errors import UserError
from quire.run import Run
from quire.training import resume as resuming
from quire.training.finetune import GENTLER


def other_text(path: Path, letters: str = "abcdefgh", count: int = 1200) -> Path:
    """A text that a run of the lab has not seen."""
    generator = random.Random(7)
    words = ["".join(generator.choices(letters, k=generator.randint(3, 7))) for _ in range(20)]
    path.write_text(" ".join(generator.choices(words, k=count // 5)), encoding="utf-8")
    return path


@pytest.fixture
def base(lab) -> Run:
    """A short training of the lab's text."""
    return lab.train("base", steps=30)


@pytest.fixture
def other(lab) -> Path:
    return other_text(lab.folder / "other.txt")


def test_it_begins_with_the_weights_and_measures_them_first(lab, base, other):
    run = quire.finetune(base, str(other), run=lab.folder / "new", steps=40)
    first, *rest = run.metrics()
    assert first["step"] == 0 and first["train_loss"] is None
    assert rest[-1]["step"] == 40 and rest[-1]["validation_loss"] < first["validation_loss"]
    before = quire.evaluate(base, [str(other)])  # the whole text, of which the held-out tenth is a part
    assert first["validation_loss"] == pytest.approx(before.validation_loss, rel=0.15)
    assert run.tokenizer.to_table() == base.tokenizer.to_table()
    assert run.manifest["finetuned_from"] == str(base.path)


def test_before_is_what_the_base_gives_on_the_new_held_out_text(lab, base, other):
    text = other.read_text()
    held_out, rest = lab.folder / "held-out.txt", lab.folder / "rest.txt"
    rest.write_text(text[:-300])
    held_out.write_text(text[-300:])
    run = quire.finetune(base, str(rest), run=lab.folder / "new", steps=5, data={"validation": str(held_out)})
    before = quire.evaluate(base, [str(held_out)])
    assert run.metrics()[0]["validation_loss"] == pytest.approx(before.validation_loss, abs=1e-6)
    assert run.metrics()[0]["validation_bits_per_byte"] == pytest.approx(before.bits_per_byte, abs=1e-6)


def test_a_finetuning_never_ends_worse_than_it_began(lab, base, other):
    run = quire.finetune(base, str(other), run=lab.folder / "new", steps=20, learning_rate=0.3)
    best = min(row["validation_loss"] for row in run.metrics() if row.get("validation_loss") is not None)
    assert best <= run.metrics()[0]["validation_loss"]
    if best == run.metrics()[0]["validation_loss"]:
        kept, began = checkpoint.load(run.folder("best")).model, checkpoint.load(base.trained_folder()).model
        assert all(torch.equal(kept[name], tensor) for name, tensor in began.items())


def test_the_settings_are_the_run_s_but_gentler_and_without_its_length_and_text(lab, base, other):
    run = quire.finetune(base, str(other), run=lab.folder / "new", epochs=1.0)
    mine, theirs = run.config["training"], base.config["training"]
    assert mine["learning_rate"] == pytest.approx(GENTLER * theirs["learning_rate"])
    assert (mine["steps"], mine["epochs"]) == (0, 1.0)
    assert {**run.config["model"]} == {**base.config["model"]}
    assert run.config["data"]["text"] == [str(other)]


def test_new_characters_become_tokens_whose_rows_are_the_mean(lab, base):
    other = other_text(lab.folder / "other.txt", "abcdÄ森🌲")
    with pytest.raises(UserError, match=r"lacks 3: .*--unknown grow to learn them, skip to leave them out, or replace"):
        quire.finetune(base, str(other), run=lab.folder / "new", steps=5)
    assert not (lab.folder / "new").exists()
    run = quire.finetune(base, str(other), run=lab.folder / "new", steps=25, unknown="grow")
    old, new = base.tokenizer, run.tokenizer
    assert new.vocabulary_size == old.vocabulary_size + 3
    assert [new.name(i) for i in range(old.vocabulary_size)] == [old.name(i) for i in range(old.vocabulary_size)]
    assert new.decode(new.encode("abÄ森🌲")) == "abÄ森🌲"
    text = run.path / "start"
    checkpoint_at_start(lab, base, other, text)
    weights, began = checkpoint.load(text).model, checkpoint.load(base.trained_folder()).model
    table = weights["token_embedding.weight"]
    assert torch.equal(table[: old.vocabulary_size], began["token_embedding.weight"])
    mean = began["token_embedding.weight"].mean(0)
    assert all(torch.allclose(row, mean) for row in table[old.vocabulary_size :])


def checkpoint_at_start(lab, base: Run, other: Path, folder: Path) -> None:
    """The checkpoint that stands before the first step, from a training that is broken off there."""
    lab.killed(0, quire.finetune, base, str(other), run=lab.folder / "killed", steps=25, unknown="grow")
    (lab.folder / "killed" / "checkpoints" / "last").rename(folder)


@pytest.mark.parametrize("unknown", ["skip", "replace"])
def test_unknown_characters_can_be_left_out_or_replaced(lab, base, unknown):
    other = other_text(lab.folder / "other.txt", "abcdefghÄ")
    run = quire.finetune(base, str(other), run=lab.folder / "new", steps=5, unknown=unknown)
    assert run.tokenizer.vocabulary_size == base.tokenizer.vocabulary_size
    text = run.tokenizer.decode(run.validation_tokens())
    assert "Ä" not in text
    assert run.manifest["validation"]["bytes"] == len(text.encode())
    assert resuming.verify(run) is None  # which reads and encodes the text anew


def test_a_killed_finetuning_resumes_to_the_same_bits(lab, base, other):
    whole = quire.finetune(base, str(other), run=lab.folder / "whole", steps=12)
    for at in (0, 7):
        lab.killed(at, quire.finetune, base, str(other), run=lab.folder / f"cut-{at}", steps=12)
        run = quire.resume(lab.folder / f"cut-{at}")
        mine, theirs = (checkpoint.load(found.folder("last")) for found in (run, whole))
        assert all(torch.equal(mine.model[name], tensor) for name, tensor in theirs.model.items())
        assert all(torch.equal(mine.training[name], tensor) for name, tensor in theirs.training.items())


def test_ten_kilobytes_are_enough(lab, base):
    other = other_text(lab.folder / "other.txt", "abcdefgh", 10_240)
    assert other.stat().st_size < 15_000
    run = quire.finetune(base, str(other), run=lab.folder / "new", steps=30)
    losses = [row["validation_loss"] for row in run.metrics() if row.get("validation_loss") is not None]
    assert losses[-1] < losses[0]


def test_what_was_left_out_stays_out_when_the_held_out_text_is_not_what_was_encoded(lab, base):
    """The held-out documents hold a character that is skipped: they must be known again all the same."""
    generator = random.Random(3)
    lines = ["".join(generator.choices("abcdefgh ", k=30)) for _ in range(60)]
    held_out = [line + "Ж" for line in lines[::7]]
    (lab.folder / "lines.txt").write_text("\n".join([*lines, *held_out]))
    (lab.folder / "held-out.txt").write_text("\n".join(held_out))
    data = {"validation": str(lab.folder / "held-out.txt"), "documents": "line"}
    text = str(lab.folder / "lines.txt")
    run = quire.finetune(base, text, run=lab.folder / "new", steps=3, unknown="skip", data=data)
    tokens = list(resuming.reopened(run).tokens)
    shutil.rmtree(files.cache_folder())  # so that the text is read again
    assert list(resuming.reopened(run).tokens) == tokens
    assert len(tokens) == run.manifest["report"]["tokens"] - run.manifest["validation"]["tokens"]
    (lab.folder / "held-out.txt").unlink()
    shutil.rmtree(files.cache_folder())
    assert list(resuming.reopened(run).tokens) == tokens


def test_held_out_words_never_become_tokens(lab):
    base = lab.train("base", steps=3, tokenizer="word", vocabulary_size=300)
    (lab.folder / "new.txt").write_text("seen words seen words " * 100 + "aside Ж aside aside " * 11)
    run = quire.finetune(base, str(lab.folder / "new.txt"), run=lab.folder / "new", steps=3, unknown="grow")
    assert {"seen", "words", "Ж"} <= set(run.tokenizer.pieces)
    assert "aside" not in run.tokenizer.pieces


@pytest.mark.parametrize("kind", ["word", "bpe", "byte-bpe"])
def test_runs_of_every_kind_of_tokenizer_are_finetuned(lab, kind):
    base = lab.train("base", steps=5, tokenizer=kind, vocabulary_size=300)
    other = other_text(lab.folder / "other.txt", "abcdÄ森")
    run = quire.finetune(base, str(other), run=lab.folder / "new", steps=5, unknown="grow")
    grown = run.tokenizer.vocabulary_size - base.tokenizer.vocabulary_size
    assert grown == 0 if kind == "byte-bpe" else grown > 0
    text = other.read_text(encoding="utf-8")
    assert run.tokenizer.decode(run.tokenizer.encode(text)) == text


def test_each_names_the_other_where_it_was_meant(lab, base, other):
    with pytest.raises(UserError, match=r"was trained on\. To train on it further: quire resume"):
        quire.finetune(base, str(lab.text), run=lab.folder / "new", steps=5)
    with pytest.raises(UserError, match=r"Name the TEXT to fine-tune on\. To train further .*: quire resume"):
        quire.finetune(base, run=lab.folder / "new", steps=5)
    lab.text.write_text(lab.text.read_text() + "more of it")
    with pytest.raises(UserError, match=r"its contents differ.*on another text: quire finetune"):
        quire.resume(base, steps=5)


def test_a_given_tokenizer_grows_in_training_too(lab, base):
    other = other_text(lab.folder / "other.txt", "abcdÄ森")
    run = quire.train(
        str(other), run=lab.folder / "new", preset="gpt-mini", model=dict(lab.MODEL), tokenizer=str(base.path),
        data={"unknown": "grow"}, **{**lab.TRAINING, "steps": 3},
    )  # fmt: skip
    assert run.tokenizer.vocabulary_size == base.tokenizer.vocabulary_size + 2
    assert json.loads((run.path / "manifest.json").read_text())["report"]["vocabulary"] == run.tokenizer.vocabulary_size
    assert resuming.verify(run) is None


def test_auto_says_why_and_records_what_it_took(lab, capsys):
    run = lab.train("small", steps=3, tokenizer="auto")
    assert "Tokenizer: character, because the text has" in capsys.readouterr().err
    assert run.config["training"]["tokenizer"] == "character"
    lab.text.write_text(lab.text.read_text() * 120)
    run = lab.train("large", steps=3, tokenizer="auto")
    assert "Tokenizer: byte-bpe, because in a text of" in capsys.readouterr().err
    assert (run.config["training"]["tokenizer"], run.tokenizer.kind) == ("byte-bpe", "byte-bpe")
