"""quire plan --devices: its numbers against models really built and run, published ones, and sums done by hand."""

import importlib.util
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quire.config import PRESETS
from quire.errors import UserError
from quire.inspection.size import size_of
from quire.models import build_model
from quire.models.decoder import DecoderSettings
from quire.planning.cards import CARDS, NETWORK, REACHED
from quire.planning.cluster import KINDS, RESERVED, Cluster, ClusterPlan, Way, check, planned
from quire.planning.work import FLOAT, Work, kept_beside, kept_by_block, matrices, newton_schulz, work_of
from quire.training.muon import newton_schulz as orthogonalized
from quire.training.settings import Settings, layered, typed

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
DECODERS = [name for name in PRESETS if layered(name)["model"].get("kind", "gpt") in KINDS]
GPT2 = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
PARTS = {"embedding_size": 48, "layers": 2, "heads": 4, "context_length": 64, "vocabulary_size": 1500, "dropout": 0.0}
SHAPES: list[dict[str, Any]] = [
    {"kind": "gpt"},
    {"kind": "gpt", "vocabulary_size": 60},
    {"kind": "gpt", "norm_placement": "post", "positions": "sinusoidal", "feedforward": "relu"},
    {"kind": "gpt", "normalization": "rmsnorm", "feedforward": "squared-relu", "qk_norm": True, "positions": "rotary"},
    {"kind": "gpt", "feedforward": "swiglu", "bias": False, "kv_heads": 2},
    {"kind": "modern", "tied": False},
    {"kind": "modern", "kv_heads": 2, "qk_norm": True, "feedforward_size": 100, "head_size": 16},
]


def settings(preset: str, **training: Any) -> Settings:
    """A preset with these training settings, and a vocabulary where it has none."""
    shape = {} if layered(preset)["model"].get("vocabulary_size") else {"vocabulary_size": 300}
    return typed(layered(preset, flags={"model": shape, "training": training}))


@pytest.fixture(scope="module")
def xl() -> ClusterPlan:
    """The plan of GPT-2 XL on eight H100."""
    return planned(settings("gpt2-xl"), 8)


# ---- what a model asks of a card ----


@pytest.mark.parametrize("preset", DECODERS)
def test_parameters_are_those_of_the_model_built(preset: str) -> None:
    checked = check(settings(preset, batch_size=8), 8)
    with torch.device("meta"):
        model = build_model(checked.model)
    work = work_of(checked)
    assert work.total == sum(parameter.numel() for parameter in model.parameters())
    assert work.block == sum(parameter.numel() for parameter in model.blocks[0].parameters())
    assert work.blocks == len(model.blocks)


@pytest.mark.parametrize(("preset", "published"), GPT2.items())
def test_parameters_are_those_that_openai_and_hugging_face_count(preset: str, published: int) -> None:
    assert work_of(settings(preset)).total == published


@pytest.mark.parametrize("preset", ["gpt2", "gpt-mini", "vaswani-decoder", "default", "sparse"])
def test_arithmetic_is_that_of_a_counted_forward_pass_three_times(preset: str) -> None:
    checked = check(settings(preset, batch_size=8), 8)
    dense = replace(checked.model, attention=("full",)) if checked.model.kind == "sparse" else checked.model
    assert work_of(replace(checked, model=dense)).flops_per_token == pytest.approx(
        3 * size_of(dense).flops_per_token, rel=0.02
    )


def test_a_window_attends_to_no_more_than_itself() -> None:
    sparse = check(settings("sparse", batch_size=8), 8)
    work, shape = work_of(sparse), sparse.model
    assert isinstance(shape, DecoderSettings) and shape.layers == 4  # three windows of 64, and one of the context
    assert work.attended == (3 * 64 + shape.context_length) * shape.embedding_size


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: ", ".join(map(str, shape.values())))
def test_what_is_kept_for_backward_is_what_autograd_keeps(shape: dict[str, Any], low: torch.dtype) -> None:
    """Each part's bytes by formula, against the storages that autograd saves of a model that really runs."""
    made = typed({"model": {**PARTS, **shape}, "training": {}}).model
    assert isinstance(made, DecoderSettings)
    kept = [saved(replace(made, layers=layers), low) for layers in (1, 3)]
    tokens = 2 * made.context_length
    block = sum(kept_by_block(made, low.itemsize).values())
    assert (kept[1] - kept[0]) / 2 / tokens == pytest.approx(block, rel=0.02)
    # Beside the blocks: the loss over a large vocabulary keeps its gradient out of autograd's sight, 4 bytes a channel;
    # over a small one all logits and their logarithms.
    beside = kept_beside(made, low.itemsize)
    beside += FLOAT * made.vocabulary_size if made.vocabulary_size < 1024 else -FLOAT * made.embedding_size
    assert kept[0] / tokens - block == pytest.approx(beside, rel=0.15)


