"""ONNX: a decoder as a graph that other runtimes run, one token after the other, with what it remembers as inputs.

    input_ids (B, T) int64, and for each layer i past_key_values.i.key and .value (B, kv_heads, P, D) float32
    -> logits (B, T, V), and present.i.key and .value (B, kv_heads, P + T, D): the past of the next call

B batch, T length and P past are free; P is 0 in the first call. Rows are not padded: all begin at position 0. In
windows too the whole past is handed on; who knows the window may cut it no sooner than positions allow: they count it.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quire import files
from quire.config import Table
from quire.errors import UserError
from quire.models import MODELS
from quire.models.decoder import Decoder
from quire.progress import say
from quire.run import Run
from quire.tokenizers.hugging_face import WRITERS, to_hugging_face, write_checked

MODEL, ABOUT = "model.onnx", "quire.json"
CLOSE = 1e-4  # how far logits may be from ours


class GivenPast:
    """A cache for one call: what came before is handed in, what comes out is kept as `present`."""

    def __init__(self, past: list[Tensor]) -> None:
        self.past, self.present = past, list[Tensor]()

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's past keys and values with the new ones (B, kv_heads, T, D) behind them."""
        keys = torch.cat((self.past[2 * layer], keys), dim=2)
        values = torch.cat((self.past[2 * layer + 1], values), dim=2)
        self.present += [keys, values]
        return keys, values


class WithPast(nn.Module):
    """A decoder as a function of tensors alone, without a choice that depends on their sizes."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits and what each layer remembers, as the head of the file says."""
        model, held = self.model, past[0].shape[2]
        positions = torch.arange(held + input_ids.shape[1])  # (P + T)
        new = positions[held:]
        angles = model.rotary.angles(new) if model.rotary is not None else None
        x = model.token_embedding(input_ids) * model.embedding_scale  # (B, T, C)
        if model.positions is not None:
            x = x + model.positions(new)
        cache = GivenPast(past)
        for layer, (block, pattern) in enumerate(zip(model.blocks, model.patterns, strict=True)):
            x = block.run(x, angles, pattern.allowed(new[:, None], positions), cache, layer)  # type: ignore[operator]
        return (model.head(x if model.norm is None else model.norm(x)), *cache.present)


def names(layers: int) -> tuple[list[str], list[str]]:
    """The names of the inputs, and of the outputs, without input_ids and logits."""
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return [f"past_key_values.{part}" for part in parts], [f"present.{part}" for part in parts]


def write(run: Run, out: Path, weights: str = "") -> None:
    """Write a folder with model.onnx, tokenizer.json and quire.json; checked in onnxruntime where that is installed.

    Needs the packages onnx and onnxscript; a kind of model that is no decoder is a UserError.
    """
    settings: Any = run.settings
    # WithPast says what a decoder's input is: one that has another is left out.
    decoders = [kind for kind, model in MODELS.items() if issubclass(model, Decoder) and model.embed is Decoder.embed]
    if settings.kind not in decoders:
        raise UserError(f"ONNX export takes models of kind {', '.join(decoders)}; this one is of kind {settings.kind}.")
    check_packages()
    tokenizer, model = run.tokenizer, run.model("cpu")
    foreign = isinstance(tokenizer, tuple(WRITERS))
    about: Table = {
        "format": "quire-onnx-1",
        "inputs": ["input_ids", *names(settings.layers)[0]],
        "outputs": ["logits", *names(settings.layers)[1]],
        "past_shape": ["batch", settings.kv_heads or settings.heads, "past", settings.head_channels],
        "context_length": settings.context_length,
        "vocabulary_size": settings.vocabulary_size,
        "prompt_prefix": run.prompt_prefix(),
        "separator": tokenizer.separator,
        "never_written": run.never_written(),
        "tokenizer": "tokenizer.json",
        "tokenizer_format": "hugging-face" if foreign else "quire",
    }

    def store(folder: Path) -> None:
        with quiet():
            files.write_by(folder / MODEL, lambda new: exported(model, new))
        checked(folder / MODEL, model)
        if foreign:
            write_checked(folder / "tokenizer.json", to_hugging_face(tokenizer, run.prompt_prefix()))
        else:
            tokenizer.save(folder / "tokenizer.json")
        files.write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")

    files.replace_folder(out, store)
    if settings.separate_documents:
        say("In this model no document sees another; the graph does not know: give it one document at a time.")


def check_packages() -> None:
    """A UserError where what the export needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError('ONNX export needs the packages onnx and onnxscript: pip install "quire[onnx]".') from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter's remarks on itself are of no use to who asked for a model."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def exported(model: Decoder, path: Path) -> None:
    """Write the graph of a model."""
    settings: Any = model.settings
    heads, layers = settings.kv_heads or settings.heads, settings.layers
    past_names, present_names = names(layers)
    past = [torch.zeros(2, heads, 3, settings.head_channels) for _ in past_names]  # sizes of 0 and 1 would be fixed
    graph = torch.onnx.export(
        WithPast(model).eval(),
        (torch.zeros(2, 4, dtype=torch.int64), past),
        input_names=["input_ids", *past_names],
        output_names=["logits", *present_names],
        dynamic_shapes={"input_ids": {0: "batch", 1: "length"}, "past": [{0: "batch", 2: "past"} for _ in past]},
        dynamo=True,
        verbose=False,
    )
    assert graph is not None
    graph.save(path)


def checked(path: Path, model: Decoder) -> None:
    """Compare the graph's logits with ours: some tokens without a past, then more, one by one, with it."""
    try:
        import onnxruntime
    except ImportError:
        say("Not checked: the package onnxruntime is not installed.")
        return
    settings: Any = model.settings
    length = min(settings.context_length, 24)
    tokens = torch.randint(settings.vocabulary_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(tokens).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    off = float(np.abs(np.concatenate(list(steps(session, tokens.numpy())), axis=1) - ours).max())
    if not off <= CLOSE * max(1.0, float(np.abs(ours).max())):
        raise RuntimeError(f"the exported graph's logits are {off} from the model's")
    say(f"Checked in onnxruntime: logits differ by at most {off:.1e}.")


def steps(session: Any, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Logits of `tokens` (B, T) by an onnxruntime session: (B, T // 2, V), then (B, 1, V) for each further one."""
    inputs = session.get_inputs()[1:]
    past = {given.name: np.zeros((len(tokens), given.shape[1], 0, given.shape[3]), np.float32) for given in inputs}
    half = tokens.shape[1] // 2
    for piece in (tokens[:, :half], *np.split(tokens[:, half:], tokens.shape[1] - half, axis=1)):
        logits, *present = session.run(None, {"input_ids": piece, **past})
        past = dict(zip(past, present, strict=True))
        yield logits
