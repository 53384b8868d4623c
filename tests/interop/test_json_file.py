"""JSON: every kind of model goes out and comes back, bit for bit; and what is refused of a changed file."""

import json

import pytest
import torch

import quire
from quire import files
from quire.config import to_table
from quire.errors import UserError
from quire.interop import export_model, import_model
from quire.interop.imported import Foreign, create
from quire.models import MODELS, build_model
from quire.run import Run


@pytest.fixture
def a_run(small_settings):
    """Makes a run of a kind, all its weights random."""

    def make(kind, tokenizer, path):
        own = {"vocabulary_size": tokenizer.vocabulary_size, "separator": tokenizer.separator}
        model = build_model(small_settings(kind, layers=2, **own))
        generator = torch.Generator().manual_seed(1)
        named = model.named_parameters()
        tensors = [(name, torch.randn(weight.shape, generator=generator) / 3) for name, weight in named]
        origin = {"format": "test", "path": "elsewhere", "bytes": 1, "sha256": "0"}
        return create(Foreign(to_table(model.settings), tensors, tokenizer, origin), path)

    return make


def test_a_model_with_an_encoder_is_told_of_with_pairs(a_run, characters, tmp_path, quire):
    run = a_run("encoder-decoder", characters, tmp_path / "run")
    export_model(run, "json", tmp_path / "model.json")
    said = quire("import", str(tmp_path / "model.json"), "--run", str(tmp_path / "again"))
    assert said.code == 0 and ": an encoder-decoder model of " in said.plain
    assert "--pairs FILE --minutes 10" in said.plain and "YOUR.txt" not in said.plain
    for command in ("evaluate", "resume"):
        said = quire(command, str(tmp_path / "again"))
        assert said.code == 2 and f"{tmp_path / 'again'} --pairs FILE" in said.plain


def test_a_decoder_of_pairs_comes_back_as_one(a_run, characters, tmp_path):
    run = a_run("modern", characters, tmp_path / "run")
    files.write_json(run.path / "manifest.json", {**run.manifest, "pairs": True})
    run = Run(run.path)
    export_model(run, "json", tmp_path / "model.json")
    again = import_model(str(tmp_path / "model.json"), tmp_path / "again")
    assert run.pairs and again.pairs
    answers = [quire.generate(each, prompt="the", tokens=5, temperature=0)[0].tokens for each in (run, again)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "ngram"])  # which is refused: it has counts too
def test_every_kind_of_model_comes_back_bit_for_bit(kind, characters, tmp_path, a_run):
    run = a_run(kind, characters, tmp_path / "run")
    export_model(run, "json", tmp_path / "model.json")
    again = import_model(str(tmp_path / "model.json"), tmp_path / "again")
    assert again.settings == run.settings
    assert again.tokenizer.to_table() == run.tokenizer.to_table()
    assert (again.prompt_prefix(), again.never_written()) == (run.prompt_prefix(), run.never_written())
    ours, theirs = run.model("cpu").state_dict(), again.model("cpu").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_program_finds_every_layer_by_its_kind_and_can_compute_with_it(byte_bpe, tmp_path, a_run):
    run = a_run("gpt", byte_bpe, tmp_path / "run")
    export_model(run, "json", tmp_path / "model.json")
    whole = json.loads((tmp_path / "model.json").read_text())
    layers = {layer["name"]: layer for layer in whole["layers"]}
    assert layers["blocks.1.feedforward.up"]["kind"] == "Linear"
    assert layers["norm"]["kind"] == "LayerNorm"
    assert layers["head"] == {
        "name": "head", "kind": "OutputHead", "parameters": {}, "shares": {"weight": "token_embedding.weight"},
    }  # fmt: skip
    written = layers["blocks.1.feedforward.up"]["parameters"]["weight"]
    weight = torch.tensor(written["values"], dtype=torch.float64).float().reshape(written["shape"])
    assert torch.equal(weight, run.model("cpu").blocks[1].feedforward.up.weight)
    assert whole["settings"]["heads"] == 4