def saved(shape: Any, low: torch.dtype) -> int:
    """Bytes of all storages that autograd keeps in a forward pass, but for parameters and their copies."""
    torch.manual_seed(1)
    model = build_model(shape).train()
    tokens = torch.randint(shape.vocabulary_size, (2, shape.context_length))
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    weights = {tuple(parameter.shape) for parameter in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.dim() == 2 and (tuple(tensor.shape) in weights or tuple(tensor.T.shape) in weights)
        if tensor.untyped_storage()._cdata not in own and not (copy and tensor.dtype is low):
            found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=low is torch.bfloat16)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_gpt2s_block_keeps_40_bytes_a_channel() -> None:
    """Korthikanti et al.'s 34 without dropout's 2, and 8 for what is kept otherwise here."""
    work = work_of(settings("gpt2"))
    small = 2 * 8 + FLOAT * 12  # means and deviations of two norms, a sum for each head
    assert sum(work.kept.values()) == 40 * work.width + small


@pytest.mark.parametrize("kind", ["gpt", "modern"])
def test_muons_arithmetic_is_that_of_its_products(kind: str, small_settings) -> None:
    shape = small_settings(kind)
    model = build_model(shape)
    there = [p.shape for p in model.blocks[0].parameters() if p.dim() == 2]
    assert sorted(matrices(shape)) == sorted(map(tuple, there))
    for rows, columns in matrices(shape):
        counter = FlopCounterMode(display=False)
        with counter:
            orthogonalized(torch.randn(1, rows, columns))
        assert newton_schulz(rows, columns) == counter.get_total_flops()


# ---- memory ----


def test_ddp_has_everything_on_every_card_and_fsdp_its_share(xl: ClusterPlan) -> None:
    ddp, fsdp = xl.ways[:2]
    states = ("parameters", "gradients", "optimizer")
    assert sum(ddp.memory[name] for name in states) == 16 * GPT2["gpt2-xl"]  # Rajbhandari et al. 2020, in float32
    assert sum(fsdp.memory[name] for name in states) == 16 * GPT2["gpt2-xl"] / 8
    assert sum(xl.parameters.values()) == GPT2["gpt2-xl"]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("preset", ["gpt2", "gpt2-xl", "default"])
