"""What a model writes for held-out sources, beside what was wanted: exact match, BLEU and chrF."""

from collections.abc import Sequence
from dataclasses import dataclass

from quire.data.pairs import Pairs
from quire.generation.generate import GenerationSettings, Writer
from quire.progress import bar, say

SHOWN, LONGEST_SHOWN = 4, 200  # pairs of a sample, and tokens written for each
AT_ONCE = 512  # pairs between two movements of the bar


@dataclass(frozen=True)
class Scores:
    """`exact_match`: the share of texts that are the reference, to the letter. BLEU and chrF go from 0 to 100."""

    exact_match: float
    bleu: float | None = None  # None: sacrebleu is not installed
    chrf: float | None = None


def translate(writer: Writer, sources: Sequence[str], beams: int = 1) -> list[str]:
    """What the model writes for each source, always the likeliest token, or the best of `beams`."""
    most = writer.model.settings.context_length
    settings = GenerationSettings(tokens=most, temperature=0.0, beams=beams, batch_size=AT_ONCE)
    order = sorted(range(len(sources)), key=lambda number: len(sources[number]))  # of one length, little is filled up
    written = [""] * len(sources)
    with bar("writing") as show:
        for first in range(0, len(order), AT_ONCE):
            part = order[first : first + AT_ONCE]
            for number, sample in zip(part, writer.write([sources[i] for i in part], settings), strict=True):
                written[number] = sample.text
            show((first + len(part)) / len(order), pairs=first + len(part))
    return written


def scored(written: Sequence[str], references: Sequence[str]) -> Scores:
    """How well texts agree with their references; BLEU and chrF as sacrebleu measures them (Post 2018)."""
    exact = sum(a == b for a, b in zip(written, references, strict=True)) / len(references)
    try:
        import sacrebleu
    except ImportError:
        say('BLEU and chrF need sacrebleu: pip install "quire[translation]"')
        return Scores(exact)
    bleu = sacrebleu.corpus_bleu(list(written), [list(references)]).score
    return Scores(exact, bleu, sacrebleu.corpus_chrf(list(written), [list(references)]).score)


def texts(writer: Writer, pairs: Pairs, count: int | None = None) -> tuple[list[str], list[str]]:
    """Sources and targets of the first `count` pairs, or of all."""
    rows = [pairs.ids(row) for row in range(min(pairs.examples(), count or pairs.examples()))]
    decode = writer.tokenizer.decode
    return [decode(source) for source, _ in rows], [decode(target) for _, target in rows]


def shown(writer: Writer, pairs: Pairs) -> str:
    """A few held-out pairs, and what the model writes for their sources."""
    sources, references = texts(writer, pairs, SHOWN)
    settings = GenerationSettings(tokens=LONGEST_SHOWN, temperature=0.0)
    written = [sample.text for sample in writer.write(sources, settings)]
    return "\n\n".join(
        f"source     {source}\nreference  {reference}\nwritten    {text}"
        for source, reference, text in zip(sources, references, written, strict=True)
    )
