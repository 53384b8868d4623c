# %% [markdown]
# # 10. Training well
#
# Chapter 9 had the whole model. How well it learns depends on some ten lines around it: how its weights begin, how a
# gradient becomes a step, how large the steps are and when. This chapter derives each, and then trains the best model
# of the course.
#
# | symbol | meaning |
# |---|---|
# | B, T | batch, time: windows at once, and positions in a window |
# | V | vocabulary size; in the section on Muon a matrix of directions |
# | L | blocks |
# | w_t, g_t | the weights at step t, and the gradient by them |
# | a | the learning rate |
# | m_t, v_t | running means of g and of g^2; b1, b2 how slowly they forget |
# | G = U S V^T | a matrix's gradient as directions U, V and strengths S |

# %%
import math

import torch
from course import T, V, held_out, measure, steps, training, write
from torch import Tensor, nn

from quire.data.batches import Batch
from quire.models.gpt import GPT, GPTSettings
from quire.training.engines import ENGINES
from quire.training.muon import Muon, newton_schulz
from quire.training.optimizers import split_matrices
from quire.training.schedules import cosine, warmed_up

torch.manual_seed(1)


def build(layers: int = 3, dropout: float = 0.0) -> GPT:
    """Chapter 9's GPT with rotary positions (chapter 7), max(0, a)^2 for its bend, which is as good as GELU and faster,
    and queries and keys that pass an RMS norm before they meet, so that no score grows wild (Henry et al. 2020)."""
    shape = {"context_length": T, "embedding_size": 64, "layers": layers, "heads": 4, "tied": False}
    parts = {"positions": "rotary", "feedforward": "squared-relu", "qk_norm": True, "initialization": "zero-output"}
    settings = GPTSettings(vocabulary_size=V, dropout=dropout, **shape, **parts)
    model = GPT(settings)
    nn.init.normal_(model.token_embedding.weight, std=0.3)
    return model


def draw(size: int, text: Tensor = training) -> Batch:
    """Windows from anywhere in a text, as Quire's engines take them."""
    places = torch.randint(len(text) - T, (size, 1)) + torch.arange(T)  # (B, T)
    return Batch(text[places], text[places + 1], counted=size * T)


# %% [markdown]
# ## Where to begin
#
# A linear map's output is a sum over its inputs, y = sum over i of w_i x_i. If weights and inputs are independent with
# mean 0, the variances of the products add up:
#
#     var(y) = inputs * var(w) * var(x)      which is var(x) when var(w) = 1 / inputs
#
# So weights begin with a deviation of 1 / sqrt(inputs). Much smaller, and layer after layer the signal shrinks. Much
# larger, and attention begins sharp and the logits wild.
#
# The stream is a sum of 2 L parts, and these variances add up too. GPT-2 divides the last weights of each part by
# sqrt(2 L), so that the sum of all has the size of one (Radford et al. 2019). One can go further and begin them at
# zero: each block then begins as the identity, and a part grows as soon as it is of use. Its gradient is not zero, for
# in dW = dy^T x only the part's input x counts. That is `zero-output` above. Embeddings begin at 0.3: not so small that
# they are drowned by what is added to them.
#
# The first loss tells whether the end is right, too. A model that knows nothing should say so, with a loss of log V.
# Here is one whose head begins at 0, as `zero-output` has it, and others with larger and larger heads.

# %%
windows = draw(16)
print(f"log V = {math.log(V):.3f}")
for deviation in 0.0, 0.02, 64**-0.5, 1.0:
    model = build()
    nn.init.normal_(model.head.weight, std=deviation)
    with torch.no_grad():
        print(f"a head of deviation {deviation:<5.3g}  first loss {model(windows.inputs, windows.targets).item():.3f}")

# %% [markdown]
# A model that begins with a loss far above log V has to unlearn first what it never should have believed.
#
# ## From gradient to step: Adam
#
# Plain descent is w = w - a g. One learning rate must do for all weights, but their gradients differ a thousandfold:
# the row of a rare character hardly ever receives one. Two ideas make Adam (Kingma and Ba 2015).
#
# *Average.* A batch's gradient is the true one plus noise. A running mean has less of it:
#
#     m_t = b1 m_(t-1) + (1 - b1) g_t
#
# *Divide by the usual size.* Keep a running mean of g^2 too, for each weight on its own, and divide by its root. A step
# is then about as large as a, whether gradients are large or small:
#
#     v_t = b2 v_(t-1) + (1 - b2) g_t^2
#     w_t = w_(t-1) - a m_t / (sqrt(v_t) + epsilon)
#
# One thing is wrong: m and v begin at 0, and remember it. Written out,
#
#     m_t = (1 - b1) (g_t + b1 g_(t-1) + ... + b1^(t-1) g_1)
#
# If all g have the same mean G, the mean of m_t is (1 - b1) (1 + b1 + ... + b1^(t-1)) G = (1 - b1^t) G. So m_t is too
# small by a known factor: divide by 1 - b1^t, and v_t by 1 - b2^t.
#
# *Weight decay.* To keep weights small one used to add a term to the loss, whose gradient is d w. In Adam that would be
# divided by sqrt(v) with the rest, and weights with large gradients would decay least. Loshchilov and Hutter (2019)
# take it out of the gradient: w = w - a d w, beside the step. With this it is AdamW. Quire decays matrices only. A bias
# or a norm's weight has no reason to be near 0.