def test_the_largest_micro_batch_is_the_largest(preset: str, card: str) -> None:
    plan = planned(settings(preset, batch_size=64), 8, card)
    work = work_of(check(settings(preset, batch_size=64), 8))
    cluster = Cluster(work, CARDS[card], 8, plan.windows // 8)
    for way in plan.ways:
        most = way.largest_micro_batch

        def total(windows: int, way: Way = way) -> int:
            return sum(cluster.memory(way.parallel, way.gradient_checkpointing, windows).values())

        assert way.fits == (most > 0) == (way.total_memory <= plan.memory_limit)
        assert total(most + 1) > plan.memory_limit
        assert most == 0 or total(most) <= plan.memory_limit
        assert way.micro_batch * way.accumulation_steps * 8 == plan.windows
        assert way.micro_batch <= max(1, most)


def test_recomputing_is_offered_where_it_alone_fits() -> None:
    shape = {"layers": 72, "embedding_size": 3072, "heads": 24, "context_length": 4096}
    wide = typed(layered("gpt2-xl", flags={"model": shape, "training": {"batch_size": 8, "accumulation_steps": 8}}))
    plan = planned(wide, 8, "a100-40gb")
    assert [way.name for way in plan.ways] == ["ddp", "fsdp", "fsdp, checkpointed"]
    assert [way.fits for way in plan.ways] == [False, False, True]
    assert plan.best == plan.ways[-1] and plan.ways[0].days is None
    asked = planned(replace(wide, training=replace(wide.training, gradient_checkpointing=True)), 8, "a100-40gb")
    assert [way.name for way in asked.ways] == ["ddp, checkpointed", "fsdp, checkpointed"]
    assert asked.ways[-1] == plan.ways[-1]


def test_recomputed_blocks_keep_what_the_engine_keeps_of_them() -> None:
    """Against what autograd saves of recomputed blocks, in float32 (inspection/size.py measures it)."""
    shape = settings("gpt2").model
    kept = size_of(shape).recomputed_window_bytes / shape.context_length
    assert isinstance(shape, DecoderSettings)
    assert kept == pytest.approx(shape.layers * FLOAT * shape.embedding_size, rel=0.1)


# ---- time ----


def by_hand(**changes: Any) -> Work:
    """Round numbers, so that sums can be done by hand."""
    numbers: dict[str, Any] = {
        "parameters": {"all": 1_000_000_000}, "multiplied": 1_000_000_000, "attended": 0, "optimizer": 2_000_000_000,
        "orthogonalizing": 0, "blocks": 10, "block": 90_000_000, "width": 4096, "context": 1000, "vocabulary": 50_000,
        "kept": {"all": 1000}, "kept_beside": 10,
    }  # fmt: skip
    return Work(**numbers | changes)


def test_a_step_is_its_parts_added_up() -> None:
    card = replace(CARDS["h100"], peak=1e15, bandwidth=1e12, link=1e11, shares={4096: 0.5})
    ddp = Way("ddp", False, {}, True, 2, 4, 2)
    found = Cluster(by_hand(), card, 8, 8, clips=False).seconds(ddp)
    assert found["computing"] == pytest.approx(8 * 1000 * 6e9 / 5e14)  # 8 windows of 1,000 tokens, 6 N, half the peak
    assert found["optimizer"] == pytest.approx(28e9 / (REACHED * 1e12))  # 28 bytes a parameter: AdamW
    exchange = 2 * 7 / 8 * 4e9 / (REACHED * 1e11)  # a ring of 8 over float32 gradients
    backward = 2 / 3 * 2 * 1000 * 6e9 / 5e14  # of the last of 4 micro-batches
    assert found["exchange"] == pytest.approx(exchange - backward)
    clipped = Cluster(by_hand(), card, 8, 8, clips=True).seconds(ddp)["optimizer"]
    assert clipped - found["optimizer"] == pytest.approx(12e9 / (REACHED * 1e12))
    fsdp = Cluster(by_hand(), card, 8, 8, clips=False).seconds(replace(ddp, parallel="fsdp"))
    gather, scatter = 7 / 8 * 2e9 / (REACHED * 1e11), 7 / 8 * 4e9 / (REACHED * 1e11)
    assert fsdp["exchange"] == pytest.approx(4 * (gather - backward / 2 + gather + scatter - backward))
    assert fsdp["optimizer"] == pytest.approx(found["optimizer"] / 8)
    again = Cluster(by_hand(), card, 8, 8, clips=False).seconds(replace(ddp, gradient_checkpointing=True))
    assert again["computing"] == pytest.approx(4 / 3 * found["computing"])


def test_one_card_exchanges_nothing_and_a_faster_link_hides_all() -> None:
    (one, *_), shape = planned(settings("gpt2"), 1).ways, settings("gpt2")
    assert one.name == "one card" and "exchange" not in one.memory and one.seconds is not None
    assert one.seconds["exchange"] == 0
    ddp = planned(shape, 8).ways[0]
    assert ddp.seconds is not None and ddp.seconds["exchange"] == 0
    slow = planned(shape, 8, "rtx-4090").ways[1]
    assert slow.fits and slow.seconds is not None
    assert slow.tokens_per_second == pytest.approx(120 * 1024 / sum(slow.seconds.values()))


def test_copies_are_recommended_for_a_small_model_where_parts_gain_little(xl: ClusterPlan) -> None:
    small = planned(settings("gpt2"), 8)
    for plan, wanted in ((small, "ddp"), (xl, "fsdp")):
        fastest = min(plan.ways, key=lambda way: way.days or math.inf)
        assert fastest.parallel == "fsdp" and plan.best is not None and plan.best.parallel == wanted
        assert (plan.best.days or math.inf) * 0.95 <= (fastest.days or 0)
    slow = planned(settings("gpt2-xl", batch_size=16), 16, network=25)
    assert slow.best is not None and slow.best.seconds is not None and slow.best.seconds["exchange"] > 1
    assert planned(settings("gpt2-xl"), 8, network=25).ways == xl.ways  # one machine has no network between


def test_the_fewest_cards_on_which_it_fits() -> None:
    shape = settings("gpt3", batch_size=576, accumulation_steps=1)
    enough = planned(shape, 8).enough
    assert enough % 8 == 0 and not any(way.fits for way in planned(shape, enough - 8).ways)
    fitting = planned(shape, enough).ways[-1]
    assert fitting.fits and fitting.gradient_checkpointing
    assert planned(settings("gpt2"), 8).enough == 1


def test_days_and_dollars_follow_from_the_step(xl: ClusterPlan) -> None:
    assert (xl.steps, xl.tokens, xl.chinchilla) == (600_000, 600_000 * 120 * 1024, False)
    for way in xl.ways:
        assert way.seconds is not None and way.days is not None
        assert way.days == pytest.approx(600_000 * sum(way.seconds.values()) / 86400)
        assert way.cost == pytest.approx(8 * 24 * way.days * CARDS["h100"].price)
        used = xl.tokens * xl.flops_per_token / (way.days * 86400) / (8 * xl.peak)
        assert way.utilization == pytest.approx(used) and way.utilization <= xl.share
    dear = planned(settings("gpt2-xl"), 8, price=10).ways[0]
    assert dear.cost == pytest.approx(10 * 8 * 24 * (dear.days or 0))


def test_the_length_is_what_the_settings_say_or_20_tokens_a_parameter() -> None:
    tokens = planned(settings("gpt2", tokens=10**9, steps=0), 8)
    assert 10**9 <= tokens.tokens < 10**9 + 120 * 1024 and not tokens.chinchilla
    open_ended = planned(settings("default"), 8)
    assert open_ended.chinchilla
    assert open_ended.tokens == pytest.approx(20 * sum(open_ended.parameters.values()), rel=0.01)


@pytest.mark.parametrize("card", CARDS)
def test_the_share_of_the_peak_grows_with_the_width_as_far_as_it_was_measured(card: str) -> None:
    shares = [CARDS[card].share(width) for width in (8, 64, 256, 512, 768, 1024, 1280, 1536, 2048, 4096)]
    assert shares == sorted(shares) and 0 < shares[0] < 0.01 and shares[-1] < 0.7
    assert CARDS[card].share(10**6) == CARDS[card].shares[max(CARDS[card].shares)]
    for width, share in CARDS[card].shares.items():
        assert CARDS[card].share(width) == pytest.approx(share)


# ---- the command ----


def test_the_table_and_the_command_to_run(desk: Path, quire) -> None:
    said = quire("plan", "--preset", "gpt2-xl", "--devices", "8")
    assert said.code == 0
    lines = said.out.splitlines()
    for name in ("parameters", "gradients", "optimizer", "activations", "exchange", "together", "fits", "a step",
                 "tokens a second", "of the peak (MFU)", "time", "dollars"):  # fmt: skip
        assert any(line.strip().startswith(name) for line in lines), name
    words = shlex.split(lines[-1])
    assert words[:7] == ["torchrun", "--nproc-per-node", "8", "-m", "--", "quire", "train"]
    assert words[7:10] == ["TEXT", "--preset", "gpt2-xl"] and words[-2:] == ["--parallel", "fsdp"]


def test_json_has_every_number_and_each_command(desk: Path, quire) -> None:
    words = ["book.txt", "--preset", "gpt2", "--devices=16", "--batch-size", "32", "--card=h200", "--price", "2"]
    said = quire("plan", *words, "--json")
    assert said.code == 0 and said.out.count("\n") == 1
    found = json.loads(said.out)
    assert (found["devices"], found["nodes"], found["card"], found["price"]) == (16, 2, "h200", 2)
    for way in found["ways"]:
        assert way["total_memory"] == sum(way["memory"].values()) <= found["memory_limit"]
        command = shlex.split(way["command"])
        assert command[:3] == ["torchrun", "--nnodes", "2"] and "book.txt" in command
        given = {name: command[command.index(name) + 1] for name in ("--batch-size", "--accumulation-steps")}
        assert int(given["--batch-size"]) * int(given["--accumulation-steps"]) == found["windows"] == 320
        assert not {"--devices=16", "--card=h200", "--price", "--json", "TEXT"} & set(command)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--preset gpt2 --devices 8 --card a100", "--card 'a100' is not known. .* Choices: a100-40gb"),
        ("--preset gpt2 --devices -1", "--devices must be from 1 to 65536"),
        ("--preset gpt2 --devices 1000000000000", "--devices must be from 1 to 65536"),
        ("--preset gpt2 --devices 16 --network 0", "--network must be the gigabits a second"),
        ("--preset gpt2 --devices 8 --pairs reverse", "Leave out --pairs"),
        ("--preset gpt2 --devices 12", "--devices 12 is no multiple"),
        ("--preset gpt2 --devices 8 --price -1", "--price must be the dollars"),
        ("--preset gpt2 --devices 8 --price nan", "--price must be the dollars"),
        (
            "--preset gpt2 --devices 7",
            "120 windows .* cannot be shared evenly among 7 cards. .* --accumulation-steps 17",
        ),
        ("--preset lstm --devices 8", "plans for decoders .* not for a recurrent model"),
        ("--preset ngram --devices 8", "plans for decoders .* not for an ngram model"),
        ("--preset gpt2 --devices 8 --minutes 5", "give --tokens or --steps, no --minutes"),
        ("--preset gpt2 --devices 8 --epochs 2", "Give --tokens or --steps, no --epochs"),
        ("--preset gpt2 --devices 8 --precision float32", "Leave out --precision"),
        ("--preset gpt2 --devices 8 --engine manual", "Leave out .* --engine"),
        ("--preset gpt-mini --devices 8", "Give --model.vocabulary-size N"),
        ("--card h200 book.txt", "--card says of which cards"),
        ("--network 25 book.txt", "--network says of which cards"),
    ],
)
def test_mistakes_get_a_sentence(words: str, sentence: str, desk: Path, quire) -> None:
    said = quire("plan", *shlex.split(words))
    assert said.code == 2 and not said.out
    assert re.search(sentence, said.plain), said.plain


