"""llama2.c: the little story, token for token; and files that are no such model."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from quire.errors import UserError
from quire.generation.stream import tokens as stream
from quire.interop import import_model, llama2c
from quire.interop.imported import halves, neighbours

from .conftest import logits

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
MODEL, TOKENIZER, GOLDEN = (SHARED / name for name in (
    "stories260K.bin", "tok512.bin", "golden_stories260K_greedy150.txt",
))  # fmt: skip
needs_data = pytest.mark.skipif(not MODEL.exists(), reason="../shared/data is not here")


@needs_data
def test_the_little_story_token_for_token(tmp_path):
    run = import_model(str(MODEL), tmp_path / "run")
    numbers, _, story = GOLDEN.read_text(encoding="utf-8").split("\n", 2)
    header = llama2c.checked_header(MODEL)
    assert [*map(str, header)] == numbers.split()[:7] and run.settings.tied
    assert run.prompt_prefix() == [1] and run.start_token() == 1
    written = stream(run.model("cpu"), [[1]], lambda row, _: [int(row[0].argmax())], torch.device("cpu"))
    ids = [next(written)[0] for _ in range(150)]
    pieces = "".join(run.tokenizer.pieces[number].replace("\u2581", " ") for number in ids)
    assert story.startswith(pieces + " 1.05")  # behind the story stands a logit of that implementation


@needs_data
def test_commands(tmp_path, quire, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = quire("import", str(MODEL), "--tokenizer", str(TOKENIZER), "--json")
    assert said.code == 0 and '"run": "runs/stories260K"' in said.out and '"parameters": 260032' in said.out
    said = quire("generate", "runs/stories260K", "--prompt", "Once upon a time", "--temperature", "0", "--tokens", "20")
    assert said.code == 0 and said.out.startswith("Once upon a time, there was a little girl named Lily.")
    assert quire("import", str(MODEL), "--run", "runs/stories260K").code == 2


def made(path: Path, vocabulary: int, heads: int = 4, kv_heads: int = 2) -> dict[str, np.ndarray]:
    """A random model of 24 channels in a .bin file, and its arrays."""
    header = llama2c.Header(24, 40, 2, heads, kv_heads, vocabulary, 16)
    generator = np.random.default_rng(1)
    arrays = [(name, generator.normal(size=shape).astype("<f4")) for name, shape in header.parts()]
    path.write_bytes(llama2c.HEADER.pack(*header) + b"".join(array.tobytes() for _, array in arrays))
    return dict(arrays)


def tokenizer_file(path: Path, count: int) -> None:
    """A tokenizer of llama2.c's with no pieces but bytes and letters."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [chr(0x100 + number) for number in range(count - len(pieces))]
    rows = [
        struct.pack("<fi", -float(number), len(piece.encode())) + piece.encode() for number, piece in enumerate(pieces)
    ]
    path.write_bytes(struct.pack("<i", 8) + b"".join(rows))


def test_a_head_of_its_own_and_heads_of_its_own_size(tmp_path):
    """Against the attention of llama2.c's run.c, written out: pairs (2i, 2i + 1) are turned."""
    arrays = made(tmp_path / "model.bin", -300)
    tokenizer_file(tmp_path / "tok300.bin", 300)
    run = import_model(str(tmp_path / "model.bin"), tmp_path / "run")
    assert not run.settings.tied and run.settings.vocabulary_size == 300
    ids = [1, 270, 33, 290, 5]
    torch.testing.assert_close(logits(run, ids), forward(arrays, ids), rtol=1e-4, atol=1e-4)


def forward(arrays: dict[str, np.ndarray], ids: list[int]) -> torch.Tensor:
    """Logits (T, V) as run.c computes them."""
    weights = {name: torch.from_numpy(array).double() for name, array in arrays.items()}

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turned(x: torch.Tensor) -> torch.Tensor:  # (T, heads, D)
        size = x.shape[-1]
        angle = torch.arange(len(ids)).double()[:, None] / 10000 ** (torch.arange(0, size, 2).double() / size)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)

    x = weights["token_embedding.weight"][ids]
    for layer in range(2):
        part = {name.removeprefix("blocks.{}."): w[layer] for name, w in weights.items() if name.startswith("blocks")}
        y = norm(x, part["attention_norm.weight"])
        query = turned((y @ part["attention.query.weight"].T).unflatten(-1, (4, 6)))
        key = turned((y @ part["attention.key.weight"].T).unflatten(-1, (2, 6))).repeat_interleave(2, 1)
        value = (y @ part["attention.value.weight"].T).unflatten(-1, (2, 6)).repeat_interleave(2, 1)
        scores = torch.einsum("thd,shd->hts", query, key) / 6**0.5
        scores += torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        x = x + torch.einsum("hts,shd->thd", scores.softmax(-1), value).flatten(1) @ part["attention.output.weight"].T
        y = norm(x, part["feedforward_norm.weight"])
        gate, up = y @ part["feedforward.gate.weight"].T, y @ part["feedforward.up.weight"].T
        x = x + (torch.nn.functional.silu(gate) * up) @ part["feedforward.down.weight"].T
    return (norm(x, weights["norm.weight"]) @ weights["head.weight"].T).float()


def test_reordering_rows_and_back():
    weight, bias = torch.randn(24, 5), torch.randn(24)
    for tensor in (weight, bias):
        assert torch.equal(neighbours(halves(tensor, 6), 6), tensor)
    assert halves(torch.arange(12), 6).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-1], "is cut off, or damaged: it has"),
        (lambda data: data + b"x", "goes on behind its end"),
        (lambda data: data[:20], "first numbers are not the shape"),
        (lambda data: b"", "first numbers are not the shape"),
        (lambda data: b"ak42" + data[4:], "first numbers are not the shape"),
        (lambda data: struct.pack("<i", 25) + data[4:], "first numbers are not the shape"),
        (lambda data: struct.pack("<i", 48) + data[4:], "is cut off, or damaged"),
    ],
)
def test_what_is_no_such_model(tmp_path, quire, change, said):
    path = tmp_path / "model.bin"
    made(path, 300)
    tokenizer_file(tmp_path / "tok300.bin", 300)
    path.write_bytes(change(path.read_bytes()))
    found = quire("import", str(path), "--run", str(tmp_path / "run"))
    assert found.code == 2 and said in found.plain and not (tmp_path / "run").exists()


def test_which_tokenizer(tmp_path):
    made(tmp_path / "model.bin", 300)
    with pytest.raises(UserError, match=r"with --tokenizer FILE: beside it there is none named tok\*\.bin"):
        import_model(str(tmp_path / "model.bin"), tmp_path / "run")
    tokenizer_file(tmp_path / "tok400.bin", 400)
    with pytest.raises(UserError, match="400 tokens, but the model 300"):
        import_model(str(tmp_path / "model.bin"), tmp_path / "run")
    tokenizer_file(tmp_path / "tok300.bin", 300)
    with pytest.raises(UserError, match="beside it there are 2"):
        import_model(str(tmp_path / "model.bin"), tmp_path / "run")
    import_model(str(tmp_path / "model.bin"), tmp_path / "run", tmp_path / "tok300.bin")
