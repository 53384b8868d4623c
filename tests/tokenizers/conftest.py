"""What the tests of tokenizers share: reference files, tiktoken as an oracle, and texts that are hard to split."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from tiktoken.load import data_gym_to_mergeable_bpe_ranks, load_tiktoken_bpe

from quire.tokenizers import ByteBPETokenizer, core, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
SPACES = list("  \t\n\r\n\r\x0b\f\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000")
SPACES += ["\r\n", "\n\n", "   ", " \n ", "\n "]
BITS = [
    *SPACES, *SPACES, *"abcST0123456789''.,;!?-_<>/|()\"\\", *"éßæıÅçñŁſκ'Юяבא森林の한글ไทยहि", *"²½Ⅷ٣৭〇𝟘",
    *"\u0301\u200b\u200d\ufe0f", *"😀👩🏽🇩🇪", "'s", "'t", "'ll", "'ve", "'re", "'LL", "'S", "'\u017f", "’s", "the",
    "Hello", "world", "number", "2026", "</w>", "<|", "|>", "://", "->", "...", "aaaa", "森林",
]  # fmt: skip


def hard_text(rng: random.Random, length: int = 12) -> str:
    """A text that mixes scripts, contractions, numbers and white space of every kind, now and then any character."""
    parts = []
    for _ in range(rng.randrange(length + 1)):
        if rng.random() < 0.1:
            code = rng.randrange(0x110000 - 0x800)
            parts.append(chr(code if code < 0xD800 else code + 0x800))
        else:
            parts.append(rng.choice(BITS) * (rng.randrange(1, 60) if rng.random() < 0.03 else 1))
    return "".join(parts)


def hard_bytes(rng: random.Random, length: int = 12) -> bytes:
    """Bytes that are UTF-8 in part: pieces of characters, characters too long, surrogates, letters and line ends."""
    bits = [b"a", b" ", b"\n", b"'s", b"1", b".", b"\xe2\x82\xac", b"\xf0\x9f\x98\x80", b"\xc3\xa9", b"\xe2\x82"]
    bits += [
        b"\xf0",
        b"\x80",
        b"\xff",
        b"\xc0\x80",
        b"\xe0\x80\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xf5",
        b"\xc2",
    ]
    bits += [bytes([byte]) for byte in range(256)]
    return b"".join(rng.choice(bits[: rng.choice([19, len(bits)])]) for _ in range(rng.randrange(length + 1)))


@pytest.fixture(scope="session")
def texts() -> Callable[..., list[str]]:
    """texts(number, seed): hard texts, the same each time."""

    def make(number: int, seed: int = 0, length: int = 12) -> list[str]:
        rng = random.Random(seed)
        return [hard_text(rng, length) for _ in range(number)]

    return make


@pytest.fixture(scope="session")
def byte_texts() -> Callable[..., list[bytes]]:
    """byte_texts(number, seed): bytes of which many are not UTF-8."""

    def make(number: int, seed: int = 0, length: int = 12) -> list[bytes]:
        rng = random.Random(seed)
        return [hard_bytes(rng, length) for _ in range(number)]

    return make


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """shared(name): a file of ../shared/data; the test is skipped where it is absent."""

    def path(name: str) -> Path:
        if not (SHARED / name).is_file():
            pytest.skip(f"../shared/data/{name} is absent")
        return SHARED / name

    return path


@pytest.fixture(scope="session")
def shared_texts() -> list[tuple[str, str]]:
    """Name and contents of every text in ../shared/data."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    found = []
    for path in sorted(SHARED.iterdir()):
        try:
            found.append((path.name, path.read_bytes().decode()))
        except UnicodeDecodeError:
            continue
    return found


@pytest.fixture(scope="session")
def patterns() -> dict[str, str]:
    """The splitting patterns of gpt2 and cl100k, as tiktoken itself has them."""
    public, ask = tiktoken_ext.openai_public, pytest.MonkeyPatch()
    with ask.context() as patched:
        patched.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})  # no download: the pattern is all we want
        cl100k = public.cl100k_base()["pat_str"]
    return {"gpt2": public.r50k_pat_str, "cl100k": cl100k}


@pytest.fixture(scope="session")
def trained_pair(patterns: dict[str, str]) -> dict[str, tuple[ByteBPETokenizer, tiktoken.Encoding]]:
    """For each pattern a tokenizer of 1,500 tokens trained on hard texts, and tiktoken with the same tokens."""
    rng = random.Random(5)
    blocks = [hard_text(rng, 40) for _ in range(1500)]
    pairs = {}
    for name, pattern in patterns.items():
        ours = ByteBPETokenizer.train(blocks, 1500, name)
        ranks = {token: number for number, token in enumerate(ours.tokens) if token}
        pairs[name] = (
            ours,
            tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(ours.specials)),
        )
    return pairs


@pytest.fixture(scope="session")
def published_pair(
    shared: Callable[[str], Path], patterns: dict[str, str]
) -> dict[str, tuple[ByteBPETokenizer, tiktoken.Encoding]]:
    """GPT-2's and cl100k's own tokens, read by Quire and by tiktoken."""
    merges, encoder = shared("gpt2_vocab.bpe"), shared("gpt2_encoder.json")
    ranks = shared("cl100k_base.tiktoken")
    with pytest.MonkeyPatch().context() as patched:
        patched.setenv("TIKTOKEN_CACHE_DIR", "")
        gpt2_ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder))
        cl100k_ranks = load_tiktoken_bpe(str(ranks))
    pairs = {}
    for name, path, oracle in (("gpt2", merges, gpt2_ranks), ("cl100k", ranks, cl100k_ranks)):
        ours = load_tokenizer(path)
        assert isinstance(ours, ByteBPETokenizer)
        pairs[name] = (
            ours,
            tiktoken.Encoding(name, pat_str=patterns[name], mergeable_ranks=oracle, special_tokens=dict(ours.specials)),
        )
    return pairs


