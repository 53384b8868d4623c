# %% [markdown]
# # 9. Blocks: residual sums, norms, feedforward
#
# Attention gathers. What is gathered must also be worked on, and all of it repeated in layer after layer without the
# gradient getting lost. Three more parts do that: a feedforward network, the residual sum and a normalization. With
# them this chapter builds a GPT block by block, and shows that it is Quire's.
#
# | symbol | meaning |
# |---|---|
# | B, T | batch, time: windows at once, and positions in a window |
# | V | vocabulary size |
# | C | channels of the *stream*, the vectors that run through all blocks |
# | L, H | blocks, and heads in each |
# | x, y | what goes into a layer and comes out of it, (..., C) |
# | dx | gradient of the loss by x, of the same shape as x |
# | mean(x) | over the C channels of one position |

# %%
import math
import textwrap

import torch
from course import T, V, batch, measure, steps, write
from torch import Tensor, nn

from quire.layers.activations import GELU
from quire.layers.attention import MultiHeadAttention
from quire.layers.blocks import PreNormBlock
from quire.layers.cross_entropy import CrossEntropy
from quire.layers.embedding import Embedding
from quire.layers.feedforward import FeedForward
from quire.layers.layer import Layer, recording
from quire.layers.linear import Linear
from quire.layers.normalization import LayerNorm, RMSNorm
from quire.layers.positions import LearnedPositions
from quire.models.gpt import GPT, GPTSettings

torch.manual_seed(1)
B, C, H = 8, 64, 4


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)  # all comparisons here are in float64


# %% [markdown]
# ## Feedforward: each position by itself
#
# Between its softmaxes attention is linear: it takes sums of values. Two linear maps in a row are one linear map, so
# something has to bend. The feedforward part widens a position to 4 C channels, bends each of them, and narrows again:
#
#     y = act(x Wu^T + bu) Wd^T + bd
#
# The simplest bend is max(0, a), the ReLU: pass it or stop it. GPT uses a smooth form of the same idea. Pass a with the
# probability that a standard normal number lies below it, and take the mean (Hendrycks and Gimpel 2016):
#
#     gelu(a) = a P(Z < a) = a F(a)       F, the normal distribution's cumulative function; F' = f, its density
#     gelu'(a) = F(a) + a f(a)            by the product rule


