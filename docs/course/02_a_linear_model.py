# %% [markdown]
# # 2. A linear model
#
# Chapter 1 *counted* a table of probabilities. This chapter finds the same table by *learning*: it begins with numbers
# that know nothing, and changes them step by step so that the loss goes down. Counting is quicker. But counting works
# for a table only, and learning works for everything that follows.
#
# The method is gradient descent: at each step, ask how the loss would change with each number, and move all of them a
# little the way that makes it smaller (Cauchy 1847).
#
# | symbol | meaning |
# |---|---|
# | N | pairs (a, b) of neighbouring characters that are looked at |
# | V | vocabulary size |
# | X (N, V) | one-hot rows: which character is read |
# | W (V, V) | the weights, which are learned |
# | Z (N, V) | logits: a number for each token that could follow |
# | P (N, V) | probabilities |
# | L | the loss |
# | dX | short for dL/dX: the gradient of the loss by X, of the same shape as X |

# %%
import math

import torch
from course import V, batch, measure, steps, tokenizer, training
from torch import Tensor, nn
from torch.nn.functional import one_hot

from quire.layers.cross_entropy import CrossEntropy
from quire.layers.embedding import Embedding
from quire.layers.layer import recording
from quire.layers.linear import Linear

torch.manual_seed(1)

# %% [markdown]
# ## A row of a table is a product
#
# A linear model multiplies what it reads by a matrix. A character is not a number to be multiplied: id 40 is not twice
# id 20. So it is written as a row of V zeros with a single 1 at the place of its id, "one-hot". Such a row times W is
# one row of W, since every other row is multiplied by 0:
#
#     (x W)_j = sum over i of x_i W_ij = W_aj   where x is 1 at a
#
# A linear model on one-hot rows *is* a table.

# %%
W = torch.randn(V, V)
a = tokenizer.encode("e")[0]
x = one_hot(torch.tensor(a), V).float()  # (V): zeros, and a 1 at a
assert torch.equal(x @ W, W[a])

# %% [markdown]
# ## From any numbers to probabilities
#
# A row of W may hold any numbers. Probabilities must be positive and add up to 1. Softmax does that: make each number
# positive by e^z, then divide by their sum. The numbers z that go in are called logits.
#
#     p_j = e^(z_j) / sum over k of e^(z_k)
#
# The loss L is that of chapter 1, the mean of -log p(b given a) over the pairs.


