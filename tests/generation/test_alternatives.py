"""What the model expected: figures against plain forwards, in Python, in JSON and in the table."""

import json
import math
from typing import Any

import pytest
import torch

from quire.generation.alternatives import alternatives, expectations
from quire.generation.generate import GenerationSettings, Writer
from quire.run import Run
from quire.tokenizers.tokenizer import visible

CPU = torch.device("cpu")


@pytest.mark.parametrize("tokens, kept", [(20, 0), (90, 0), (90, 3)])
def test_each_token_against_its_own_window(tiny: Run, tokens: int, kept: int) -> None:
    """Also past the context of 32 tokens: each is expected from the very window that it was written in."""
    writer = Writer(tiny, CPU)
    writer.prefix = tiny.tokenizer.encode("owl")[:kept]
    written = writer.write(["The owl"], GenerationSettings(tokens=tokens, seed=2))[0]
    writer.explain(written)
    prompt = [*writer.prefix, *tiny.tokenizer.encode("The owl")]
    assert [e.token for e in written.prompt_expected or []] == prompt
    assert [e.token for e in written.expected or []] == written.tokens
    window = prompt[:1]
    for expected in [*(written.prompt_expected or [])[1:], *(written.expected or [])]:
        with torch.no_grad():
            p = torch.softmax(writer.model(torch.tensor([window]))[0, -1], -1)
        assert expected.log_probability == pytest.approx(math.log(p[expected.token]), abs=1e-4)
        best = p.sort(descending=True)
        assert [other.probability for other in expected.alternatives] == pytest.approx(
            best.values[:5].tolist(), abs=1e-5
        )
        assert [p[other.token] for other in expected.alternatives] == pytest.approx(best.values[:5].tolist(), abs=1e-5)
        assert [other.text for other in expected.alternatives] == [
            tiny.tokenizer.name(other.token) for other in expected.alternatives
        ]
        window = [*window, expected.token]
        if len(window) > 32:
            window = [*window[:kept], *window[-16 + kept :]]


def test_it_is_the_model_s_own_distribution(tiny: Run) -> None:
    """Temperature and cuts shape the draw, not what is said of it; a beam's score is the sum of its tokens."""
    writer = Writer(tiny, CPU)
    (plain,) = writer.write(["The owl"], GenerationSettings(tokens=12, top_k=1))
    (hot,) = writer.write(["The owl"], GenerationSettings(tokens=12, top_k=1, temperature=3.0, min_p=0.5))
    for sample in (plain, hot):
        writer.explain(sample)
    assert plain.expected == hot.expected
    for written in writer.write(["The owl"], GenerationSettings(tokens=12, beams=4, samples=4)):
        writer.explain(written)
        total = sum(expected.log_probability or 0.0 for expected in written.expected or [])
        assert written.score and written.score.log_probability == pytest.approx(total, abs=1e-4)


def test_alternatives_of_logits(tiny: Run) -> None:
    logits = torch.zeros(2, tiny.tokenizer.vocabulary_size)
    logits[0, 3], logits[1, 4] = 30.0, 30.0
    first, second = alternatives(logits, tiny.tokenizer, 2)
    assert (first[0].token, first[0].text) == (3, tiny.tokenizer.name(3))
    assert first[0].probability == pytest.approx(1) and second[0].token == 4 and len(first) == len(second) == 2
    assert len(alternatives(logits, tiny.tokenizer, 9999)[0]) == logits.shape[1]


def test_a_single_token_has_nothing_before_it(tiny: Run) -> None:
    (only,) = expectations(tiny.model(CPU), tiny.tokenizer, [5], CPU)
    assert (only.token, only.log_probability, only.alternatives) == (5, None, [])


def test_what_does_not_print_is_made_visible() -> None:
    assert visible(" a\n\tb\r") == "␣a↵⇥b␍"
    assert visible("\x1b[31m\x00\u200b\ue000") == "\\x1b[31m\\x00\\u200b\\ue000"
    assert visible("é森😀 ") == "é森😀␣"
    assert visible("\u202e") == "\\u202e" and visible("") == "∅"


def test_json(tiny: Run, quire: Any) -> None:
    words = ["generate", "tiny", "--prompt", "The", "--tokens", "9", "--samples", "2", "--json"]
    plain = json.loads(quire(*words).out)["samples"]
    said = quire(*words, "--show-alternatives")
    assert said.err == ""
    for sample, before in zip(json.loads(said.out)["samples"], plain, strict=True):
        assert list(sample) == [
            *before, "logprobs", "alternatives", "prompt_tokens", "prompt_logprobs", "prompt_alternatives",
        ]  # fmt: skip
        assert {name: sample[name] for name in before} == before
        assert len(sample["logprobs"]) == len(sample["alternatives"]) == len(sample["tokens"]) == 9
        assert all(value < 0 for value in sample["logprobs"])
        for row in sample["alternatives"]:
            assert len(row) == 5 and list(row[0]) == ["token", "text", "probability"]
            assert sorted((other["probability"] for other in row), reverse=True) == [o["probability"] for o in row]
        assert sample["prompt_tokens"] == tiny.tokenizer.encode("The")
        assert sample["prompt_logprobs"][0] is None and sample["prompt_alternatives"][0] == []
        assert len(sample["prompt_logprobs"]) == len(sample["prompt_alternatives"]) == 3


def test_the_table(tiny: Run, quire: Any) -> None:
    """One line a token, in columns, with the figures of the JSON."""
    words = ["generate", "tiny", "--prompt", "The owl", "--tokens", "9", "--show-alternatives"]
    said = quire(*words)
    sample = json.loads(quire(*words, "--json").out)["samples"][0]
    text, lines = said.out.split("\n\n")
    assert text == f"The owl{sample['text']}".rstrip("\n")
    head, *rows = lines.splitlines()
    assert head.split() == ["position", "token", "p", "likeliest"] and len(rows) == 7 + 9
    assert rows[0].split() == ["prompt", "0", "T", "-"]
    assert rows[3].split()[:3] == ["prompt", "3", "␣"]
    for place, (row, logprob) in enumerate(zip(rows[7:], sample["logprobs"], strict=True)):
        part, position, token, p, *others = row.split()
        assert (part, position, p) == ("text", str(7 + place), f"{math.exp(logprob):.3f}")
        assert token == visible(tiny.tokenizer.name(sample["tokens"][place]))
        assert others == [
            word for other in sample["alternatives"][place]
            for word in (visible(other["text"]), f"{other['probability']:.3f}")
        ]  # fmt: skip
    columns = {row.index(" 0.") for row in rows[1:] if "森" not in row}
    assert len(columns) == 1, "the figures stand below each other"
