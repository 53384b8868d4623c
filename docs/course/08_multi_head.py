# %% [markdown]
# # 8. Many heads
#
# One attention gives each position one mixture of what came before. A writer needs several things at once: the letter
# just before, the beginning of the word, the last line break. One row of weights that adds up to 1 cannot be sharp in
# three places. So let H small attentions look at the same time, each in its own C/H channels, and put what they gather
# side by side (Vaswani et al. 2017, section 3.2.2).
#
# | symbol | meaning |
# |---|---|
# | B, T | batch, time: windows at once, and positions in a window |
# | V | vocabulary size |
# | C | channels: how many numbers stand for one position |
# | H, D | heads, and the size of each head's queries, keys and values; here H D = C |
# | K | heads of keys and values; K = H unless said otherwise |
# | Wq, Wk, Wv, Wo | the maps to queries, keys and values, and the one from all heads back to C channels |
# | dX | gradient of the loss by X, of the same shape as X |

# %%
import math

import torch
from course import T, V, batch, measure, steps, tokenizer, training, write
from torch import Tensor

from quire.inspection.attention import AttentionLayer, record
from quire.inspection.heads import head_scores
from quire.layers.attention import MultiHeadAttention, causal_mask
from quire.layers.layer import recording
from quire.models.stack import Stack, StackSettings

torch.manual_seed(1)
B, C, H = 8, 64, 4
D = C // H

# %% [markdown]
# ## Heads one after another
#
# Head h has its own rows h D to (h + 1) D of Wq, Wk and Wv. It is the attention of chapter 7, with D in place of C. The
# results lie side by side in C channels again, and a last map Wo mixes them.


# %%
def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Chapter 7's attention: mixtures (..., T, D) and weights (..., T, T)."""
    S = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    W = torch.softmax(S.masked_fill(~causal_mask(S.shape[-1], 0, S.device), -math.inf), dim=-1)
    return W @ value, W


x = torch.randn(B, T, C, dtype=torch.float64)
Wq, Wk, Wv, Wo = (torch.randn(C, C, dtype=x.dtype) / math.sqrt(C) for _ in range(4))

gathered = []
for h in range(H):
    rows = slice(h * D, (h + 1) * D)
    gathered.append(attend(x @ Wq[rows].T, x @ Wk[rows].T, x @ Wv[rows].T)[0])  # (B, T, D)
one_by_one = torch.cat(gathered, dim=-1) @ Wo.T  # (B, T, C)

# %% [markdown]
# Wo can be read in another way. A product with things that lie side by side is a sum of products, so head h has its own
# D columns of Wo, and what it finds is *added* to the result. The heads do not wait for each other and do not know of
# each other.

# %%
as_sum = sum(part @ Wo[:, h * D : (h + 1) * D].T for h, part in enumerate(gathered))
assert torch.allclose(one_by_one, as_sum)

# %% [markdown]
# ## Heads as a reshape
#
# No loop is needed. x Wq^T has C = H D numbers for each position. Seen as (H, D) they are the queries of all heads;
# with H moved before T, the products of chapter 7 run over B and H together. Nothing is computed in a reshape: the
# numbers stay where they are, and only the way of counting them changes.


