# %% [markdown]
# # 7. Attention
#
# The LSTM of chapter 6 carries all that it remembers in one vector, step by step. What happened forty characters ago
# has gone through forty updates, and its gradient has to come back through all of them. Attention takes a shorter way:
# a position looks back at *all* earlier ones at once, and gathers what it needs. From any position to any other it is
# one step, forward and backward.
#
# Bahdanau, Cho and Bengio (2015) let a translator look back at the sentence it translates in this way, beside a
# recurrent network. Vaswani et al. (2017) threw the recurrent network out: "Attention is all you need". This chapter is
# their equation 1, derived and differentiated.
#
# | symbol | meaning |
# |---|---|
# | B, T | batch, time: windows at once, and positions (a character each) in a window |
# | V | vocabulary size |
# | C | channels: how many numbers stand for one position |
# | D | size of a query and of a key; here D = C |
# | Q, K, V | queries, keys and values, each (T, D): one row a position. In code `value`, for V is taken |
# | S, W | scores and weights, each (T, T): row t says how position t looks at each position s |
# | dX | gradient of the loss by X, of the same shape as X |

# %%
import math

import torch
from course import T, V, batch, measure, steps, write
from torch import Tensor, nn

from quire.layers.attention import MultiHeadAttention, ScaledDotProductAttention
from quire.layers.cross_entropy import CrossEntropy
from quire.layers.embedding import Embedding
from quire.layers.layer import Layer, recording
from quire.layers.linear import Linear
from quire.layers.positions import LearnedPositions, RotaryPositions, SinusoidalPositions

torch.manual_seed(1)
C = 64

# %% [markdown]
# ## Averaging the past
#
# Begin with the simplest thing that a position could gather: the mean of all vectors up to itself.
#
#     y_t = (x_1 + ... + x_t) / t
#
# A loop does it. So does one product with a matrix W: its row t has 1/t in the first t places, and 0 in the rest.

# %%
x = torch.randn(T, C, dtype=torch.float64)

by_loop = torch.stack([x[: t + 1].mean(0) for t in range(T)])
W = torch.ones(T, T, dtype=x.dtype).tril() / torch.arange(1, T + 1).unsqueeze(1)
assert torch.allclose(by_loop, W @ x)
print("the first rows of W:", W[:4, :4], sep="\n")

# %% [markdown]
# Each row of W is positive and adds up to 1: it is a probability distribution over the positions that may be seen. The
# function that makes such rows from any numbers is softmax. Where all scores are alike it gives the mean, and a score
# of minus infinity gives a weight of exactly 0. That is the *causal mask*: position t must not see what comes after it,
# for that is what it has to predict.


# %%
def visible(n: int) -> Tensor:
    """True where a position (row) may look at a position (column): at itself and at what came before."""
    return torch.ones(n, n, dtype=torch.bool).tril()


S = torch.zeros(T, T, dtype=x.dtype).masked_fill(~visible(T), -math.inf)
assert torch.allclose(torch.softmax(S, dim=-1), W)

# %% [markdown]
# ## Queries, keys and values
#
# A plain mean treats a space like a capital letter. The scores should depend on what stands where. So every position
# makes three vectors of its own, by three linear maps:
#
#     q_t = x_t Wq^T    a query: what do I look for?
#     k_s = x_s Wk^T    a key: what do I have to offer?
#     v_s = x_s Wv^T    a value: what do I hand over if I am chosen?
#
# How well they fit is their dot product. All scores together are one matrix product, and all gathering is another:
#
#     S = Q K^T / sqrt(D),   hidden places -infinity
#     W = softmax of each row of S
#     Y = W V
#
# It is a dictionary lookup made soft. A dictionary compares a key with all that it holds and hands over one value. This
# compares a query with all keys and hands over a mixture. A mixture has a derivative, so the maps can be learned.

