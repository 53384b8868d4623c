"""What all tests share: a cache of their own, and a tiny trained run, made once and copied for each test."""

import dataclasses
import http.server
import os
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.cli.main import call
from quire.models import MODELS
from quire.run import Run
from quire.sources import transfer

TINY = shlex.split(
    "--preset gpt-mini --model.layers 1 --model.heads 2 --model.embedding-size 16 --model.context-length 32"
    " --model.dropout 0 --batch-size 4 --warmup-steps 0 --learning-rate 0.01 --threads 1 --device cpu"
)
WORDS = shlex.split("the owl calls upon a night and speaks to none but café or 森 while rivers run below their stones")
SMALL = {  # those of these fields that a model's settings have
    "vocabulary_size": 13, "context_length": 12, "separator": 12, "embedding_size": 16, "hidden_size": 16, "layers": 3,
    "heads": 4, "kv_heads": 2, "feedforward_size": 24, "window": 4, "ngram_orders": (2, 3, 5), "ngram_rows": 256,
    "stack": ({"kind": "embedding", "size": 16}, {"kind": "lstm", "size": 12}, {"kind": "attention"},
              {"kind": "gru", "normalization": "rmsnorm"}, {"kind": "block", "heads": 2}, {"kind": "layernorm"}),
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """$QUIRE_CACHE in a temporary folder: no test reads or fills the user's own."""
    before, folder = os.environ.get("QUIRE_CACHE"), tmp_path_factory.mktemp("cache")
    os.environ["QUIRE_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["QUIRE_CACHE"]
    else:
        os.environ["QUIRE_CACHE"] = before


@pytest.fixture(scope="session")
def small_settings() -> Callable[..., Any]:
    """Gives the settings of a small model of a kind; what that kind has no field for is left out."""

    def settings(kind: str, **changes: Any) -> Any:
        own = MODELS[kind].Settings
        names = {field.name for field in dataclasses.fields(own)}
        return own(**{name: value for name, value in {**SMALL, **changes, "kind": kind}.items() if name in names})

    return settings


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Commands set the number of threads of this whole process: put it back after each test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def book(lines: int = 150) -> str:
    """A text of its own making, some of its characters of two and three bytes."""
    state, text = 1, []
    for _ in range(lines):
        row = []
        for _ in range(7):
            state = state * 48271 % 0x7FFFFFFF
            row.append(WORDS[state % len(WORDS)])
        text.append(" ".join(row).capitalize() + ".\n")
    return "".join(text)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of sources and targets, for models with an encoder."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    words = ["owl", "night", "river", "stone", "below", "upon", "calls"]
    lines = [f"{a} {b}\t{b} {c} {a}" for a in words for b in words for c in words[:3]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with book.txt and the finished run `tiny` of it: to be copied, not changed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "book.txt").write_text(book(), encoding="utf-8", newline="\n")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert call(["train", "book.txt", "--run", "tiny", "--steps", "30", "--json", *TINY]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def desk(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test: book.txt and the run `tiny`, copies that may be changed."""
    folder = tmp_path / "desk"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def tiny(desk: Path) -> Run:
    """The tiny run, opened; the working directory is its folder."""
    return Run("tiny")


@pytest.fixture
def with_gpt2_weights() -> Callable[[Any, Any], Any]:
    """Gives our GPT the weights of transformers' GPT-2, by names written out here: the importer has no part in it."""

    def fill(ours: Any, theirs: Any) -> Any:
        renamed: dict[str, torch.Tensor] = {}
        for name, tensor in theirs.state_dict().items():
            name = name.removeprefix("transformer.")
            for old, new in [("h.", "blocks."), ("ln_1", "attention_norm"), ("ln_2", "feedforward_norm"),
                             ("wte", "token_embedding"), ("wpe", "positions"), ("ln_f", "norm"), ("lm_head", "head"),
                             ("attn.c_proj", "attention.output"), ("mlp.c_fc", "feedforward.up"),
                             ("mlp.c_proj", "feedforward.down")]:  # fmt: skip
                name = name.replace(old, new)
            if name.startswith("blocks") and "norm" not in name:
                tensor = tensor.T if tensor.dim() == 2 else tensor  # their Conv1D is (inputs, outputs)
            if "attn.c_attn" in name:
                for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    renamed[name.replace("attn.c_attn", f"attention.{part}")] = third
            else:
                renamed[name] = tensor
        ours.load_state_dict(renamed)
        return ours

    return fill


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def plain(self) -> str:
        """Standard error without the boxes and line ends of a terminal's width."""
        return " ".join("".join(" " if 0x2500 <= ord(c) < 0x2580 else c for c in self.err).split())


@pytest.fixture
def quire(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run one command line in this process: quire("generate", "tiny", "--prompt", "A")."""

    def run(*words: str) -> Said:
        capsys.readouterr()
        code = call(list(words))
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


# ---- a web server that misbehaves in every way it is told to ----

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


@dataclass
class Served:
    """A file on the server: its ETag, whether it comes in ranges, and after which bytes the transfers break off."""

    body: bytes
    tag: str = '"one"'
    ranges: bool = True
    obeys: bool = True  # If-Range
    breaks: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # the Range of each request
    sent: int = 0  # bytes in all

    def __call__(self, headers: Mapping[str, str]) -> Answer:
        self.asked.append(headers.get("Range") or "")
        start = 0
        same = not self.obeys or headers.get("If-Range") == self.tag
        if self.ranges and same and (found := re.fullmatch(r"bytes=(\d+)-", self.asked[-1])):
            start = int(found[1])
        end = max(start, self.breaks.pop(0)) if self.breaks else len(self.body)
        self.sent += end - start
        head = {"Content-Length": str(len(self.body) - start)} | ({"ETag": self.tag} if self.tag else {})
        if start:
            head["Content-Range"] = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
        return 206 if start else 200, head, self.body[start:end]


class WebServer(http.server.ThreadingHTTPServer):
    """Answers PATH with answers[PATH], an Answer or a function from the request's headers to one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WebHandler)
        self.answers: dict = {}
        self.requests: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def serve(self, path: str, body: bytes, **how: object) -> Served:
        self.answers[path] = Served(body, **how)
        return self.answers[path]


class WebHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        answer = self.server.answers.get(self.path, (404, {"Content-Length": "0"}, b""))
        status, headers, body = answer(self.headers) if callable(answer) else answer
        self.send_response(status)
        for name, value in {"Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """A web server of the test's own, with an empty cache; failed downloads are tried again without a pause."""
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "PAUSE", 0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = WebServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
