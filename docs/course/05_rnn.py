# %% [markdown]
# # 5. Recurrent networks
#
# The model of chapter 4 sees n characters and nothing before. A recurrent network (Elman, "Finding Structure in Time",
# 1990) reads one character after another and keeps a *state*, a vector in which it can note whatever is worth
# remembering. There is no fixed n. The same weights are used at every step, and that is what makes its gradient worth
# a chapter: it runs backward through time (Werbos 1990).
#
# | symbol | meaning |
# |---|---|
# | B, T | batch, time: windows at once, and characters in each, which are read one after another |
# | C | size of an input x_t, a character's vector |
# | H | size of the state h_t |
# | V | vocabulary size |
# | W (H, C), U (H, H), b (H) | weights for the input, for the state before, and a bias |
# | s_t | the sum before the bend |
# | dx | gradient of the loss by x, of the same shape as x |

# %%
import torch
from course import T, V, batch, by_place, measure, steps, write
from torch import Tensor, nn

from quire.layers.cross_entropy import CrossEntropy
from quire.layers.embedding import Embedding
from quire.layers.layer import Layer, recording
from quire.layers.linear import Linear
from quire.layers.recurrent import RNN

torch.manual_seed(1)
double = torch.float64

# %% [markdown]
# ## Forward
#
#     s_t = W x_t + U h_(t-1) + b        h_t = tanh(s_t)        h before the first step is 0
#
# Written out in time it is an ordinary, deep network, with a layer for each step. All layers share their weights:
#
#     0 --U--> h_1 --U--> h_2 --U--> h_3 --U--> ...
#               ^          ^          ^
#               W          W          W
#              x_1        x_2        x_3


# %%
def forward(x: Tensor, W: Tensor, U: Tensor, b: Tensor) -> Tensor:
    """x (B, T, C) to the states (B, T, H)."""
    h, states = x.new_zeros(len(x), len(U)), []
    for t in range(x.shape[1]):
        s = x[:, t] @ W.T + h @ U.T + b  # (B, H)
        h = torch.tanh(s)
        states.append(h)
    return torch.stack(states, dim=1)


# %% [markdown]
# ## Backward through time
#
# The states go into a loss L. Let g_t be what the layer above hands back for the state at t. A state acts in two ways:
# on what is predicted at t, which is g_t, and on the next state by way of U. Gradients of several ways add up:
#
#     dh_t = g_t + U^T ds_(t+1)
#
# Here ds_(t+1) is needed before dh_t, so the loop goes from the last step to the first. Through the bend, with
# tanh'(s) = 1 - tanh(s)^2 and tanh(s_t) = h_t,
#
#     ds_t = dh_t (1 - h_t^2)
#
# Through the sum, as in any linear layer. W, U and b are used at every step, and each use adds its part:
#
#     dx_t = W^T ds_t
#     dW = sum over t of ds_t x_t^T     dU = sum over t of ds_t h_(t-1)^T     db = sum over t of ds_t
#
# That is all of "backpropagation through time": chapter 4's rules, in a loop that runs backward.


