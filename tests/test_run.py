"""The run directory: what it holds, what it refuses, and what it says when something is missing."""

import hashlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import quire
from quire import checkpoint, files
from quire.errors import UserError
from quire.run import Run, empty_model, token_type
from quire.tokenizers import TOKENIZERS
from quire.training import journal
from quire.training.begin import free_path
from quire.training.resume import resume

TINY = {"layers": 1, "embedding_size": 16, "heads": 2, "context_length": 16}
SETTINGS = {"preset": "gpt-mini", "batch_size": 4, "threads": 1, "device": "cpu"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory of a test, which is empty; plots and fsync are tested elsewhere."""
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(journal, "plot_losses", lambda curves, axis, path: None)
    monkeypatch.setattr(files, "_sync", lambda path: None)
    return tmp_path / "here"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A trained run, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog, again and again.\n" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "plot_losses", lambda curves, axis, path: None)
        patch.setenv("QUIRE_CACHE", str(folder / "cache"))
        quire.train(str(folder / "text.txt"), run=folder / "run", model=TINY, steps=20, **SETTINGS)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return Run(tmp_path / "run")


# ---- what it holds ------------------------------------------------------------------------------------------------


def test_the_directory_holds_what_the_design_says(run):
    for name in (
        "config.toml",
        "tokenizer.json",
        "manifest.json",
        "metrics.jsonl",
        "samples.md",
        "data/validation.bin",
    ):
        assert (run.path / name).is_file()
    for which in ("best", "last"):
        for name in ("model.safetensors", "training.safetensors", "state.json"):
            assert (run.folder(which) / name).is_file()
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["versions"].keys() >= {"quire", "python", "torch", "numpy", "safetensors"}
    assert manifest.keys() >= {"device", "threads", "world_size", "compile", "seed"}
    (origin,) = manifest["data"]
    text = Path(origin["path"])
    assert text.is_absolute() and origin["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert origin["bytes"] == text.stat().st_size


def test_a_run_can_be_moved_and_copied(run, tmp_path):
    moved = Run(shutil.move(run.path, tmp_path / "elsewhere"))
    tokens = torch.from_numpy(moved.validation_tokens()[:16].astype(np.int64)).unsqueeze(0)
    again = Run(shutil.copytree(moved.path, tmp_path / "copy"))
    with torch.no_grad():
        assert torch.equal(moved.model("cpu")(tokens), again.model("cpu")(tokens))


def test_held_out_tokens_are_the_end_of_the_text(run):
    text = Path(run.manifest["data"][0]["path"]).read_text()
    held_out = run.validation_tokens()
    assert held_out[0] == run.tokenizer.separator
    assert text.endswith(decoded := run.tokenizer.decode(held_out)) and len(decoded) == len(held_out) - 1
    assert len(decoded) == len(text) // 10


def test_the_model_is_the_best_checkpoint(run):
    best = checkpoint.load(run.folder("best")).model
    assert torch.equal(run.model("cpu").head.weight, best["token_embedding.weight"])
    assert not run.model("cpu").training
    shutil.rmtree(run.folder("best"))
    last = checkpoint.load(run.folder("last")).model
    assert torch.equal(run.model("cpu").head.weight, last["token_embedding.weight"])


def test_loading_a_model_draws_no_random_numbers(run):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run.model("cpu")
    empty_model(run.settings, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_gives_the_same_first_weights(run):
    one, two, other = (run.fresh_model(seed, torch.device("cpu")).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


@pytest.mark.parametrize(("vocabulary", "bytes_each"), [(3, 2), (65536, 2), (65537, 4)])
def test_tokens_take_two_bytes_where_they_suffice(here, vocabulary, bytes_each):
    class Named(TOKENIZERS["character"]):
        pass

    tokenizer = Named("ab\n")
    tokenizer.vocabulary_size = vocabulary
    ids = np.array([1, 2, vocabulary - 1])
    made = Run.create(here / "run", {}, tokenizer, {"validation": {"bytes": 3}}, ids, {})
    made.__dict__["tokenizer"] = tokenizer
    assert (made.path / "data" / "validation.bin").stat().st_size == 3 * bytes_each
    assert made.validation_tokens().tolist() == ids.tolist()
    assert token_type(vocabulary).str[0] == "<"  # the same on every machine


@pytest.mark.parametrize(("separators", "starts_with"), [(99, "\n"), (100, "separator")])
def test_an_empty_prompt_starts_from_a_separator_that_is_known_well(run, separators, starts_with):
    run.__dict__["manifest"] = {**run.manifest, "separators": separators}
    expected = run.tokenizer.separator if starts_with == "separator" else run.tokenizer.encode("\n")[0]
    assert run.start_token() == expected


# ---- what it refuses ----------------------------------------------------------------------------------------------


def test_an_existing_run_is_never_overwritten(here):
    (here / "a.txt").write_text("some text to learn from. " * 40)
    made = quire.train("a.txt", run="mine", model=TINY, steps=10, **SETTINGS)
    before = {path: path.read_bytes() for path in made.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"mine exists already.*or go on with it: quire resume mine"):
        quire.train("a.txt", run="mine", model=TINY, steps=10, **SETTINGS)
    assert {path: path.read_bytes() for path in made.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("what", ["a file", "a folder"])
def test_nothing_else_is_overwritten_either_nor_called_a_run(here, what):
    (here / "a.txt").write_text("some text to learn from. " * 40)
    if what == "a file":
        (here / "mine").write_text("precious")
    else:
        (here / "mine").mkdir()
        (here / "mine" / "thesis").write_text("precious")
    with pytest.raises(UserError, match=r"^mine exists already\. Name another --run\.$"):
        quire.train("a.txt", run="mine", model=TINY, steps=10, **SETTINGS)
    assert (here / "mine" if what == "a file" else here / "mine" / "thesis").read_text() == "precious"


def test_an_empty_folder_may_become_a_run(here):
    (here / "a.txt").write_text("some text to learn from. " * 40)
    (here / "mine").mkdir()
    assert quire.train("a.txt", run="mine", model=TINY, steps=10, **SETTINGS).metrics()


def test_a_disk_that_is_full_while_a_run_is_made_leaves_the_name_free(here, monkeypatch):
    tokenizer, changes, fail_at = TOKENIZERS["character"]("abc"), 0, 0

    def full(kind, path):
        nonlocal changes
        changes += 1
        if changes > fail_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "operation", full)
    while True:
        changes = 0
        try:
            Run.create(
                here / "mine", {"model": {}}, tokenizer, {"validation": {}}, np.arange(5), {"data/kept": b"kept"}
            )
        except OSError:
            assert not (here / "mine").exists()
            fail_at += 1
        else:
            break
    assert fail_at == changes >= 15  # five files
    assert Run(here / "mine").config == {"model": {}} and (here / "mine" / "data" / "kept").read_bytes() == b"kept"


# ---- what it says when something is missing -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "use", "says"),
    [
        ("config.toml", lambda run: Run(run.path), r"is not a run: it has no config\.toml.*quire runs"),
        ("tokenizer.json", lambda run: run.tokenizer, "There is no tokenizer at .*run"),
        ("manifest.json", lambda run: run.manifest, r"lacks its manifest\.json. Restore it from a copy"),
        ("data/validation.bin", lambda run: run.validation_tokens(), r"validation\.bin is missing.*quire evaluate"),
        ("checkpoints", lambda run: run.model("cpu"), "has no checkpoint yet. Train it first: quire resume .*run"),
        ("checkpoints/best/model.safetensors", lambda run: run.model("cpu"), r"model\.safetensors is missing.*copy"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(run, missing, use, says):
    files.remove(run.path / missing)
    with pytest.raises(UserError, match=says):
        use(Run(run.path) if missing != "config.toml" else run)


def test_what_is_not_there_is_no_run(tmp_path):
    with pytest.raises(UserError, match="absent is not a run"):
        Run(tmp_path / "absent")


def test_metrics_that_are_not_there_yet_are_none(run):
    files.remove(run.path / "metrics.jsonl")
    assert run.metrics() == []


def test_a_tokenizer_of_another_run_is_refused(run):
    TOKENIZERS["character"]("abc").save(run.path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is not this model's"):
        _ = run.tokenizer


# ---- its name, and text from a pipe -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("book.txt", "book"),
        ("/some/where/War and Peace.txt", "War-and-Peace"),
        ("some/where/", "where"),
        (r"C:\texts\book.md", "book"),
        ("https://example.org/a/b/moby.txt.gz?download=1#top", "moby"),
        ("shakespeare", "shakespeare"),
        ("-", "standard-input"),
        ("texts/*.txt", "run"),
        ("源氏物語.txt", "源氏物語"),
        (".", "here"),
    ],
)
def test_a_run_is_named_after_its_first_text(here, text, name):
    assert free_path(text) == Path("runs") / name


def test_a_name_that_is_taken_is_counted_on(here):
    for expected in ("book", "book-2", "book-3"):
        path = free_path("book.txt")
        assert path == Path("runs") / expected
        path.mkdir(parents=True)
    shutil.rmtree(here / "runs" / "book-2")
    assert free_path("book.txt") == Path("runs/book-2")


def test_text_from_a_pipe_is_kept_and_resumed_from(here, monkeypatch):
    text = "some text to learn from. " * 40
    (here / "more.txt").write_text("more of it, from a file. " * 10)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    made = quire.train("-", "more.txt", model=TINY, steps=10, **SETTINGS)
    assert made.path == Path("runs/standard-input")
    assert (made.path / "data" / "standard-input.txt").read_text() == text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"something else")))
    assert resume(made, steps=10).metrics()[-1]["step"] == 20