# %%
Wq, Wk, Wv = (torch.randn(C, C, dtype=x.dtype) / math.sqrt(C) for _ in range(3))
query, key, value = x @ Wq.T, x @ Wk.T, x @ Wv.T  # (T, D)


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Y (T, D) and the weights W (T, T)."""
    S = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (T, T)
    W = torch.softmax(S.masked_fill(~visible(S.shape[-1]), -math.inf), dim=-1)
    return W @ value, W


y, W = attend(query, key, value)
print("now the rows of W differ in more than their length:", W[:4, :4], sep="\n")

# %% [markdown]
# What lies ahead must not matter. Change the last ten positions: all rows before them stay as they were, to the bit.

# %%
changed = x.clone()
changed[-10:] = torch.randn(10, C, dtype=x.dtype)
y_changed, _ = attend(changed @ Wq.T, changed @ Wk.T, changed @ Wv.T)
assert torch.equal(y[:-10], y_changed[:-10]) and not torch.allclose(y[-10:], y_changed[-10:])

# %% [markdown]
# ## Why divide by sqrt(D)?
#
# Let the components of q and k be independent, with mean 0 and variance 1. Each product q_i k_i then has mean 0 and
# variance 1 too, and variances of independent terms add up:
#
#     q k^T = sum over D terms q_i k_i   has variance D, that is, a standard deviation of sqrt(D)
#
# Divided by sqrt(D), scores have a deviation of 1 at any size. Without it, softmax of large scores puts nearly all
# weight on one position. That alone would be no harm, if the model had chosen it. But the derivative of softmax goes
# to 0 there (chapter 3: dw_s/dS_r = w_s ([s is r] - w_r), where one w is 1 and the others 0), so a random first choice
# could hardly be unlearned.

# %%
print("       scores not divided                       divided by sqrt(D)")
print("   D   deviation  largest weight  |dW/dS|       deviation  largest weight  |dW/dS|")
for D in 4, 16, 64, 256, 1024:
    row = f"{D:>4}"
    for scale in 1.0, math.sqrt(D):
        scores = (torch.randn(500, 1, D) * torch.randn(500, T, D)).sum(-1) / scale  # 500 queries, T keys each
        weights = torch.softmax(scores, dim=-1)
        jacobian = torch.diag_embed(weights) - weights.unsqueeze(-1) * weights.unsqueeze(-2)
        row += f"{scores.std():12.2f}{weights.max(-1).values.mean():16.2f}{jacobian.norm(dim=(1, 2)).mean():9.3f}    "
    print(row)

# %% [markdown]
# Read the rightmost column of each half. Undivided, the larger D, the less comes back through the softmax (from 16 on);
# divided, D makes no difference.
#
# ## Backward
#
# Through Y = W V, which is a matrix product like any other:
#
#     dW = dY V^T        dV = W^T dY
#
# Through softmax, one row at a time, by the line that chapter 3 derived:
#
#     dS_r = w_r (dW_r - sum over s of w_s dW_s),   for all rows at once   dS = W * (dW - sum of W * dW over the row)
#
# where * multiplies element by element. In words: where a value raises the loss more than the mixture does, the
# gradient of its score is positive, and descent lowers the score. A hidden place has w = 0, hence a gradient of 0, and
# needs no case of its own.
#
# Through S = Q K^T / sqrt(D):
#
#     dQ = dS K / sqrt(D)        dK = dS^T Q / sqrt(D)


# %%
def attend_backward(dY: Tensor, query: Tensor, key: Tensor, value: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV, each (T, D)."""
    dW, dV = dY @ value.T, W.T @ dY  # (T, T), (T, D)
    dS = W * (dW - (W * dW).sum(-1, keepdim=True))  # (T, T)
    dS = dS / math.sqrt(query.shape[-1])
    return dS @ key, dS.T @ query, dV


dY = torch.randn_like(y)
by_hand = attend_backward(dY, query, key, value, W)

# %% [markdown]
# Quire's layer does the same for a whole batch of heads at once, (B, H, T, D). And autograd, asked for its opinion,
# agrees with both.

# %%
layer = ScaledDotProductAttention()
with recording(layer):
    from_layer = layer(query[None, None], key[None, None], value[None, None])
    by_layer = layer.backward(dY[None, None])