# %%
def backward(g: Tensor, x: Tensor, states: Tensor, W: Tensor, U: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Given g (B, T, H), the gradient by the states: dx, dW, dU, db."""
    from_later = torch.zeros_like(g[:, 0])
    ds = torch.empty_like(g)
    for t in reversed(range(x.shape[1])):
        dh = g[:, t] + from_later
        ds[:, t] = dh * (1 - states[:, t].square())
        from_later = ds[:, t] @ U  # for rows: U^T ds is ds U
    before = torch.cat((torch.zeros_like(states[:, :1]), states[:, :-1]), dim=1)  # h_(t-1)
    rows = ds.flatten(0, 1)  # (B T, H): the sum over batch and time is one matrix product
    return ds @ W, rows.T @ x.flatten(0, 1), rows.T @ before.flatten(0, 1), rows.sum(0)


# %% [markdown]
# A check by a nudge, and the same from Quire's layer. Its RNN has two biases, one beside W and one beside U, as in
# torch.nn.RNN; they are added, so each has our db.

# %%
layer = RNN(3, 5).double()
W, U, b = layer.weight_ih_l0.detach(), layer.weight_hh_l0.detach(), layer.bias_ih_l0.detach()
x, g = torch.randn(2, 7, 3, dtype=double), torch.randn(2, 7, 5, dtype=double)
states = forward(x, W, U, b)
dx, dW, dU, db = backward(g, x, states, W, U)

h = 1e-5
nudge = torch.zeros_like(U)
nudge[2, 4] = h  # with the loss sum(g states), whose gradient by the states is g
nudged = (g * (forward(x, W, U + nudge, b) - forward(x, W, U - nudge, b))).sum() / (2 * h)
print(f"dU[2, 4]: derived {dU[2, 4].item():+.9f}, nudged {nudged.item():+.9f}")
assert torch.isclose(dU[2, 4], nudged, atol=1e-8)

with torch.no_grad(), recording(layer):
    assert torch.allclose(layer(x), states)
    assert torch.allclose(layer.backward(g), dx)
assert torch.allclose(layer.weight_ih_l0.grad, dW) and torch.allclose(layer.weight_hh_l0.grad, dU)
assert torch.allclose(layer.bias_ih_l0.grad, db) and torch.allclose(layer.bias_hh_l0.grad, db)
print("states and all gradients by hand, and the same from Quire's RNN")

# %% [markdown]
# ## The gradient that vanishes
#
# What does a mistake at the last step tell the state k steps earlier? Put the two lines of the loop into each other:
#
#     dh_(t-1) = U^T (dh_t (1 - h_t^2))
#
# So k steps back the gradient has been multiplied by U^T k times, and by slopes of at most 1. If U makes vectors no
# longer than a factor u, the gradient has at most the length u^k times what it was: for u below 1 it vanishes, and only
# for u above 1 can it explode (Hochreiter 1991; Bengio, Simard and Frasconi 1994). Here is its length in numbers, for a
# U that turns vectors without changing their length (it is orthogonal), times u.

# %%
H, distances = 64, (1, 2, 5, 10, 20, 40)
turn = nn.init.orthogonal_(torch.empty(H, H, dtype=double))
W, b = torch.randn(H, H, dtype=double) * 0.3 / H**0.5, torch.zeros(H, dtype=double)
x = torch.randn(1, 50, H, dtype=double)  # gentle inputs, that leave tanh where it is steep
print("steps back" + "".join(f"{k:>10}" for k in distances))
for u in 0.5, 1.0, 1.5, 3.0:
    U = u * turn
    states = forward(x, W, U, b)
    dh, lengths = torch.randn(1, H, dtype=double), []
    for t in reversed(range(50)):
        lengths.append(dh.norm().item())
        dh = (dh * (1 - states[:, t].square())) @ U
    print(f"  u = {u:3.1f} " + "".join(f"{lengths[k] / lengths[0]:10.1e}" for k in distances))

# %% [markdown]
# At u = 1 the slopes alone make it vanish: 1 - h^2 is below 1. At u = 3 it explodes. Somewhere between it about keeps
# its length, but that is a knife's edge: each step back is one more factor, any change of U tips the product to one
# side, and training changes U all the time. A network that is told nothing of a distant cause cannot learn it. Chapter
# 6 changes the network for that.
#
# ## The gradient that explodes
#
# Sometimes the factors do multiply to something huge, a cliff in the loss: one step from there throws the weights far
# away. The remedy (Pascanu, Mikolov and Bengio 2013) is short. Take all gradients as one long vector of length |g|. If
# it is longer than c, shorten it to c, and keep its direction:
#
#     g = g min(1, c / |g|)


# %%
def clip(weights: list[nn.Parameter], c: float) -> float:
    """Shorten the gradient to a length of at most c; gives the length it had."""
    length = torch.stack([weight.grad.norm() for weight in weights]).norm().item()
    for weight in weights:
        weight.grad *= min(1.0, c / max(length, 1e-12))
    return length


weight, copied = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
weight.grad, copied.grad = torch.tensor([30.0, 40.0]), torch.tensor([30.0, 40.0])
print(f"clipped: a gradient of length {clip([weight], 5.0):.0f} has become {weight.grad.tolist()}")
nn.utils.clip_grad_norm_([copied], 5.0)  # torch has it too, and later chapters take it from there
assert torch.allclose(weight.grad, copied.grad)


# %% [markdown]
# ## The model
#
# An embedding, the recurrent layer, and a linear map to logits. The gradient visits them in reverse.


# %%
class Recurrent(Layer):
    """Characters embedded, read one by one, and logits from each state."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.embedding, self.rnn = Embedding(V, size), RNN(size, hidden)
        self.head, self.cross_entropy = Linear(hidden, V), CrossEntropy()
        nn.init.normal_(self.embedding.weight, std=1.0)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens (B, T) give logits (B, T, V), or the loss where the tokens that follow are given, targets (B, T)."""
        z = self.head(self.rnn(self.embedding(tokens)))
        return z if targets is None else self.cross_entropy(z, targets)

    def backward(self) -> None:
        dh = self.head.backward(self.cross_entropy.backward())
        self.embedding.backward(self.rnn.backward(dh))


# %% [markdown]
# ## Training
#
# Windows of T characters, the state 0 at the beginning of each. The gradient goes back to the beginning of its window
# and no further, which is called truncated backpropagation through time.
#
# From here on the steps are made by Adam (Kingma and Ba 2015), which gives each weight a learning rate of its own:
# chapter 10 writes it out. It reads `.grad`, and does not care who filled it in.

# %%
length = T
model = Recurrent(size=32, hidden=192)
weights = list(model.parameters())
adam = torch.optim.Adam(weights)
count, cut = steps(1500), 0
for step in range(count):
    tokens, targets = batch(16, length)
    with torch.no_grad(), recording(model):
        loss = model(tokens, targets)
        model.backward()
    cut += clip(weights, 1.0) > 1.0
    adam.param_groups[0]["lr"] = 0.003 * (1 - step / count)
    adam.step()
    adam.zero_grad()
    if step % (count // 10) == 0:
        print(f"step {step:5}   loss {loss.item():.3f}")
print(f"the gradient was longer than 1 and shortened in {cut} of {count} steps")

# %%
loss = measure(model)
print(write(model))
print(f"held-out loss: 8 characters and a hidden layer 1.869, this network {loss:.3f} nats per character")

# %% [markdown]
# ## How far back does it look?
#
# At the first place of a window it has read one character, at the last one T. The loss at each place says what the
# characters further back are worth.

# %%
losses = by_place(model)
for first, last in (0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63):
    print(f"{first + 1:2} to {last + 1:2} characters read: {losses[first : last + 1].mean().item():.3f}")

# %% [markdown]
# Most is won within the first eight characters: 1.80 there, 1.78 from 33 on. Nothing in the model says eight. It is the
# vanishing gradient, seen from outside: what lies further back was hardly ever heard of in training.
#
# ## Experiment
#
# Change the line
#
#     length = T
#
# into
#
#     length = 8
#
# so that the gradient never goes back more than eight characters. What happens to the loss? And what happens after
# eight characters, where this network was never trained?
#
# **Answer.** Held out 1.984 in place of 1.808. A part of that is not the distance: a step now learns from 128
# characters and not from 1,024. Its gradient is noisier, so that it was longer than 1 and shortened in 1,180 of the
# 1,500 steps (with T: in 1). But nothing breaks after eight characters: 1.988 at places 5 to 8, 1.970 from 33 on. The
# weights are the same at every step, and a state that served well for eight steps is a good one to go on from.