# %%
def forward(X: Tensor, b: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of N pairs, and the probabilities P (N, V)."""
    Z = X @ W  # (N, V)
    E = Z.exp()
    P = E / E.sum(1, keepdim=True)
    L = -P[torch.arange(len(b)), b].log().mean()
    return L, P


W = torch.zeros(V, V, dtype=torch.float64)
X, b = one_hot(training[:500], V).double(), training[1:501]  # 500 pairs
L, P = forward(X, b, W)
print(f"all weights 0, all tokens alike: {L.item():.3f} nats, and log V = {math.log(V):.3f}")
assert math.isclose(L.item(), math.log(V))

# %% [markdown]
# ## The gradient
#
# Follow the loss back to the weights, one line of `forward` at a time. Chapter 3 derives the first step, through the
# logarithm and softmax; its result is simple enough to be used before it is derived. For one pair,
#
#     dL/dz_j = p_j - [j is b]
#
# where [j is b] is 1 if j = b, else 0: the probability that the model gave, minus what it should have given. For the
# mean of N pairs, divide by N.
#
# The second step goes through Z = X W. The weight W_ij enters only column j of Z, and there it is multiplied by X_ni:
#
#     dL/dW_ij = sum over n of dL/dZ_nj X_ni,   that is   dW = X^T dZ
#
# This line, the gradient of a matrix product, returns in every chapter.


# %%
def backward(X: Tensor, b: Tensor, P: Tensor) -> Tensor:
    """dW (V, V), given what `forward` read and found."""
    dZ = (P - one_hot(b, V)) / len(b)  # (N, V)
    return X.T @ dZ


dW = backward(X, b, P)

# %% [markdown]
# Is it right? Ask the definition: nudge one weight up and down by a small h, and see how much the loss changes.
#
#     dL/dW_ij is about (L(W_ij + h) - L(W_ij - h)) / 2h

# %%
h = 1e-5
for i, j in (training[0], training[1]), (training[3], training[9]):
    up, down = W.clone(), W.clone()
    up[i, j] += h
    down[i, j] -= h
    nudged = ((forward(X, b, up)[0] - forward(X, b, down)[0]) / (2 * h)).item()
    print(f"dL/dW[{i}, {j}]: derived {dW[i, j].item():+.10f}, nudged {nudged:+.10f}")
    assert math.isclose(dW[i, j].item(), nudged, abs_tol=1e-9)

# %% [markdown]
# ## Quire's layers do the same, twice
#
# `Linear` is y = x W^T + b; its weight is stored as (outputs, inputs), so ours is its transpose, and there is no b.
# Inside `recording`, a layer keeps what its gradient needs; `backward` then takes the gradient by its output, adds to
# `.grad` of its weights, and returns the gradient by its input.
#
# `Embedding` takes ids instead of one-hot rows and looks the rows up: the same numbers without V multiplications by 0
# for each. Its gradient is X^T dZ too, done as it is meant: each row of dZ is *added* to the row of W that was read.

# %%
linear, embedding, cross_entropy = Linear(V, V, bias=False).double(), Embedding(V, V).double(), CrossEntropy()
nn.init.zeros_(linear.weight)
nn.init.zeros_(embedding.weight)
with torch.no_grad(), recording(linear), recording(embedding), recording(cross_entropy):
    assert torch.isclose(cross_entropy(linear(X), b), L)
    linear.backward(cross_entropy.backward())
    assert torch.isclose(cross_entropy(embedding(training[:500]), b), L)
    embedding.backward(cross_entropy.backward())
assert torch.allclose(linear.weight.grad.T, dW, atol=1e-12)
assert torch.allclose(embedding.weight.grad, dW, atol=1e-12)
print("Linear on one-hot rows and Embedding on ids: the same loss, the same gradient as by hand")

# %% [markdown]
# ## Where does it end?
#
# Add up the gradient over the whole text for one row a. Every time a was read, the model said the same p(. given a):
#
#     dL/dW_aj = 1/N * (n(a) p(j given a) - n(a, j)) = n(a)/N * (p(j given a) - n(a, j) / n(a))
#
# It is 0 exactly when p(j given a) = n(a, j) / n(a): the table of counts. The factor n(a)/N says how fast a row gets
# there: that of a rare character hardly moves, which is why the learning rate below looks large.
#
# Can descent end elsewhere, and how large may the learning rate be? Both are questions about the second derivatives of
# the loss. For row a they are n(a)/N dp_i/dz_j, and chapter 3 derives dp_i/dz_j = p_i ([i is j] - p_j). Along a
# direction v of length 1 the loss therefore curves by n(a)/N times
#
#     sum over i, j of v_i dp_i/dz_j v_j = sum over i of p_i v_i^2 - (sum over i of p_i v_i)^2
#
# which is the variance of v_i when i is drawn from p. It is never negative: the loss has one valley only. And it is at
# most 1/2, for numbers from a smallest v_i to a largest v_j have a variance of at most (v_i - v_j)^2 / 4, and
# (v_i - v_j)^2 is at most 2 (v_i^2 + v_j^2), hence 2.
#
# In a valley of curvature c, c x^2 / 2, a step takes x to x - rate * c x. That is nearer to the bottom only for a rate
# below 2 / c. The largest n(a)/N is that of the space, the most frequent character.

# %%
share = (training == tokenizer.encode(" ")[0]).double().mean().item()
print(f"{share:.1%} of all characters are spaces: the learning rate is safe below {2 / (share / 2):.0f}")

# %% [markdown]
# ## Training
#
# Not the whole text at each step: a random part of it gives nearly the same gradient for far less work (Robbins and
# Monro 1951). Each step is four lines: forward, backward, move, forget the gradient.

# %%
learning_rate = 20.0
embedding = Embedding(V, V)
nn.init.zeros_(embedding.weight)
count = steps(3000, short=40)
for step in range(count):
    tokens, targets = batch(256)  # (256, 64) each: 16,384 pairs
    with torch.no_grad(), recording(embedding), recording(cross_entropy):
        loss = cross_entropy(embedding(tokens), targets)
        embedding.backward(cross_entropy.backward())
        embedding.weight -= learning_rate * embedding.weight.grad
        embedding.weight.grad = None
    if step % (count // 10) == 0:
        print(f"step {step:5}   loss {loss.item():.3f}")

# %% [markdown]
# ## It ends where counting ended

# %%
counts = torch.bincount(training[:-1] * V + training[1:], minlength=V * V).view(V, V).double()
counted = counts / counts.sum(1, keepdim=True).clamp(min=1)
learned = torch.softmax(embedding.weight.detach().double(), dim=1)

for a in tokenizer.encode("eq ", unknown="skip"):
    print(f"after {tokenizer.name(a)!r}, counted and learned:", end="")
    for j in counted[a].topk(4).indices.tolist():
        print(f"   {tokenizer.name(j)!r} {counted[a, j]:.3f} {learned[a, j]:.3f}", end="")
    print()


def on_training(p: Tensor) -> float:
    """Nats per character on all of the training text."""
    seen = counts > 0
    return -(counts[seen] * p[seen].log()).sum().item() / counts.sum().item()


loss = measure(embedding)
print(f"training text: counted {on_training(counted):.4f}, learned {on_training(learned):.4f} nats per character")
print(f"held-out text: learned {loss:.4f}; counted infinite, or 2.488 with the smoothing of chapter 1")

# %% [markdown]
# The learned table needs no smoothing. A count of 0 would ask for a weight of minus infinity, and descent takes forever
# to get there: having stopped early, it still finds nothing quite impossible.
#
# ## Experiment
#
# Change the line
#
#     learning_rate = 20.0
#
# into
#
#     learning_rate = 200.0
#
# which is above the limit that was computed. What will happen to the loss?
#
# **Answer.** It does not run away, but it never settles. The rows of frequent characters jump across their valley at
# each step: at the end a space after 'e' has the probability 0.709, where counting says 0.293. Rows of rare characters
# gain: 'u' after 'q' is at 0.997 in place of 0.964. Held out, the loss is 2.582 in place of 2.495. One learning rate
# cannot be right for all rows; chapter 10 meets optimizers that give each weight its own.