def test_what_fits_nowhere_is_said(desk: Path, quire) -> None:
    said = quire("plan", "--preset", "gpt3", "--devices", "8")
    assert said.code == 0 and re.search(
        r"It fits in none of these ways. Take a --card with more memory, --devices \d+ \(on so", said.out
    )
    assert "torchrun" not in said.out
    with pytest.raises(UserError, match="--card"):
        planned(settings("gpt2"), 8, "abacus")


# ---- against published runs ----


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """benchmarks/plan_against_published.py as a module."""
    path = ROOT / "benchmarks" / "plan_against_published.py"
    spec = importlib.util.spec_from_file_location("plan_against_published", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_published_runs_are_planned_as_the_results_say(benchmark: Any) -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "plan_against_published.json").read_text())["rows"]
    assert [benchmark.row(run) for run in benchmark.PUBLISHED] == kept


def test_docs_show_the_benchmarks_table_and_no_other_figures(benchmark: Any) -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "plan_against_published.json").read_text())["rows"]
    assert "\n".join(benchmark.table(kept)) in PAGE
    off = sorted(row["hours_off"] for row in kept)
    assert f"from {off[0]:+.0%} to {off[-1]:+.0%}" in PAGE


def test_nanochats_arithmetic_is_what_nanochat_counted(benchmark: Any) -> None:
    (run,) = [run for run in benchmark.PUBLISHED if run.operations]
    work, _ = benchmark.work_for(run)
    planned_operations = work.flops_per_token * run.steps * run.windows * work.context
    assert planned_operations == pytest.approx(run.operations, rel=1e-3)
    assert f"{planned_operations / run.operations - 1:+.3%}" in PAGE


def test_docs_list_the_cards_and_the_constants() -> None:
    for name, card in CARDS.items():
        assert f"| {name} | {card.peak / 1e12:g} | {card.memory / 1e9:.1f} | {card.price:.2f} |" in PAGE
    assert f"reserved: {RESERVED:.0%} of the card" in PAGE and f"by {REACHED:.0%} of memory's bandwidth" in PAGE
    assert f"({NETWORK:,g} each, as NVIDIA's own do" in PAGE
