"""tokenizer.json of published families, read and written: ids and text as Hugging Face's own tokenizers give them."""

import json
import unicodedata

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import UserError
from quire.tokenizers import TOKENIZERS, ByteBPETokenizer, CharacterTokenizer, SentencePieceTokenizer, load_tokenizer
from quire.tokenizers.hugging_face import (
    from_hugging_face,
    prompt_prefix,
    read_hugging_face,
    to_hugging_face,
    write_checked,
)
from quire.tokenizers.tokenizer import PADDING, SEPARATOR

BYTE_LEVEL = {"gpt2": "gpt2", "qwen2": "qwen2", "llama3": "cl100k-hf", "smollm2": "smollm"}
PIECES = {"llama2": "always", "mistral": "first", "each-part": "missing", "no-prefix": "never"}
FAMILIES = [*BYTE_LEVEL, *PIECES]
quick = settings(max_examples=100, deadline=None)


def oracle(table: dict) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(table))


def plain(theirs: tokenizers.Tokenizer, text: str) -> list[int]:
    return theirs.encode(text, add_special_tokens=False).ids


def usable(text: str) -> str:
    """Without characters newer than the Unicode tables of one of the two, whose NFC may differ."""
    return "".join(character for character in text if unicodedata.category(character) not in ("Cn", "Cs"))


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_text_are_those_of_hugging_face(name, family, texts, monkeypatch, tmp_path):
    theirs, file = oracle(family(name)), tmp_path / "tokenizer.json"
    file.write_text(json.dumps(family(name)))
    ours = load_tokenizer(file)
    if isinstance(ours, SentencePieceTokenizer):
        assert ours.prefix == PIECES[name]
    else:
        assert isinstance(ours, ByteBPETokenizer) and ours.pattern == BYTE_LEVEL[name]
        assert ours.normalization == ("NFC" if name == "qwen2" else "")

    def check(text: str) -> None:
        ids = ours.encode(text, special="text")
        assert ids == plain(theirs, text)
        assert ours.decode(ids) == theirs.decode(ids)

    for text in texts(1500, seed=61):
        check(usable(text))

    @quick
    @given(st.text(max_size=30) | st.text(st.sampled_from(" \n\tab1234'sTl.\u2581森\u0301e\u1100\u1161"), max_size=16))
    def on_any(text):
        check(usable(text))

    on_any()
    monkeypatch.setattr("quire.tokenizers.core.fast", None)
    for text in texts(200, seed=62):
        check(usable(text))


@pytest.mark.parametrize("name", FAMILIES)
def test_written_again_it_gives_the_same_ids_and_is_read_as_the_same(name, family, texts, tmp_path):
    first = from_hugging_face(family(name))
    first.save(tmp_path / "tokenizer.json")
    ours = load_tokenizer(tmp_path)
    assert ours.to_table() == first.to_table() and type(ours) is type(first)
    before = prompt_prefix(family(name))
    assert before == ([700] if name == "llama3" else [1] if name in PIECES else [])
    table = to_hugging_face(ours, before)
    write_checked(tmp_path / "hf" / "tokenizer.json", table)
    again, prefix = read_hugging_face(tmp_path / "hf")
    assert again.to_table() == ours.to_table() and prefix == before
    theirs, written = oracle(family(name)), tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for text in texts(400, seed=63):
        ids = theirs.encode(text).ids
        assert written.encode(text).ids == ids and written.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_a_text_become_what_they_are_there(name, family, texts):
    ours, theirs = from_hugging_face(family(name)), oracle(family(name))
    names = list(ours.specials)
    for number, text in enumerate(texts(300, seed=64)):
        parts = [usable(text), names[number % len(names)], " then", names[-1], names[0], usable(text)]
        mixed = "".join(parts[number % 3 :])
        assert ours.encode(mixed, special="token") == plain(theirs, mixed)


def test_the_tokens_that_end_and_pad_are_found_by_name_or_id(family):
    file = family("smollm2")
    assert from_hugging_face(file).separator == from_hugging_face(file).padding == 0
    ours = from_hugging_face(file, separator=2, padding="<repo_name>")
    assert (ours.separator, ours.padding) == (2, 3) and ours.name(2) == "<|im_end|>"
    again = from_hugging_face(to_hugging_face(ours))
    assert (again.separator, again.padding) == (2, 3)
    assert from_hugging_face(family("llama2"), padding="<unk>").padding == 0
    for name in ("smollm2", "llama2"):
        for which in ("<nobody>", 10**6, -1):
            with pytest.raises(UserError, match="has no token"):
                from_hugging_face(family(name), separator=which)


