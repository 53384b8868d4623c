"""Tokenizers on many texts: tiktoken's ids, texts and bytes that come back, and the published steps end to end.

    python benchmarks/tokenizer_campaign.py [--data ../shared/data] [--generated 100000] [--any 20000] [--json OUT]

Prints a table and writes JSON; exits with 1 if anything differed. Needs tiktoken, hypothesis. About seven minutes.

ids         gpt2 and cl100k against tiktoken: generated texts that mix scripts, contractions, numbers and white space,
            property-based ones (hypothesis), and every text of the folder
round trips byte level: any bytes; word and bpe: any text; character: text over its vocabulary
core        the C core and the reference: the same merges and the same ids of every text of the folder, each with its
            own merges, at 4,096 and at 32,768 tokens (fewer where no pair is left that occurs twice)
steps       4,000 merges of tiny-shakespeare by the rule of the published steps, and the number of distinct tokens; the
            first --steps of them beside the steps themselves, one by one (all 4,000: seven minutes)
"""

import argparse
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiktoken
import tiktoken_ext.openai_public as public
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.tokenizers import ByteBPETokenizer, CharacterTokenizer, Tokenizer, WordTokenizer, core, load_tokenizer
from quire.tokenizers.bpe import END, BPETokenizer, build_vocab, get_stats, get_tokens, merge_vocab
from quire.tokenizers.merges import apply

_spec = importlib.util.spec_from_file_location(
    "hard_texts", Path(__file__).resolve().parents[1] / "tests" / "tokenizers" / "conftest.py"
)
assert _spec and _spec.loader
hard = importlib.util.module_from_spec(_spec)  # the generators of the tests
_spec.loader.exec_module(hard)
Pair = tuple[ByteBPETokenizer, tiktoken.Encoding]


def pairs_of(data: Path) -> dict[str, Pair]:
    """GPT-2 and cl100k, read by Quire and built for tiktoken from the same ranks without a download."""
    original, public.load_tiktoken_bpe = public.load_tiktoken_bpe, lambda *_, **__: {}
    patterns = {"gpt2": public.r50k_pat_str, "cl100k": public.cl100k_base()["pat_str"]}
    public.load_tiktoken_bpe = original
    files = {"gpt2": data / "gpt2_vocab.bpe", "cl100k": data / "cl100k_base.tiktoken"}
    found = {}
    for name, file in files.items():
        ours = load_tokenizer(file)
        assert isinstance(ours, ByteBPETokenizer)
        ranks = {token: number for number, token in enumerate(ours.tokens) if token}
        found[name] = (
            ours,
            tiktoken.Encoding(name, pat_str=patterns[name], mergeable_ranks=ranks, special_tokens=dict(ours.specials)),
        )
    return found


def on_any(strategy: st.SearchStrategy[Any], number: int, check: Callable[[Any], bool]) -> dict[str, int]:
    """How often `check` held on property-based cases."""
    counts = {"cases": 0, "differed": 0}

    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(case: Any) -> None:
        counts["cases"] += 1
        counts["differed"] += not check(case)

    run()
    return counts


def ids(data: Path, generated: int, any_: int) -> dict[str, dict[str, int]]:
    """The ids of all texts beside tiktoken's."""
    found = {}
    for name, (ours, oracle) in pairs_of(data).items():

        def same(text: str, ours: ByteBPETokenizer = ours, oracle: tiktoken.Encoding = oracle) -> bool:
            row = ours.encode_array(text)
            return row.tolist() == oracle.encode_ordinary(text) and ours.decode(row) == text

        rng = random.Random(1)
        wrong = sum(not same(hard.hard_text(rng)) for _ in range(generated))
        found[f"{name}: generated texts"] = {"cases": generated, "differed": wrong}
        found[f"{name}: property-based texts"] = on_any(st.text(max_size=60), any_, same)
        texts = texts_of(data).values()
        found[f"{name}: files of the folder"] = {"cases": len(texts), "differed": sum(not same(text) for text in texts)}
    return found


