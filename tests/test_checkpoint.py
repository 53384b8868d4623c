"""A checkpoint comes back as it was saved, or is refused by name."""

import os
import threading

import pytest
import torch

from quire import checkpoint, files
from quire.checkpoint import MODEL, STATE, TRAINING
from quire.errors import UserError
from quire.models import MODELS, build_model


def generated(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = {
        "matrix": torch.randn(3, 5, generator=generator),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(7, generator=generator).bfloat16(),
    }
    training = {"random.cpu": generator.get_state(), "optimizer.matrix.step": torch.tensor(seed, dtype=torch.int64)}
    return model, training, {"step": seed, "text": "ä", "loss": 1 / 3, "none": None, "cursor": {"epoch": 1}}


def assert_equal(found, model, training, state):
    for mine, theirs in ((found.model, model), (found.training, training)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
            assert torch.equal(tensor, theirs[name])
    assert found.state == state


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "last"
    checkpoint.save(path, *generated())
    return path


def test_everything_comes_back_bit_for_bit(folder):
    assert_equal(checkpoint.load(folder), *generated())
    assert sorted(path.name for path in folder.iterdir()) == sorted([MODEL, TRAINING, STATE])


def test_special_numbers_come_back(tmp_path):
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    checkpoint.save(tmp_path / "last", {"odd": odd}, {}, {"loss": float("inf")})
    found = checkpoint.load(tmp_path / "last")
    assert torch.equal(found.model["odd"].view(torch.int32), odd.view(torch.int32))
    assert found.state == {"loss": float("inf")}


def test_the_model_alone_needs_no_training_state(folder):
    (folder / TRAINING).unlink()
    found = checkpoint.load(folder, training=False)
    assert found.training == {} and found.model.keys() == generated()[0].keys()
    with pytest.raises(UserError, match=TRAINING):
        checkpoint.load(folder)


def test_no_checkpoint_is_said_so(tmp_path):
    assert not checkpoint.exists(tmp_path / "last")
    with pytest.raises(UserError, match=r"There is no checkpoint in .*last"):
        checkpoint.load(tmp_path / "last")


@pytest.mark.parametrize("name", [MODEL, TRAINING])
def test_a_changed_tensor_is_named(folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    last = {MODEL: "matrix|transposed|scalar|half", TRAINING: "random.cpu|optimizer.matrix.step"}[name]
    with pytest.raises(UserError, match=rf"{name} is damaged: tensor ({last}) does not match its checksum.*copy"):
        checkpoint.load(folder)


def test_exchanged_files_of_two_checkpoints_are_refused(folder, tmp_path):
    checkpoint.save(tmp_path / "other", *generated(1))
    os.replace(tmp_path / "other" / MODEL, folder / MODEL)
    with pytest.raises(UserError, match=rf"{MODEL} is damaged"):
        checkpoint.load(folder)


def test_a_second_save_replaces_the_first(folder):
    checkpoint.save(folder, *generated(2))
    assert_equal(checkpoint.load(folder), *generated(2))
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


@pytest.mark.skipif(os.name == "nt", reason="a limit on the size of files is POSIX")
def test_a_file_that_the_disk_has_no_room_for_is_an_oserror_and_leaves_the_old_checkpoint(folder):
    """A true failure in the middle of a write, by the kernel."""
    import resource

    large = {"weights": torch.zeros(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            checkpoint.save(folder, large, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_equal(checkpoint.load(folder), *generated())
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


def test_a_reader_finds_a_whole_checkpoint_at_every_moment_of_a_save(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(files, "operation", lambda kind, path: seen.append(checkpoint.load(folder).state["step"]))
    checkpoint.save(folder, *generated(1))
    monkeypatch.undo()
    assert seen == sorted(seen) and set(seen) == {0, 1} and checkpoint.load(folder).state["step"] == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows does not rename what is being read")
def test_a_reader_is_not_disturbed_by_saves(folder, monkeypatch):
    monkeypatch.setattr(files, "_sync", lambda path: None)
    done = threading.Event()

    def save_for_ever():
        step = 0
        while not done.is_set():
            step += 1
            checkpoint.save(folder, *generated(step))

    writer = threading.Thread(target=save_for_ever)
    writer.start()
    try:
        for _ in range(60):
            found = checkpoint.load(folder)
            assert_equal(found, *generated(found.state["step"]))
    finally:
        done.set()
        writer.join()
    assert found.state["step"] > 0


def test_a_reader_that_is_overtaken_reads_again(folder, monkeypatch):
    load_file_is_next = [True, True]
    inner = checkpoint._load

    def overtaken(found, training):
        whole = files.read_json(found / STATE)
        if load_file_is_next:
            load_file_is_next.pop()
            checkpoint.save(folder, *generated(whole["state"]["step"] + 1))
            raise FileNotFoundError(found)
        return inner(found, training)

    monkeypatch.setattr(checkpoint, "_load", overtaken)
    assert checkpoint.load(folder).state["step"] == 2


# ---- into a model -------------------------------------------------------------------------------------------------


def tiny(**changes):
    shape = {"vocabulary_size": 7, "context_length": 8, "embedding_size": 8, "layers": 1, "heads": 2, **changes}
    return build_model(MODELS["gpt"].Settings(**shape))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_tensor_is_saved_once_and_tied_again(tmp_path, tied):
    model, other = tiny(tied=tied), tiny(tied=tied)
    checkpoint.save(tmp_path / "last", checkpoint.model_tensors(model), {}, {})
    found = checkpoint.load(tmp_path / "last").model
    assert ("head.weight" in found) is not tied
    checkpoint.load_model_tensors(other, found, "here")
    assert (other.head.weight is other.token_embedding.weight) is tied
    tokens = torch.arange(7).unsqueeze(0)
    assert torch.equal(other(tokens), model(tokens))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocabulary_size": 9}, r"token_embedding\.weight is \(9, 8\) there, and \(7, 8\) here"),
        ({"layers": 2}, r"blocks\.1\..* are in one and not in the other"),
        ({"bias": False}, "bias.* are in one and not in the other"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(changes, says):
    with pytest.raises(UserError, match=f"runs/a does not fit this model's settings: .*{says}"):
        checkpoint.load_model_tensors(tiny(), checkpoint.model_tensors(tiny(**changes)), "runs/a")