@pytest.fixture
def no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the C core is not compiled."""
    monkeypatch.setattr(core, "fast", None)


# ---- files as published ones are, with small vocabularies that Hugging Face's own trainer has made ----

SPACE = "\u2581"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = WORDS + r"\p{N}{1,3}" + OTHERS, WORDS + r"\p{N}" + OTHERS
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]}


DIGITS = {"type": "Digits", "individual_digits": True}
PREFIXED = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
PIECES_DECODER = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]  # fmt: skip

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTE_FAMILIES: dict[str, dict[str, Any]] = {  # normalizer, pre_tokenizer, special tokens, ignore_merges, our pattern
    "gpt2": {"split": {**BYTE_LEVEL, "use_regex": True}, "specials": ["<|endoftext|>"], "pattern": "gpt2"},
    "qwen2": {"normalizer": {"type": "NFC"}, "split": _split(QWEN2), "specials": CHATML, "pattern": "qwen2"},
    "llama3": {
        "split": _split(LLAMA3), "ignore_merges": True, "pattern": "cl100k-hf",
        "specials": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    },
    "smollm2": {
        "split": {"type": "Sequence", "pretokenizers": [DIGITS, {**BYTE_LEVEL, "use_regex": True}]},
        "specials": [*CHATML, "<repo_name>"], "pattern": "smollm", "first": True,
    },
}  # fmt: skip
PIECES_FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"normalizer": {"type": "Sequence", "normalizers": PREFIXED}, "split": None},
    "mistral": {"normalizer": None, "split": METASPACE},
    "each-part": {"normalizer": None, "split": {**METASPACE, "prepend_scheme": "always"}},
    "no-prefix": {"normalizer": PREFIXED[1], "split": None},
}


def _parts(model: dict[str, Any], decoder: Any, added: list[tuple[int, str]], **rest: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    full = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, **rest}
    return {**full, "added_tokens": [{"id": i, "content": name, **flags} for i, name in added], "decoder": decoder,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, **model}}  # fmt: skip


def _template(name: str, number: int) -> dict[str, Any]:
    token, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    special = {name: {"id": name, "ids": [number], "tokens": [name]}}
    return {
        "type": "TemplateProcessing",
        "single": [token, text],
        "pair": [token, text, other],
        "special_tokens": special,
    }


def _byte_level(family: str, texts: list[str], size: int = 700) -> dict[str, Any]:
    """The contents of a tokenizer.json of the family: its special tokens first, or after the others."""
    given = BYTE_FAMILIES[family]
    rest = {"normalizer": given.get("normalizer"), "pre_tokenizer": given["split"]}
    decoder = {**BYTE_LEVEL, "use_regex": True}
    made = tokenizers.Tokenizer.from_str(json.dumps(_parts({"vocab": {}, "merges": []}, decoder, [], **rest)))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    first = given["specials"] if given.get("first") else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=first, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    model = json.loads(made.to_str())["model"]
    added = [(i if first else len(model["vocab"]) + i, name) for i, name in enumerate(given["specials"])]
    model = {**model, "ignore_merges": given.get("ignore_merges", False)}
    template = _template(added[0][1], added[0][0]) if family == "llama3" else None
    after = {"type": "Sequence", "processors": [{**BYTE_LEVEL, "use_regex": True}, template]} if template else None
    return _parts(model, decoder, added, **{**rest, "post_processor": after})


def _merges(vocabulary: dict[str, int], first: int) -> list[list[str]]:
    """All ways to make a piece of two, the first piece first: as published files have them, made from scores."""
    found = []
    for piece, number in vocabulary.items():
        parts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if number >= first]
        known = [pair for pair in parts if pair[0] in vocabulary and pair[1] in vocabulary]
        found += [(number, vocabulary[left], vocabulary[right], [left, right]) for left, right in known]
    return [pair for _, _, _, pair in sorted(found)]


def _pieces(family: str, texts: list[str], size: int = 700) -> dict[str, Any]:
    """The contents of a tokenizer.json of SentencePiece's kind: <unk> <s> </s>, the bytes, then learned pieces."""
    given = PIECES_FAMILIES[family]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"{SPACE}+[^{SPACE}\n]*|\n"), "isolated")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, limit_alphabet=60, show_progress=False
    )
    made.train_from_iterator([f" {text}" for text in texts], trainer)
    learned = json.loads(made.to_str())["model"]
    model = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
             "vocab": learned["vocab"], "merges": _merges(learned["vocab"], len(special))}  # fmt: skip
    rest = {"normalizer": given["normalizer"], "pre_tokenizer": given["split"], "post_processor": _template("<s>", 1)}
    steps = PIECES_DECODER[: 3 if family == "no-prefix" else 4]
    return _parts(model, {"type": "Sequence", "decoders": steps}, list(enumerate(special[:3])), **rest)


@pytest.fixture(scope="session")
def family(texts: Callable[..., list[str]]) -> Callable[[str], dict[str, Any]]:
    """family(name): the contents of a tokenizer.json as the models of that name have it."""
    blocks = [f"{text} the owl calls upon the night 12345" for text in texts(800, seed=60, length=20)]
    return cache(lambda name: _byte_level(name, blocks) if name in BYTE_FAMILIES else _pieces(name, blocks))
