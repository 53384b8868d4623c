"""Cards that can be rented: what each can do at best, what share of it trainings reached, what an hour costs.

Data sheets say the best; the shares are published measurements of others. None of it was measured by Quire.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

# How much of a data sheet's bandwidth is reached. NCCL's maintainers put the protocol's overhead on NVLink at about a
# fifth (https://github.com/NVIDIA/nccl-tests/issues/212); memory is taken alike.
REACHED = 0.8
GIB = 2**30
NODE = 8  # cards in one machine
NETWORK = 3200.0  # gigabits a second between machines, of each: 400 for each of its cards, as in NVIDIA's DGX H100


@dataclass(frozen=True)
class Card:
    """A card's data sheet, in operations, bytes and dollars.

    `peak`: operations a second in bfloat16, summed in float32, without sparsity. `link`: bytes a second to its
    neighbours, each way. `shares`: of the peak, that trainings reached, by the channels of their models; these count
    6 operations for each parameter and attention's (Chowdhery et al. 2022, appendix B), and none that are repeated.
    """

    peak: float
    memory: float
    bandwidth: float
    link: float
    price: float  # of an hour
    shares: dict[int, float]

    def share(self, width: int) -> float:
        """The share of the peak that a model of so many channels reaches.

        Between widths by straight lines over the logarithm; above the widest as that, so that nothing is promised
        that nobody measured. Below the narrowest it falls as on the card where that was measured, and below what was
        measured anywhere in proportion to the width, as do the operations for each byte of memory that is moved.
        """
        fall = CARDS["a100-80gb"].shares
        narrowest, bottom = min(self.shares), min(fall)
        if width < narrowest:
            lower = between(fall, width) * min(1, width / bottom)
            return self.shares[narrowest] * lower / between(fall, narrowest)
        return between(self.shares, width)


# Shares on A100 and H100: MosaicML's tables for their MPT models, PyTorch with FSDP and a fused attention kernel, of
# each model the best row with 2,048 tokens and no recomputation
# (https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md). Best, because what is lost
# to exchange and optimizer is counted apart here. On an RTX 4090 29% of an A100's peak was reported for GPT-2 124M
# (https://github.com/karpathy/nanoGPT/issues/182). The L40S is the same silicon with 142 of its multiprocessors where
# that has 128, at the same clock: as many operations by each are assumed.
# Prices on demand: Lambda's nodes of 8 (https://lambda.ai/instances, September 2026), H200 by RunPod
# (https://www.runpod.io/pricing, October 2026), L40S and RTX 4090 by RunPod in SkyPilot's catalogue (September 2026).
# Memory is what torch's out-of-memory errors say that a card has in all, the least of several, in GiB.
# An RTX 4090 has no direct way to its neighbours: what it sends passes through the host's memory, at half of PCIe's.
H100_SHARES = {1536: 0.3789, 2048: 0.4236, 2560: 0.4373, 4096: 0.4644, 5120: 0.3995}
CARDS: dict[str, Card] = {
    "a100-40gb": Card(
        peak=312e12, memory=39.4 * GIB, bandwidth=1.555e12, link=300e9, price=1.99,
        shares={768: 0.4275, 1024: 0.4917, 1536: 0.5289, 2048: 0.5623, 2560: 0.5782},
    ),
    "a100-80gb": Card(
        peak=312e12, memory=79.1 * GIB, bandwidth=2.039e12, link=300e9, price=2.79,
        shares={768: 0.4479, 1024: 0.5162, 1536: 0.5685, 2048: 0.5986, 2560: 0.6211, 4096: 0.6423, 5120: 0.5957},
    ),
    "h100": Card(peak=989e12, memory=79.1 * GIB, bandwidth=3.35e12, link=450e9, price=3.99, shares=H100_SHARES),
    "h200": Card(peak=989e12, memory=139.7 * GIB, bandwidth=4.8e12, link=450e9, price=4.59, shares=H100_SHARES),
    "l40s": Card(peak=362e12, memory=44.3 * GIB, bandwidth=864e9, link=32e9, price=1.09, shares={768: 0.277}),
    "rtx-4090": Card(peak=165.2e12, memory=23.6 * GIB, bandwidth=1.008e12, link=16e9, price=0.74, shares={768: 0.548}),
}  # fmt: skip


def between(shares: dict[int, float], width: int) -> float:
    """The share at a width, by straight lines over its logarithm; beyond the ends as at the end."""
    widths = sorted(shares)
    after = bisect_left(widths, width)
    if after in (0, len(widths)):
        return shares[widths[min(after, len(widths) - 1)]]
    low, high = widths[after - 1], widths[after]
    part = math.log(width / low) / math.log(high / low)
    return (1 - part) * shares[low] + part * shares[high]


def link(card: Card, devices: int, network: float = NETWORK) -> float:
    """Bytes a second, each way, that a ring through all devices has: of the slowest of its links.

    `network`: gigabits a second of a machine, which rings side by side share, one for each of its cards.
    """
    return REACHED * (card.link if devices <= NODE else min(card.link, network * 1e9 / 8))
