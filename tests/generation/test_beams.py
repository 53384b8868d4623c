"""Beam search against a search of everything, and against transformers."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice, product
from typing import Any

import pytest
import torch

from quire.errors import UserError
from quire.generation.beams import BeamSearch, Result
from quire.generation.generate import GenerationSettings, Writer
from quire.generation.reading import Source
from quire.generation.stream import tokens
from quire.models import MODELS
from quire.run import Run

CPU = torch.device("cpu")
PENALTIES = (0.0, 0.6, 1.0, 2.0)
END = 0  # the token that ends a text here


def gpt(vocabulary: int, context_length: int = 16, seed: int = 1, **parts: Any) -> Any:
    """A small GPT with an opinion on everything."""
    Model = MODELS["gpt"]
    size = {"embedding_size": 8, "layers": 2, "heads": 2, "norm_placement": "pre"} | parts
    model = Model(Model.Settings(vocabulary_size=vocabulary, context_length=context_length, **size))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()


def searched(
    model: Any,
    prompts: Sequence[Sequence[int]],
    beams: int,
    count: int,
    length: int,
    penalty: float,
    sources: Sequence[Source] = (),
    stops: Sequence[tuple[int, ...]] = (),
    cached: bool = True,
    never: Sequence[int] = (),
) -> list[list[Result]]:
    """The results of a search for each prompt; a text ends at END, or at one of `stops`, runs of tokens."""

    def ended(written: Sequence[int]) -> Any:
        if written[-1] == END:
            return "separator"
        return "stop" if any(tuple(written[-len(stop) :]) == stop for stop in stops) else None

    search = BeamSearch(len(prompts), beams, count, length, penalty, ended, never)
    list(tokens(model, prompts, search.choose, CPU, cached, sources))
    return search.results


def everything(
    model: Any, prompt: Sequence[int], vocabulary: int, length: int, penalty: float,
    source: Source = None, stops: Sequence[tuple[int, ...]] = (),
) -> list[tuple[float, tuple[int, ...]]]:  # fmt: skip
    """Every text there can be, with its score, best first: by one whole forward for each, without a cache."""
    texts = set()
    for letters in product(range(vocabulary), repeat=length):
        for end in range(1, length + 1):
            if letters[end - 1] == END or any(letters[max(0, end - len(stop)) : end] == stop for stop in stops):
                break
        texts.add(letters[:end])
    found = []
    for text in texts:
        given = {} if source is None else {"source": torch.tensor([source])}
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text[:-1]]]), **given)[0, len(prompt) - 1 :].double()
        sums = torch.log_softmax(logits, -1)[range(len(text)), list(text)].sum().item()
        found.append((sums / len(text) ** penalty, text))
    return sorted(found, reverse=True)


def agree(found: list[Result], expected: list[tuple[float, tuple[int, ...]]]) -> None:
    assert [result.tokens for result in found] == [text for _, text in expected]
    for result, (score, text) in zip(found, expected, strict=True):
        assert result.score == pytest.approx(score, abs=1e-5)
        assert result.stopped_by == ("separator" if text[-1] == END else result.stopped_by)


# ---- against a search of everything ----


@pytest.mark.parametrize("penalty", PENALTIES)
def test_with_room_for_all_beams_the_best_texts_are_found(penalty: float) -> None:
    """With as many beams as there are texts, the n best are the n best of all texts, in order."""
    model = gpt(4)
    found = searched(model, [[1, 2]], 4**4, 40, 4, penalty)[0]
    agree(found, everything(model, [1, 2], 4, 4, penalty)[:40])


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_recurrent_state_and_a_source(penalty: float, automaton: Any) -> None:
    """Any model of the protocol: here one whose memory is a state, and that read sources of different lengths."""
    sources = [(3, 1, 2), (2,), (1, 1)]
    found = searched(automaton(4), [[END]] * 3, 4**4, 15, 4, penalty, sources)
    for results, source in zip(found, sources, strict=True):
        agree(results, everything(automaton(4), [END], 4, 4, penalty, source)[:15])
    assert found[0] != found[1]


def test_stop_strings_end_a_text() -> None:
    """A run of tokens ends a text as its separator does, and counts in its length; even where every beam ends so."""
    model, stops = gpt(4, seed=3), [(1,), (2, 3)]
    found = searched(model, [[2]], 4**4, 30, 4, 1.0, stops=stops)[0]
    agree(found, everything(model, [2], 4, 4, 1.0, stops=stops)[:30])
    assert {result.stopped_by for result in found} == {"separator", "stop", "length"}
    everywhere = searched(model, [[2]], 3, 3, 9, 1.0, stops=[(1,), (2,), (3,)])[0]
    assert [len(result.tokens) for result in everywhere] == [1, 1, 1]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_ending_early_changes_nothing(penalty: float, automaton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that ends as soon as it is decided gives what one that goes on to the last token gives."""
    steps = []
    for early in (True, False):
        if not early:
            monkeypatch.setattr(BeamSearch, "_decided", lambda self, prompt: not self.running[prompt])
        model = automaton(6, seed=9)
        model.logits[:, END] += 1.5
        results = [searched(model, [[seed % 5 + 1]], 5, 3, 30, penalty)[0] for seed in range(5)]
        steps.append((len(model.asked), results))
    assert steps[0][1] == steps[1][1]
    assert steps[0][0] < steps[1][0] if penalty < 1 else steps[0][0] <= steps[1][0]