# %%
class AdamW:
    def __init__(self, model: nn.Module, decay: float = 0.1, b1: float = 0.9, b2: float = 0.99) -> None:
        self.decay, self.b1, self.b2, self.t = decay, b1, b2, 0
        self.weights = list(model.parameters())
        self.m = [torch.zeros_like(w) for w in self.weights]
        self.v = [torch.zeros_like(w) for w in self.weights]

    @torch.no_grad()
    def step(self, a: float) -> None:
        self.t += 1
        for w, m, v in zip(self.weights, self.m, self.v):
            m.mul_(self.b1).add_((1 - self.b1) * w.grad)
            v.mul_(self.b2).add_((1 - self.b2) * w.grad**2)
            m_hat, v_hat = m / (1 - self.b1**self.t), v / (1 - self.b2**self.t)
            if w.dim() == 2:
                w -= a * self.decay * w
            w -= a * m_hat / (v_hat.sqrt() + 1e-8)
            w.grad = None


ours, theirs = build(layers=1), build(layers=1)
theirs.load_state_dict(ours.state_dict())
adamw = AdamW(ours)
groups = [
    {"params": [w for w in theirs.parameters() if w.dim() == 2], "weight_decay": 0.1},
    {"params": [w for w in theirs.parameters() if w.dim() != 2], "weight_decay": 0.0},
]
torchs = torch.optim.AdamW(groups, lr=0.003, betas=(0.9, 0.99))
before = ours.head.weight.detach().clone()
for step in range(5):
    windows = draw(4)
    for model in ours, theirs:  # forward and backward as in the chapters before, in one call: see "Two engines" below
        ENGINES["manual"].backpropagate(model, windows, 1.0)
    adamw.step(0.003)
    torchs.step()
    torchs.zero_grad()
    if step == 0:
        moved = (ours.head.weight - before * (1 - 0.003 * 0.1)).abs() / 0.003
        print(f"first step: the median weight of the head moved by {moved.median():.3f} learning rates")
assert all(torch.allclose(w, u, atol=1e-5) for w, u in zip(ours.parameters(), theirs.parameters()))
print("five steps: our AdamW and torch's come to the same weights")

# %% [markdown]
# ## Warm-up and decay
#
# Look at that first step. With one gradient seen, m_hat = g and v_hat = g^2, so that m_hat / sqrt(v_hat) is the sign of
# g: *every* weight moves by the whole learning rate, also where its gradient is nothing but noise. Until v has seen
# some dozens of gradients steps should be small. So the learning rate rises from 0 in a straight line, the *warm-up*.
#
# At the end it falls. Near a minimum each step overshoots by something like a times the noise of the gradient; with a
# constant a the weights keep jumping around in a ball of that size. Shrink a, and they settle. Half a cosine wave
# spends much of the run at high rates and ends softly (Loshchilov and Hutter 2017):
#
#     a(t) = peak * min(1, (t + 1) / (warm-up + 1)) * (1 + cos(pi t / steps)) / 2