# %%
def gelu(a: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(a) and its derivative."""
    F = 0.5 * (1 + torch.erf(a / math.sqrt(2)))
    f = torch.exp(-0.5 * a**2) / math.sqrt(2 * math.pi)
    return a * F, F + a * f


a = torch.linspace(-3, 3, 7, dtype=torch.float64)
value, slope = gelu(a)
h = 1e-6
assert torch.allclose(slope, (gelu(a + h)[0] - gelu(a - h)[0]) / (2 * h))  # nudged, as in chapter 2
print("a       ", [f"{v:+.2f}" for v in a.tolist()])
print("gelu(a) ", [f"{v:+.2f}" for v in value.tolist()])
print("gelu'(a)", [f"{v:+.2f}" for v in slope.tolist()])

# %% [markdown]
# Backward through the whole part: undo each map in turn. da is the gradient at the bend.

# %%
x = torch.randn(B, T, C, dtype=torch.float64)
dy = torch.randn_like(x)

feedforward = FeedForward(C, 4 * C, "gelu").double()
Wu, bu = feedforward.up.weight.detach(), feedforward.up.bias.detach()
Wd, bd = feedforward.down.weight.detach(), feedforward.down.bias.detach()

bent, slope = gelu(x @ Wu.T + bu)  # (B, T, 4 C)
y = bent @ Wd.T + bd
da = (dy @ Wd) * slope  # (B, T, 4 C)
dx = da @ Wu
dWd, dWu = dy.flatten(0, 1).T @ bent.flatten(0, 1), da.flatten(0, 1).T @ x.flatten(0, 1)

with torch.no_grad(), recording(feedforward):
    assert same(feedforward(x), y)
    assert same(feedforward.backward(dy), dx)
assert same(feedforward.down.weight.grad, dWd) and same(feedforward.up.weight.grad, dWu)

with torch.no_grad(), recording(curve := GELU()):
    assert same(curve(a), value)
    assert same(curve.backward(torch.ones_like(a)), gelu(a)[1])
print("FeedForward and GELU: forward and backward as by hand")

# %% [markdown]
# ## The residual sum
#
# Stack 24 such parts and send a gradient back. Each multiplies it by its Jacobian J, the matrix of its derivatives:
# after 24 layers what arrives is a product of 24 matrices. If each shrinks it by a third, together they shrink it more
# than ten-thousandfold.
#
# He et al. (2016) changed y = f(x) into y = x + f(x). The derivative becomes 1 + J, 1 being the identity matrix, and
#
#     dx = dy + J^T dy
#
# One of the two ways back is the plain 1: whatever the parts do, each layer receives the gradient of the end, and
# something on top. The product (1 + J_1) (1 + J_2) ... begins with 1 when multiplied out. And forward, a part need not
# say again what is known; it only says what should be *added*. The sum that runs through is the stream.

# %%
depth = 24
parts = [FeedForward(C, 4 * C, "gelu").double() for _ in range(depth)]
for part in parts:
    for linear in (part.up, part.down):
        nn.init.normal_(linear.weight, std=linear.weight.shape[1] ** -0.5)

for residual in False, True:
    stream, norms = x, []
    with torch.no_grad(), recording(nn.ModuleList(parts)):
        for part in parts:
            stream = stream + part(stream) if residual else part(stream)
        grad = dy
        for part in reversed(parts):
            grad = grad + part.backward(grad) if residual else part.backward(grad)
            norms.append((grad.norm() / dy.norm()).item())
    picked = [f"{norms[n - 1]:.1e}" for n in (1, 6, 12, 18, 24)]
    print(f"{'x + f(x)' if residual else 'f(x)':<9} gradient after 1, 6, 12, 18, 24 layers back: {', '.join(picked)}")

# %% [markdown]
# The plain stack loses the gradient. The residual one keeps it, and has another, smaller problem: it grows, for so does
# the stream. What is added up has variances that add up.
#
# ## Layer norm
#
# A part should not have to care how large the stream has become. So normalize what it reads: for each position, take
# off the mean over its channels and divide by their deviation (Ba, Kiros and Hinton 2016). A weight and a bias for each
# channel let the model choose another size.
#
#     c = x - mean(x)        v = mean(c^2)        r = 1 / sqrt(v + epsilon)        n = c r        y = n * weight + bias
#
# **Backward.** weight and bias are used at every position, so their gradients are sums over positions of dy * n and of
# dy. At n arrives g = dy * weight. From there:
#
# *From n to c.* c_j has a part in n_j, and by way of r in every n_i:
#
#     dc_j = g_j r + (sum over i of g_i c_i) dr/dc_j
#     dr/dc_j = -1/2 (v + epsilon)^(-3/2) dv/dc_j,   dv/dc_j = 2 c_j / C   (the sum has the one term c_j^2)
#             = -r^3 c_j / C
#     dc_j = r g_j - r^3 c_j (1/C) (sum over i of g_i c_i)
#          = r (g_j - n_j mean(g * n))                      since r c = n, twice
#
# *From c to x.* x_j has a part in c_j, and by way of the mean in every c_i, with -1/C:
#
#     dx = dc - mean(dc)
#     mean(dc) = r (mean(g) - mean(n) mean(g * n)) = r mean(g)            since mean(n) = 0
#     dx = r (g - mean(g) - n mean(g * n))


# %%
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, and what backward needs: n and r."""
    c = x - x.mean(-1, keepdim=True)
    r = (c.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    n = c * r
    return n * weight + bias, n, r


def layer_norm_backward(dy: Tensor, n: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias."""
    g = dy * weight
    dx = r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    return dx, (dy * n).sum((0, 1)), dy.sum((0, 1))


norm = LayerNorm(C).double()
nn.init.normal_(norm.weight)
nn.init.normal_(norm.bias)
y, n, r = layer_norm(3 * x + 1, norm.weight.detach(), norm.bias.detach())
dx, dweight, dbias = layer_norm_backward(dy, n, r, norm.weight.detach())

with torch.no_grad(), recording(norm):
    assert same(norm(3 * x + 1), y)
    assert same(norm.backward(dy), dx)
assert same(norm.weight.grad, dweight) and same(norm.bias.grad, dbias)

leaf = (3 * x + 1).requires_grad_()
assert same(torch.autograd.grad(norm(leaf), leaf, dy)[0], dx)

# %% [markdown]
# The two means can be understood without any algebra. Adding a constant to x, or making c longer, does not change y. So
# the gradient must have no part in those two directions, 1 and n; the formula takes exactly these parts off.

# %%
print(f"part of dx along 1: {dx.sum(-1).abs().max():.1e}, along n: {(dx * n).sum(-1).abs().max():.1e} (only epsilon's)")

# %% [markdown]
# RMS norm (Zhang and Sennrich 2019) leaves out the centring: r = 1 / sqrt(mean(x^2) + epsilon), n = x r. The first of
# the two steps above is then all of it: dx = r (g - n mean(g * n)).

# %%
r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
n = x * r
dx = r * (dy - n * (dy * n).mean(-1, keepdim=True))  # its weight is 1 at first, so g = dy
with torch.no_grad(), recording(rms := RMSNorm(C).double()):
    assert same(rms(x), n)
    assert same(rms.backward(dy), dx)
print("LayerNorm and RMSNorm: forward and backward as derived")

# %% [markdown]
# ## A block
#
# Attention, then feedforward, each with a norm *before* it and a sum around both:
#
#     x = x + attention(norm(x))
#     x = x + feedforward(norm(x))
#
# Backward is these lines in reverse. Of a sum, both terms receive the gradient.


# %%
class Block(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(C)
        self.attention = MultiHeadAttention(C, heads=H, kv_heads=H, head_size=C // H)
        self.feedforward_norm = LayerNorm(C)
        self.feedforward = FeedForward(C, 4 * C, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feedforward(self.feedforward_norm(x))

    def backward(self, dy: Tensor) -> Tensor:
        dx = dy + self.feedforward_norm.backward(self.feedforward.backward(dy))
        return dx + self.attention_norm.backward(self.attention.backward(dx))


ours = Block().double()
quires = PreNormBlock(
    MultiHeadAttention(C, H, H, C // H), FeedForward(C, 4 * C, "gelu"), normalization=lambda: LayerNorm(C)
).double()
quires.load_state_dict(ours.state_dict())
with torch.no_grad(), recording(ours), recording(quires):
    assert same(ours(x), quires(x))
    assert same(ours.backward(dy), quires.backward(dy))
print("our block is Quire's PreNormBlock")

# %% [markdown]
# ## Before or after?
#
# Vaswani et al. (2017) put the norm after the sum: x = norm(x + attention(x)). Then the stream itself passes through
# every norm, and so does the gradient: the plain 1 of the residual sum is gone. With the norm before, inside the
# branch, it stays. Xiong et al. (2020) show what that means at the start of training. In the last block of a fresh
# model, the gradients of after-norm are as large however deep the model is. Those of before-norm fall as 1 / sqrt(L):
# the stream has grown, and what one block adds to it matters less. So after-norm needs a careful warm-up before it
# bears large steps, and the deeper it is the more; before-norm hardly does.
#
# Here are 12 blocks of each kind, fresh, and the lengths of the gradients of their feedforwards' last weights. Compare
# the two in block 12: after-norm's are three times as long. And before-norm's first blocks receive seven times what its
# last one does.

# %%
shape = {"vocabulary_size": V, "context_length": T, "embedding_size": C, "heads": H, "feedforward": "gelu"}
tokens, targets = batch(B)
for placement in "pre", "post":
    model = GPT(GPTSettings(**shape, layers=12, norm_placement=placement, initialization="gpt2"))
    for linear in (module for module in model.blocks.modules() if isinstance(module, Linear)):
        nn.init.normal_(linear.weight, std=linear.weight.shape[1] ** -0.5)
    with torch.no_grad(), recording(model):
        model(tokens, targets)
        model.backward()
    norms = [block.feedforward.down.weight.grad.norm().item() for block in model.blocks]
    print(f"{placement:<5} block 1, 2, 4, 8, 12:", [f"{norms[i - 1]:.4f}" for i in (1, 2, 4, 8, 12)])

# %% [markdown]
# ## GPT
#
# Nothing is missing now: embeddings of tokens and places, a stack of blocks, one norm more (for the stream has grown),
# and a map to the logits.


# %%
class OurGPT(Layer):
    """Characters and their places embedded, blocks, a last norm, and logits."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.token_embedding = Embedding(V, C)
        self.positions = LearnedPositions(T, C)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = LayerNorm(C)
        self.head = Linear(C, V, bias=False)
        self.cross_entropy = CrossEntropy()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens (B, T) give logits (B, T, V), or the loss where the tokens that follow are given, targets (B, T)."""
        x = self.token_embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        z = self.head(self.norm(x))
        return z if targets is None else self.cross_entropy(z, targets)

    def backward(self) -> None:
        dx = self.norm.backward(self.head.backward(self.cross_entropy.backward()))
        for block in reversed(self.blocks):
            dx = block.backward(dx)
        self.positions.backward(dx.sum(0))
        self.token_embedding.backward(dx)


norm_placement = "pre"
settings = GPTSettings(**shape, layers=2, tied=False, norm_placement=norm_placement, initialization="zero-output")
model = GPT(settings)
nn.init.normal_(model.token_embedding.weight, std=0.3)  # see below
print(f"Quire's GPT has {sum(p.numel() for p in model.parameters()):,} parameters, named as ours:")
names = ", ".join(name for name, _ in model.named_parameters() if not name.startswith("blocks.1"))
print(textwrap.fill(names, width=120))

# %% [markdown]
# The names are the same, so one loads the weights of the other. Their logits and the gradients of all parameters agree.
# (The weights are made random first: this initialization begins with zeros, and zeros would prove little.)

# %%
if norm_placement == "pre":
    ours, quires = OurGPT(layers=2).double(), GPT(settings).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    quires.load_state_dict(ours.state_dict())
    with torch.no_grad(), recording(ours), recording(quires):
        assert same(ours(tokens, targets), quires(tokens, targets))
        ours.backward()
        quires.backward()
    for (name, one), other in zip(ours.named_parameters(), quires.parameters()):
        assert same(one.grad, other.grad), name
    quires.zero_grad()
    quires(tokens, targets).backward()  # autograd's opinion
    worst = max((one.grad - other.grad).abs().max() for one, other in zip(ours.parameters(), quires.parameters()))
    print(f"ours, Quire's and autograd's gradients agree; the largest difference is {worst:.1e}")

# %% [markdown]
# ## Training
#
# As in the chapters before. One thing is new with the stream: what the blocks add to it soon has a size of 1.
# Embeddings that begin at 0.02, as GPT-2's do, would be drowned by it, so here they begin at 0.3.

# %%
adam = torch.optim.Adam(model.parameters())
count = steps(1000)
for step in range(count):
    tokens, targets = batch(16)
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
print(f"held-out loss: attention alone 2.182, this GPT {loss:.3f} nats per character")

# %% [markdown]
# Most words are words now, and speakers have lines. Still, the LSTM of chapter 6 reached 1.720 in about the same time.
# Nothing is wrong with the model: attention has to learn from examples what a recurrent network has built in, that what
# came just before matters most, and it is slow at that when places are learned vectors and the steps are chosen
# carelessly. That is the next chapter.
#
# ## Experiment
#
# Change the line
#
#     norm_placement = "pre"
#
# into
#
#     norm_placement = "post"
#
# The two blocks then have their norms after the sums, and there is none before the head. Does it train?
#
# **Answer.** It does, and just as well: 1.928 in place of 1.931, no more than another seed would change. It even starts
# a little faster (2.37 against 2.45 after 200 steps). With two blocks there are only four norms in the gradient's way,
# and the stream cannot grow. The difference comes with depth: GPT-2 and nearly all large models after it have their
# norms before.
