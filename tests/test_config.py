"""One configuration: dataclasses, TOML and flags say the same thing, and a mistake in any is named."""

import dataclasses
import math
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from quire.config import PRESETS, from_table, merged, read_checked_toml, read_toml, to_table, write_checked_toml
from quire.data.reading import DataSettings
from quire.errors import UserError
from quire.models import MODELS
from quire.training.settings import LENGTHS, Settings, TrainingSettings, layered, typed

KINDS = [TrainingSettings, DataSettings, MODELS["gpt"].Settings]

# ---- there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_settings_survive_toml(tmp_path, kind):
    changed = {
        "learning_rate": 1e-7, "seed": 2**40, "text": ("a b.txt", 'c"\\\nü森.txt'), "documents": "\n***\t", "layers": 3,
        "compile": "no", "bias": False, "norm_epsilon": 1e-12, "epochs": 0.1, "validation": "",
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(kind)}
    settings = kind(**{name: value for name, value in changed.items() if name in known})
    path = tmp_path / "config.toml"
    write_checked_toml(path, {"table": to_table(settings)})
    table = read_checked_toml(path)["table"]
    assert table.keys() == known  # complete: every setting is spelled out
    assert from_table(kind, table, "table") == settings


@given(st.floats(min_value=0, allow_infinity=False, allow_nan=False), st.integers(0, 2**62))
def test_numbers_survive_toml_exactly(tmp_path_factory, rate, seed):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    settings = TrainingSettings(learning_rate=rate, seed=seed)
    write_checked_toml(path, to_table(settings))
    assert from_table(TrainingSettings, read_checked_toml(path), "training") == settings


def test_a_whole_number_serves_where_a_fraction_may_stand():
    settings = from_table(TrainingSettings, {"minutes": 3, "learning_rate": 1}, "training")
    assert isinstance(settings.minutes, float) and isinstance(settings.learning_rate, float)


# ---- mistakes -----------------------------------------------------------------------------------------------------


def test_a_setting_of_another_kind_of_model_names_the_kinds_that_have_it():
    with pytest.raises(UserError) as said:
        typed({"model": {"kind": "modern", "stack": [{"kind": "embedding", "size": 8}]}})
    assert str(said.value) == (
        "The kind of model is 'modern', which has no setting 'stack'. These have: stack."
        ' Say which, as in kind = "stack" under [model].'
    )


@pytest.mark.parametrize(
    ("kind", "table", "says"),
    [
        (TrainingSettings, {"learning_rat": 1.0}, "training has no setting 'learning_rat'. Did you mean learning_rate"),
        (TrainingSettings, {"warmup": 5}, "no setting 'warmup'. Did you mean warmup_steps?"),
        (TrainingSettings, {"xyzzy": 5}, r"no setting 'xyzzy'\.$"),
        (TrainingSettings, {"steps": "many"}, "training.steps must be a whole number, not 'many'"),
        (TrainingSettings, {"steps": 1.5}, "training.steps must be a whole number, not 1.5"),
        (TrainingSettings, {"steps": True}, "training.steps must be a whole number, not True"),
        (TrainingSettings, {"minutes": "1"}, "training.minutes must be a number, not '1'"),
        (TrainingSettings, {"minutes": False}, "training.minutes must be a number, not False"),
        (TrainingSettings, {"optimizer": 3}, "training.optimizer must be text in quotes, not 3"),
        (TrainingSettings, {"compile": "maybe"}, "training.compile must be one of auto, yes, no, not 'maybe'"),
        (TrainingSettings, {"compile": ["no"]}, "training.compile must be one of auto, yes, no"),
        (TrainingSettings, {"optimizer": "adamax"}, "--optimizer 'adamax' is not known. Did you mean adam"),
        (TrainingSettings, {"engine": "auto"}, "--engine 'auto' is not known.*Choices: autograd, manual"),
        (TrainingSettings, {"batch_size": 0}, "--batch-size must be at least 1, not 0"),
        (TrainingSettings, {"steps": -1}, "--steps must be a finite number of at least 0, not -1"),
        (TrainingSettings, {"learning_rate": math.nan}, "--learning-rate must be a finite number"),
        (TrainingSettings, {"minutes": math.inf}, "--minutes must be a finite number"),
        (TrainingSettings, {"beta2": 1.0}, "--beta2 must be at least 0 and below 1"),
        (TrainingSettings, {"decay_floor": 1.5}, "--decay-floor must be between 0 and 1"),
        (TrainingSettings, {"steps": 5, "minutes": 1.0}, "--steps and --minutes both give the length"),
        (DataSettings, {"text": "a.txt"}, "data.text must be a list of texts in quotes, not 'a.txt'"),
        (DataSettings, {"text": ["a", 3]}, "data.text must be a list of texts in quotes"),
        (MODELS["gpt"].Settings, {"bias": 1}, "model.bias must be true or false, not 1"),
        (MODELS["gpt"].Settings, {"embeding_size": 8}, "Did you mean embedding_size?"),
        (MODELS["gpt"].Settings, {"embedding_size": 10, "heads": 3}, "10 cannot be divided among 3 heads"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_remedy(kind, table, says):
    where = {TrainingSettings: "training", DataSettings: "data"}.get(kind, "model")
    with pytest.raises(UserError, match=says):
        from_table(kind, table, where)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"trainin": {}}, "The table 'trainin' is not known. Did you mean training?"),
        ({"training": 3}, "training must be a table"),
        ({"model": {"kind": "gtp"}}, "--model.kind 'gtp' is not known. Did you mean gpt?"),
    ],
)
def test_a_mistaken_table_is_named(table, says):
    with pytest.raises(UserError, match=says):
        typed(table)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "There is no configuration file .*config.toml"),
        (b"[training\nsteps = 3", r"config.toml cannot be read as TOML: .*line 1"),
        (b"[training]\nsteps = 3\nsteps = 4\n", r"cannot be read as TOML: .*line 3"),
        (b"\xff\xfe\x00", "cannot be read as TOML"),
    ],
)
def test_a_file_that_is_no_toml_is_named(tmp_path, content, says):
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_toml(path)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(
        UserError, match=r"The preset 'gpt-mni' is not known. Did you mean gpt-mini\? Choices: .*default"
    ):
        layered("gpt-mni")


