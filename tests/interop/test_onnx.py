"""ONNX: decoders as graphs, run by onnxruntime at once and token by token; and what is refused."""

import json

import numpy as np
import pytest
import torch

from quire.errors import UserError
from quire.interop import export_model, onnx
from quire.models import MODELS, build_model
from quire.models.settings import ModelSettings
from quire.tokenizers import load_tokenizer

SHAPE = {
    "vocabulary_size": 13, "context_length": 24, "separator": 12, "embedding_size": 16, "layers": 2, "heads": 4,
    "kv_heads": 2, "feedforward_size": 24,
}  # fmt: skip
PARTS = {
    "gpt": {"kind": "gpt"},
    "sinusoidal": {"kind": "gpt", "positions": "sinusoidal", "norm_placement": "post"},
    "modern": {"kind": "modern", "qkv_bias": True, "qk_norm": True, "tied": False},
    "scaled": {"kind": "modern", "rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_context": 8},
    "window": {"kind": "modern", "window": 5},
    "sparse": {"kind": "sparse", "window": 4, "attention": ("block-local", "columns")},
    "strided": {"kind": "sparse", "window": 3, "attention": ("strided", "window")},
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_exported_is_the_model(name):
    """The function of tensors alone, before it becomes a graph: in two pieces, as without a past."""
    torch.manual_seed(1)
    model = build_model(MODELS[PARTS[name]["kind"]].Settings(**SHAPE, **PARTS[name])).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) / 3
    tokens = torch.randint(13, (2, 20))
    given, past, pieces = onnx.WithPast(model).eval(), [torch.zeros(2, 2, 0, 4)] * 4, []
    with torch.no_grad():
        for piece in (tokens[:, :11], tokens[:, 11:12], tokens[:, 12:]):
            logits, *past = given(piece, past)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"kind": "gpt"}, {"kind": "sparse", "window": 4, "kv_heads": 2}], ids=str)
def test_onnxruntime_computes_the_same_logits_with_and_without_a_past(settings, random_run, tmp_path, quire):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    run = random_run(layers=1 if settings["kind"] == "gpt" else 2, **settings)
    said = quire("export", str(run.path), "--to", "onnx", "--out", str(tmp_path / "out"))
    assert said.code == 0, said.err
    assert "differ by at most" in said.err
    about = json.loads((tmp_path / "out" / "quire.json").read_text())
    assert load_tokenizer(tmp_path / "out" / about["tokenizer"]).encode("the owl") == run.tokenizer.encode("the owl")

    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert [given.name for given in session.get_inputs()] == about["inputs"]
    assert [given.name for given in session.get_outputs()] == about["outputs"]
    for batch, length in ((1, 40), (3, 7)):
        tokens = torch.randint(run.settings.vocabulary_size, (batch, length))
        with torch.no_grad():
            expected = run.model("cpu")(tokens).numpy()
        assert expected.std() > 0.1
        found = np.concatenate(list(onnx.steps(session, tokens.numpy())), axis=1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_without_the_package_a_sentence_says_what_to_install(random_run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"quire\[onnx\]"):
        export_model(random_run(kind="gpt"), "onnx", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_kinds_without_a_graph_are_refused_by_name(random_run, tmp_path):
    run = random_run(kind="modern")
    run.__dict__["settings"] = ModelSettings(kind="abacus")
    with pytest.raises(UserError, match="gpt, modern, sparse; this one is of kind abacus"):
        export_model(run, "onnx", tmp_path / "out")


def test_a_graph_that_computes_something_else_is_never_left(random_run, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    run = random_run(kind="gpt", layers=1)
    monkeypatch.setattr(onnx, "exported", lambda model, path: path.write_bytes(b"no graph"))
    with pytest.raises(Exception, match=r"model\.onnx"):
        export_model(run, "onnx", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
