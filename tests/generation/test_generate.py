"""Writing: what a text may depend on, where it ends, and what is shown of it."""

import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import quire as face
from quire.errors import UserError
from quire.generation.generate import GenerationSettings, Writer
from quire.run import Run

CPU = torch.device("cpu")


class Scripted:
    """Stands in for a model: asked for the n-th time, it wants the n-th token of its script, whatever was chosen."""

    def __init__(self, script: list[int], vocabulary: int) -> None:
        self.settings = SimpleNamespace(context_length=1000)
        self.script, self.vocabulary, self.place = script, vocabulary, -1
        self.loud = None  # a token with a higher logit than the script's

    def new_cache(self, batch: int) -> None:
        return None

    def __call__(self, tokens: torch.Tensor, **_: Any) -> torch.Tensor:
        self.place += 1
        logits = torch.full((tokens.shape[0], 1, self.vocabulary), -100.0)
        logits[:, :, self.script[min(self.place, len(self.script) - 1)]] = 0.0
        if self.loud is not None:
            logits[:, :, self.loud] = 50.0
        return logits


def writing(run: Run, text: str | list[int]) -> Writer:
    """A writer that writes exactly this text (or these tokens) after any prompt."""
    script = run.tokenizer.encode(text) if isinstance(text, str) else text
    return Writer(run, CPU, Scripted(script, run.tokenizer.vocabulary_size))


@pytest.fixture
def writer(tiny: Run) -> Writer:
    return Writer(tiny, CPU)


# ---- what a text depends on ----


def test_greedy_takes_the_likeliest_each_time(tiny: Run, writer: Writer) -> None:
    """Against a plain loop over the model, one whole forward for each token."""
    written = writer.write(["The owl"], GenerationSettings(tokens=20, temperature=0, seed=1))[0]
    model, window = tiny.model(CPU), tiny.tokenizer.encode("The owl")
    for token in written.tokens:
        with torch.no_grad():
            logits = model(torch.tensor([window]))[0, -1]
        logits[tiny.tokenizer.padding] = -torch.inf
        assert int(logits.argmax()) == token
        window.append(token)
    assert writer.write(["The owl"], GenerationSettings(tokens=20, temperature=0, seed=2))[0] == written


