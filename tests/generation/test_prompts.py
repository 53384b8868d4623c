"""Prompts of several kinds: beginnings, sources, the questions of pairs, prefixes, and files of many prompts."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.config import write_checked_toml
from quire.errors import UserError
from quire.generation.alternatives import expectations
from quire.generation.generate import GenerationSettings, Writer
from quire.run import Run

CPU = torch.device("cpu")


class Spy:
    """Passes on to a model, and keeps the tokens and sources that it was first asked to read."""

    def __init__(self, model: Any) -> None:
        self.model, self.settings, self.seen = model, model.settings, []

    def new_cache(self, batch: int) -> Any:
        return self.model.new_cache(batch)

    def __call__(self, tokens: Tensor, source: Tensor | None = None, **rest: Any) -> Tensor:
        self.seen.append((tokens.tolist(), None if source is None else source.tolist()))
        return self.model(tokens, **rest) if source is None else self.model(tokens, source=source, **rest)


@pytest.fixture
def translating(tiny: Run, automaton: Any, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """A writer whose model has an encoder; the separator is likely enough to end its texts."""
    monkeypatch.setattr(type(tiny.settings), "reads_source", True)
    model = automaton(tiny.tokenizer.vocabulary_size, tiny.settings.context_length)
    model.logits[:, tiny.tokenizer.separator] += 2
    return Writer(tiny, CPU, Spy(model))


# ---- models with an encoder ----


def test_a_prompt_is_the_source(tiny: Run, translating: Writer) -> None:
    """The decoder starts from the separator, the source is given once, padded with ignored tokens."""
    separator, encode = tiny.tokenizer.separator, tiny.tokenizer.encode
    asked = GenerationSettings(tokens=8, temperature=0)
    samples = translating.write(["The owl", "A", ""], asked)
    first, *later = translating.model.seen
    padded = [[*row, *[-100] * (7 - len(row))] for row in (encode("The owl"), encode("A"), [tiny.start_token()])]
    assert first == ([[separator]] * 3, padded)
    assert all(source is None for _, source in later), "the cache remembers it"
    for prompt, sample in zip(["The owl", "A", ""], samples, strict=True):
        assert translating.write([prompt], asked)[0] == sample
    assert {sample.stopped_by for sample in samples} & {"separator"}, "its separator is a target"


@pytest.mark.parametrize("settings", [{"beams": 3, "samples": 3}, {"samples": 3, "seed": 2}])
def test_sources_in_a_batch_and_alone(translating: Writer, settings: dict[str, int]) -> None:
    """Also past the context, where source and separator are read again with what is left of the window."""
    prompts, asked = ["The owl", "A", "river"], GenerationSettings(tokens=70, **settings)
    translating.model.model.logits[:, translating.tokenizer.separator] -= 7
    together = translating.write(prompts, asked)
    alone = [sample for prompt in prompts for sample in translating.write([prompt], asked)]
    assert [sample.text for sample in together] == [sample.text for sample in alone]
    again = [(rows, source) for rows, source in translating.model.seen if len(rows[0]) == 16]
    assert again and all(source is not None for _, source in again)
    assert {row[0] for rows, _ in again for row in rows} == {translating.tokenizer.separator}


def test_a_source_is_remembered_whole_or_not_at_all(translating: Writer) -> None:
    asked, model = GenerationSettings(tokens=2, temperature=0), translating.model
    translating.write(["The owl"], asked)
    model.seen.clear()
    translating.write(["The owl"], asked)
    assert all(source is None for _, source in model.seen)
    translating.write(["The owl calls"], asked)
    assert len(model.seen[-1][1][0] if model.seen[-1][1] else model.seen[-2][1][0]) == 13


def test_expectations_of_an_answer(tiny: Run, translating: Writer) -> None:
    (written,) = translating.write(["The owl"], GenerationSettings(tokens=8, temperature=0))
    translating.explain(written)
    assert [e.token for e in written.prompt_expected or []] == [tiny.tokenizer.separator]
    source = tuple(tiny.tokenizer.encode("The owl"))
    tokens = [tiny.tokenizer.separator, *written.tokens]
    assert written.expected == expectations(translating.model, tiny.tokenizer, tokens, CPU, source)[1:]
    for expected in written.expected or []:
        possible = [other for other in expected.alternatives if other.token not in translating.never]
        assert expected.token == possible[0].token or possible[0].token == tiny.tokenizer.separator


def test_a_source_longer_than_the_context(translating: Writer) -> None:
    with pytest.raises(UserError, match=r"The prompt has 40 tokens, and this model reads at most 32. Shorten it."):
        translating.write(["The " * 10], GenerationSettings())


# ---- models without one ----


def spied(run: Run) -> Writer:
    return Writer(run, CPU, Spy(run.model(CPU)))


def test_a_run_of_pairs_answers_between_separators(tiny: Run) -> None:
    tiny.config["data"] = {**tiny.config.get("data", {}), "pairs": "pairs.tsv"}
    writer, separator = spied(tiny), tiny.tokenizer.separator
    assert tiny.manifest["separators"] == 1 and separator not in writer.never
    writer.write(["The"], GenerationSettings(tokens=2))
    assert writer.model.seen[0][0] == [[separator, *tiny.tokenizer.encode("The"), separator]]
    empty = spied(tiny)
    empty.write([""], GenerationSettings(tokens=2))
    assert empty.model.seen[0][0] == [[separator, separator]]
    with pytest.raises(UserError, match=r"The prompt has 31 tokens, and this model reads at most 30"):
        writer.write(["a" * 31], GenerationSettings())


def test_a_prefix_stands_before_every_prompt(tiny: Run) -> None:
    """An empty prompt is the prefix alone; it stays in front of a text that outgrows the context."""
    prefix, encode = [7, 9], tiny.tokenizer.encode
    tiny.manifest["prompt_prefix"] = prefix
    for prompt, rest in [("The", "The"), ("", ""), ("a" * 99, "a" * 30)]:
        writer = spied(tiny)
        writer.write([prompt], GenerationSettings(tokens=40, temperature=0))
        assert writer.model.seen[0][0] == [[*prefix, *encode(rest)]]
        again = [rows for rows, _ in writer.model.seen[1:] if len(rows[0]) == 16]
        assert again and all(row[:2] == prefix for rows in again for row in rows)


def test_a_memory_and_a_prefix(tiny: Run) -> None:
    tiny.manifest["prompt_prefix"] = [7, 9]
    writer = spied(tiny)
    writer.write(["The"], GenerationSettings(tokens=1))
    writer.write(["A"], GenerationSettings(tokens=1))
    assert [rows for rows, _ in writer.model.seen] == [
        [[7, 9, *tiny.tokenizer.encode("The")]],
        [tiny.tokenizer.encode("A")],
    ]


# ---- files of prompts ----


def test_a_file_of_prompts(tiny: Run, quire: Any) -> None:
    """One a line, an empty one too; each as if it were asked alone."""
    (tiny.path.parent / "asked.txt").write_bytes(b"The owl\r\n\r\nriver\r\n")
    words = ["generate", "tiny", "--tokens", "6", "--seed", "3"]
    said = quire(*words, "--prompts", "asked.txt", "--samples", "2", "--json")
    samples = json.loads(said.out)["samples"]
    assert said.err == "" and [sample["prompt"] for sample in samples] == [
        prompt for prompt in ("The owl", "", "river") for _ in range(2)
    ]
    for prompt in ("The owl", "", "river"):
        alone = json.loads(quire(*words, "--prompt", prompt, "--samples", "2", "--json").out)["samples"]
        assert [{"prompt": prompt} | sample for sample in alone] == [s for s in samples if s["prompt"] == prompt]
    said = quire(*words, "--prompts", "asked.txt")
    texts = [samples[i]["prompt"] + samples[i]["text"] for i in (0, 2, 4)]
    assert said.out == "".join(f"--- {n} ---\n{text}\n" for n, text in enumerate(texts, 1))


def test_prompts_from_a_pipe(tiny: Run, quire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"The owl\nriver"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=SimpleNamespace(read=lambda: data), isatty=lambda: False))
    said = quire("generate", "tiny", "--prompts", "-", "--tokens", "3")
    assert said.code == 0 and "--- 2 ---\nriver" in said.out


def test_answers_are_lines(tiny: Run, quire: Any) -> None:
    """What does not go on with its prompt is printed without it: one answer below the other, for other programs."""
    write_checked_toml(tiny.path / "config.toml", {**tiny.config, "data": {"pairs": "pairs.tsv"}})
    (tiny.path.parent / "asked.txt").write_text("The owl\nriver\n")
    words = ["generate", "tiny", "--temperature", "0", "--tokens", "7"]
    samples = json.loads(quire(*words, "--prompts", "asked.txt", "--json").out)["samples"]
    texts = [sample["text"] for sample in samples]
    assert quire(*words, "--prompts", "asked.txt").out == "".join(f"{text}\n" for text in texts)
    assert quire(*words, "--prompt", "river").out == f"{texts[1]}\n"
    numbered = quire(*words, "--prompts", "asked.txt", "--samples", "2").out
    assert numbered.startswith(f"--- 1 ---\n{texts[0]}\n--- 2 ---\n")
