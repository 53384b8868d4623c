"""What is read, and what is not read again: counted at the model, and with the same texts as without a memory."""

import copy
from typing import Any

import pytest
import torch

from quire.generation.generate import GenerationSettings, Writer
from quire.run import Run

CPU = torch.device("cpu")
ASKED = GenerationSettings(tokens=6, temperature=0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tiny: Run) -> list[tuple[int, int]]:
    """The shape (rows, tokens) of every call of a GPT, in order."""
    calls: list[tuple[int, int]] = []
    Model = type(tiny.model(CPU))
    forward = Model.forward

    def counted(self: Any, tokens: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        calls.append(tuple(tokens.shape))
        return forward(self, tokens, *rest, **named)

    monkeypatch.setattr(Model, "forward", counted)
    return calls


def read_by(reads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The calls since the last time that read more than the steps of a text."""
    steps = [(shape[0], 1) for shape in reads[-5:]]
    assert reads[-5:] == steps, "each further token is one step"
    shown = reads[:-5]
    reads.clear()
    return shown


def test_a_prompt_is_read_once(tiny: Run, reads: list[tuple[int, int]]) -> None:
    """The same again: nothing. A longer one: what is new. One that parts ways: from there on. A beginning: its end."""
    writer = Writer(tiny, CPU)
    for prompt, expected in [
        ("The owl calls", [(1, 13)]),
        ("The owl calls", []),
        ("The owl calls upon", [(1, 5)]),
        ("The owl and", [(1, 3)]),
        ("The owl", [(1, 1)]),
        ("river", [(1, 5)]),
    ]:
        anew = Writer(tiny, CPU, writer.model).write([prompt], ASKED)
        reads.clear()
        assert writer.write([prompt], ASKED) == anew
        assert read_by(reads) == expected, prompt


def test_samples_of_one_prompt_read_it_once(tiny: Run, reads: list[tuple[int, int]]) -> None:
    writer = Writer(tiny, CPU)
    writer.write(["The owl", "A", "The owl"], GenerationSettings(tokens=6, samples=4))
    assert read_by(reads) == [(2, 7)]
    writer.write(["A"], GenerationSettings(tokens=6, samples=2))
    assert read_by(reads) == []
    writer.write(["A night", "The"], ASKED)
    assert read_by(reads) == [(2, 7)], "several new prompts are read as one batch"


def test_a_prompt_behind_padding_is_read_on(tiny: Run, reads: list[tuple[int, int]]) -> None:
    """What was read in a batch serves alone, as long as there is room behind its padding."""
    writer = Writer(tiny, CPU)
    writer.write(["The owl calls upon a night", "A owl"], ASKED)
    read_by(reads)
    for prompt, expected in [("A owl cal", (1, 9 - 5)), ("A owl calls upon", (1, 16))]:
        anew = Writer(tiny, CPU, writer.model).write([prompt], ASKED)
        reads.clear()
        assert writer.write([prompt], ASKED) == anew
        assert reads[0] == expected


def test_what_was_written_leaves_the_memory_alone(tiny: Run) -> None:
    """Writing past the context, or a broken-off text, does not change what the next one starts from."""
    writer = Writer(tiny, CPU)
    first = writer.write(["The owl"], GenerationSettings(tokens=50, seed=1))
    next(writer.steps(["The owl"], GenerationSettings(tokens=50, seed=4), []))
    writer.write(["The owl"], GenerationSettings(tokens=9, beams=3))
    assert writer.write(["The owl"], GenerationSettings(tokens=50, seed=1)) == first
    assert writer.write(["The owls"[:-1]], GenerationSettings(tokens=50, seed=1)) == first


def test_a_state_that_cannot_be_taken_back(tiny: Run, automaton: Any) -> None:
    """A recurrent model goes on from a whole earlier prompt, and reads any other one anew."""
    model = automaton(tiny.tokenizer.vocabulary_size)
    writer = Writer(tiny, CPU, model)
    for prompt, expected in [("The owl", 7), ("The owl", 0), ("The owl calls", 6), ("The owl", 7), ("The night", 9)]:
        anew = Writer(tiny, CPU, copy.deepcopy(model)).write([prompt], ASKED)
        model.asked.clear()
        assert writer.write([prompt], ASKED) == anew
        assert sum(model.asked) == expected + 5, prompt


def test_a_window_that_forgets(tiny: Run, desk: Any) -> None:
    """A model with sliding windows writes the same with a memory as without, whatever it can reuse."""
    from quire.models import MODELS

    torch.manual_seed(3)
    Model = MODELS["modern"]
    shape = {"embedding_size": 16, "layers": 2, "heads": 2, "kv_heads": 1, "window": 4}
    size = tiny.tokenizer.vocabulary_size
    model = Model(Model.Settings(vocabulary_size=size, context_length=32, **shape)).eval()
    writer = Writer(tiny, CPU, model)
    for prompt in (
        "The owl",
        "The owl calls",
        "The",
        "The owl calls upon the night and",
        "The owl calls",
        "The owl calls",
    ):
        assert writer.write([prompt], ASKED) == Writer(tiny, CPU, model).write([prompt], ASKED)


def test_rows_that_ended_are_run_no_further(tiny: Run, reads: list[tuple[int, int]]) -> None:
    samples = Writer(tiny, CPU).write(["The owl"], GenerationSettings(tokens=40, seed=1, samples=6, stop=("o",)))
    longest = max(len(sample.tokens) for sample in samples)
    running = [sum(len(sample.tokens) > step for sample in samples) for step in range(1, longest)]
    assert [rows for rows, width in reads if width == 1] == running[: sum(width == 1 for _, width in reads)]
    assert running[-1] < 6
