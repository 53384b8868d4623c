"""`quire plan --devices` against runs that others published: hours, dollars, and the arithmetic where it was said.

    python benchmarks/plan_against_published.py

Nothing runs but formulas. Each run is given to the plan as Quire would be asked for it: model, windows of a step, steps
and cards, and the price of a card as it was paid then. The constants of the plan are the same for all, and none was
chosen by any of these runs (quire/planning/cards.py says where they come from). docs/planning.md has the table, as
it is printed here.
"""

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quire.planning.cluster import ClusterPlan, check, plan_of
from quire.planning.work import Work, work_of
from quire.training.settings import layered, typed

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 8

# nanochat's model of depth 24 is 24 x 64 channels wide, with heads of 128; it has no positions but rotary ones, no
# biases and no weights in its norms, which Quire's have.
D24 = {
    "kind": "gpt", "vocabulary_size": 32768, "context_length": 2048, "embedding_size": 1536, "layers": 24, "heads": 12,
    "positions": "rotary", "normalization": "rmsnorm", "feedforward": "squared-relu", "bias": False, "qk_norm": True,
    "tied": False,
}  # fmt: skip
D24_WINDOWS = 18 * 1024 + 6 * 2048  # positions that its blocks look at: of every four three half the context
D24_VALUES = 12 * 32768 * 1536  # value embeddings, looked up in every other block; Quire has none


@dataclass(frozen=True)
class Published:
    """A run as its authors tell it; `address` is where. Hours are of training, dollars 0 where none are told."""

    name: str
    preset: str
    card: str
    windows: int  # of a step
    micro_batch: int  # windows that a card takes at once
    steps: int
    hours: float
    price: float  # of a card for an hour
    dollars: float
    address: str
    model: dict[str, Any] = field(default_factory=dict)
    operations: float = 0.0  # of the whole training, where they are told


LLMC = "https://github.com/karpathy/llm.c/blob/f1e2ace/scripts/run_gpt2_{}.sh"
PUBLISHED = [
    Published(
        "nanoGPT, GPT-2 124M", "gpt2", "a100-40gb", 480, 12, 600_000, 4 * 24, 0, 0,
        "https://github.com/karpathy/nanoGPT/blob/3adf61e/README.md",  # "about 4 days"; its config says "~5 days"
    ),
    Published(
        "llm.c, GPT-2 124M", "gpt2", "a100-80gb", 512, 64, 18_865, 94.3 / 60, 14 / 8, 20, LLMC.format("124M"),
    ),
    Published(
        "llm.c, GPT-2 350M", "gpt2-medium", "a100-80gb", 512, 64, 60_000, 13.7, 14 / 8, 200, LLMC.format("350M"),
    ),
    Published(
        "llm.c, GPT-2 774M", "gpt2-large", "a100-80gb", 512, 32, 286_102, 135, 14 / 8, 2000, LLMC.format("774M"),
    ),
    Published(
        "llm.c, GPT-2 124M", "gpt2", "h100", 512, 64, 19_560, 19_560 * 0.139 / 3600, 0, 0,  # 139 ms a step
        "https://github.com/KellerJordan/modded-nanogpt/blob/3ff0383/records/101324_llmc/README.md",
    ),
    Published(
        "llm.c, GPT-2 1558M", "gpt2-xl", "h100", 1024, 16, 32_000, 24, 28 / 8, 672, LLMC.format("1558M"),
    ),
    Published(
        "nanochat, d24", "gpt2", "h100", 256, 16, 16_704, 10_949.46713 / 3600, 3, 73,
        "https://github.com/karpathy/nanochat/blob/92d63d4/dev/LEADERBOARD.md", D24, 4.330784131228946e19,
    ),
]  # fmt: skip


def work_for(run: Published) -> tuple[Work, Any]:
    """What the run's model asks of a card, and the settings: nanochat's with its windows and its value embeddings."""
    training = {"steps": run.steps, "batch_size": run.windows, "accumulation_steps": 1}
    training |= {"optimizer": "muon"} if run.model else {}
    settings = check(typed(layered(run.preset, flags={"model": run.model, "training": training})), DEVICES)
    work = work_of(settings)
    if run.model:
        values = {"value embeddings": D24_VALUES}
        work = replace(
            work,
            attended=work.width * D24_WINDOWS,
            parameters=work.parameters | values,
            optimizer=work.optimizer + 2 * D24_VALUES,
        )
    return work, settings


def row(run: Published) -> dict[str, Any]:
    """One run: what was published, what the plan says, and by how much that is off."""
    work, settings = work_for(run)
    plan: ClusterPlan = plan_of(work, settings, DEVICES, run.card, run.price)
    best = plan.best
    assert best is not None and best.days is not None and best.cost is not None, "each of them was trained"
    hours, dollars = 24 * best.days, best.cost if run.price else 0.0
    told = work.flops_per_token * plan.tokens / run.hours / 3600 / DEVICES / plan.peak
    return {
        "run": run.name, "card": run.card, "devices": DEVICES, "steps": run.steps, "tokens": plan.tokens,
        "published_hours": round(run.hours, 3), "planned_hours": round(hours, 3),
        "hours_off": round(hours / run.hours - 1, 4),
        "published_utilization": round(told, 4), "planned_utilization": round(best.utilization or 0.0, 4),
        "published_dollars": run.dollars, "planned_dollars": round(dollars, 2),
        "published_micro_batch": run.micro_batch,
        "largest_micro_batch": {way.name: way.largest_micro_batch for way in plan.ways},
        "published_operations": run.operations, "planned_operations": float(work.flops_per_token * plan.tokens),
        "way": best.name, "address": run.address,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    lines = [
        "| run, on 8 cards | tokens | hours published | planned | off | MFU published | planned | dollars then"
        " | planned | windows at once, published | the most that fit: ddp, fsdp |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in rows:
        dollars = [f"{found[name]:,.0f}" if found[name] else "-" for name in ("published_dollars", "planned_dollars")]
        most = ", ".join(
            str(found["largest_micro_batch"][way]) for way in ("ddp", "fsdp") if way in found["largest_micro_batch"]
        )
        cells = [
            f"[{found['run']}, {found['card']}]({found['address']})",
            f"{found['tokens'] / 1e9:.1f} G",
            f"{found['published_hours']:.3g}", f"{found['planned_hours']:.3g}", f"{found['hours_off']:+.0%}",
            f"{found['published_utilization']:.0%}", f"{found['planned_utilization']:.0%}",
            *dollars, str(found["published_micro_batch"]), most,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "plan_against_published.json")
    given = parser.parse_args()
    rows = [row(run) for run in PUBLISHED]
    print(*table(rows), sep="\n")
    for found in rows:
        if found["published_operations"]:
            off = found["planned_operations"] / found["published_operations"] - 1
            print(f"{found['run']}: operations of the whole training {off:+.3%} of those published.")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