def test_what_is_never_written_is_in_no_result() -> None:
    for result in searched(gpt(5), [[1]], 8, 8, 3, 1.0, never=[2, 4])[0]:
        assert not {2, 4} & set(result.tokens)
    assert len(searched(gpt(5), [[1]], 4, 4, 1, 1.0, never=[0, 1, 2])[0]) == 2, "there are no more texts than two"


# ---- against transformers ----


@pytest.mark.parametrize("beams, count", [(2, 1), (4, 4), (7, 3)])
def test_transformers(beams: int, count: int, with_gpt2_weights: Callable[[Any, Any], Any]) -> None:
    """Texts and scores of `generate(num_beams=...)` of a GPT-2 with the same weights, for every length penalty."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(beams)
    shape = {"vocab_size": 13, "n_positions": 32, "n_embd": 8, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, **ends)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ours = with_gpt2_weights(gpt(13, context_length=32), theirs)
    for penalty, prompt in product(PENALTIES, ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10])):
        expected = theirs.generate(
            torch.tensor([prompt]), num_beams=beams, num_return_sequences=count, length_penalty=penalty,
            max_new_tokens=12, do_sample=False, early_stopping="never", return_dict_in_generate=True,
            output_scores=True, attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )  # fmt: skip
        found = searched(ours, [prompt], beams, count, 12, penalty)[0]
        for result, row, score in zip(found, expected.sequences, expected.sequences_scores, strict=True):
            text = row[len(prompt) :].tolist()
            text = text[: text.index(END) + 1] if END in text else text  # their padding is END too
            assert list(result.tokens) == text
            assert result.score == pytest.approx(float(score), abs=1e-4)


# ---- prompts together, and past the context ----


def alike(found: list[Result], expected: list[Result]) -> None:
    assert [(result.tokens, result.stopped_by) for result in found] == [(e.tokens, e.stopped_by) for e in expected]
    assert [result.score for result in found] == pytest.approx([result.score for result in expected], abs=1e-5)


@pytest.mark.parametrize("kind", ["learned", "rotary", "recurrent"])
def test_a_batch_is_what_each_prompt_gives_alone(kind: str, automaton: Any) -> None:
    """Prompts of different lengths, ends at different steps, texts that outgrow the context; cached and uncached."""
    model = automaton(7, 16) if kind == "recurrent" else gpt(7, seed=5, positions=kind)
    prompts = [[1], [2, 3, 4, 5, 6, 1, 2], [6, 6], [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 6, 1, 3, 2]]
    alone = [searched(model, [prompt], 4, 3, 25, 1.0)[0] for prompt in prompts]
    for cached in (True, False):
        for results, expected in zip(searched(model, prompts, 4, 3, 25, 1.0, cached=cached), alone, strict=True):
            alike(results, expected)
    assert max(len(result.tokens) for results in alone for result in results) > 16


def test_the_scores_of_a_text_past_the_context() -> None:
    """Each token is scored in the window it was written in: a single beam is the greedy text, and its sum."""
    model = gpt(7, seed=5)
    model.token_embedding.weight.data[END] = 0  # logit 0 of an end that never wins
    for text in searched(model, [[3, 2]], 1, 1, 40, 0.0)[0]:
        window, total = [3, 2], 0.0
        for token in text.tokens:
            with torch.no_grad():
                steps = torch.log_softmax(model(torch.tensor([window]))[0, -1].double(), -1)
            assert token == int(steps.argmax())
            total += float(steps[token])
            window = [*window[-7:], token] if len(window) == 16 else [*window, token]
        assert text.log_probability == pytest.approx(total, abs=1e-4)
        assert len(text.tokens) == 40


# ---- the ways to ask ----


def test_samples_are_the_best_of_the_beams(tiny: Run) -> None:
    writer = Writer(tiny, CPU)
    best = writer.write(["The owl"], GenerationSettings(tokens=15, beams=6, samples=4))
    scores = [sample.score.normalized for sample in best if sample.score]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    assert len({sample.text for sample in best}) == 4
    for sample in best:
        assert sample.score and sample.score.normalized == sample.score.log_probability / len(sample.tokens)
        assert tiny.tokenizer.decode(sample.tokens) == sample.text
    assert writer.write(["The owl"], GenerationSettings(tokens=15, beams=6))[0] == best[0]
    greedy = writer.write(["The owl"], GenerationSettings(tokens=15, temperature=0))[0]
    writer.explain(greedy)
    assert best[0].score and greedy.expected
    assert best[0].score.log_probability > sum(e.log_probability or 0 for e in greedy.expected) - 1e-4


def test_small_batches_write_the_same(tiny: Run) -> None:
    prompts, writer = ["The owl", "A", "river", "The owl"], Writer(tiny, CPU)
    for asked in ({"beams": 3, "samples": 2}, {"samples": 3, "seed": 5}):
        large = writer.write(prompts, GenerationSettings(tokens=12, **asked))
        for size in (1, 4, 7):
            small = writer.write(prompts, GenerationSettings(tokens=12, batch_size=size, **asked))
            assert [sample.text for sample in small] == [sample.text for sample in large]
            assert [sample.prompt for sample in small] == [sample.prompt for sample in large]
            assert small[0].text == small[6 if "beams" in asked else 9].text


def test_stop_strings_in_text(tiny: Run) -> None:
    writer = Writer(tiny, CPU)
    stop = writer.write(["The owl"], GenerationSettings(tokens=20, beams=3))[0].text[5:8]
    asked = GenerationSettings(tokens=20, beams=3, samples=3, stop=(stop,))
    written = writer.write(["The owl"], asked)
    assert "stop" in {sample.stopped_by for sample in written}
    for sample in written:
        assert stop not in sample.text
        assert (stop in tiny.tokenizer.decode(sample.tokens)) == (sample.stopped_by == "stop")
    assert "".join(writer.pieces("The owl", replace(asked, samples=1))) == written[0].text


def test_the_command(tiny: Run, quire: Any) -> None:
    words = ["generate", "tiny", "--prompt", "The owl", "--tokens", "8", "--beams", "4", "--samples", "2"]
    said = quire(*words, "--length-penalty", "0.5", "--json")
    samples = json.loads(said.out)["samples"]
    assert said.err == "" and len(samples) == 2
    for sample in samples:
        assert list(sample) == ["text", "tokens", "stopped_by", "score"]
        score = sample["score"]
        assert score["normalized"] == pytest.approx(score["log_probability"] / math.sqrt(len(sample["tokens"])))
    said = quire(*words, "--length-penalty", "0.5")
    heads = [f"--- {n} (score {sample['score']['normalized']:.4f}) ---" for n, sample in enumerate(samples, 1)]
    assert said.out == "".join(f"{h}\nThe owl{sample['text']}\n" for h, sample in zip(heads, samples, strict=True))
    assert quire(*words[:-2], "--length-penalty", "0.5").out == f"The owl{samples[0]['text']}\n"


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"beams": 0}, "--beams must be at least 1, not 0"),
        ({"beams": 3, "length_penalty": -1.0}, "--length-penalty must be between 0 and 10, not -1"),
        ({"beams": 3, "length_penalty": math.nan}, "--length-penalty must be between 0 and 10, not nan"),
        ({"length_penalty": 0.5}, "--length-penalty ranks the texts of a beam search. Give --beams"),
        ({"beams": 3, "samples": 4}, "--samples 4 is more than the --beams 3"),
        ({"beams": 3, "temperature": 0.5}, "--temperature shapes a draw, and --beams draws nothing"),
        ({"beams": 3, "presence_penalty": 0.5}, "--presence-penalty shapes a draw"),
        ({"batch_size": 0}, "--batch-size must be at least 1, not 0"),
    ],
)
def test_impossible_settings_name_their_flag(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        GenerationSettings(**asked)
    GenerationSettings(beams=3, temperature=0)  # nothing is drawn either way


def test_more_beams_than_tokens(tiny: Run) -> None:
    with pytest.raises(UserError, match=r"--beams 99999 is more than the vocabulary has tokens: at most \d+"):
        next(islice(Writer(tiny, CPU).steps([""], GenerationSettings(beams=99999), []), 1))