def test_the_seed_decides(writer: Writer) -> None:
    first, again, other = (
        writer.write(["The"], GenerationSettings(tokens=40, seed=seed))[0].text for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_sample_is_what_its_own_seed_gives_alone(writer: Writer) -> None:
    batch = writer.write(["The owl"], GenerationSettings(tokens=50, seed=7, samples=4))
    for index, sample in enumerate(batch):
        assert writer.write(["The owl"], GenerationSettings(tokens=50, seed=7 + index))[0] == sample
    assert len({sample.text for sample in batch}) == 4


def test_prompts_of_different_lengths_in_one_batch(writer: Writer) -> None:
    prompts = ["A", "The owl calls upon the night", "river"]
    asked = GenerationSettings(tokens=30, seed=3, samples=2)
    together = writer.write(prompts, asked)
    assert together == [sample for prompt in prompts for sample in writer.write([prompt], asked)]


def test_a_prompt_longer_than_the_context_counts_by_its_end(tiny: Run, writer: Writer) -> None:
    long = "The owl calls upon the night and speaks to none. " * 5
    asked = GenerationSettings(tokens=50, temperature=0)
    end = long[-tiny.settings.context_length :]
    assert writer.write([long], asked) == writer.write([end], asked)


def test_the_random_generator_of_the_program_is_left_alone(writer: Writer) -> None:
    torch.manual_seed(5)
    writer.write(["The"], GenerationSettings(tokens=5))
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


def test_unknown_characters(writer: Writer) -> None:
    asked = GenerationSettings(tokens=10, temperature=0)
    with pytest.raises(UserError, match=r"'Ω' \(U\+03A9\) at position 4"):
        writer.write(["The Ω owl"], asked)
    skipped = writer.write(["The Ω owl"], GenerationSettings(tokens=10, temperature=0, unknown="skip"))
    assert skipped == writer.write(["The  owl"], asked)
    replaced = writer.write(["The Ω owl"], GenerationSettings(tokens=10, temperature=0, unknown="replace"))
    assert replaced == writer.write(["The   owl"], asked)  # no U+FFFD, ? or _ in this vocabulary, but a space


# ---- where it begins and ends ----


def test_an_empty_prompt_starts_from_a_newline_after_one_document(tiny: Run, writer: Writer) -> None:
    assert tiny.manifest["separators"] == 1
    asked = GenerationSettings(tokens=30, temperature=0)
    assert writer.write([""], asked) == writer.write(["\n"], asked)


def test_an_empty_prompt_starts_from_the_separator_after_a_hundred_documents(tiny: Run) -> None:
    tiny.manifest["separators"] = 100
    assert tiny.start_token() == tiny.tokenizer.separator
    tiny.manifest["separators"] = 99
    assert tiny.tokenizer.decode([tiny.start_token()]) == "\n"


def test_length(tiny: Run) -> None:
    written = writing(tiny, "the owl calls upon").write(["T"], GenerationSettings(tokens=7))[0]
    assert (written.text, len(written.tokens), written.stopped_by) == ("the owl", 7, "length")


@pytest.mark.parametrize(
    "stops, left",
    [(["night"], "upon a "), (["night", "gh"], "upon a ni"), (["ight", "night"], "upon a "), (["zz"], None)],
)
def test_stop_strings(tiny: Run, stops: list[str], left: str | None) -> None:
    """The text ends before the first of them; each spans several tokens."""
    text = "upon a night and speaks"
    asked = GenerationSettings(tokens=len(text), stop=tuple(stops))
    written = writing(tiny, text).write(["T"], asked)[0]
    assert written.text == (text if left is None else left)
    assert written.stopped_by == ("length" if left is None else "stop")
    assert "".join(writing(tiny, text).pieces("T", asked)) == written.text


def test_nothing_shown_is_taken_back(tiny: Run) -> None:
    text, shown = "a nine at nigh a night", []
    for piece in writing(tiny, text).pieces("T", GenerationSettings(tokens=99, stop=("night",))):
        shown.append(piece)
        assert "a nine at nigh a ".startswith("".join(shown))
    assert "".join(shown) == "a nine at nigh a "
    assert len(shown) > 10, "what can be no stop string is shown at once"


def test_half_a_stop_string_at_the_very_end_is_shown(tiny: Run) -> None:
    asked = GenerationSettings(tokens=8, stop=("night",))
    assert "".join(writing(tiny, "one nigh").pieces("T", asked)) == "one nigh"


def test_the_separator_ends_a_text_and_is_not_in_it(tiny: Run) -> None:
    tiny.manifest["separators"] = 2  # trained on more than one document
    script = [*tiny.tokenizer.encode("the"), tiny.tokenizer.separator]
    written = writing(tiny, script).write(["T"], GenerationSettings(tokens=9))[0]
    assert (written.text, written.stopped_by) == ("the", "separator")
    assert written.tokens == tiny.tokenizer.encode("the")


def test_one_row_ends_and_the_others_go_on(writer: Writer) -> None:
    batch = writer.write(["The owl"], GenerationSettings(tokens=60, seed=1, samples=6, stop=("o",)))
    assert len({len(sample.tokens) for sample in batch}) > 1
    assert all("o" not in sample.text for sample in batch)
    assert {sample.stopped_by for sample in batch} <= {"stop", "length", "separator"}


def test_padding_is_never_written(tiny: Run) -> None:
    writer = writing(tiny, "the owl")
    writer.model.loud = tiny.tokenizer.padding
    still(writer)


def test_a_separator_that_was_never_a_target_is_never_written(tiny: Run) -> None:
    """With one document it is as untrained as padding."""
    assert tiny.manifest["separators"] == 1
    writer = writing(tiny, "the owl")
    writer.model.loud = tiny.tokenizer.separator
    still(writer)


def still(writer: Writer) -> None:
    """What is loud is not heard: the script is written, greedy and sampled."""
    for temperature in (0, 1):
        writer.model.place = -1
        written = writer.write(["T"], GenerationSettings(tokens=7, temperature=temperature))[0]
        assert written.text == "the owl"


@pytest.mark.parametrize("seed", range(4))
def test_the_pieces_are_the_text(writer: Writer, seed: int) -> None:
    asked = GenerationSettings(tokens=60, seed=seed, stop=("th", "on a"))
    assert "".join(writer.pieces("The ", asked)) == writer.write(["The "], asked)[0].text


def test_pieces_hold_whole_characters(tiny: Run) -> None:
    assert list(writing(tiny, "é森").pieces("T", GenerationSettings(tokens=2))) == ["é", "森"]


# ---- the ways to ask ----


def test_two_lines_of_python(tiny: Run) -> None:
    samples = face.generate("tiny", prompt="The", tokens=12, samples=2, seed=4)
    assert [sample.text for sample in samples] == [
        sample.text for sample in face.generate(tiny, "The", tokens=12, samples=2, seed=4)
    ]


def test_json(tiny: Run, quire) -> None:
    said = quire("generate", "tiny", "--prompt", "The", "--tokens", "9", "--samples", "2", "--seed", "3", "--json")
    assert said.code == 0 and said.err == "" and said.out.count("\n") == 1
    given = json.loads(said.out)
    assert list(given) == ["samples"] and len(given["samples"]) == 2
    for sample in given["samples"]:
        assert list(sample) == ["text", "tokens", "stopped_by"]
        assert tiny.tokenizer.decode(sample["tokens"]) == sample["text"]
        assert sample["stopped_by"] == "length" and len(sample["tokens"]) == 9


def test_the_command_writes_prompt_and_text(desk, quire) -> None:
    text = face.generate("tiny", "The owl", tokens=20, seed=2)[0].text
    said = quire("generate", "tiny", "--prompt", "The owl", "--tokens", "20", "--seed", "2")
    assert (said.code, said.out, said.err) == (0, f"The owl{text}\n", "")


def test_several_samples_are_numbered(desk, quire) -> None:
    said = quire("generate", "tiny", "--prompt", "The", "--tokens", "5", "--samples", "2")
    first, second = (sample.text for sample in face.generate("tiny", "The", tokens=5, samples=2))
    assert said.out == f"--- 1 ---\nThe{first}\n--- 2 ---\nThe{second}\n"


@pytest.mark.parametrize("way", ["file", "pipe", "dash"])
def test_prompts_from_elsewhere(desk, quire, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Read as UTF-8; a byte order mark and the last line end are left out."""
    data = b"\xef\xbb\xbfcaf\xc3\xa9 and\r\nriver\r\n"
    (desk / "prompt.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: way == "file"))
    words = {"file": ["--prompt-file", "prompt.txt"], "pipe": [], "dash": ["--prompt", "-"]}[way]
    said = quire("generate", "tiny", "--tokens", "5", *words)
    assert said.code == 0 and said.out.startswith("café and\nriver")


def test_at_a_terminal_it_asks_again_and_again(desk, quire, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["The owl", "Ω", ""])

    def ask(_: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    said = quire("generate", "tiny", "--tokens", "8", "--seed", "5")
    texts = [face.generate("tiny", prompt, tokens=8, seed=seed)[0].text for prompt, seed in (("The owl", 5), ("", 7))]
    assert said.code == 0
    assert said.out == f"The owl{texts[0]}\n{texts[1]}\n\n"
    assert "Ctrl-D ends" in said.err and "lacks 'Ω'" in said.err
