"""llama2.c (Karpathy 2023): the little Llama models of its .bin files, version 0, and their tokenizer.bin.

A file is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len) and then float32 tensors in
a fixed order, each kind for all layers at once; a vocab_size below 0 says that a head of its own stands at the end.
Its rotary positions turn channels (2i, 2i + 1) of a head: the rows of queries and keys are put in the order in which
ours turn (i, i + D/2). Its texts begin with token 1, which also ends them.
C channels, F feedforward channels, L layers, D head size, V vocabulary, T context.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quire import files
from quire.errors import UserError
from quire.interop.imported import Foreign, halves
from quire.tokenizers.llama2c import read_llama2c

BEGIN = 1  # the token before every text
HEADER = struct.Struct("<7i")


class Header(NamedTuple):
    """The seven numbers, as that file names them."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int

    @property
    def plausible(self) -> bool:
        """Whether a model can have this shape."""
        return (
            min(self[:5]) > 0 and max(map(abs, self)) < 1 << 24 and self.vocab_size != 0 and self.seq_len > 1
            and self.dim % self.n_heads == 0 and self.n_heads % self.n_kv_heads == 0
            and (self.dim // self.n_heads) % 2 == 0
        )  # fmt: skip

    def parts(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every array in the order of the file: our name with {} for the layer ("": not needed), and its shape."""
        c, f, n, v = self.dim, self.hidden_dim, self.n_layers, abs(self.vocab_size)
        size = c // self.n_heads
        kv, block = self.n_kv_heads * size, "blocks.{}."
        head = [("head.weight", (v, c))] if self.vocab_size < 0 else []
        return [
            ("token_embedding.weight", (v, c)),
            (f"{block}attention_norm.weight", (n, c)),
            (f"{block}attention.query.weight", (n, c, c)),
            (f"{block}attention.key.weight", (n, kv, c)),
            (f"{block}attention.value.weight", (n, kv, c)),
            (f"{block}attention.output.weight", (n, c, c)),
            (f"{block}feedforward_norm.weight", (n, c)),
            (f"{block}feedforward.gate.weight", (n, f, c)),
            (f"{block}feedforward.down.weight", (n, c, f)),
            (f"{block}feedforward.up.weight", (n, f, c)),
            ("norm.weight", (c,)),
            ("", (self.seq_len, size // 2)),  # cosines and sines, which earlier versions of that program read
            ("", (self.seq_len, size // 2)),
            *head,
        ]

    def size(self) -> int:
        """Bytes of a whole file."""
        return HEADER.size + 4 * sum(math.prod(shape) for _, shape in self.parts())


def recognizes(path: Path) -> bool:
    """Whether the name ends in .bin and the first numbers may be the header of such a model."""
    return path.suffix == ".bin" and path.is_file()


def read(path: Path, tokenizer: Path | None = None) -> Foreign:
    """The model in a .bin file, with the tokenizer from a file beside it, or the one named."""
    header = checked_header(path)
    settings = {
        "kind": "modern",
        "context_length": header.seq_len,
        "embedding_size": header.dim,
        "layers": header.n_layers,
        "heads": header.n_heads,
        "kv_heads": header.n_kv_heads,
        "feedforward_size": header.hidden_dim,
        "norm_epsilon": 1e-5,
        "tied": header.vocab_size > 0,
    }
    known = read_llama2c(tokenizer or tokenizer_beside(path), abs(header.vocab_size))
    origin = {
        "format": "llama2.c",
        "path": str(path.resolve()),
        "bytes": header.size(),
        "sha256": files.sha256_of(path),
    }
    return Foreign(settings, tensors(path, header), known, origin, prompt_prefix=[BEGIN])


def checked_header(path: Path) -> Header:
    """The header, if the rest of the file is as long as it says."""
    with open(path, "rb") as file:
        raw = file.read(HEADER.size)
    header = Header(*HEADER.unpack(raw)) if len(raw) == HEADER.size else None
    if header is None or not header.plausible:
        raise UserError(
            f"{path} is no llama2.c model: its first numbers are not the shape of one."
            " (Its versions 1 and 2, which begin with ak42, and PyTorch's .bin files are not read.)"
        )
    size, expected = path.stat().st_size, header.size()
    if size != expected:
        what = "is cut off, or damaged" if size < expected else "goes on behind its end"
        raise UserError(f"{path} {what}: it has {size:,} bytes, and a llama2.c model of its shape {expected:,}.")
    return header


def tokenizer_beside(path: Path) -> Path:
    """The one other .bin file in its folder that is named like a tokenizer."""
    beside = sorted(file for file in path.parent.glob("tok*.bin") if file != path)
    if len(beside) != 1:
        found = f"there are {len(beside)}" if beside else "there is none"
        raise UserError(f"Name the tokenizer of {path} with --tokenizer FILE: beside it {found} named tok*.bin.")
    return beside[0]


def tensors(path: Path, header: Header) -> Iterator[tuple[str, Tensor]]:
    """The weights by Quire's names."""
    whole = np.memmap(path, dtype="<f4", mode="r", offset=HEADER.size)
    start = 0
    for name, shape in header.parts():
        count = math.prod(shape)
        array = whole[start : start + count].reshape(shape)
        start += count
        for layer, part in enumerate(array) if "{}" in name else [(0, array)] if name else []:
            tensor = torch.from_numpy(np.array(part, dtype=np.float32))
            turned = name.endswith(("query.weight", "key.weight"))
            yield name.format(layer), halves(tensor, header.dim // header.n_heads) if turned else tensor