# %%
def share(step: int, count: int, warmup: int) -> float:
    """The learning rate as a share of its peak."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    return rise * (1 + math.cos(math.pi * step / count)) / 2


for step in range(1000):
    assert math.isclose(share(step, 1000, 50), warmed_up(cosine, step, 50, step / 1000, 0.0, 0.0))
print("share of the peak:", {step: round(share(step, 1000, 50), 2) for step in (0, 10, 25, 50, 250, 500, 750, 999)})

# %% [markdown]
# ## Batch size
#
# A batch's gradient is a mean over B windows drawn at random. The mean of B independent draws has 1/B of their
# variance: four times the windows, half the noise. At some size the noise is small beside the gradient itself, and a
# larger batch buys nothing more (McCandlish et al. 2018). Before that, it allows larger steps.


# %%
def gradient(model: nn.Module, size: int, parts: int = 1) -> Tensor:
    """The gradient of a batch as one long vector; in `parts`, each of which gives its share."""
    model.zero_grad()
    for part in draw(size).split(parts):
        ENGINES["manual"].backpropagate(model, part, scale=1 / parts)
    return torch.cat([w.grad.flatten() for w in model.parameters()])


mean = torch.stack([gradient(ours, 64) for _ in range(8)]).mean(0)
for size in 1, 4, 16, 64:
    noise = torch.stack([(gradient(ours, size) - mean).norm() for _ in range(8)]).mean()
    print(f"B = {size:>2}: the noise is {noise / mean.norm():.2f} times as long as the gradient")

# %% [markdown]
# Each row is about half of the one before. What does not fit into memory at once can be added up: the gradient of a
# mean is the mean of the gradients, so each part's counts 1 / parts. That is what an engine's `scale` is for.

# %%
torch.manual_seed(2)
whole = gradient(ours, 16)
torch.manual_seed(2)  # the same windows again
assert torch.allclose(whole, gradient(ours, 16, parts=4), atol=1e-5)

# %% [markdown]
# ## Two engines
#
# Who fills in `.grad`? In this course it was always the backward passes written by hand; in Quire that is the engine
# "manual". The engine "autograd" lets PyTorch record the forward and find the derivatives by itself. Everything else,
# optimizer, schedule, clipping (chapter 5), never learns which it was. Here are both, from the same weights, with the
# same batches:

# %%
losses: dict[str, list[float]] = {}
for engine in "manual", "autograd":
    torch.manual_seed(3)
    model = build()
    adamw = AdamW(model)
    losses[engine] = []
    for _ in range(5):
        loss = ENGINES[engine].backpropagate(model, draw(8), 1.0)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step(0.003)
        losses[engine].append(loss.item())
    print(f"{engine:<9}", [round(loss, 5) for loss in losses[engine]])
assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(losses["manual"], losses["autograd"]))

# %% [markdown]
# ## Learning by heart
#
# A model with enough weights can learn its text by heart. On a text of 5,000 characters that is soon seen: the loss on
# the text itself falls on and on, and the one on held-out text turns and rises.
#
# Two things help against it. Weight decay keeps weights small where the text does not insist. *Dropout* (Srivastava et
# al. 2014) zeroes each number with probability p while training, and multiplies the others by 1 / (1 - p), so that the
# mean stays: no part can rely on another one being there, and what is learned has to be spread. Its gradient is zeroed
# and multiplied in the same places. The best remedy is more text; the second best is to stop in time.

# %%
few = training[:5_000]
rest = held_out[: (len(held_out) - 1) // T * T + 1]
some_held_out = Batch(rest[:-1].view(-1, T)[:200], rest[1:].view(-1, T)[:200], counted=200 * T)


def loss_on(model: GPT, windows: Batch) -> float:
    model.eval()  # without dropout
    with torch.no_grad():
        loss = model(windows.inputs, windows.targets).item()
    model.train()
    return loss


print(f"{len(few):,} characters; losses on them / held out")
for name, dropout, decay in ("neither", 0.0, 0.0), ("weight decay 1", 0.0, 1.0), ("dropout 0.3", 0.3, 0.0):
    torch.manual_seed(4)
    model, seen = build(layers=1, dropout=dropout), []
    adamw = AdamW(model, decay=decay)
    count = steps(200, short=8)
    for step in range(count):
        ENGINES["manual"].backpropagate(model, draw(8, few), 1.0)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step(0.004)
        if (step + 1) % (count // 4) == 0:
            seen.append(f"{loss_on(model, draw(64, few)):.2f} / {loss_on(model, some_held_out):.2f}")
    print(f"{name:<15}", "   ".join(seen))

# %% [markdown]
# On this little text the loss on held-out text soon rises and rises. Weight decay holds it back. Dropout slows the
# learning itself, and its held-out loss soon stands still: but it is no lower than what the others had at their best.
#
# ## One step more: Muon
#
# Adam treats a matrix as a heap of numbers. But what a matrix does is to send directions into directions. Write its
# gradient as a sum of such pairs, G = sum over i of s_i u_i v_i^T (the singular value decomposition; the u_i, and the
# v_i, have length 1 and are at right angles to each other). A few s_i are large, and a step along G learns these few
# and hardly the others. Muon (Jordan et al. 2024) takes the same directions, all at the same strength:
#
#     G = U S V^T    becomes    U V^T
#
# Among all matrices M that lengthen no vector, this is the one by which the loss falls fastest. A step against M lowers
# it by the sum over j, k of G_jk M_jk = sum over i of s_i (u_i^T M v_i), in which no term can be larger than s_i; with
# M = U V^T each is as large as that. The momentum takes the place of G, as in Adam.
#
# U V^T is found without a decomposition. As U^T U = 1 and V^T V = 1, M M^T M = U S^3 V^T: products of M with itself act
# on the singular values alone. So
#
#     c1 M + c3 M M^T M + c5 M M^T M M^T M   makes of each s   c1 s + c3 s^3 + c5 s^5
#
# Coefficients that drive every s towards 1 are known, and five rounds will do.
#
# The u_i and v_i of an m by n matrix, m not above n, are m each, so the m n entries of U V^T have squares that sum up
# to m, and a size of about 1 / sqrt(n). Times 0.2 sqrt(n) a step is as large as one of Adam's usually is (Liu et al.
# 2025). Embeddings and the head stay with Adam: their rows belong to single characters, not to directions.


# %%
def orthogonal(G: Tensor) -> Tensor:
    """About U V^T of G = U S V^T."""
    M = G / G.norm()  # no singular value is above 1 now
    for _ in range(5):
        A = M @ M.T
        M = 3.4445 * M - 4.7750 * A @ M + 2.0315 * A @ A @ M
    return M


G = torch.randn(64, 256)
U, S, Vh = torch.linalg.svd(G, full_matrices=False)
s = torch.linalg.svdvals(orthogonal(G))
print(f"singular values were {S.min():.1f} to {S.max():.1f}, and are {s.min():.2f} to {s.max():.2f}, near enough to 1")
assert torch.allclose(orthogonal(G), newton_schulz(G.unsqueeze(0))[0], atol=1e-3)

weight = nn.Parameter(torch.randn(64, 256))
start, m = weight.detach().clone(), torch.zeros_like(weight)
muon = Muon([weight], lr=0.02, weight_decay=0.1, momentum=0.95)
for _ in range(3):
    weight.grad = torch.randn_like(weight)
    m = 0.95 * m + 0.05 * weight.grad
    ahead = 0.95 * m + 0.05 * weight.grad  # Nesterov: the mean as it will be if the gradient goes on like this
    start = start * (1 - 0.02 * 0.1) - 0.02 * 0.2 * math.sqrt(256) * orthogonal(ahead)
    muon.step()
assert torch.allclose(weight, start, atol=1e-4)
print("three steps: Quire's Muon and these lines come to the same weights")

# %% [markdown]
# ## The run
#
# The whole text is two hundred times as long, and a model of this size does not learn it by heart in so few steps. So
# there is no dropout, and a little weight decay; there are warm-up, cosine and clipping; Muon for the matrices of the
# blocks, and AdamW (torch's, which came to the same weights as ours) for the rest.

# %%
torch.manual_seed(1)
peak, matrix_peak = 0.006, 0.02
model = build()
matrices, rest = split_matrices(model)  # those of the blocks, and all other weights
muon = Muon(matrices, lr=matrix_peak, weight_decay=0.1, momentum=0.95)
adamw = torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
count = steps(1000)
for step in range(count):
    loss = ENGINES["manual"].backpropagate(model, draw(16), 1.0)
    length = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    now = share(step, count, warmup=count // 20)
    muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = matrix_peak * now, peak * now
    muon.step()
    adamw.step()
    model.zero_grad()
    if step % (count // 10) == 0:
        print(f"step {step:5}   loss {loss.item():.3f}   gradient {length:.2f}")

# %%
loss = measure(model)
print(write(model))
print(f"held-out loss: the LSTM of chapter 6 1.720, this model {loss:.3f} nats per character")

# %% [markdown]
# That is just below the LSTM's 1.720, and below all that came before. The next chapter trains two such blocks with
# AdamW alone for as many steps, and comes to 1.857. Steps, batch and learning rates were chosen for two minutes of one
# core. A model that is four times as large and trains for an hour is another matter; that is what `quire train
# --minutes` works out.
#
# ## Experiment
#
# Change the line
#
#     few = training[:5_000]
#
# into
#
#     few = training[:50_000]
#
# Ten times the text, the same model and the same number of steps. Which of the three does best now?
#
# **Answer.** The losses after 50, 100, 150 and 200 steps, on the text and held out:
#
#     neither         2.48 / 2.69   2.31 / 2.61   2.25 / 2.55   2.07 / 2.48
#     weight decay 1  2.48 / 2.69   2.31 / 2.57   2.23 / 2.49   2.06 / 2.46
#     dropout 0.3     2.57 / 2.74   2.44 / 2.70   2.42 / 2.68   2.29 / 2.63
#
# All are far better held out than with a tenth of the text, where the best had 2.88 at any time: nothing helps against
# learning by heart like more text. Weight decay still gains a little. Dropout now only costs: it is a remedy against a
# text that is too small for its model, and without the illness it is no use.
