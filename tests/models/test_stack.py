"""Custom stacks: what is wrong with a list is said, and a right one goes from TOML to text and back."""

import re
import shlex
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quire as face
from quire import files
from quire.config import from_table, read_toml, to_table, write_checked_toml
from quire.errors import UserError
from quire.models import build_model
from quire.models.stack import STACK, StackSettings
from quire.run import Run
from quire.training import journal
from quire.training.resume import verify

DOCUMENT = (Path(__file__).parents[2] / "docs" / "custom-stacks.md").read_text(encoding="utf-8")
EMBEDDING = {"kind": "embedding", "size": 12}
LSTM = {"kind": "lstm", "size": 8}


@pytest.mark.parametrize(
    ("stack", "says"),
    [
        ([], "A stack needs layers: [[model.stack]] tables in a --config file, the first an embedding."),
        ([{**EMBEDDING, "kind": "embeding"}], "Layer 1 of the stack: the kind 'embeding' is not known."),
        ([EMBEDDING, {"size": 8}], 'Layer 2 of the stack needs a kind, as in kind = "lstm".'),
        ([EMBEDDING, {"kind": 3}], "Layer 2 of the stack needs a kind"),
        ([{"kind": "embedding"}], "Layer 1 (embedding) needs a size"),
        ([{**EMBEDDING, "inputs": 3}], "Layer 1 (embedding) needs a size, the channels of a token's vector, and takes"),
        ([LSTM], "Layer 1 (lstm) does not fit: the first layer reads tokens."),
        ([EMBEDDING, EMBEDDING], "Layer 2 (embedding) does not fit: layer 1 (embedding) gives 12 channels."),
        ([EMBEDDING, LSTM, {"kind": "layernorm", "size": 12}],
         "Layer 3 (layernorm) takes 12 channels, but layer 2 (lstm) gives 8. Make them equal, or leave the size out"),
        ([EMBEDDING, LSTM, {"kind": "gru", "inputs": 12}],
         "Layer 3 (gru) takes 12 channels, but layer 2 (lstm) gives 8."),
        ([EMBEDDING, {"kind": "rmsnorm", "inputs": 12, "size": 8}],
         "Layer 2 (rmsnorm) gives as many channels as it reads: 12 from layer 1 (embedding), not 8."),
        ([EMBEDDING, {**LSTM, "residual": True}],
         "Layer 2 (lstm) is residual: it adds the 8 channels it gives to the 12 of layer 1 (embedding)."),
        ([EMBEDDING, LSTM, {"kind": "attention", "heads": 3}],
         "Layer 3 (attention) cannot divide the 8 channels of layer 2 (lstm) among 3 heads"),
        ([EMBEDDING, {"kind": "block", "heads": 4}], "Layer 2 (block) turns pairs of channels, being rotary"),
        ([EMBEDDING, {"kind": "attention", "heads": 4, "kv_heads": 3}], "Layer 2 (attention) has 4 heads, 3 kv_heads"),
        ([EMBEDDING, {"kind": "attention", "heads": 0}], "Layer 2 (attention) must have at least one head"),
        ([EMBEDDING, {"kind": "rmsnorm", "epsilon": -1}], "Layer 2 (rmsnorm) must have a finite epsilon above 0, not"),
        ([EMBEDDING, {"kind": "attention", "hed": 4}], "layer 2 (attention) has no setting 'hed'. Did you mean heads?"),
        ([EMBEDDING, {"kind": "gru", "size": "big"}], "layer 2 (gru).size must be a whole number, not 'big'."),
        ([EMBEDDING, {"kind": "lstm", "size": 8.0}], "layer 2 (lstm).size must be a whole number, not 8.0."),
        ([EMBEDDING, {"kind": "rnn", "residual": "yes"}], "layer 2 (rnn).residual must be true or false, not 'yes'."),
        ([EMBEDDING, {"kind": "gru", "normalization": "batch"}], "layer 2 (gru).normalization must be one of none"),
        ([EMBEDDING, {"kind": "rnn", "dropout": 1}], "Layer 2 (rnn) must have a dropout of at least 0 and below 1"),
        ([EMBEDDING, {"kind": "dropout", "probability": 1}], "Layer 2 (dropout) must have a probability of at least 0"),
        ([EMBEDDING, {"kind": "dense", "size": -1}], "Layer 2 (dense) must have sizes of at least 0."),
        ([EMBEDDING, {"kind": "dense", "activation": "gleu"}], "Layer 2 (dense) has the activation 'gleu'. Choices:"),
        ([EMBEDDING, {"kind": "feedforward", "hidden_size": -1}], "Layer 2 (feedforward) must have a hidden_size"),
        ([EMBEDDING, {"kind": "block", "heads": 2, "activation": "x"}], "Layer 2 (block) has the activation 'x'."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(stack, says):
    with pytest.raises(UserError, match=re.escape(says)):
        from_table(StackSettings, {"kind": "stack", "stack": stack}, "model")


@pytest.mark.parametrize("stack", ["lstm", 3, ["lstm"], [3], {"kind": "lstm"}])
def test_a_list_of_other_things_is_refused(stack):
    with pytest.raises(UserError, match=r"model.stack must be a list of tables"):
        from_table(StackSettings, {"kind": "stack", "stack": stack}, "model")


def test_a_tied_head_needs_the_embedding_s_size():
    with pytest.raises(UserError, match=r"layer 1 \(embedding\) has 12 channels, but layer 2 \(lstm\) gives 8"):
        StackSettings(stack=(EMBEDDING, LSTM), tied=True)
    model = build_model(StackSettings(stack=(EMBEDDING, {"kind": "gru"}), tied=True, vocabulary_size=7))
    assert model.head.weight is model.token_embedding.weight


def test_a_size_left_out_follows_from_the_layer_before():
    stack = ({**EMBEDDING, "size": 6}, {"kind": "lstm", "size": 10}, {"kind": "layernorm"}, {"kind": "dense"})
    model = build_model(StackSettings(stack=stack, vocabulary_size=7))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["blocks.0.inner.weight_ih_l0"] == (40, 6) and shapes["blocks.1.inner.weight"] == (10,)
    assert shapes["blocks.2.inner.layers.0.weight"] == (10, 10) and shapes["head.weight"] == (7, 10)


def test_a_list_survives_toml_and_changes_of_other_settings(tmp_path):
    settings = StackSettings(stack=[EMBEDDING, {"kind": "block", "heads": 2, "rotary_base": 500.0, "qk_norm": True}])
    write_checked_toml(tmp_path / "config.toml", {"model": to_table(settings)})
    assert from_table(StackSettings, read_toml(tmp_path / "config.toml")["model"], "model") == settings
    assert replace(settings, vocabulary_size=9).stack == settings.stack


# ---- the page about it ----


def example(tmp_path: Path) -> Path:
    """The TOML that the page shows, as a file."""
    (text,) = re.findall(r"^```toml\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.toml").write_text(text)
    return tmp_path / "mine.toml"


def test_the_page_has_every_kind_and_every_setting():
    for kind, entry in STACK.items():
        assert f"`{kind}`" in DOCUMENT
        for field in fields(entry):
            assert f"`{field.name}`" in DOCUMENT or field.name == "kind", f"{kind}: {field.name}"


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a book; trainings leave out what takes time: plots, fsync, long samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "plot_losses", lambda curves, axis, path: None)
    monkeypatch.setattr(files, "_sync", lambda path: None)
    Path("book.txt").write_text("the owl that calls upon the night speaks the unbeliever's fright. " * 40)
    return tmp_path


def test_its_example_trains_writes_and_resumes(desk, quire):
    """With both engines, which come to the same; by the command line, as the page says."""
    example(desk)
    losses = []
    words = shlex.split(
        "--config mine.toml --model.context-length 16 --batch-size 2 --device cpu --threads 1 --steps 5"
        " --sample-tokens 10"
    )
    for engine in ("autograd", "manual"):
        said = quire("train", "book.txt", "--json", "--run", engine, "--engine", engine, *words)
        assert said.code == 0, said.err
        losses.append(face.evaluate(engine).validation_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    stack = tomllib.loads(Path("mine.toml").read_text())["model"]["stack"]
    assert list(Run("autograd").settings.stack) == stack
    assert quire("resume", "autograd", "--steps", "2", "--engine", "manual", "--json").code == 0
    assert quire("generate", "autograd", "--prompt", "the ", "--tokens", "30").code == 0
    assert (
        quire("train", "book.txt", "--config", "autograd/config.toml", "--run", "again", "--steps", "2", "--json").code
        == 0
    )


def test_the_command_line_shows_no_flag_for_it_and_says_what_is_wrong(desk, quire):
    said = quire("train", "book.txt", "--model.kind", "stack", "--steps", "2")
    assert said.code == 2 and "A stack needs layers" in said.plain
    Path("bad.toml").write_text(
        '[model]\nkind = "stack"\n[[model.stack]]\nkind = "embedding"\nsize = 8\n'
        '[[model.stack]]\nkind = "lstm"\nsize = 4\n[[model.stack]]\nkind = "rmsnorm"\nsize = 8\n'
    )
    said = quire("train", "book.txt", "--config", "bad.toml", "--steps", "2")
    assert said.code == 2 and "Layer 3 (rmsnorm) takes 8 channels, but layer 2 (lstm) gives 4." in said.plain
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "model",
    [
        {"kind": "stack", "stack": [EMBEDDING, LSTM, {"kind": "attention", "rotary": True}]},
        {"kind": "recurrent", "embedding_size": 8, "cell": "gru", "dropout": 0.1},
    ],
)
def test_from_python(desk, model: dict[str, Any]):
    """With dropout and checkpointing: both engines agree, and a resumed run is exact."""
    common = {"steps": 6, "batch_size": 2, "device": "cpu", "threads": 1, "optimizer": "adamw", "sample_tokens": 10}
    model = {**model, "context_length": 16}
    runs = [
        face.train("book.txt", run=engine, model=model, engine=engine, gradient_checkpointing=again, **common)
        for engine, again in (("autograd", False), ("manual", True))
    ]
    one, other = (run.model("cpu") for run in runs)
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=name)
    assert verify(runs[1]) is None
    assert len(face.generate(runs[0], prompt="the ", tokens=20)[0].tokens) == 20
