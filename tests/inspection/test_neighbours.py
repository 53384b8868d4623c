"""Tokens that a model holds to be alike, beside cosines computed one by one; and how a token is named."""

import math

import pytest
import torch

from quire import files
from quire.errors import UserError
from quire.inspection.neighbours import find_token, neighbours, tokenizer_facts
from quire.run import Run
from quire.tokenizers import TOKENIZERS
from quire.tokenizers.character import CharacterTokenizer

TEXT = "the owl calls upon the night and the night calls upon the owl\n" * 30


def test_neighbours_by_brute_force(tiny: Run) -> None:
    model, tokenizer = tiny.model("cpu"), tiny.tokenizer
    token = find_token(tokenizer, "e")
    found = neighbours(model, tokenizer, token)
    rows = model.token_embedding.weight.tolist()

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)

    others = [i for i in range(tokenizer.vocabulary_size) if i not in (token, tokenizer.padding)]
    expected = sorted(others, key=lambda i: -cosine(rows[i], rows[token]))[:10]
    assert [row.id for row in found] == expected
    assert [row.token for row in found] == [tokenizer.name(i) for i in expected]
    assert [row.similarity for row in found] == pytest.approx(
        [cosine(rows[i], rows[token]) for i in expected], rel=1e-4
    )


def test_fewer_tokens_than_asked_for(tiny: Run) -> None:
    model, tokenizer = tiny.model("cpu"), tiny.tokenizer
    assert len(neighbours(model, tokenizer, 5, 10_000)) == tokenizer.vocabulary_size - 2  # itself and padding


def test_a_model_without_such_a_table(tiny: Run) -> None:
    with pytest.raises(UserError, match="no table of token embeddings"):
        neighbours(torch.nn.Linear(3, 3), tiny.tokenizer, 3)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_token_is_found_by_its_name(kind: str) -> None:
    tokenizer = TOKENIZERS[kind].train([TEXT], 0 if kind == "character" else 300)
    for token in range(tokenizer.vocabulary_size):
        name = tokenizer.name(token)
        found = find_token(tokenizer, name)
        assert found == token or tokenizer.decode([found]) == name or tokenizer.name(found) == name


def test_naming_a_token() -> None:
    tokenizer = CharacterTokenizer.train(["Owl\n é"])
    assert find_token(tokenizer, "\\n") == find_token(tokenizer, "\n") == 2
    assert find_token(tokenizer, "<|separator|>") == tokenizer.separator
    with pytest.raises(UserError, match=r"--token 'Owl' is 3 tokens to this model: 'O', 'w', 'l'. Name one of them"):
        find_token(tokenizer, "Owl")
    with pytest.raises(UserError, match=r"'L' is not a token of this model's vocabulary of 8. Did you mean l\?"):
        find_token(tokenizer, "L")
    with pytest.raises(UserError, match="--token is empty"):
        find_token(tokenizer, "")
    words = TOKENIZERS["word"].train([TEXT], 300)
    assert words.name(find_token(words, "night")) == "night"
    with pytest.raises(
        UserError, match=r"'nigth' is 5 tokens to this model: 'n', .* Name one of them. Did you mean night\?"
    ):
        find_token(words, "nigth")


def test_facts_of_a_tokenizer(tiny: Run) -> None:
    facts = tokenizer_facts(tiny)
    held_out = tiny.validation_tokens().tolist()
    assert (facts.kind, facts.vocabulary_size) == ("character", tiny.tokenizer.vocabulary_size)
    assert facts.occurring == len({*held_out} - {0, 1})
    text = tiny.tokenizer.decode(held_out)
    assert facts.bytes_per_token == pytest.approx(len(text.encode()) / len(text))
    assert facts.specials == {"<|padding|>": 0, "<|separator|>": 1}
    files.remove(tiny.path / "data" / "validation.bin")
    facts = tokenizer_facts(tiny)
    assert (facts.occurring, facts.bytes_per_token) == (None, None)
