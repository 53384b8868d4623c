"""Training on a prepared text, here and elsewhere, is training on the text itself."""

import json
import os
import random
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

import quire as library
from quire import files
from quire.data import elsewhere, published
from quire.data.reading import DataSettings, read
from quire.errors import UserError
from quire.planning.plan import asked, follow
from quire.run import Run
from quire.training.begin import names_after
from quire.training.resume import resume, verify

ADDRESS = "memory://shelf/book"
INDEX = f"{ADDRESS}/index.json"
SMALL = (
    "--preset gpt-mini --model.layers 1 --model.heads 2 --model.embedding-size 16 --model.context-length 16"
    " --batch-size 2 --threads 1 --device cpu --steps 3"
)


@pytest.fixture(autouse=True)
def memory(lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small blocks, no pause between tries; memory:// is empty at the end."""
    monkeypatch.setattr(published, "BLOCK", 500)
    monkeypatch.setattr(elsewhere, "PAUSE", 0)
    yield
    fsspec.filesystem("memory").store.clear()


def train(lab, address: str, name: str, **settings) -> Run:
    """As lab.train does with the text."""
    path = lab.folder / name
    settings = {"steps": 30, **lab.TRAINING, **settings}
    return library.train(address, run=path, preset="gpt-mini", model=dict(lab.MODEL), **settings)


def move(address: str) -> None:
    """All of memory:// to another folder there."""
    memory = fsspec.filesystem("memory")
    for path in list(memory.store):
        memory.mv(path, f"/{address.partition('://')[2]}/{path.rpartition('/')[2]}")


# ---- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["character", "byte-bpe"])
def test_weights_are_those_of_training_on_the_text(lab, server, quire, kind):
    size = "400" if kind == "byte-bpe" else "0"
    straight = lab.train("straight", steps=30, tokenizer=kind, vocabulary_size=int(size))
    for out in (ADDRESS, "here"):
        said = quire("prepare", str(lab.text), "--tokenizer", kind, "--vocabulary-size", size, "--out", out)
        assert said.code == 0 and f"quire train {out}/index.json --minutes 5" in said.err
    names = {path.name for path in Path("here").iterdir()}
    for path in Path("here").iterdir():
        server.answers[f"/{path.name}?key=1"] = ranged(path.read_bytes())
    for number, address in enumerate((INDEX, "here/index.json", f"{server.address}/index.json?key=1")):
        run = train(lab, address, f"run-{number}")
        lab.assert_same(run, straight)
        assert run.config["training"]["tokenizer"] == kind
        for name in ("tokenizer.json", "data/validation.bin"):
            assert (run.path / name).read_bytes() == (straight.path / name).read_bytes()
    assert {path.name for path in Path("here").iterdir()} == names


def ranged(data: bytes):
    """An answer of the test's web server that knows ranges."""

    def answer(headers):
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range") or "")
        part = data[int(found[1]) : int(found[2]) + 1] if found else data
        return 206 if found else 200, {"Content-Length": str(len(part))}, part

    return answer


def test_killed_and_resumed_also_where_it_has_moved_to(lab, quire):
    straight = lab.train("straight", steps=30)
    quire("prepare", str(lab.text), "--out", ADDRESS)
    lab.killed(8, train, lab, INDEX, "run")
    assert verify(lab.folder / "run") is None
    lab.killed(14, resume, lab.folder / "run")
    move("memory://cellar")
    with pytest.raises(
        UserError, match=rf"There is no {INDEX}. Say where it is now: quire resume .*run --data ADDRESS"
    ):
        resume(lab.folder / "run")
    lab.killed(20, resume, lab.folder / "run", data=["memory://cellar/index.json"])
    fsspec.filesystem("memory").get("/cellar/", "moved/", recursive=True)
    lab.assert_same(resume(lab.folder / "run", data=["moved"]), straight)
    again = library.train(run=lab.folder / "again", **settings_of(lab.folder / "run", "moved/index.json"))
    lab.assert_same(again, straight)


def settings_of(path: Path, text: str) -> dict:
    """The settings of a run, to train so again."""
    config = Run(path).config
    return {"model": config["model"], "data": {**config["data"], "text": [text]}, **config["training"]}


def test_what_vanishes_while_it_trains(lab, quire):
    """Training stops with a sentence, and goes on with the same bits when what it needs is there again."""
    straight = lab.train("straight", steps=30)
    quire("prepare", str(lab.text), "--out", ADDRESS)
    lab.killed(8, train, lab, INDEX, "run")
    before = dict(fsspec.filesystem("memory").store)
    for name in before:
        if name.endswith(".bin"):
            del fsspec.filesystem("memory").store[name]
    files.remove(files.cache_folder() / "elsewhere")
    with pytest.raises(
        UserError, match=rf"There is no {ADDRESS}/training-00000.bin. A run.* goes on with quire resume RUN"
    ):
        resume(lab.folder / "run")
    fsspec.filesystem("memory").store.update(before)
    lab.assert_same(resume(lab.folder / "run"), straight)


def test_another_text_is_refused(lab, quire):
    quire("prepare", str(lab.text), "--out", ADDRESS)
    run = train(lab, INDEX, "run")
    (origin,) = run.manifest["data"]
    raw = fsspec.filesystem("memory").cat_file("/shelf/book/index.json")
    assert (origin["path"], origin["bytes"]) == (INDEX, len(raw))
    lab.text.write_text(lab.text.read_text() + "more of it ")
    quire("prepare", str(lab.text), "--out", "memory://shelf/other")
    said = quire("resume", str(run.path), "--steps", "3", "--data", "memory://shelf/other/index.json")
    assert said.code == 2
    assert f"memory://shelf/other/index.json is not the prepared text that {run.path} began with" in said.plain
    text = lab.train("text", steps=3)
    assert "prepared text, which stands alone" in quire("resume", str(text.path), "--steps", "3", "--data", INDEX).plain


# ---- what comes with it -------------------------------------------------------------------------------------------


def test_several_texts_and_a_curriculum(lab, quire):
    other = lab.folder / "other.txt"
    other.write_text(lab.text.read_text()[::-1])
    stages = ["1:8", f"1::{other}"]
    settings = {"model": dict(lab.MODEL), "steps": 12, "curriculum": stages, **lab.TRAINING}
    straight = library.train(str(lab.text), str(other), run="straight", preset="gpt-mini", **settings)
    quire("prepare", str(lab.text), str(other), "--out", ADDRESS, "--validation", str(lab.text))
    held_out = train(lab, INDEX, "held-out", steps=3)
    assert held_out.validation_tokens().tolist()[1:] == held_out.tokenizer.encode(lab.text.read_text())
    quire("prepare", str(lab.text), str(other), "--out", "memory://shelf/both")
    lab.assert_same(train(lab, "memory://shelf/both/index.json", "run", steps=12, curriculum=stages), straight)


def test_pairs(lab, quire, pairs):
    small = shlex.split(SMALL.replace("context-length 16", "context-length 40"))
    assert quire("train", "--pairs", str(pairs), "--run", "straight", *small).code == 0
    said = quire("prepare", "--pairs", str(pairs), "--tokenizer", "character", "--out", ADDRESS)
    assert said.code == 0 and f"train --pairs {INDEX} --minutes 5" in said.err
    assert quire("train", "--pairs", INDEX, "--run", "run", *small).code == 0
    lab.assert_same(Run("run"), Run("straight"))
    assert "holds pairs. Name it so: quire train --pairs" in quire("train", INDEX, *small).plain
    quire("prepare", str(lab.text), "--out", "memory://text")
    assert "holds a text, not pairs" in quire("train", "--pairs", "memory://text/index.json", *small).plain


def test_fine_tuning_with_the_tokenizer_of_the_run(lab, quire):
    base = lab.train("base", steps=3, tokenizer="byte-bpe", vocabulary_size=2000)  # more than so short a text gives
    other = lab.folder / "other.txt"
    other.write_text(" ".join(random.Random(5).choices(lab.text.read_text().split(), k=700)))
    quire("prepare", str(other), "--tokenizer", str(base.path), "--out", ADDRESS)
    straight = library.finetune(base, str(other), run="straight", steps=9)
    lab.assert_same(library.finetune(base, INDEX, run="run", steps=9), straight)
    quire("prepare", str(other), "--tokenizer", "word", "--out", "memory://words")
    said = quire("finetune", str(base.path), "memory://words/index.json", "--steps", "3")
    assert said.code == 2 and f"which is not --tokenizer {base.path}" in said.plain


def test_the_planner_takes_a_recipe_and_leaves_the_tokenizer(lab, quire, monkeypatch):
    """The recipe that it takes for the text itself, but for the tokenizer."""
    quire("prepare", str(lab.text), "--tokenizer", "word", "--out", ADDRESS)
    found = {}
    for text in (INDEX, str(lab.text)):
        build, wanted = asked((text,), "", False, None, None, {"minutes": 0.5, "device": "cpu", "threads": 1})
        found[text] = follow(build, wanted, time.time())
    shape, plain = (found[text].settings for text in (INDEX, str(lab.text)))
    assert shape.training.tokenizer == "word" and found[INDEX].recipe == "" != found[str(lab.text)].recipe
    for name in ("layers", "embedding_size", "feedforward_size", "dropout"):
        assert getattr(shape.model, name) == getattr(plain.model, name)
    assert shape.training.batch_size == plain.training.batch_size
    assert shape.training.minutes == plain.training.minutes
    monkeypatch.setattr("quire.planning.plan.MEASURING_SECONDS", 0.01)
    said = quire("plan", INDEX, "--json", *shlex.split(SMALL))
    assert json.loads(said.out)["tokenizer"] == "word"


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, says",
    [
        ("train INDEX --tokenizer byte-bpe", r"tokenizer of its own \(character, \d+ tokens\), which is not --token"),
        ("train INDEX --tokenizer character --vocabulary-size 7", r"which is not --vocabulary-size 7"),
        ("train INDEX --validation text.txt", r"is prepared already: --validation was for quire prepare"),
        ("train INDEX --documents line", r"--documents was for quire prepare"),
        ("train INDEX text.txt", r"names a prepared text, which stands alone"),
        ("train INDEX --cache-gigabytes 0", r"--cache-gigabytes 0 is too little"),
        ("train INDEX --cache-gigabytes nan", r"--cache-gigabytes nan is too little"),
        ("train --pairs INDEX", r"holds a text, not pairs"),
        ("train INDEX --preset transformer-base", r"learns from pairs"),
        ("train text/index.json", r"is not the index of a prepared text"),
        ("train nothing/index.json", r"There is no nothing.index.json"),
        ("train s3://bucket/index.json", r"s3://bucket needs a further package .*: pip install 'quire\[s3\]'"),
        ("train s3://bucket/text.txt", r"not an http or https address.* quire prepare FILE --out ADDRESS, then"),
        ("train shelf", r"shelf holds a prepared text, which stands alone.* quire train shelf/index.json"),
        ("train --pairs shelf", r"shelf holds a prepared text, .* quire train --pairs shelf/index.json"),
        ("train renamed.json", r"renamed.json is the index of a prepared text, no text itself. Name it where its f"),
        ("evaluate base shelf", r"shelf holds a prepared text"),
        ("evaluate base INDEX", r"names a prepared text, which stands alone"),
        ("prepare text.txt", r"Say where the tokens go: --out FOLDER"),
        ("prepare INDEX --out x", r"is prepared already. To have it elsewhere, copy its folder"),
        ("prepare nothing.txt --out x", r"no file, folder or corpus named 'nothing.txt'"),
        ("prepare text.txt --pairs reverse --out x", r"both name what to prepare"),
        ("prepare text.txt --tokenizer nonsense --out x", r"no tokenizer at nonsense"),
        ("prepare text.txt --tokenizer nonsense --out http://127.0.0.1:9/x", r"can only be read"),  # said at once
        ("prepare text.txt text --out text/x", r"--out text/x lies in text, which is read as text. Name a folder outs"),
        ("prepare text.txt --validation . --out x", r"--out x lies in \., which is read as text"),
        ("prepare text.txt --out text.txt/x", r"text.txt is a file. Name a folder"),
        ("prepare text.txt --out text", r"text holds another index.json, which is not written over"),
    ],
)  # fmt: skip
def test_mistakes(lab, quire, monkeypatch, line, says):
    quire("prepare", "text.txt", "--tokenizer", "character", "--out", ADDRESS)
    fsspec.filesystem("memory").get("/shelf/book/", "shelf/", recursive=True)
    shutil.copy("shelf/index.json", "renamed.json")
    (lab.folder / "text").mkdir()
    (lab.folder / "text" / "index.json").write_text('{"pages": []}')
    if line.startswith("evaluate"):
        lab.train("base", steps=1)
    if "s3://" in line:
        monkeypatch.setitem(sys.modules, "s3fs", None)
    flags = shlex.split(SMALL) if line.startswith("train") and "--preset" not in line else []
    said = quire(*line.replace("INDEX", INDEX).split(), *flags)
    assert said.code == 2 and re.search(says, said.plain), said.err
    assert not (lab.folder / "runs").exists() and not (lab.folder / "x").exists()


