# %% [markdown]
# # 4. Embeddings
#
# A sum of tables cannot say "u, but only after q, and only if no u came before": each place speaks for itself. And no
# table knows that A and E have more in common than A and q. Bengio, Ducharme, Vincent and Jauvin ("A Neural
# Probabilistic Language Model", 2003) solved both at once. Each token becomes a short vector that is learned, so that
# tokens used alike may come to lie close together; and a hidden layer with a bend in it combines the vectors of several
# places. It is the pattern of every language model since: embed, combine, predict.
#
# | symbol | meaning |
# |---|---|
# | B, T | batch, time: windows at once, and characters in each |
# | V | vocabulary size |
# | n | characters of context |
# | D | size of a character's vector |
# | H | size of the hidden layer |
# | N | predictions at once, B T |
# | E (V, D) | the embedding: a vector for each character |
# | dx | gradient of the loss by x, of the same shape as x |

# %%
import torch
from course import V, batch, measure, steps, tokenizer, training, write
from torch import Tensor, nn
from torch.nn.functional import pad

from quire.layers.activations import ReLU
from quire.layers.cross_entropy import CrossEntropy
from quire.layers.embedding import Embedding
from quire.layers.layer import Layer, recording
from quire.layers.linear import Linear

torch.manual_seed(1)

# %% [markdown]
# ## The whole model, on a few characters
#
#     ids (N, n)  ->  x = the n vectors, side by side (N, n D)  ->  a = x W1^T + b1  (N, H)
#                 ->  r = max(0, a)  ->  z = r W2^T + b2  (N, V)  ->  softmax, loss
#
# Without the bend, max(0, a), called ReLU, the two matrices would multiply to one, and all would be a linear model
# again.

# %%
n, D, H, N = 3, 4, 5, 8
double = torch.float64
E = torch.randn(V, D, dtype=double)
W1, b1 = torch.randn(H, n * D, dtype=double), torch.randn(H, dtype=double)
W2, b2 = torch.randn(V, H, dtype=double), torch.zeros(V, dtype=double)

ids = torch.stack([training[i : i + n] for i in range(N)])  # (N, n): the contexts
targets = training[n : n + N]  # (N): what follows each
print("contexts and what follows:", [tokenizer.decode([*c, t]) for c, t in zip(ids.tolist(), targets.tolist())])

x = E[ids].flatten(1)  # (N, n D)
a = x @ W1.T + b1  # (N, H)
r = a.clamp(min=0)  # (N, H)
z = r @ W2.T + b2  # (N, V)

# %% [markdown]
# ## Backward: the lines in reverse
#
# **The loss** (chapter 3): dz = (p - q) / N.

# %%
p = torch.softmax(z, dim=1)
dz = p.clone()
dz[torch.arange(N), targets] -= 1
dz /= N

# %% [markdown]
# **A linear layer**, z = r W^T + b. For row m, z_mj = sum over i of r_mi W_ji + b_j. Each of r, W, b has its turn:
#
#     dL/dW_ji = sum over m of dz_mj r_mi    that is   dW = dz^T r     (all rows that W was used on add up)
#     dL/db_j  = sum over m of dz_mj         that is   db = the sum of dz's rows
#     dL/dr_mi = sum over j of dz_mj W_ji    that is   dr = dz W       (all outputs that r_mi went to add up)
#
# The shapes alone leave no other choice: dW must be shaped like W, dr like r.

# %%
dW2, db2, dr = dz.T @ r, dz.sum(0), dz @ W2

# %% [markdown]
# **The bend**, r = max(0, a). Its slope is 1 where a > 0, and 0 elsewhere: what was cut off passes nothing back.

# %%
da = dr * (a > 0)
dW1, db1, dx = da.T @ x, da.sum(0), da @ W1

# %% [markdown]
# **The lookup**, x = E[ids]. A row of E that was read k times has k copies in x, and each of them has its own influence
# on the loss. The row's gradient is the sum of all:
#
#     dE_v = sum over the places where id v stood of dx at that place
#
# Here is a trap. `dE[ids] = dx` looks right, and even runs. But it *assigns*: where an id is repeated, the last one
# overwrites the others. Characters repeat in every batch, so most of the gradient would be lost, without any error: the
# model learns all the same, only worse. `index_add_` adds.

# %%
rows = dx.view(N * n, D)
dE = torch.zeros(V, D, dtype=double).index_add_(0, ids.flatten(), rows)

overwritten = torch.zeros(V, D, dtype=double)
overwritten[ids.flatten()] = rows
different = ids.unique().numel()
print(f"{ids.numel()} places, {different} different characters: assigning keeps {different} gradients of {ids.numel()}")
print(f"and the result is off by {((overwritten - dE).norm() / dE.norm()).item():.0%}")

# %% [markdown]
# Two checks. A nudge of one number of E that was read more than once; and Quire's layers with the same weights, each
# with its own backward pass.


# %%
def loss_of(E: Tensor) -> float:
    z = (E[ids].flatten(1) @ W1.T + b1).clamp(min=0) @ W2.T + b2
    return -torch.log_softmax(z, dim=1)[torch.arange(N), targets].mean().item()


repeated, h = int(ids.flatten().mode().values), 1e-5
nudge = torch.zeros(V, D, dtype=double)
nudge[repeated, 0] = h
nudged = (loss_of(E + nudge) - loss_of(E - nudge)) / (2 * h)
print(f"row of {tokenizer.name(repeated)!r}: derived {dE[repeated, 0].item():+.9f}, nudged {nudged:+.9f}")
assert abs(dE[repeated, 0].item() - nudged) < 1e-8

