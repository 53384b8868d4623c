"""Sharding by one process: what two do together is in test_distributed.py."""

import errno
from typing import Any

import pytest
import torch

import quire
from quire import checkpoint
from quire.errors import UserError
from quire.training import resume as resuming
from quire.training.settings import TrainingSettings

SMALL = {"layers": 1, "embedding_size": 16, "heads": 2, "context_length": 16}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "manual"}, "hand-written backward cannot do without: take --engine autograd"),
        ({"optimizer": "muon"}, "take --optimizer adamw, or --parallel ddp"),
        ({"precision": "float16"}, "not --precision float16"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        TrainingSettings(steps=1, parallel="fsdp", **settings)


def test_tables_cannot_be_sharded(lab):
    with pytest.raises(UserError, match="cannot shard n-gram tables"):
        quire.train(str(lab.text), run=lab.folder / "run", preset="ngram", steps=1, parallel="fsdp", optimizer="adamw",
                    curriculum=(), model=SMALL)  # fmt: skip


def test_one_process_shards_for_itself(lab):
    run = lab.train("run", steps=12, parallel="fsdp")
    assert resuming.verify(run) is None
    assert checkpoint.is_sharded(run.folder("last"))
    plain = lab.train("plain", steps=12)
    for name, tensor in run.checkpoint().model.items():
        torch.testing.assert_close(tensor, plain.checkpoint().model[name])
    resumed = resuming.resume(run, steps=3)
    assert resumed.metrics()[-1]["step"] == 15


@pytest.mark.parametrize(
    ("preset", "model", "data"),
    [
        ("lstm", {"embedding_size": 16, "context_length": 16, "layers": 1}, {}),
        ("stack-mixed", {"context_length": 16}, {}),
        ("transformer-base", {**SMALL, "context_length": 32, "feedforward_size": 32}, {"pairs": "pairs.tsv"}),
    ],
)
def test_other_kinds_of_model_can_be_sharded(lab, preset, model, data):
    """They train, measure, write, are saved and go on."""
    (lab.folder / "pairs.tsv").write_text("".join(f"owl {i}\towls {i % 7}\n" for i in range(100)))
    texts = [] if data else [str(lab.text)]
    few = {"steps": 2, "batch_size": 2, "optimizer": "adamw", "sample_tokens": 5, "threads": 1, "device": "cpu"}
    run = quire.train(*texts, run=lab.folder / "run", preset=preset, model=model, data=data, parallel="fsdp", **few)
    assert resuming.resume(run, steps=2).metrics()[-1]["step"] == 4
    assert (run.path / "samples.md").read_text().count("## Step") >= 2


def test_what_is_gathered_in_bfloat16_is_measured_in_float32(lab):
    run = lab.train("run", steps=4, parallel="fsdp", precision="bfloat16", sample_tokens=5)
    assert run.metrics()[-1]["validation_loss"] == pytest.approx(quire.evaluate(run).validation_loss, rel=1e-7)
    assert "```text" in (run.path / "samples.md").read_text()


def test_a_finished_run_changes_the_form_of_its_checkpoints(lab):
    run = lab.train("run", steps=3)
    whole = run.checkpoint()
    for parallel in ("fsdp", "ddp"):
        resuming.resume(run, parallel=parallel)
        for which in ("best", "last"):
            assert checkpoint.is_sharded(run.folder(which)) is (parallel == "fsdp")
        found = run.checkpoint()
        assert found.state == whole.state
        for name in ("model", "training"):
            mine, theirs = getattr(found, name), getattr(whole, name)
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert resuming.resume(run, parallel="fsdp", steps=2).metrics()[-1]["step"] == 5


def test_a_full_disk_is_said_where_parts_are_written(lab, monkeypatch):
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    def full(writer: Any, plan: Any, planner: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(writer.path))

    run = lab.train("run", steps=4, parallel="fsdp")
    before = lab.contents(run.folder("last"))
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(OSError, match="No space left on device"):
        resuming.resume(run, steps=4)
    assert lab.contents(run.folder("last")) == before
