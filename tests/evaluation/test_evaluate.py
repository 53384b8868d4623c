"""Loss and bits per byte: the definitions, on a run's held-out text and on others."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import quire as face
from quire.errors import UserError
from quire.evaluation.loss import total_loss
from quire.run import Run

CPU = torch.device("cpu")


def stream(tokenizer, documents: list[str]) -> np.ndarray:
    """[separator] document [separator] document ..."""
    return np.array([token for text in documents for token in [tokenizer.separator, *tokenizer.encode(text)]])


def by_definition(run: Run, tokens: np.ndarray, stride: int | None = None) -> tuple[float, int]:
    """The sum of -log p over all tokens but the first, one window after the other, in float64."""
    model, context = run.model(CPU).double(), run.settings.context_length
    last, total, done = len(tokens) - 1, 0.0, 0
    for end in [context, *range(context + (stride or context), last + (stride or context), stride or context)]:
        start = end - context
        window = torch.tensor(tokens[start : min(end, last)].astype(np.int64))[None]
        with torch.no_grad():
            logs = torch.log_softmax(model(window)[0], -1)
        for place in range(done, min(end, last)):  # each token once: by the first window that reaches it
            total -= float(logs[place - start, int(tokens[place + 1])])
        done = min(end, last)
    return total, done


def test_the_whole_held_out_text_each_token_once(tiny: Run) -> None:
    tokens = tiny.validation_tokens()
    found = face.evaluate("tiny", device="cpu")
    total, count = by_definition(tiny, tokens)
    assert found.tokens == count == len(tokens) - 1
    assert found.validation_loss == pytest.approx(total / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-6)
    text = tiny.tokenizer.decode(tokens)
    assert found.bytes == len(text.encode()) > len(text)  # some characters have two and three bytes
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-6)
    assert found.context_length == tiny.settings.context_length and found.stride is None


@pytest.mark.parametrize("stride", [1, 5, 16, 31, 32])
@pytest.mark.parametrize("count", [2, 20, 32, 33, 34, 64, 65, 100])
def test_overlapping_windows(tiny: Run, count: int, stride: int) -> None:
    tokens = tiny.validation_tokens()[:count]
    expected, predicted = by_definition(tiny, tokens, stride)
    total, counted = total_loss(tiny.model(CPU), tokens, 32, tiny.tokenizer.vocabulary_size, CPU, stride)
    assert counted == predicted == count - 1
    assert total == pytest.approx(expected, rel=1e-5)


def test_how_many_windows_at_once_changes_nothing(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (tiny.model(CPU), tiny.validation_tokens(), 32, tiny.tokenizer.vocabulary_size, CPU)
    total, count = total_loss(*arguments)
    monkeypatch.setattr("quire.evaluation.loss.TOKENS", 64)
    again, same = total_loss(*arguments)
    assert same == count and again == pytest.approx(total, rel=1e-6)


def test_measuring_leaves_a_training_model_in_training(tiny: Run) -> None:
    model = tiny.model(CPU).train()
    total_loss(model, tiny.validation_tokens()[:40], 32, tiny.tokenizer.vocabulary_size, CPU)
    assert model.training


def test_another_text(tiny: Run, desk: Path) -> None:
    text = "The owl speaks to none.\nA night below café stones 森.\n"
    (desk / "other.txt").write_text(text, encoding="utf-8")
    total, count = by_definition(tiny, stream(tiny.tokenizer, [text]))
    found = face.evaluate(tiny, ["other.txt"], device="cpu")
    assert found.tokens == count == len(text) and found.bytes == len(text.encode())
    assert found.validation_loss == pytest.approx(total / count, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-6)


def test_several_documents_have_separators_between_them(tiny: Run, desk: Path) -> None:
    """The separator is predicted between documents only, and has no bytes."""
    documents = ["The owl.", "A night.", "None."]
    for number, text in enumerate(documents):
        (desk / f"{number}.txt").write_text(text)
    found = face.evaluate(tiny, ["0.txt", "1.txt", "2.txt"], device="cpu")
    assert found.bytes == sum(map(len, documents))
    assert found.tokens == found.bytes + len(documents) - 1
    total, count = by_definition(tiny, stream(tiny.tokenizer, documents))
    assert found.validation_loss == pytest.approx(total / count, rel=1e-6)


def test_unknown_characters_are_left_out_or_replaced_and_counted_so(tiny: Run, desk: Path) -> None:
    (desk / "greek.txt").write_text("The Ω owl", encoding="utf-8")
    (desk / "plain.txt").write_text("The  owl", encoding="utf-8")
    with pytest.raises(UserError, match="'Ω'"):
        face.evaluate(tiny, ["greek.txt"])
    plain = face.evaluate(tiny, ["plain.txt"])
    assert face.evaluate(tiny, ["greek.txt"], unknown="skip") == replace(plain, unknown=1)
    assert plain.unknown is None
    assert face.evaluate(tiny, ["greek.txt"], unknown="replace").bytes == len("The   owl")


def test_json_is_the_best_loss_of_the_training(tiny: Run, quire) -> None:
    said = quire("evaluate", "tiny", "--json")
    assert said.code == 0 and said.err == "" and said.out.count("\n") == 1
    found = json.loads(said.out)
    assert list(found) == ["validation_loss", "perplexity", "bits_per_byte", "tokens", "bytes", "context_length"]
    measured = [row for row in tiny.metrics() if "validation_loss" in row]
    best = min(measured, key=lambda row: row["validation_loss"])
    assert abs(found["validation_loss"] - best["validation_loss"]) < 1e-6
    assert abs(found["bits_per_byte"] - best["validation_bits_per_byte"]) < 1e-6


def test_a_stride_is_reported_as_such(tiny: Run, quire) -> None:
    plain, strided = (json.loads(quire("evaluate", "tiny", "--json", *more).out) for more in ([], ["--stride", "4"]))
    assert strided.pop("stride") == 4 and list(strided) == list(plain) and strided["tokens"] == plain["tokens"]
    assert "overlapping" in quire("evaluate", "tiny", "--stride", "4").out
    assert "overlapping" not in quire("evaluate", "tiny").out


def test_what_a_person_reads(desk: Path, quire) -> None:
    found = face.evaluate("tiny")
    lines = quire("evaluate", "tiny").out.splitlines()
    assert lines[0] == f"validation loss  {found.validation_loss:.4f} nats per token"
    assert lines[1] == f"perplexity       {found.perplexity:.4f}"
    assert lines[2] == f"bits per byte    {found.bits_per_byte:.4f}"
    assert f"{found.tokens:,} tokens, {found.bytes:,} bytes, in windows of 32" in lines[3] and len(lines) == 4