# %%
def split(x: Tensor) -> Tensor:
    """(B, T, H D) to (B, H, T, D)."""
    return x.unflatten(-1, (-1, D)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """(B, H, T, D) to (B, T, H D)."""
    return x.transpose(1, 2).flatten(2)


query, key, value = split(x @ Wq.T), split(x @ Wk.T), split(x @ Wv.T)
mixed, W = attend(query, key, value)
y = join(mixed) @ Wo.T
assert torch.allclose(y, one_by_one)
print(f"weights {tuple(W.shape)}: windows, heads, positions that look, positions that are looked at")

# %% [markdown]
# What does it cost? The maps have 4 C^2 weights, and scores and mixtures take 2 T C multiplications for each position.
# There is no H in either. Heads are not more of the same; the same work is cut differently.
#
# ## The whole backward
#
# Forward's lines in reverse. Each line is known by now:
#
#     y = m Wo^T                      dm = dy Wo,   dWo = sum over positions of dy^T m
#     m = join(mixed)                 dmixed = split(dm): a reordering's gradient is the order put back
#     mixed = W value                 dW = dmixed value^T,   dvalue = W^T dmixed
#     W = softmax(S)                  dS = W * (dW - sum of W dW)
#     S = query key^T / sqrt(D)       dquery = dS key / sqrt(D),   dkey = dS^T query / sqrt(D)
#     query = split(x Wq^T)           dWq = sum over positions of join(dquery)^T x; the same for key and value
#     x fed three maps                dx = dq Wq + dk Wk + dv Wv: all three add up


# %%
def backward(dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """dx, and the gradients of the four weights."""
    dmixed = split(dy @ Wo)  # (B, H, T, D)
    dW, dvalue = dmixed @ value.mT, W.mT @ dmixed
    dS = W * (dW - (W * dW).sum(-1, keepdim=True)) / math.sqrt(D)  # (B, H, T, T)
    dq, dk, dv = join(dS @ key), join(dS.mT @ query), join(dvalue)  # (B, T, C)

    def weight(grad: Tensor, into: Tensor) -> Tensor:
        return grad.flatten(0, 1).T @ into.flatten(0, 1)  # the sum over all B T positions is a product

    gradients = {
        "query": weight(dq, x),
        "key": weight(dk, x),
        "value": weight(dv, x),
        "output": weight(dy, join(mixed)),
    }
    return dq @ Wq + dk @ Wk + dv @ Wv, gradients


dy = torch.randn_like(y)
dx, gradients = backward(dy)

# %% [markdown]
# Quire's MultiHeadAttention, given the same four weights, and autograd's opinion of it:

# %%
layer = MultiHeadAttention(C, heads=H, kv_heads=H, head_size=D, bias=False).double()
maps = {"query": Wq, "key": Wk, "value": Wv, "output": Wo}
layer.load_state_dict({f"{name}.weight": weight for name, weight in maps.items()})

with torch.no_grad(), recording(layer):
    assert torch.allclose(layer(x), y)
    assert torch.allclose(layer.backward(dy), dx)

inputs = [x.clone().requires_grad_(), *(layer.get_parameter(f"{name}.weight") for name in maps)]
by_autograd = torch.autograd.grad(layer(inputs[0]), inputs, dy)
assert torch.allclose(by_autograd[0], dx)
for name, theirs in zip(maps, by_autograd[1:]):
    ours = gradients[name]
    assert torch.allclose(layer.get_parameter(f"{name}.weight").grad, ours) and torch.allclose(theirs, ours)
    print(f"gradient of {name:<6} largest difference to autograd {(ours - theirs).abs().max():.1e}")

# %% [markdown]
# ## Aside: fewer keys and values
#
# A model that writes keeps the keys and values of all that it has read (chapter 11): 2 C numbers for each position and
# layer.
# Several query heads may share one head of keys and values (Shazeer 2019 with K = 1; Ainslie et al. 2023 with any K
# that divides H). The cache is then K/H of its size. Forward, each shared head is repeated for its group of H/K
# queries; backward, what was used several times receives the sum of its gradients. These are two lines more:
#
#     key = key.repeat_interleave(H // K, dim=1)                 forward: (B, K, T, D) to (B, H, T, D)
#     dkey = dkey.unflatten(1, (K, H // K)).sum(2)               backward

# %%
K = 2
shared = MultiHeadAttention(C, heads=H, kv_heads=K, head_size=D, bias=False).double()
with torch.no_grad(), recording(shared):
    shared(x)
    dx = shared.backward(dy)
key_grad = shared.key.weight.grad

repeated = MultiHeadAttention(C, heads=H, kv_heads=H, head_size=D, bias=False).double()
for name in maps:
    weight = shared.get_parameter(f"{name}.weight").detach()
    if name in ("key", "value"):  # each head of D rows, once for every query head of its group
        weight = weight.unflatten(0, (K, D)).repeat_interleave(H // K, dim=0).flatten(0, 1)
    repeated.get_parameter(f"{name}.weight").data.copy_(weight)
with torch.no_grad(), recording(repeated):
    repeated(x)
    assert torch.allclose(repeated.backward(dy), dx)
summed = repeated.key.weight.grad.unflatten(0, (K, H // K, D)).sum(1).flatten(0, 1)
assert torch.allclose(summed, key_grad)
print(f"{K} heads of keys serve {H} of queries, as if each were there {H // K} times; their gradients add up")

# %% [markdown]
# ## Training
#
# The model of chapter 7, with four heads. Quire's `stack` builds a model from a list of layers; a residual layer adds
# what it gives to what it reads. It has a backward of its own, which calls each layer's backward, last layer first.

# %%
heads = 4


def build() -> Stack:
    layers = (
        {"kind": "embedding", "size": C},
        {"kind": "positional-embedding"},
        {"kind": "attention", "heads": heads, "residual": True},
    )
    return Stack(StackSettings(vocabulary_size=V, context_length=T, stack=layers))


model = build()
adam = torch.optim.Adam(model.parameters())
count = steps(1000)
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

# %%
loss = measure(model)
print(write(model))
print(f"held-out loss: one head 2.240, {heads} heads {loss:.3f} nats per character")

# %% [markdown]
# ## What the heads look at
#
# The weights are there to be read. `record` runs a model and keeps them, `head_scores` puts each head into a few
# numbers, here over 64 windows of the training text:
#
# - *entropy* in nats: 0 looks at one position, log n evenly at n;
# - *distance*: how many characters back, on average;
# - *previous*: the weight on the character just before.

# %%
windows = training[: 64 * T].view(64, T)
_, found = record(model, {"tokens": windows})
(name, weights), *_ = found.items()  # (B, H, T, T)
per_window = [head_scores([AttentionLayer(name, "prompt", "prompt", window.numpy())]) for window in weights]
print("head   entropy   distance   previous")
for h in range(heads):
    scores = [window[h] for window in per_window]
    row = [
        sum(getattr(score, key) for score in scores) / len(scores) for key in ("entropy", "distance", "previous_token")
    ]
    print(f"{h:>4}{row[0]:>10.2f}{row[1]:>11.1f}{row[2]:>11.2f}")

# %% [markdown]
# And in one place: the last position of a line, and the four characters that each head takes most from.

# %%
text = "\nKING RICHARD II:\nWhat says the king? Must he be deposed, and th"
ids = tokenizer.encode(text, unknown="skip")  # should your own text lack some of these characters
text = tokenizer.decode(ids)
_, found = record(model, {"tokens": ids})
last = next(iter(found.values()))[0, :, -1]  # (H, T)
print(f"after {text[-20:]!r}")
for h in range(heads):
    most = last[h].topk(4)
    print(
        f"head {h}:",
        ", ".join(
            f"{text[i]!r} {len(text) - 1 - i} back: {w:.2f}"
            for w, i in zip(most.values.tolist(), most.indices.tolist())
        ),
    )

# %% [markdown]
# The heads differ, although nothing told them to. In the full run, heads 0 and 1 look at the last few characters, with
# a low entropy: they give the short context that chapter 1 counted. Heads 2 and 3 look further and wider. After "th",
# head 1 takes all of the "t", head 0 the space before it, which says that "th" begins a word.
#
# ## Experiment
#
# Change the line
#
#     heads = 4
#
# into
#
#     heads = 16
#
# Each head now has D = 4 channels. The number of weights stays what it is. Is it better?
#
# **Answer.** No: 2.189, and it takes twice as long, for there are four times as many T x T tables of weights to make. A
# query and a key of four numbers cannot tell apart 65 characters in 64 places. Some heads stay vague (an entropy of 2
# and more) and several do the same: six of the sixteen look first at the space before "th". Heads of 32 to 128
# channels are what large models use.
