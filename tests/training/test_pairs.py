"""Training on pairs: an encoder-decoder and a decoder alone, stopped, resumed, fine-tuned, measured and written by."""

import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest

import quire
from quire.data.pairs import Pairs
from quire.errors import UserError
from quire.evaluation.evaluate import evaluate
from quire.evaluation.translations import scored
from quire.run import Run
from quire.training import resume as resuming
from quire.training.resume import resume, verify

KINDS = {
    "encoder-decoder": {"kind": "encoder-decoder", "layers": 1, "embedding_size": 16, "heads": 2},
    "gpt": {"kind": "gpt", "layers": 1, "embedding_size": 16, "heads": 2, "dropout": 0.1},
}


def pairs_of(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Short words, and the same in capitals."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdef", k=generator.randint(1, 5))) for _ in range(count)]
    return [(word, word.upper()) for word in words]


def write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    return path


@pytest.fixture
def train_pairs(lab):
    """train_pairs(name, kind, ...): a training of a file of pairs with the lab's sizes."""
    write(lab.folder / "pairs.tsv", pairs_of(150))

    def act(name: str, kind: str = "encoder-decoder", data: dict | None = None, **settings: Any) -> Run:
        model = {**KINDS[kind], "context_length": 16}
        data = {"pairs": "pairs.tsv", **(data or {})}
        return quire.train(run=lab.folder / name, model=model, data=data, **{**lab.TRAINING, **settings})

    return act


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["autograd", "manual"])
def test_a_stop_changes_nothing(lab, train_pairs, kind, engine):
    settings = {"steps": 12, "engine": engine, "evaluation_interval": 5, "accumulation_steps": 2}
    straight = train_pairs("straight", kind, **settings)
    lab.killed(3, train_pairs, "run", kind, **settings)
    for step in (5, 9):
        lab.killed(step, resume, lab.folder / "run")
    lab.assert_same(resume(lab.folder / "run"), straight)
    assert verify(lab.folder / "run") is None


def test_both_engines_learn_the_same(lab, train_pairs):
    one, other = (train_pairs(engine, engine=engine, steps=20) for engine in ("autograd", "manual"))
    for a, b in zip(one.metrics(), other.metrics(), strict=True):
        if a["train_loss"] is not None:
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_is_measured_on_targets_alone(lab, train_pairs, kind):
    run = train_pairs("run", kind, steps=30, learning_rate=0.01)
    held_out = run.examples(run.validation_tokens())
    assert isinstance(held_out, Pairs)
    found = evaluate(run)
    references = [run.tokenizer.decode(held_out.ids(row)[1]) for row in range(held_out.examples())]
    assert (found.pairs, found.bytes) == (len(references), len("".join(references).encode()))
    assert found.tokens == found.bytes + found.pairs  # each letter, and each end
    best = min(row["validation_loss"] for row in run.metrics() if row.get("validation_loss") is not None)
    assert found.validation_loss == pytest.approx(best, abs=1e-6)
    assert found.validation_loss < 2.3  # of 14 tokens: 2.64
    assert evaluate(run, pairs=str(write(lab.folder / "more.tsv", pairs_of(20)))).pairs == 20
    assert 30 * 4 * 2 <= run.metrics()[-1]["tokens"] <= 30 * 4 * 6  # those of the targets, 1 to 5 letters and the end


def test_samples_show_source_reference_and_what_was_written(train_pairs):
    run = train_pairs("run", steps=4)
    text = (run.path / "samples.md").read_text()
    held_out = run.examples(run.validation_tokens())
    source, target = (run.tokenizer.decode(ids) for ids in held_out.ids(0))
    assert f"source     {source}\nreference  {target}\nwritten    " in text


