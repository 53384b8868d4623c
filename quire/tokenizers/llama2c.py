"""The tokenizer files of llama2.c: SentencePiece's pieces with their scores.

int32 length of the longest piece, then for each: float32 score, int32 length, its bytes; all little-endian. Spaces
stand as they are; ids 0, 1 and 2 are <unk>, the beginning and the end of a text, and the 256 bytes come next.
"""

import struct
from pathlib import Path

from quire.errors import UserError
from quire.tokenizers.sentencepiece import SPACE, SentencePieceTokenizer, from_pieces

SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2}
FIRST_BYTE, SMALLEST = 3, 3 + 256


def read_llama2c(path: Path, vocabulary_size: int = 0) -> SentencePieceTokenizer:
    """The tokenizer in a file of llama2.c; `vocabulary_size` is what the model's header says (0: not known).

    Texts there begin with <s>, id 1, which is the separator. A UserError says in what way a file is none.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"There is no tokenizer at {path}: {error.strerror}.") from error
    pieces, scores = _pieces(data, path)
    if vocabulary_size and len(pieces) != vocabulary_size:
        raise UserError(f"{path} has {len(pieces)} tokens, but the model {vocabulary_size}: it belongs to another one.")
    bytes_there = pieces[FIRST_BYTE:SMALLEST] == [f"<0x{byte:02X}>" for byte in range(256)]
    if len(pieces) < SMALLEST or pieces[0] != "<unk>" or not bytes_there:
        raise UserError(f"{path} is no tokenizer of llama2.c: it does not begin with <unk> and the tokens for bytes.")
    pieces[:FIRST_BYTE] = SPECIALS
    spelled = [piece.replace(" ", SPACE) for piece in pieces]
    # What stands before a text also ends the one before it: llama2.c's own models were trained so, without </s>.
    return from_pieces(spelled, SPECIALS, str(path), separator="<s>", scores=scores, unknown_token="<unk>")


def _pieces(data: bytes, path: Path) -> tuple[list[str], list[float]]:
    pieces, scores, at = [], [], 4
    try:
        (longest,) = struct.unpack_from("<i", data)
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            piece = data[at : at + length]
            if not 0 < length <= longest or len(piece) < length:
                raise ValueError
            pieces.append(piece.decode())
            scores.append(score)
            at += length
    except (struct.error, ValueError) as error:
        raise UserError(
            f"{path} is no tokenizer of llama2.c, or damaged or cut short: at byte {at} begins no token."
        ) from error
    return pieces, scores