embed, first, bend, second, cross_entropy = Embedding(V, D), Linear(n * D, H), ReLU(), Linear(H, V), CrossEntropy()
layers = nn.ModuleList((embed, first, bend, second, cross_entropy)).double()
weights = embed.weight, first.weight, first.bias, second.weight, second.bias
with torch.no_grad(), recording(layers):
    for weight, ours in zip(weights, (E, W1, b1, W2, b2)):
        weight.copy_(ours)
    cross_entropy(second(bend(first(embed(ids).flatten(1)))), targets)
    dx_again = first.backward(bend.backward(second.backward(cross_entropy.backward())))
    embed.backward(dx_again.view(N, n, D))
assert all(torch.allclose(weight.grad, derived) for weight, derived in zip(weights, (dE, dW1, db1, dW2, db2)))
print("five gradients by hand, and the same from Quire's layers")


# %% [markdown]
# ## The model
#
# Every place of a window has its own context, the n characters up to it. At the beginning of a window some are missing;
# there stands padding, id 0, whose vector is learned like any other. So a batch of B windows has N = B T predictions.
#
# Weights begin at random. A sum of m products of numbers of size 1 with random weights of size s, of either sign, has
# the size s sqrt(m) (chapter 10 derives it), so s = 1/sqrt(m) keeps it at 1. The bend cuts half of the numbers to 0,
# and with them half of the mean square: hence sqrt(2/m) before it (He et al. 2015).


# %%
class Bengio(Layer):
    """Characters embedded, a hidden layer over n of them, and logits."""

    def __init__(self, n: int, size: int, hidden: int) -> None:
        super().__init__()
        self.n, self.size = n, size
        self.embedding, self.first, self.bend = Embedding(V, size), Linear(n * size, hidden), ReLU()
        self.second, self.cross_entropy = Linear(hidden, V), CrossEntropy()
        nn.init.normal_(self.embedding.weight, std=1.0)
        nn.init.normal_(self.first.weight, std=(2 / (n * size)) ** 0.5)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens (B, T) give logits (B, T, V), or the loss where the tokens that follow are given, targets (B, T)."""
        contexts = pad(tokens, (self.n - 1, 0)).unfold(1, self.n, 1)  # (B, T, n)
        vectors = self.embedding(contexts).flatten(2)  # (B, T, n D)
        z = self.second(self.bend(self.first(vectors)))
        return z if targets is None else self.cross_entropy(z, targets)

    def backward(self) -> None:
        dz = self.cross_entropy.backward()
        dx = self.first.backward(self.bend.backward(self.second.backward(dz)))  # (B, T, n D)
        self.embedding.backward(dx.unflatten(2, (self.n, self.size)))


# %% [markdown]
# ## Training, with momentum
#
# A batch's gradient points downhill only on the whole. Momentum (Polyak 1964) moves along a fading sum v of past
# gradients: what they agree on adds up, what they disagree on cancels.
#
#     v = 0.9 v + gradient,   weight = weight - learning rate * v
#
# The learning rate falls to 0 in a straight line, so that the steps end small. Chapter 10 is about such choices.

# %%
context = 8
model = Bengio(n=context, size=24, hidden=256)
beginning = model.embedding.weight.detach().clone()
weights = list(model.parameters())
velocities = [torch.zeros_like(weight) for weight in weights]
count = steps(1500)
for step in range(count):
    tokens, targets = batch(32)
    learning_rate = 0.2 * (1 - step / count)
    with torch.no_grad(), recording(model):
        loss = model(tokens, targets)
        model.backward()
        for weight, v in zip(weights, velocities):
            v.mul_(0.9).add_(weight.grad)
            weight -= learning_rate * v
            weight.grad = None
    if step % (count // 10) == 0:
        print(f"step {step:5}   loss {loss.item():.3f}")

# %%
loss = measure(model)
print(write(model))
print(f"held-out loss: a sum of 6 tables 2.234, this model with {context} characters {loss:.3f} nats per character")
print(f"{sum(w.numel() for w in weights):,} weights; a table for {context} characters has {V ** (context + 1):.0e}")

# %% [markdown]
# That is a large step from the sum of tables, though not yet below the best table of counts of chapter 1, 1.773 for
# strings of four characters. That table holds 133,293 different strings of five, all it will ever know. This model has
# half as many numbers, has trained for less than a minute, and still improves where it is trained longer.
#
# ## What the vectors have learned
#
# Nobody told the model what a vowel is, or that a capital and its small letter belong together. The vectors began at
# random; what training has added to them is what was learned. For each character, these are the ones to whose vectors
# it has added the most similar thing (the cosine of the angle between the two is largest), among those that occur often
# enough to have learned anything.

# %%
often = torch.bincount(training, minlength=V) >= 1000
learned = model.embedding.weight.detach() - beginning
directions = learned / learned.norm(dim=1, keepdim=True).clamp(min=1e-9)
for character in "aeiotsAB.\n":
    if character in tokenizer.characters:
        cosines = (directions @ directions[tokenizer.encode(character)[0]]).where(often, -1.0)
        nearest = cosines.topk(5).indices.tolist()[1:]
        print(f"{character!r:>5} is near", ", ".join(f"{tokenizer.name(i)!r} ({cosines[i]:.2f})" for i in nearest))

# %% [markdown]
# Vowels have come near vowels, capitals near capitals, and the signs that end a sentence near each other: each of them
# is followed by the same sort of thing, and whatever is learned about one is half learned about the others.
#
# ## Experiment
#
# Change the line
#
#     context = 8
#
# into
#
#     context = 3
#
# How much worse does it become with so much less to go by?
#
# **Answer.** Hardly: 1.877 in place of 1.869. (Three characters, counted and smoothed, gave 1.797.) More context only
# opens the possibility of a better model: five more characters bring 30,720 more weights, each tied to one place, and
# 1,500 steps are few for them. A model that uses the same weights at every place needs fewer: the next chapter.