def test_lengths_in_epochs_and_tokens(lab, train_pairs):
    run = train_pairs("epochs", epochs=2)
    pairs = Pairs(resuming.reopened(run).tokens, run.tokenizer.separator, 16, 0, True)
    assert run.metrics()[-1]["step"] == -(-2 * pairs.examples() // 4)
    assert run.manifest["report"]["predictions"] == len(pairs)
    run = train_pairs("tokens", tokens=600)
    assert run.metrics()[-1]["tokens"] == pytest.approx(600, rel=0.15)


def test_minutes(train_pairs):
    run = train_pairs("run", minutes=0.05)
    assert run.metrics()[-1]["step"] >= 1


def test_a_resume_finds_pairs_that_moved(lab, train_pairs, monkeypatch):
    straight = train_pairs("straight", steps=12)
    lab.killed(5, train_pairs, "run", steps=12)
    monkeypatch.setenv("QUIRE_CACHE", str(lab.folder / "another"))
    moved = (lab.folder / "pairs.tsv").rename(lab.folder / "moved.tsv")
    with pytest.raises(UserError, match=r"cannot be read: There is no file of pairs named .*--data PATH"):
        resume(lab.folder / "run")
    lab.assert_same(resume(lab.folder / "run", data=[str(moved)]), straight)


def test_validation_pairs_of_their_own(lab, train_pairs, monkeypatch, capsys):
    """Their sources are not trained on, also after a resume that reads everything anew."""
    aside = pairs_of(150)[:5] + pairs_of(20, seed=5)
    write(lab.folder / "held-out.tsv", aside)
    how = {"data": {"validation": "held-out.tsv"}, "steps": 12}
    straight = train_pairs("straight", **how)
    held_out = straight.examples(straight.validation_tokens())
    assert [straight.tokenizer.decode(held_out.ids(row)[0]) for row in range(held_out.examples())] == [
        source for source, _ in aside
    ]
    assert "left out: the pairs of --validation have their sources" in capsys.readouterr().err
    trained = straight.in_pairs(resuming.reopened(straight).tokens)
    known = {straight.tokenizer.decode(trained.ids(row)[0]) for row in range(trained.examples())}
    assert not known & {source for source, _ in aside}
    lab.killed(5, train_pairs, "run", **how)
    monkeypatch.setenv("QUIRE_CACHE", str(lab.folder / "another"))
    (lab.folder / "held-out.tsv").unlink()
    lab.assert_same(resume(lab.folder / "run"), straight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finetuning_on_other_pairs(lab, train_pairs, kind):
    base = train_pairs("base", kind, steps=20)
    other = write(lab.folder / "other.tsv", [(a[::-1], b) for a, b in pairs_of(150, seed=3)])
    run = quire.finetune(base, run=lab.folder / "new", steps=5, data={"pairs": str(other)})
    first = run.metrics()[0]
    assert first["step"] == 0 and run.manifest["report"]["predictions"] > 0
    assert evaluate(run).pairs > 1
    with pytest.raises(UserError, match=r"That is the text .* was trained on"):
        quire.finetune(base, run=lab.folder / "newer", steps=5, data={"pairs": str(lab.folder / "pairs.tsv")})


def test_pairs_that_do_not_fit_are_said(lab, train_pairs, capsys):
    lines = [*pairs_of(60), ("a" * 30, "b"), *pairs_of(60, seed=2), ("a", "b" * 16)]
    write(lab.folder / "long.tsv", lines)
    run = train_pairs("run", data={"pairs": "long.tsv"}, steps=2)
    said = capsys.readouterr().err
    assert "1 of 1" in said and "do not fit the context length of 16 tokens and are left out" in said
    assert run.manifest["validation"]["bytes"] < 16 * 12
    write(lab.folder / "longer.tsv", [(f"{'a' * 30}{i}", "b") for i in range(60)])
    with pytest.raises(
        UserError, match=r"No pair .* fits the context length of 16 tokens. Give a longer --model.context"
    ):
        train_pairs("none", data={"pairs": "longer.tsv"}, steps=2)
    assert not (lab.folder / "none").exists()


# ---- what is refused ----


def test_mistakes_are_named_before_a_run_is_made(lab, train_pairs):
    model = {**KINDS["encoder-decoder"], "context_length": 16}
    mistakes = {
        "learns from pairs .* give it --pairs FILE": {"model": model},
        r"TEXT \(text.txt\) and --pairs pairs.tsv both name": {"data": {"pairs": "pairs.tsv", "text": ["text.txt"]}},
        "--curriculum cuts a text into windows": {
            "model": model, "data": {"pairs": "pairs.tsv"}, "curriculum": ("1:8", "1:"),
        },
        "--model.separate-documents is for streams": {
            "model": {**KINDS["gpt"], "separate_documents": True}, "data": {"pairs": "pairs.tsv"},
        },
        "no file of pairs named 'pair.tsv'": {"model": model, "data": {"pairs": "pair.tsv"}},
    }  # fmt: skip
    for sentence, settings in mistakes.items():
        with pytest.raises(UserError, match=sentence):
            quire.train(run=lab.folder / "run", steps=3, **{**lab.TRAINING, **settings})
        assert not (lab.folder / "run").exists()


def test_what_a_run_of_pairs_is_not_measured_on(lab, train_pairs):
    run = train_pairs("run", steps=3)
    for sentence, how in {
        "has an encoder, and is measured on pairs": {"texts": ["text.txt"]},
        "both name what to measure on": {"texts": ["text.txt"], "pairs": "pairs.tsv"},
        "--stride is for windows of a text": {"stride": 4},
    }.items():
        with pytest.raises(UserError, match=sentence):
            evaluate(run, **how)
    with pytest.raises(UserError, match="Name the --pairs FILE to fine-tune on"):
        quire.finetune(run, run=lab.folder / "new", steps=3)
    plain = lab.train("plain", steps=3)
    with pytest.raises(UserError, match="--translations needs pairs of a source and a target"):
        evaluate(plain, translations=True)


# ---- what it writes ----


@pytest.mark.parametrize("kind", KINDS)
def test_translations_are_compared_with_their_references(lab, train_pairs, kind):
    run = train_pairs("run", kind, steps=60, learning_rate=0.01)
    found = evaluate(run, translations=True)
    held_out = run.examples(run.validation_tokens())
    pairs = [[run.tokenizer.decode(ids) for ids in held_out.ids(row)] for row in range(held_out.examples())]
    written = [quire.generate(run, source, temperature=0, tokens=16)[0].text for source, _ in pairs]  # one at a time
    assert found.exact_match == sum(text == target for text, (_, target) in zip(written, pairs)) / len(pairs)
    assert found.bleu is not None and 0 < found.chrf <= 100
    assert 0 < evaluate(run, translations=True, beams=2).chrf <= 100


def test_scores_are_sacrebleu_s():
    sacrebleu = pytest.importorskip("sacrebleu")
    written, wanted = ["the cat sat on the mat today", "a dog"], ["the cat sat on the mat now", "a dog"]
    found = scored(written, wanted)
    assert found.exact_match == 0.5
    assert found.bleu == pytest.approx(sacrebleu.BLEU().corpus_score(written, [wanted]).score)
    assert found.chrf == pytest.approx(sacrebleu.CHRF().corpus_score(written, [wanted]).score)
    assert scored(wanted, wanted).bleu == pytest.approx(100)


def test_without_sacrebleu_the_rest_is_said(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    found = scored(["a", "b"], ["a", "c"])
    assert (found.exact_match, found.bleu, found.chrf) == (0.5, None, None)
    assert 'pip install "quire[translation]"' in capsys.readouterr().err


def test_the_commands(lab, train_pairs, quire, monkeypatch):
    """Train on a task by its preset, cut down; evaluate and generate as a person would."""
    small = shlex.split("--steps 3 --model.layers 1 --model.embedding-size 16 --model.heads 2 --batch-size 4")
    small += ["--threads", "1", "--device", "cpu"]
    said = quire("train", "--preset", "seq2seq-copy", "--pairs", "pairs.tsv", "--run", "run", "--json", *small)
    assert said.code == 0, said.err
    assert json.loads(said.out)["steps"] == 3
    measured = quire("evaluate", "run", "--translations", "--json")
    assert {"pairs", "exact_match", "bleu", "chrf"} <= json.loads(measured.out).keys()
    assert "exact match" in quire("evaluate", "run", "--translations", "--beams", "2").out
    assert quire("generate", "run", "--prompt", "abc", "--json").code == 0
    assert quire("train", "text.txt", "--preset", "seq2seq-copy", "--run", "none", *small).code == 2
    assert quire("resume", "run", "--steps", "2").code == 0
    assert quire("plot", "run", "--out", "plot.png").code == 0