def test_an_ordinary_token_that_a_model_ends_with_becomes_special(family):
    file = {**family("gpt2"), "added_tokens": []}
    vocabulary = {**file["model"]["vocab"], "<|stop|>": 700}
    ours = from_hugging_face({**file, "model": {**file["model"], "vocab": vocabulary}}, separator=700)
    assert ours.specials == {"<|stop|>": 700} and ours.separator == 700 and ours.vocabulary_size == 701


@pytest.mark.parametrize("name", ["qwen2", "llama2"])
def test_a_vocabulary_may_be_larger_than_its_tokens(name, family, tmp_path):
    smaller = from_hugging_face(family(name))
    ours = from_hugging_face(family(name), vocabulary_size=768)
    assert ours.vocabulary_size == 768 and ours.encode("The owl") == smaller.encode("The owl")
    assert set(range(smaller.vocabulary_size, 768)) <= ours.reserved() and ours.decode([767]) == ""
    ours.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).vocabulary_size == 768
    assert oracle(to_hugging_face(ours)).get_vocab_size() == smaller.vocabulary_size
    with pytest.raises(UserError, match="but a vocabulary of 300 was asked for"):
        from_hugging_face(family(name), vocabulary_size=300)


def test_a_byte_that_has_no_token_is_refused_or_left_out(family, monkeypatch):
    file = family("smollm2")
    vocabulary = {token: i for token, i in file["model"]["vocab"].items() if token != "Ę"}  # byte 0x18
    merges = [pair for pair in file["model"]["merges"] if "Ę" not in "".join(pair)]
    file = {**file, "model": {**file["model"], "vocab": vocabulary, "merges": merges}}
    ours, theirs = from_hugging_face(file), oracle(file)
    for _ in range(2):  # with the core and without
        assert ours.encode("a \x18 b" + "\x18 x" * 60, "skip") == plain(theirs, "a \x18 b" + "\x18 x" * 60)
        with pytest.raises(UserError, match="no token for the byte 0x18"):
            ours.encode("a \x18 b")
        assert ours.unknown("a \x18 b\x18") == {"\x18": 2} and not ours.unknown("any other 森")
        monkeypatch.setattr("quire.tokenizers.core.fast", None)


def test_text_and_its_bytes_are_brought_into_nfc_and_what_is_no_text_is_kept(family):
    ours = from_hugging_face(family("qwen2"))
    assert isinstance(ours, ByteBPETokenizer)
    apart, together = "cafe\u0301 \u1100\u1161 \u212b", "caf\u00e9 \uac00 \u00c5"
    assert ours.encode(apart) == ours.encode(together) and ours.decode(ours.encode(apart)) == together
    assert ours.encode_bytes(apart.encode()).tolist() == ours.encode(together)
    data = b"\xff" + "e\u0301".encode() + b"\xe2\x82"
    assert ours.decode_bytes(ours.encode_bytes(data)) == b"\xff\xc3\xa9\xe2\x82"


# ---- characters ----


def characters_file(text: str) -> tuple[CharacterTokenizer, dict]:
    ours = CharacterTokenizer.train([text])
    return ours, json.loads(json.dumps(to_hugging_face(ours)))


@quick
@given(st.text(min_size=1, max_size=40), st.data())
def test_characters_are_bpe_without_merges(inventory, data):
    inventory += "\r\n \u0301"
    ours, table = characters_file(inventory)
    theirs = oracle(table)
    text = data.draw(st.text(st.sampled_from(inventory), max_size=60))
    ids = ours.encode_array(text).tolist()
    assert theirs.encode(text).ids == ids and theirs.decode(ids) == text == ours.decode(ids)
    assert theirs.get_vocab_size() == ours.vocabulary_size
    assert theirs.encode(text + "\U0010fffd" * 3).ids == ids + ours.encode("\U0010fffd" * 3, "skip")
    again = from_hugging_face(table)
    assert isinstance(again, CharacterTokenizer) and again.characters == ours.characters


def test_transformers_loads_what_is_written(family, tmp_path):
    from transformers import PreTrainedTokenizerFast

    text = "'The owl',  calls\r\nupon a\u0301 night ; 12 .\n"
    for ours in (CharacterTokenizer.train([text]), *map(from_hugging_face, map(family, ("qwen2", "llama2")))):
        (tmp_path / "tokenizer.json").write_text(json.dumps(to_hugging_face(ours)))
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids and len(theirs) == ours.vocabulary_size
        assert theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == ours.decode(ids)