inputs = [part.clone().requires_grad_() for part in (query, key, value)]
by_autograd = torch.autograd.grad(attend(*inputs)[0], inputs, dY)

assert torch.allclose(from_layer[0, 0], y)
for name, ours, quires, autograds in zip("QKV", by_hand, by_layer, by_autograd):
    assert torch.allclose(ours, quires[0, 0]) and torch.allclose(ours, autograds)
    print(f"d{name}: the largest difference to autograd is {(ours - autograds).abs().max():.1e}")

# %% [markdown]
# ## Attention does not know order
#
# Nothing in these equations says *where* a key stands. Shuffle the past: the keys and values come in another order, and
# so do their weights, and the sum is the same. What the last position gathers cannot tell "dog bites man" from "man
# bites dog".

# %%
order = torch.cat((torch.randperm(T - 1), torch.tensor([T - 1])))  # the past shuffled, the last position left
shuffled = x[order]
y_shuffled, _ = attend(shuffled @ Wq.T, shuffled @ Wk.T, shuffled @ Wv.T)
assert torch.allclose(y_shuffled[-1], y[-1])

# %% [markdown]
# The remedy is to put the place into the vector: x_t = (embedding of the token) + (vector of position t). Vaswani et
# al. (section 3.5) take waves of many lengths, two channels for each frequency f:
#
#     P(t) = (sin t f_1, cos t f_1, sin t f_2, cos t f_2, ...),   f_i = 10000^(-2 (i - 1) / C)
#
# Why a sine and a cosine? Because sin a sin b + cos a cos b = cos(a - b). So the dot product of two such vectors
#
#     P(t) . P(s) = sum over i of cos((t - s) f_i)
#
# depends on the *distance* t - s alone. A query that contains P(t) can ask for "three places before me": to turn each
# pair of channels by the angle -3 f_i is a linear map, and it makes P(t - 3) of P(t).

# %%
P = SinusoidalPositions(C)(torch.arange(T))  # (T, C)
products = P @ P.T
assert torch.allclose(products.diagonal(-3), products[3, 0].expand(T - 3), atol=1e-4)
print("P(t) . P(t - d):", {d: round(float(products[40, 40 - d]), 1) for d in (0, 1, 2, 4, 8, 16)})

y_placed, _ = attend((x + P) @ Wq.T, (x + P) @ Wk.T, (x + P) @ Wv.T)
y_shuffled, _ = attend((shuffled + P) @ Wq.T, (shuffled + P) @ Wk.T, (shuffled + P) @ Wv.T)
assert not torch.allclose(y_shuffled[-1], y_placed[-1], atol=0.01)

# %% [markdown]
# There is another way to the same end, which most models use today: not to add a place, but to *turn* query and key by
# an angle that grows with it (Su et al. 2021). Read two channels as one complex number. Turning by an angle a is
# multiplying by e^(i a), i being the imaginary unit, and the dot product of two such pairs is the real part of q k*,
# where k* is the conjugate. Of the turned ones
#
#     q e^(i t f) (k e^(i s f))* = q k* e^(i (t - s) f)
#
# and again the distance alone is left. Here are one query and one key, put into every place:

# %%
pairs = C // 2
f = 10000.0 ** (-torch.arange(pairs) / pairs)
q, k = x[0].float(), x[1].float()
turns = torch.polar(torch.ones(T, pairs), torch.arange(T).unsqueeze(1) * f)  # e^(i t f), (T, C/2)
q_turned = torch.complex(q[:pairs], q[pairs:]) * turns  # channel i and channel i + C/2 are one number
k_turned = torch.complex(k[:pairs], k[pairs:]) * turns
products = (q_turned @ k_turned.conj().T).real  # (T, T)
assert torch.allclose(products.diagonal(-3), products[3, 0].expand(T - 3), atol=1e-3)

