"""An imported run is a run like any other, or says in a sentence what it lacks; an import is whole or nothing."""

import shutil
from pathlib import Path

import pytest
import torch

import quire as library
from quire import checkpoint, files
from quire.errors import UserError
from quire.interop import EXPORTERS, IMPORTERS, found, imported
from quire.interop.imported import Foreign, create
from quire.interop.pretrained import PRETRAINED
from quire.run import Run
from quire.sources import SOURCES
from quire.training import finetune

from .conftest import TEXT, logits


@pytest.fixture
def run(random_run, tmp_path, monkeypatch) -> Run:
    """An imported run, whose folder is the working directory."""
    monkeypatch.chdir(tmp_path)
    made = random_run(kind="modern", layers=1, context_length=32)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return Run(made.path.name)


# ---- every command ------------------------------------------------------------------------------------------------


def test_generate_evaluate_and_runs(run, quire):
    said = quire("generate", str(run.path), "--prompt", "The owl", "--tokens", "5")
    assert said.code == 0 and said.out.startswith("The owl")
    assert '"validation_loss"' in quire("evaluate", str(run.path), "text.txt", "--json").out
    said = quire("runs", ".", "--json")
    assert f'"run": "{run.path}"' in said.out and '"text": "imported from elsewhere"' in said.out


def test_special_tokens_in_a_prompt(run, quire):
    """As text a special's name is many tokens, as a token it is one: a model that was taught to chat needs those."""
    name = next(iter(run.tokenizer.specials))
    as_text, as_token = (
        library.generate(run, f"{name}The", temperature=0, tokens=9, special=kind)[0].tokens
        for kind in ("text", "token")
    )
    ids = [run.tokenizer.specials[name], *run.tokenizer.encode("The")]
    with torch.no_grad():
        row = run.model("cpu")(torch.tensor([ids]))[0, -1]
    row[sorted(run.tokenizer.reserved() - {run.tokenizer.separator})] = -torch.inf
    assert as_token[:1] == [int(row.argmax())] and as_text != as_token
    assert quire("generate", str(run.path), "--prompt", f"{name}The", "--special", "token", "--tokens", "3").code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate"], "was imported, without a held-out text. Name one: quire evaluate"),
        (["resume"], "was imported: there is no training to resume. To train its model on a text: quire finetune"),
        (["resume", "--steps", "5"], "there is no training to resume"),
        (["resume", "--verify"], "there is no training to resume"),
        (["plot"], "has no measurements yet"),
        (["finetune"], "Name the TEXT to fine-tune on."),
        (["finetune", "text.txt"], "Say how long to train"),
    ],
)
def test_what_it_lacks_is_a_sentence(run, quire, words, said):
    found = quire(words[0], str(run.path), *words[1:])
    assert found.code == 2 and said in found.plain and "quire resume" not in found.plain


def test_finetune_begins_with_its_weights_and_keeps_what_belongs_to_them(random_run, tmp_path, monkeypatch, quire):
    monkeypatch.chdir(tmp_path)
    base = random_run(kind="modern", layers=1, context_length=32, prefix=(5,))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    new = library.finetune(base, "text.txt", run="new", steps=2, threads=1, device="cpu")
    assert new.prompt_prefix() == [5] and not new.imported and new.manifest["finetuned_from"] == str(base.path)
    assert new.metrics()[0]["step"] == 0 and new.metrics()[-1]["step"] == 2
    shutil.rmtree(base.path)  # it stands on its own
    assert quire("evaluate", "new").code == 0 and quire("resume", "new", "--steps", "1").code == 0