def test_awkward_numbers_come_back(characters, tmp_path, a_run):
    run = a_run("gpt", characters, tmp_path / "run")
    bits = torch.randint(-(2**31), 2**31, (5000,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    numbers = bits.view(torch.float32)
    numbers = torch.cat((numbers[numbers.isfinite()], torch.tensor([-0.0, 1e-45, 3.4028235e38, 0.1])))[-1536:]
    model = run.model("cpu")
    with torch.no_grad():
        model.blocks[0].feedforward.up.weight.copy_(numbers[-384:].reshape(24, 16))
    from quire import checkpoint

    checkpoint.save(run.folder("best"), checkpoint.model_tensors(model), {}, {})
    export_model(run, "json", tmp_path / "model.json")
    again = import_model(str(tmp_path / "model.json"), tmp_path / "again").model("cpu")
    ours, back = (m.blocks[0].feedforward.up.weight.detach().view(torch.int32) for m in (model, again))
    assert torch.equal(ours, back)  # -0.0 too


def test_a_trained_run_comes_back_and_writes_the_same(tiny, tmp_path):
    export_model(tiny, "json", tmp_path / "tiny.json")
    again = import_model(str(tmp_path / "tiny.json"), tmp_path / "again")
    for prompt in ("The owl", ""):
        written = [quire.generate(run, prompt=prompt, tokens=20, seed=3, device="cpu") for run in (tiny, again)]
        assert written[0] == written[1]


def test_damage_is_a_sentence(characters, tmp_path, quire, a_run):
    run = a_run("modern", characters, tmp_path / "run")
    export_model(run, "json", tmp_path / "model.json")
    text = (tmp_path / "model.json").read_text()
    whole = json.loads(text)

    def refused(content, *words):
        (tmp_path / "bad.json").write_text(content if isinstance(content, str) else json.dumps(content))
        said = quire("import", str(tmp_path / "bad.json"), "--run", str(tmp_path / "bad"))
        assert said.code == 2, said.err
        assert all(word in said.plain for word in words), said.plain
        assert not (tmp_path / "bad").exists()

    def with_layer(number, **changes):
        layers = [dict(layer) for layer in whole["layers"]]
        layers[number].update(changes)
        return {**whole, "layers": layers}

    for size in (0, 1, 100, len(text) // 2, len(text) - 3):
        refused(text[:size], "cut off")
    refused("[1]", "no model")
    refused({"kind": "x"}, "format")
    refused({**whole, "settings": {**whole["settings"], "kind": "transfomer"}}, "transfomer")
    refused({**whole, "settings": {**whole["settings"], "laiers": 3}}, "laiers")
    refused({**whole, "settings": None}, "settings")
    refused({**whole, "tokenizer": {"kind": "character"}}, "tokenizer")
    refused({**whole, "layers": 7}, "layers")
    refused({**whole, "layers": whole["layers"][1:]}, "lacks the layer token_embedding")
    refused(with_layer(0, kind="Quantum"), "'Quantum'", "Embedding")
    refused(with_layer(0, parameters={}), "token_embedding.weight")
    refused(with_layer(0, parameters={"weight": {"shape": [2, 2], "values": [1.0, 2.0, 3.0]}}), "3 values")
    refused(with_layer(0, parameters={"weight": {"shape": [1, 2], "values": [1.0, 2.0]}}), "token_embedding.weight")
    refused(with_layer(0, parameters={"weight": {"shape": [1, 2], "values": [1.0, "2"]}}), "not numbers")
    refused(with_layer(0, parameters={"weight": {"shape": [1], "values": [float("nan")]}}), "NaN")
    refused(with_layer(0, parameters={"weight": {"shape": [1], "values": [1e39]}}), "too large")
    more = {**whole["layers"][0]["parameters"], "more": {"shape": [1], "values": [1]}}
    refused(with_layer(0, parameters=more), "token_embedding.more")


def test_numbers_that_json_lacks_are_refused(characters, tmp_path, a_run):
    from quire import checkpoint

    run = a_run("gpt", characters, tmp_path / "run")
    model = run.model("cpu")
    with torch.no_grad():
        model.blocks[1].attention.key.bias[2] = float("nan")
    checkpoint.save(run.folder("best"), checkpoint.model_tensors(model), {}, {})
    with pytest.raises(UserError, match=r"blocks\.1\.attention\.key\.bias"):
        export_model(run, "json", tmp_path / "model.json")
    assert not list(tmp_path.glob("model*"))