rotary = RotaryPositions(C)
angles = rotary.angles(torch.arange(T))
by_quire = rotary(q.expand(1, T, 1, C), *angles)[0, :, 0] @ rotary(k.expand(1, T, 1, C), *angles)[0, :, 0].T
assert torch.allclose(products, by_quire, atol=1e-3)

# %% [markdown]
# GPT does without a formula and learns one vector for each position below T, like the embedding of a token. So does the
# model below.
#
# ## A language model that looks back
#
# Embedding plus position, one attention, and a linear map to the logits. What attention gathers is *added* to x, so
# that a position keeps what it is itself; chapter 9 says why every Transformer does so. Quire's MultiHeadAttention with
# one head has the three maps and the attention of above, and one more linear map behind it, which chapter 8 explains.
#
# The backward pass is the forward's lines in reverse. Of the sum x + attention(x), x receives both gradients.


# %%
class Looker(Layer):
    """Characters embedded, one attention, and logits."""

    def __init__(self, knows_order: bool) -> None:
        super().__init__()
        self.token_embedding = Embedding(V, C)
        self.positions = LearnedPositions(T, C) if knows_order else None
        self.attention = MultiHeadAttention(C, heads=1, kv_heads=1, head_size=C)
        self.head = Linear(C, V)
        self.cross_entropy = CrossEntropy()
        for module in self.modules():  # so that what comes out is about as large as what went in: see chapter 10
            if isinstance(module, Embedding):
                nn.init.normal_(module.weight)
            elif isinstance(module, Linear):
                nn.init.normal_(module.weight, std=C**-0.5)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens (B, T) give logits (B, T, V), or the loss where the tokens that follow are given, targets (B, T)."""
        x = self.token_embedding(tokens)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1]))
        sees = visible(tokens.shape[1])  # (T, T)
        x = x + self.attention(x, None, sees)
        z = self.head(x)
        return z if targets is None else self.cross_entropy(z, targets)

    def backward(self) -> None:
        dx = self.head.backward(self.cross_entropy.backward())
        dx = dx + self.attention.backward(dx)
        if self.positions is not None:
            self.positions.backward(dx.sum(0))  # one row of positions served all B windows
        self.token_embedding.backward(dx)


def train(model: Looker, count: int) -> float:
    """Train so many steps; gives the held-out loss."""
    adam = torch.optim.Adam(model.parameters())
    for step in range(count):
        tokens, targets = batch(32)
        with torch.no_grad(), recording(model):
            loss = model(tokens, targets)
            model.backward()
        adam.param_groups[0]["lr"] = 0.005 * (1 - step / count)
        adam.step()
        adam.zero_grad()
        if step % (count // 10) == 0:
            print(f"step {step:5}   loss {loss.item():.3f}")
    return measure(model)


print("attention that does not know order:")
unordered = train(Looker(knows_order=False), steps(400))
print("attention with positions:")
model = Looker(knows_order=True)
loss = train(model, steps(1000))

# %%
print(write(model))
print(f"held-out loss: {unordered:.3f} without positions, {loss:.3f} with them, nats per character")

# %% [markdown]
# Two words or three look English now, names stand in capitals and are followed by a colon. The loss is above that of
# chapter 1's longer strings: one look back, added to one letter, is little to decide on. More looks (chapter 8) and
# something that works on what they found (chapter 9) come next.
#
# ## Experiment
#
# Change the line
#
#     sees = visible(tokens.shape[1])  # (T, T)
#
# into
#
#     sees = visible(tokens.shape[1]) | True  # (T, T)
#
# in the model's `forward`. Now every position looks at all of its window, also at what comes after it. What happens to
# the loss, with positions and without them? What does the model write?
#
# **Answer.** With positions the loss falls to 0.04 within 250 steps, and it is 0.042 on held-out text too, far better
# than any language model ever was. It learned nothing but to look one place ahead: the answer stands there. Only the
# last position of a window has no next one to look at. And writing is always done from the last position: the text is
# nothing but empty lines. Without positions it cannot ask for the next place, and knowing *which* characters are in the
# window helps only a little: 2.345. A held-out loss that is too good to be true is, more often than not, a mask that
# leaks.