def test_finetuning_a_long_context_reads_shorter_windows(random_run, tmp_path, monkeypatch, quire):
    monkeypatch.chdir(tmp_path)
    for path, positions in (("rotary", "rotary"), ("learned", "learned")):
        base = random_run(kind="gpt", positions=positions, layers=1, context_length=4000)
        assert finetune.context_of(base, 0) == finetune.LONGEST and finetune.context_of(base, 4000) == 4000
        with pytest.raises(UserError, match=r"--context-length must be between 2 and that of .*, 4000, not 4001"):
            finetune.context_of(base, 4001)
        (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
        flags = ("--context-length", "32", "--steps", "1", "--threads", "1", "--learning-rate", "0")
        said = quire("finetune", str(base.path), "text.txt", *flags, "--run", path, "--json")
        assert said.code == 0, said.err
        new, ids = Run(path), base.tokenizer.encode("The owl calls")
        assert new.settings.context_length == 32
        assert torch.equal(logits(new, ids), logits(base, ids))


# ---- whole or nothing ---------------------------------------------------------------------------------------------


def foreign(tokenizer, **changes) -> Foreign:
    """A little model, its tensors made anew at each call."""
    settings = {"kind": "modern", "layers": 1, "embedding_size": 16, "heads": 2, "feedforward_size": 24}
    settings = {**settings, "context_length": 32, **changes}
    sizes = {"vocabulary_size": tokenizer.vocabulary_size, "separator": tokenizer.separator}
    model = imported.empty_model(imported.MODELS["modern"].Settings(**settings, **sizes), torch.device("cpu"))
    tensors = {name: torch.ones_like(weight) for name, weight in checkpoint.model_tensors(model).items()}
    return Foreign(settings, list(tensors.items()), tokenizer, {"path": "it", "format": "test"})


class Broken(Exception):
    """Some failure in the middle."""


def test_whatever_change_to_the_disk_fails_nothing_half_is_left(byte_bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_sync", lambda path: None)
    number = 0
    while True:
        number += 1
        left = number

        def operation(kind: str, path: Path) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Broken

        with monkeypatch.context() as patch:
            patch.setattr(files, "operation", operation)
            try:
                create(foreign(byte_bpe), tmp_path / "run")
                if left > 0:
                    break
            except Broken:
                pass
        if (tmp_path / "run").exists():
            assert Run(tmp_path / "run").model("cpu") is not None
            shutil.rmtree(tmp_path / "run")
        assert not list(tmp_path.glob("**/config.toml")), number
    assert number > 10 and Run(tmp_path / "run").model("cpu").settings.layers == 1


def test_leftovers_of_a_kill_are_swept_and_a_run_is_never_overwritten(byte_bpe, tmp_path):
    (tmp_path / "run.new" / "checkpoints").mkdir(parents=True)
    run = create(foreign(byte_bpe), tmp_path / "run")
    assert not (tmp_path / "run.new").exists()
    with pytest.raises(UserError, match="exists already"):
        create(foreign(byte_bpe), run.path)


def test_a_flipped_bit_is_found_as_in_any_run(run):
    path = run.folder("best") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged: tensor"):
        run.model("cpu")


def test_too_little_memory_or_disk_is_said_before_any_work(byte_bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(imported, "memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"of memory .weights in float32, twice.; this machine has 0.00 GB"):
        create(foreign(byte_bpe), tmp_path / "run")
    monkeypatch.setattr(imported, "memory_bytes", lambda: 0)  # not known: no refusal
    monkeypatch.setattr(imported, "disk_free", lambda path: 10)
    with pytest.raises(UserError, match="Make room, or name a --run on another disk"):
        create(foreign(byte_bpe), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_tensors_must_fit(byte_bpe, tmp_path):
    whole = foreign(byte_bpe)
    tensors = list(whole.tensors)
    for wrong, said in (
        (tensors[1:], "it is incomplete: it lacks token_embedding.weight"),
        ([*tensors, ("more", torch.ones(1))], "a tensor more that"),
        ([(tensors[0][0], torch.ones(3)), *tensors[1:]], "its tensor token_embedding.weight is .3,. instead of"),
    ):
        whole.tensors = wrong
        with pytest.raises(UserError, match=said):
            create(whole, tmp_path / "run")


def test_a_shorter_context(byte_bpe, tmp_path):
    assert create(foreign(byte_bpe), tmp_path / "run", 16).settings.context_length == 16
    with pytest.raises(UserError, match=r"--context-length must be between 2 and the model's own 32, not 33"):
        create(foreign(byte_bpe), tmp_path / "other", 33)


# ---- what is offered ----------------------------------------------------------------------------------------------


def test_what_is_no_model(tmp_path, quire, run):
    (tmp_path / "text.md").write_text("no model")
    assert "is no model that Quire knows" in quire("import", "text.md").plain
    assert "is a run of Quire's already" in quire("import", str(run.path)).plain
    said = quire("import", "smollm-135m-instruct")
    assert said.code == 2 and "Did you mean smollm2-135m-instruct?" in said.plain
    said = quire("export", str(run.path), "--to", "ggfu", "--out", "x")
    assert said.code == 2 and "Did you mean gguf?" in said.plain
    assert "exists already" in quire("export", str(run.path), "--to", "gguf", "--out", "text.md").plain
    assert "Say --to" in quire("export", str(run.path)).plain


def test_names_are_in_the_table_of_sources():
    assert IMPORTERS and EXPORTERS
    for name, known in PRETRAINED.items():
        assert not SOURCES[known.source].is_text and SOURCES[known.source].licence, name


def test_smollm2(tmp_path, monkeypatch):
    """From the user's own cache, where the archive is: nothing is downloaded in a test."""
    import os

    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    if not (cache := os.environ.get("QUIRE_SMOLLM2_CACHE")):
        pytest.skip("downloads nothing: name a cache that has the archive with QUIRE_SMOLLM2_CACHE")
    monkeypatch.setenv("QUIRE_CACHE", cache)
    run = create(found("smollm2-135m-instruct", None), tmp_path / "run")
    written = library.generate(run, "The capital of France is", temperature=0, tokens=3)[0]
    assert written.text.startswith(" Paris")
    assert run.manifest["imported_from"]["sha256"].startswith("b179c9523d0e6a0f") and "chat_template" in run.manifest