def test_other_kinds_cannot_be_written():
    for kind in ("word", "bpe"):
        with pytest.raises(UserError, match=f"A {kind} tokenizer cannot be written .* --tokenizer byte-bpe"):
            to_hugging_face(TOKENIZERS[kind].train(["a few words"], 300))


def test_characters_that_are_not_as_quire_writes_them_are_refused():
    _, table = characters_file("abc")
    model = table["model"]
    for changed, sentence in (
        ({**table, "added_tokens": []}, "its special tokens differ"),
        ({**table, "model": {**model, "vocab": {**model["vocab"], "d": 9}}}, "its special tokens differ"),
        ({**table, "model": {**model, "vocab": {**model["vocab"], "de": 5}}}, "tokens of several characters"),
        ({**table, "model": {**model, "vocab": {PADDING: 0, SEPARATOR: 1}}}, "its special tokens differ"),
    ):
        with pytest.raises(UserError, match=sentence):
            from_hugging_face(changed)


# ---- damaged files ----


def test_damaged_files_of_sentencepiece(family):
    good = family("llama2")
    model, metaspace = good["model"], family("mistral")["pre_tokenizer"]
    vocabulary = model["vocab"]

    def of(**changes: object) -> dict:
        return {**good, "model": {**model, **changes}}

    for table, sentence in (
        (of(vocab={**vocabulary, "zz": -1}), "an id 699|not a tokenizer|damaged"),
        (of(vocab={**vocabulary, "zz": 10**12}), "an id 1000000000000"),
        (of(vocab={**vocabulary, "zz": 400}), "two of its tokens have the same id"),
        (of(vocab={**vocabulary, "zz": None}), "not a tokenizer"),
        (of(merges=[*model["merges"], ["森", "林林"]]), "not a tokenizer"),
        (of(merges=[["<unk>", "<s>"]]), "not a tokenizer"),
        (of(merges=7), "not a tokenizer"),
        (of(unk_token="<nobody>"), "not a tokenizer"),
        (of(ignore_merges=True), "ignore_merges"),
        ({**good, "added_tokens": [{"id": 0, "content": "<unk>"}]}, "no token that ends a text"),
        ({**good, "normalizer": {"type": "Lowercase"}}, "in a way that Quire does not know"),
        ({**good, "normalizer": {"type": "Prepend", "prepend": "_"}}, "in a way that Quire does not know"),
        ({**good, "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"}}, "in a way"),
        ({**good, "pre_tokenizer": metaspace}, "in a way that Quire does not know"),
        ({**good, "normalizer": None, "pre_tokenizer": {**metaspace, "split": True}}, "in a way"),
        ({**good, "normalizer": None, "pre_tokenizer": {**metaspace, "replacement": "_"}}, "in a way"),
        ({**good, "normalizer": 3}, "not a tokenizer"),
    ):
        with pytest.raises(UserError, match=sentence):
            from_hugging_face(table, "its file")


def test_other_ways_to_split_are_refused(family):
    digits, level = family("smollm2")["pre_tokenizer"]["pretokenizers"]
    split, bare = family("qwen2")["pre_tokenizer"]["pretokenizers"]
    for steps in (
        [digits],
        [{**digits, "individual_digits": False}, level],
        [digits, {**level, "use_regex": False}],
        [split, level],
        [split, {**bare, "add_prefix_space": True}],
        [{**split, "behavior": "Removed"}, bare],
        [{**split, "invert": True}, bare],
        [digits, split, bare],
    ):
        with pytest.raises(UserError, match="splits text in a way"):
            from_hugging_face({**family("qwen2"), "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})
    inverted = {**split, "behavior": "Removed", "invert": True}  # another spelling of the same
    file = {**family("qwen2"), "pre_tokenizer": {"type": "Sequence", "pretokenizers": [inverted, bare]}}
    assert from_hugging_face(file).to_table() == from_hugging_face(family("qwen2")).to_table()


def test_a_folder_without_a_tokenizer_and_a_damaged_one(family, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json at"):
        read_hugging_face(tmp_path)
    file = tmp_path / "tokenizer.json"
    for data, sentence in (
        (b"", "not JSON"),
        (b"\xff\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a tokenizer"),
        (b"{}", "not a tokenizer"),
        (json.dumps({**family("llama2"), "post_processor": {"type": "TemplateProcessing"}}).encode(), "post_processor"),
        (json.dumps({**family("llama2"), "post_processor": [7]}).encode(), "post_processor"),
    ):
        file.write_bytes(data)
        with pytest.raises(UserError, match=sentence):
            read_hugging_face(tmp_path)
