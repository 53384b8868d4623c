"""Hugging Face's model folders: GPT-2, Llama, Mistral, Qwen2 and Qwen3 come in and go out, with their tokenizer.

A folder has config.json (see hugging_face_config.py), model.safetensors or several files of it with an index, and
tokenizer.json. Its llama, mistral and qwen turn channels (i, i + D/2) of a head by rotary positions, as Quire does.
GPT-2 keeps its matrices as (inputs, outputs), and queries, keys and values in one.
C channels, F feedforward channels, H heads, K key/value heads, D head size, V vocabulary.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quire import checkpoint, files
from quire.config import Table, from_table
from quire.errors import UserError
from quire.interop.hugging_face_config import BIASED, SUPPORTED, Config, config_of, family_for, family_of, settings_of
from quire.interop.imported import Foreign
from quire.models import MODELS
from quire.progress import say
from quire.run import Run
from quire.tokenizers import Tokenizer
from quire.tokenizers.byte_bpe import ByteBPETokenizer
from quire.tokenizers.hugging_face import read_hugging_face, to_hugging_face, write_checked

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
READ = ("F32", "F16", "BF16")  # how numbers may be stored
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # ends of names that are no weights


# ---- what is named how --------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """One tensor of theirs, and where it belongs."""

    theirs: str
    ours: tuple[str, ...]  # the parameters that it is, one under the other
    shape: tuple[int, ...]  # theirs
    turned: bool = False  # theirs is the transpose of ours


def places(family: str, settings: Any) -> list[Place]:
    """Every tensor of a model of that family."""
    found = list(gpt2_places(settings) if family == "gpt2" else modern_places(settings, family))
    head = Place("lm_head.weight", ("head.weight",), (settings.vocabulary_size, settings.embedding_size))
    return found if settings.tied else [*found, head]


def linear(theirs: str, ours: list[str], rows: int, columns: int, bias: bool, turned: bool = False) -> list[Place]:
    """A linear map from `columns` to `rows` channels."""
    shape = (columns, rows) if turned else (rows, columns)
    weight = Place(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), shape, turned)
    return [weight, Place(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours), (rows,))] if bias else [weight]


def modern_places(settings: Any, family: str) -> Iterator[Place]:
    """Those of a Llama, Mistral or Qwen, without the head."""
    size, hidden = settings.embedding_size, settings.feedforward_size or 4 * settings.embedding_size
    queries = settings.heads * settings.head_channels  # H D
    keys = (settings.kv_heads or settings.heads) * settings.head_channels  # K D
    biased = family == "qwen2" or getattr(settings, "qkv_bias", False)
    yield Place("model.embed_tokens.weight", ("token_embedding.weight",), (settings.vocabulary_size, size))
    for layer in range(settings.layers):
        there, here = f"model.layers.{layer}.", f"blocks.{layer}."
        yield Place(f"{there}input_layernorm.weight", (f"{here}attention_norm.weight",), (size,))
        yield from linear(f"{there}self_attn.q_proj", [f"{here}attention.query"], queries, size, biased)
        yield from linear(f"{there}self_attn.k_proj", [f"{here}attention.key"], keys, size, biased)
        yield from linear(f"{there}self_attn.v_proj", [f"{here}attention.value"], keys, size, biased)
        yield from linear(f"{there}self_attn.o_proj", [f"{here}attention.output"], size, queries, False)
        if biased and family in BIASED:
            yield Place(f"{there}self_attn.o_proj.bias", (f"{here}attention.output.bias",), (size,))
        if settings.qk_norm:
            for name, ours in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
                ours = f"{here}attention.{ours}.weight"
                yield Place(f"{there}self_attn.{name}.weight", (ours,), (settings.head_channels,))
        yield Place(f"{there}post_attention_layernorm.weight", (f"{here}feedforward_norm.weight",), (size,))
        yield from linear(f"{there}mlp.gate_proj", [f"{here}feedforward.gate"], hidden, size, False)
        yield from linear(f"{there}mlp.up_proj", [f"{here}feedforward.up"], hidden, size, False)
        yield from linear(f"{there}mlp.down_proj", [f"{here}feedforward.down"], size, hidden, False)
    yield Place("model.norm.weight", ("norm.weight",), (size,))


def gpt2_places(settings: Any) -> Iterator[Place]:
    """Those of a GPT-2, without the head."""
    size, hidden = settings.embedding_size, settings.feedforward_size or 4 * settings.embedding_size

    def norm(theirs: str, ours: str) -> list[Place]:
        return [Place(f"{theirs}.{end}", (f"{ours}.{end}",), (size,)) for end in ("weight", "bias")]

    yield Place("transformer.wte.weight", ("token_embedding.weight",), (settings.vocabulary_size, size))
    yield Place("transformer.wpe.weight", ("positions.weight",), (settings.context_length, size))
    for layer in range(settings.layers):
        there, here = f"transformer.h.{layer}.", f"blocks.{layer}."
        joint = [f"{here}attention.{role}" for role in ("query", "key", "value")]
        yield from norm(f"{there}ln_1", f"{here}attention_norm")
        yield from linear(f"{there}attn.c_attn", joint, 3 * size, size, True, turned=True)
        yield from linear(f"{there}attn.c_proj", [f"{here}attention.output"], size, size, True, turned=True)
        yield from norm(f"{there}ln_2", f"{here}feedforward_norm")
        yield from linear(f"{there}mlp.c_fc", [f"{here}feedforward.up"], hidden, size, True, turned=True)
        yield from linear(f"{there}mlp.c_proj", [f"{here}feedforward.down"], size, hidden, True, turned=True)
    yield from norm("transformer.ln_f", "norm")


# ---- in -----------------------------------------------------------------------------------------------------------


def recognizes(path: Path) -> bool:
    """Whether a path is a folder as transformers writes it, or a file of weights out of one."""
    if path.is_file():
        return path.suffix == ".safetensors"
    names = (CONFIG, WEIGHTS, INDEX, "pytorch_model.bin", "adapter_config.json")
    return path.is_dir() and any((path / name).is_file() for name in names)


def read(path: Path, tokenizer: Path | None = None) -> Foreign:
    """The model in a folder; `tokenizer` is a tokenizer.json elsewhere."""
    if path.is_file():
        raise UserError(f"{path} is a model's weights alone. Import the folder that it is in, with its {CONFIG}.")
    config = Config(json_object(path / CONFIG), str(path / CONFIG))
    family = family_of(config)
    settings = settings_of(config)
    tensors = Tensors(path)
    typed = from_table(MODELS[settings["kind"]].Settings, settings, config.where)
    found = tensors.checked(places(family, typed))
    generation, words = (optional(path / name) for name in ("generation_config.json", "tokenizer_config.json"))
    size = settings.pop("vocabulary_size")
    known, prefix = read_hugging_face(tokenizer or path, end_of(config, generation, words), None, size)
    if known.vocabulary_size != size:
        raise UserError(
            f"{path}: its tokenizer has {known.vocabulary_size} tokens, and by its {CONFIG} there are {size}."
        )
    notes: Table = {"chat_template": template} if (template := chat_template(path, words)) else {}
    begin = config.table.get("bos_token_id")
    if isinstance(begin, int) and 0 <= begin < size:
        notes["start_token"] = begin
    return Foreign(settings, found, known, tensors.origin(), prefix, notes)


def json_object(path: Path) -> Table:
    """The JSON object in a file."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} lacks its {path.name}: it is no whole model of Hugging Face's.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON.") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object.")
    return table