# ---- a run's own --------------------------------------------------------------------------------------------------


def test_a_run_s_configuration_that_was_edited_is_refused_with_the_way_to_use_it(tmp_path):
    path = tmp_path / "config.toml"
    table = Settings().tables()
    write_checked_toml(path, table)
    written = path.read_bytes()
    assert read_checked_toml(path) == read_toml(path) == table
    edits = [written.replace(b"batch_size = 12", b"batch_size = 13"), written + b"\n", b"# mine\n" + written, b""]
    edits += [written[:-12], written.replace(b"# crc32 ", b"# crc 32"), written.replace(b"\n", b"\r\n")]
    for edited in edits:
        assert edited != written
        path.write_bytes(edited)
        with pytest.raises(UserError, match=r"edited or damaged.*quire train TEXT --config .*config\.toml"):
            read_checked_toml(path)
    path.write_bytes(edits[0])
    assert typed(layered("gpt-mini", path)).training.batch_size == 13  # that way works


# ---- layers -------------------------------------------------------------------------------------------------------


def lengths(table) -> dict[str, float]:
    return {name: table["training"][name] for name in LENGTHS if table["training"].get(name)}


@pytest.fixture
def file(tmp_path):
    """file({...}): the path of a TOML file with those tables."""

    def write(table) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(tomli_w.dumps(table))
        return path

    return write


def test_each_layer_lies_over_the_one_before(file):
    path = file({"training": {"batch_size": 3, "seed": 1}, "model": {"layers": 2}})
    table = layered("gpt-mini", path, {"training": {"seed": 2}, "data": {"text": ["a.txt"]}})
    assert table["training"]["batch_size"] == 3 and table["training"]["seed"] == 2
    assert table["model"]["layers"] == 2 and table["model"]["heads"] == 6
    assert table["training"]["warmup_steps"] == 100
    assert typed(table).data.text == ("a.txt",)


@pytest.mark.parametrize("later", LENGTHS)
@pytest.mark.parametrize("preset", ["default", "gpt-mini"])
def test_a_later_length_replaces_an_earlier_one(file, preset, later):
    assert lengths(layered(preset)) != {later: 7}
    assert lengths(layered(preset, file({"training": {later: 7}}))) == {later: 7}
    assert lengths(layered(preset, None, {"training": {later: 7}})) == {later: 7}
    both = layered(preset, file({"training": {"epochs": 3}}), {"training": {later: 7}})
    assert lengths(both) == {later: 7}
    assert typed(both).training.batch_size == layered(preset)["training"]["batch_size"]


def test_layers_that_give_no_length_keep_it(file):
    before = lengths(layered("gpt-mini"))
    assert before and lengths(layered("gpt-mini", file({"training": {"seed": 3}}), {"model": {"layers": 1}})) == before


def test_one_layer_with_two_lengths_is_refused(file):
    with pytest.raises(UserError, match="--steps and --tokens both give the length"):
        typed(layered("default", file({"training": {"steps": 5, "tokens": 100}})))


def test_merging_changes_neither_table():
    base, over = {"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": {"z": 4}}
    assert merged(base, over) == {"a": {"x": 1, "y": 3}, "b": 1, "c": {"z": 4}}
    assert base == {"a": {"x": 1, "y": 2}, "b": 1} and over == {"a": {"y": 3}, "c": {"z": 4}}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_partial_configuration_without_a_mistake(name):
    table = layered(name)
    settings = typed(table)
    for part, values in table.items():
        for key, value in values.items():
            assert to_table(getattr(settings, part))[key] == value
    assert sum(bool(getattr(settings.training, length)) for length in LENGTHS) == 1