def round_trips(data: Path, number: int) -> dict[str, dict[str, int]]:
    """decode(encode(x)) == x, half of the cases trained on real text, half on hard ones."""
    real = (data / "wikitext2_valid.txt").read_text(encoding="utf-8")[:300_000]
    rng = random.Random(2)
    training = [real, *(hard.hard_text(rng) for _ in range(2000))]
    kinds: dict[str, Tokenizer] = {
        "byte-bpe": ByteBPETokenizer.train(training, 4096),
        "byte-bpe, cl100k": ByteBPETokenizer.train(training, 4096, "cl100k"),
        "word": WordTokenizer.train(training, 8192),
        "bpe, subword-nmt": BPETokenizer.train(training, 4096),
        "bpe, published": BPETokenizer.train(training, 1024, "published"),
        "character": CharacterTokenizer.train(training),
    }
    found = {}
    for name, tokenizer in kinds.items():
        wrong = 0
        for _ in range(number):
            if isinstance(tokenizer, ByteBPETokenizer):
                data_ = hard.hard_bytes(rng, 30) if rng.random() < 0.5 else rng.randbytes(rng.randrange(40))
                wrong += tokenizer.decode_bytes(tokenizer.encode_bytes(data_)) != data_
            elif isinstance(tokenizer, CharacterTokenizer):
                text = "".join(rng.choices(tokenizer.characters, k=rng.randrange(40)))
                wrong += tokenizer.decode(tokenizer.encode_array(text)) != text
            else:
                text = hard.hard_text(rng)
                wrong += tokenizer.decode(tokenizer.encode_array(text)) != text
        found[f"round trip: {name}"] = {"cases": number, "differed": wrong}
    return found


def texts_of(data: Path) -> dict[str, str]:
    """Every text of the folder."""
    found = {}
    for path in sorted(data.iterdir()):
        try:
            found[path.name] = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
    return found


def core_and_reference(data: Path) -> dict[str, dict[str, int]]:
    """Texts whose merges or ids are not the same with the C core and without it."""
    fast = core.fast
    if fast is None:
        sys.exit("the C core is not compiled: install Quire where there is a C compiler")
    found = {f"core, reference: {size} tokens": {"cases": 0, "differed": 0} for size in (4096, 32768)}
    for text in texts_of(data).values():
        for size, row in zip((4096, 32768), found.values()):
            results = []
            for core.fast in (fast, None):
                made = ByteBPETokenizer.train([text], size)
                results.append((made.merges, made.encode_array(text).tolist()))
            row["cases"] += 1
            row["differed"] += results[0] != results[1]
            core.fast = fast
    return found


def published_steps(data: Path, merges: int, steps_shown: int) -> dict[str, Any]:
    """The steps as they are published, and the same merges by the tokenizer class."""
    text = (data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    start, vocab, learned = time.process_time(), build_vocab(text), []
    for _ in range(steps_shown):
        pairs = get_stats(vocab)
        best = max(pairs, key=lambda pair: pairs[pair])
        vocab = merge_vocab(best, vocab)
        learned.append(best)
    steps = time.process_time() - start
    start = time.process_time()
    trained = BPETokenizer.train([text], rule="published", count=merges)
    seconds = time.process_time() - start
    words = [(*word, END) for word in set(text.split())]
    ranks = {pair: (rank, "".join(pair)) for rank, pair in enumerate(trained.learned)}
    rows = [apply(word, ranks) for word in words]
    first = {pair: known for pair, known in ranks.items() if known[0] < steps_shown}
    tokens = {symbol for word in words for symbol in apply(word, first)}
    return {
        "merges": merges,
        "distinct_tokens": len({symbol for row in rows for symbol in row}),
        "steps": steps_shown,
        "the_same_by_the_class": trained.learned[:steps_shown] == learned and tokens == set(get_tokens(vocab)),
        "seconds_of_the_steps": round(steps, 1),
        "seconds_of_the_class": round(seconds, 1),
    }


def main() -> None:
    """Run it all, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of texts and ranks")
    parser.add_argument("--generated", type=int, default=100_000, help="generated texts, and round trips of each kind")
    parser.add_argument("--any", type=int, default=20_000, help="property-based texts")
    parser.add_argument("--merges", type=int, default=4000, help="by the rule of the published steps")
    parser.add_argument("--steps", type=int, default=300, help="of them beside the steps themselves")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tokenizer_campaign.json"))
    given_ = parser.parse_args()
    if not (given_.data / "gpt2_vocab.bpe").is_file():
        sys.exit(f"{given_.data}/gpt2_vocab.bpe is absent: give --data, the folder of texts and ranks.")
    cases = {**core_and_reference(given_.data), **ids(given_.data, given_.generated, given_.any)}
    cases |= round_trips(given_.data, given_.generated)
    for name, row in cases.items():
        print(f"{name:34} {row['cases']:8} cases, {row['differed']} differed")
    steps = published_steps(given_.data, given_.merges, given_.steps)
    print(f"published steps: {steps}")
    given_.json.parent.mkdir(parents=True, exist_ok=True)
    figures = {"tiktoken": tiktoken.__version__, "cases": cases, "published_steps": steps}
    given_.json.write_text(json.dumps(figures, indent=1) + "\n")
    if any(row["differed"] for row in cases.values()) or not steps["the_same_by_the_class"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