def optional(path: Path) -> Table:
    """The JSON object in a file; empty where there is none."""
    return json_object(path) if path.is_file() else {}


def end_of(config: Config, generation: Table, words: Table) -> str | int | None:
    """The token that ends a text: the model's; where it has several, the tokenizer's; None where nobody names one."""
    ids = generation.get("eos_token_id")
    ids = config.table.get("eos_token_id") if ids is None else ids
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    named = words.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    if not all(isinstance(number, int) for number in ids) or not isinstance(named, str | None):
        raise UserError(f"{config.where}, or a file beside it, is damaged: its eos_token is not one.")
    return ids[0] if len(ids) == 1 or (ids and named is None) else named


def chat_template(path: Path, words: Table) -> str | None:
    """How a conversation is laid out as one text, for programs that do so."""
    file = path / "chat_template.jinja"
    if file.is_file():
        with contextlib.suppress(ValueError):
            return file.read_text(encoding="utf-8")
    template = words.get("chat_template")
    return template if isinstance(template, str) else None


class Tensors:
    """The tensors of a folder, in one file or several; read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = self._files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.file: dict[str, Path] = {}
        for file in self.files:
            with self._opened(file) as opened:
                for name in list(opened.keys()):
                    part = opened.get_slice(name)
                    if part.get_dtype() not in READ:
                        raise UserError(
                            f"{file}: its tensor {name} is stored as {part.get_dtype()}. Quire reads {', '.join(READ)}."
                        )
                    self.shapes[name], self.file[name] = tuple(part.get_shape()), file

    def _files(self) -> list[Path]:
        if (self.path / WEIGHTS).is_file():
            return [self.path / WEIGHTS]
        if not (self.path / INDEX).is_file():
            pickled = any(self.path.glob("pytorch_model*.bin"))
            remedy = (
                " Its weights are a pickle, which may run any code when it is read: Quire never does. Convert it to"
                " safetensors first (save_pretrained of transformers)."
            )
            raise UserError(f"{self.path} has no {WEIGHTS}.{remedy if pickled else ''}")
        names = json_object(self.path / INDEX).get("weight_map")
        names = sorted(set(names.values())) if isinstance(names, dict) and names else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise UserError(f"{self.path / INDEX} is damaged: it does not say which file each tensor is in.")
        for name in names:
            if not (self.path / name).is_file():
                raise UserError(f"{self.path} is incomplete: it lacks {name}, which its {INDEX} names.")
        return [self.path / name for name in names]

    @contextlib.contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                yield opened
        except (SafetensorError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file} is cut off, damaged, or no safetensors file: {error}.") from error

    def origin(self) -> Table:
        """For the manifest: where the weights are from."""
        return {
            "format": "hugging-face",
            "path": str(self.path.resolve()),
            "bytes": sum(file.stat().st_size for file in self.files),
            "sha256": {file.name: files.sha256_of(file) for file in self.files},
        }

    def checked(self, wanted: list[Place]) -> Iterator[tuple[str, Tensor]]:
        """The weights by our names in float32. A UserError names a tensor that is missing, unknown or misshapen."""
        inner = {place.theirs.partition(".")[2]: place.theirs for place in wanted if not place.theirs.startswith("lm_")}
        # A model saved without its head has names without the first part; that of the published GPT-2 is one.
        names = {inner.get(name, name): name for name in self.shapes}
        for place in wanted:
            shape = self.shapes.get(names.get(place.theirs, ""))
            if shape is None:
                raise UserError(f"{self.path} is incomplete: it lacks the tensor {place.theirs}.")
            if shape != place.shape:
                raise UserError(
                    f"{self.path} is damaged: its tensor {place.theirs} is {shape}, and by its {CONFIG} {place.shape}."
                )
        spare = {*(place.theirs for place in wanted), "lm_head.weight"}  # a tied head is the embedding once more
        unknown = [name for name in names if name not in spare and not name.endswith(BUFFERS)]
        if unknown:
            raise UserError(
                f"{self.path} has a part that Quire's models of this family lack: the tensor {unknown[0]}."
                f" It imports {SUPPORTED}, as language models."
            )
        return self._read(wanted, names)

    def _read(self, wanted: list[Place], names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        for place in wanted:
            name = names[place.theirs]
            with self._opened(self.file[name]) as opened:
                tensor = opened.get_tensor(name).float()
            if place.theirs.endswith("o_proj.bias"):
                if tensor.any():
                    raise UserError(
                        f"{self.path}: its tensor {place.theirs} is not zero. Quire's models have attention_bias on"
                        " queries, keys and values alone."
                    )
                continue
            tensor = tensor.T if place.turned else tensor
            yield from zip(place.ours, tensor.chunk(len(place.ours)))


# ---- out ----------------------------------------------------------------------------------------------------------


def write(run: Run, out: Path, weights: str = "") -> None:
    """Write a run's best model as a folder that transformers loads: AutoModelForCausalLM, AutoTokenizer.

    Biases that a family has and the model has not are zero.
    """
    settings: Any = run.settings
    tokenizer, prefix = run.tokenizer, run.prompt_prefix()
    named = {number: name for name, number in tokenizer.specials.items()}
    ends = {
        "bos_token_id": run.manifest.get("start_token", prefix[0] if prefix else tokenizer.separator),
        "eos_token_id": tokenizer.separator,
        "pad_token_id": tokenizer.padding,
    }
    family = family_for(settings, splits_as_qwen2(tokenizer) and not prefix)
    config = config_of(settings, family, ends)
    vocabulary = to_hugging_face(tokenizer, prefix)
    never = run.never_written()
    generation = {**ends, **({"suppress_tokens": never} if never else {})}
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": settings.context_length,
        "clean_up_tokenization_spaces": False,
        **{name[: -len("_id")]: named[number] for name, number in ends.items() if number in named},
    }
    if "chat_template" in run.manifest:
        words["chat_template"] = run.manifest["chat_template"]
    own = checkpoint.model_tensors(run.model("cpu"))
    tensors = {place.theirs: joined(place, own) for place in places(family, settings)}

    def store(folder: Path) -> None:
        checkpoint.write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        write_checked(folder / "tokenizer.json", vocabulary)
        contents = {"tokenizer_config.json": words, "generation_config.json": generation, CONFIG: config}
        for name, table in contents.items():
            files.write_text(folder / name, json.dumps(table, indent=2) + "\n")

    files.replace_folder(out, store)
    if settings.separate_documents:
        say("In this model no document sees another; other programs do not know: give them one document at a time.")


def splits_as_qwen2(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is of Qwen2's kind, in all but its vocabulary."""
    if not isinstance(tokenizer, ByteBPETokenizer) or tokenizer.whole:
        return False
    return tokenizer.pattern == "qwen2" and tokenizer.normalization == "NFC"


def joined(place: Place, own: dict[str, Tensor]) -> Tensor:
    """Their tensor, made of ours."""
    rows = place.shape[-1 if place.turned else 0] // len(place.ours)
    tensor = torch.cat([own[name].detach() if name in own else torch.zeros(rows) for name in place.ours])
    return tensor.T.contiguous() if place.turned else tensor