@pytest.mark.parametrize("named", ["corpus", "corpus/*", "corpus/*.* corpus/*/*", "corpus/**", "corpus/**/*"])
def test_a_prepared_text_in_a_folder_of_texts_is_passed_over(lab, quire, named):
    for name in ("a.txt", "shelf/b.txt"):
        (lab.folder / "corpus" / name).parent.mkdir(exist_ok=True)
        shutil.copy(lab.text, f"corpus/{name}")
    quire("prepare", "text.txt", "--tokenizer", "character", "--out", "corpus/shelf/one")
    shutil.copy("corpus/shelf/one/index.json", "corpus/renamed.json")
    found = read(named.split(), DataSettings())
    assert [origin["path"] for origin in found.origins] == [os.path.abspath("corpus/a.txt"),
                                                            os.path.abspath("corpus/shelf/b.txt")]  # fmt: skip
    skipped = {Path(path).name: reason for path, reason in found.skipped}
    assert skipped["renamed.json"] == "is the index of a prepared text, no text itself"
    passed = "one", "is a prepared text", "tokenizer.json", "is a part of a prepared text"
    assert skipped.get(passed[0]) == passed[1] or skipped.get(passed[2]) == passed[3]
    found.close()


def test_a_signed_address_names_a_run_as_another_does():
    assert next(names_after("https://host/shelf/book/index.json?token=a/b#c")) == Path("runs/book")


def test_a_run_is_named_after_the_folder(lab, quire):
    quire("prepare", "text.txt", "--out", "shelf/book")
    said = quire("train", "shelf/book/index.json", "--json", *shlex.split(SMALL))
    assert json.loads(said.out)["run"] == str(Path("runs/book"))
    assert quire("evaluate", "runs/book", "--json").code == 0


def test_prepare_tells_a_program_what_it_wrote(lab, quire):
    said = quire("prepare", "text.txt", "--out", ADDRESS, "--json")
    found = json.loads(said.out)
    sizes = {path: len(file.getvalue()) for path, file in fsspec.filesystem("memory").store.items()}
    tokens = sum(size for path, size in sizes.items() if path.endswith(".bin")) // np.dtype("<u2").itemsize
    assert found == {"address": ADDRESS, "shards": 2, "tokens": tokens, "bytes": sum(sizes.values())}
    assert "Next:" not in said.err
