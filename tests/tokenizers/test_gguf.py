"""The parts of a GGUF file's tokenizer: written and read back, refused where llama.cpp has nothing equal, damaged."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import UserError
from quire.tokenizers import TOKENIZERS, ByteBPETokenizer, CharacterTokenizer, SentencePieceTokenizer
from quire.tokenizers.gguf import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, from_gguf, to_gguf
from quire.tokenizers.hugging_face import from_hugging_face

NAMES = {"gpt2": "gpt-2", "qwen2": "qwen2", "llama3": "llama-bpe", "smollm2": "smollm", "llama2": "default"}


@pytest.mark.parametrize("name", NAMES)
def test_written_and_read_back_it_gives_the_same_ids(name, family, texts):
    ours = from_hugging_face(family(name), separator=2 if name == "smollm2" else None, vocabulary_size=720)
    parts = to_gguf(ours, [1] if name == "llama2" else [])
    assert parts["pre"] == NAMES[name] and len(parts["tokens"]) == len(parts["token_types"]) == 720
    assert len(set(parts["tokens"])) == 720 and parts["token_types"][-1] == UNUSED
    again, before = from_gguf(**parts)
    assert before == ([1] if name == "llama2" else []) and type(again) is type(ours)
    assert (again.vocabulary_size, again.separator, again.padding) == (720, ours.separator, ours.padding)
    assert again.specials == ours.specials
    for text in texts(600, seed=80):
        ids = ours.encode(text, special="text")
        assert again.encode(text, special="text") == ids and again.decode(ids) == ours.decode(ids)
    assert to_gguf(again, before) == parts


def test_kinds_of_tokens(family):
    parts = to_gguf(from_hugging_face(family("llama2")), [1])
    assert parts["token_types"][:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and parts["token_types"][-1] == NORMAL
    assert (parts["unknown"], parts["bos"], parts["eos"], parts["add_bos"]) == (0, 1, 2, True)
    assert parts["add_space_prefix"] and not to_gguf(from_hugging_face(family("no-prefix")))["add_space_prefix"]


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "cl100k-hf", "qwen2", "smollm"])
def test_a_pattern_has_a_name_there_or_is_refused(pattern, texts):
    ours = ByteBPETokenizer.train(texts(200, seed=81), 400, pattern)
    if pattern == "cl100k":
        with pytest.raises(UserError, match="by the pattern cl100k, which"):
            to_gguf(ours)
        return
    parts = to_gguf(ours)
    assert parts["pre"] == {"gpt2": "gpt-2", "cl100k-hf": "dbrx"}.get(pattern, pattern)
    again, _ = from_gguf(**parts)
    for text in texts(300, seed=82):
        if pattern != "qwen2":  # whose models were trained on NFC, which is put on in reading
            assert again.encode(text, special="text") == ours.encode(text, special="text")
    ours.whole[b"the"] = 300
    if pattern != "cl100k-hf":
        with pytest.raises(UserError, match="with tokens that no merges make"):
            to_gguf(ours)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=30), st.data())
def test_characters_are_pieces_of_one_character(inventory, data):
    ours = CharacterTokenizer.train([inventory.replace("\u2581", "_") + "\r\n \u0301"])
    parts = to_gguf(ours)
    assert parts["model"] == "llama" and parts["token_types"][:3] == [CONTROL, CONTROL, NORMAL]
    again, before = from_gguf(**parts)
    assert isinstance(again, SentencePieceTokenizer) and not before and again.separator == ours.separator
    text = data.draw(st.text(st.sampled_from(ours.characters), max_size=40))
    ids = ours.encode(text, special="text")
    assert again.encode(text, special="text") == ids and again.decode(ids) == text


def test_what_cannot_be_written():
    with pytest.raises(UserError, match=r"U\+2581.*which llama.cpp takes for a space"):
        to_gguf(CharacterTokenizer("a\u2581"))
    for kind in ("word", "bpe"):
        with pytest.raises(UserError, match=f"A {kind} tokenizer cannot be written to GGUF.*byte-bpe"):
            to_gguf(TOKENIZERS[kind].train(["a few words"], 300))
    with pytest.raises(UserError, match="room for one token that a text begins with"):
        to_gguf(CharacterTokenizer("ab"), [0, 1])


def test_merges_that_scores_cannot_say_are_refused(family):
    """One way to make a piece is missing: by scores, it would be made in that way too."""
    file = family("llama2")
    pieces = {**file["model"]["vocab"], "xyz": 700, "xy": 701, "yz": 702, "x": 703, "y": 704, "z": 705}
    merges = [["x", "y"], ["y", "z"], ["xy", "z"]]
    few = from_hugging_face({**file, "model": {**file["model"], "vocab": pieces, "merges": merges}})
    with pytest.raises(UserError, match="cannot be said by scores"):
        to_gguf(few)


def test_damaged_parts(family):
    good, pieces = to_gguf(from_hugging_face(family("smollm2"))), to_gguf(from_hugging_face(family("llama2")), [1])
    tokens = good["tokens"]
    for parts, sentence in (
        ({**good, "model": "bert"}, r"kind 'bert'\. Those that can be read are gpt2 and llama"),
        ({**good, "pre": "deepseek-llm"}, "'deepseek-llm', which Quire does not know"),
        ({**good, "pre": ""}, "Quire does not know. Known are gpt-2"),
        ({**good, "tokens": []}, "0 tokens"),
        ({**good, "token_types": [1, 1]}, "2 types"),
        ({**good, "tokens": [*tokens[:-1], tokens[-2]]}, "stands there twice|which is no token"),
        ({**good, "tokens": [*tokens[:-1], "森"]}, "not spelled in GPT-2's letters"),
        ({**good, "tokens": [*tokens[:-1], 7]}, "of the wrong kind"),
        ({**good, "merges": ["a b c"]}, "of the wrong kind"),
        ({**good, "merges": ["森 林"]}, "it merges '森', which is no token"),
        ({**good, "merges": ["a b", 3]}, "of the wrong kind"),
        ({**good, "eos": 10**6}, "its token for end is 1000000, of"),
        ({**good, "pad": -1}, "its token for padding is -1"),
        ({**good, "tokens": ["", *tokens[1:]]}, "a special token without a name"),
        ({**pieces, "scores": []}, "it has no scores"),
        ({**pieces, "scores": [0.5]}, "1 scores"),
        ({**pieces, "scores": [float("inf"), *pieces["scores"][1:]]}, "a score is not a number"),
        ({**pieces, "scores": ["x", *pieces["scores"][1:]]}, "of the wrong kind"),
        ({**pieces, "tokens": [*pieces["tokens"][:-1], pieces["tokens"][-2]]}, "stands there twice"),
    ):
        with pytest.raises(UserError, match=sentence):
            from_gguf(**parts, where="model.gguf")
