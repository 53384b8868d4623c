# %% [markdown]
# # 3. Softmax and cross-entropy
#
# Chapter 2 borrowed one result: the gradient of the loss by the logits is the probabilities minus the one-hot target.
# This chapter derives it, twice, and shows why the two functions are computed as one. Every model of this course, and
# every large language model, ends in these few lines.
#
# | symbol | meaning |
# |---|---|
# | z (V) | logits |
# | p (V) | probabilities, p = softmax(z) |
# | t | target: the token that really came |
# | q (V) | what p should have been: 1 at t, else 0 |
# | L | loss, -log p_t |
# | dx | gradient of the loss by x, of the same shape as x |
# | [i is j] | 1 where i = j, else 0 |

# %%
import torch
from course import V, batch, measure, steps, write
from torch import Tensor, nn
from torch.nn.functional import pad

from quire.layers.cross_entropy import IGNORED, CrossEntropy
from quire.layers.embedding import Embedding
from quire.layers.layer import Layer, recording

torch.manual_seed(1)


# %% [markdown]
# ## Softmax
#
#     p_i = e^(z_i) / S   with   S = sum over k of e^(z_k)
#
# Adding one number c to all logits multiplies e^(z_i) and S alike by e^c, and p stays what it was. So the largest logit
# may always be taken off first. That matters: e^89 is already more than a float32 can hold.


# %%
def softmax(z: Tensor) -> Tensor:
    e = (z - z.max()).exp()  # the largest is e^0 = 1: nothing overflows
    return e / e.sum()


z = torch.tensor([1.0, 2.0, 100.0])
print("as the formula stands:", (z.exp() / z.exp().sum()).tolist())
print("largest taken off:    ", softmax(z).tolist())

# %% [markdown]
# ## Its derivative
#
# Each p_i depends on each z_j: through its own numerator if i is j, and through S always. With dS/dz_j = e^(z_j), the
# quotient rule gives
#
#     dp_i/dz_j = ([i is j] e^(z_i) S - e^(z_i) e^(z_j)) / S^2 = p_i ([i is j] - p_j)
#
# a whole V by V matrix, the Jacobian: diag(p) - p p^T.


# %%
def jacobian(p: Tensor) -> Tensor:
    return torch.diag(p) - torch.outer(p, p)  # [i, j] = dp_i/dz_j


z = torch.randn(5, dtype=torch.float64)
p, h = softmax(z), 1e-5
nudged = torch.stack([(softmax(z + h * e) - softmax(z - h * e)) / (2 * h) for e in torch.eye(5, dtype=z.dtype)], dim=1)
print(f"Jacobian, derived against nudged: largest difference {(jacobian(p) - nudged).abs().max().item():.1e}")
assert torch.allclose(jacobian(p), nudged, atol=1e-10)
print("sums of its rows:", [f"{s:.0e}" for s in jacobian(p).sum(1).tolist()], "(0: a constant on all z is nothing)")

# %% [markdown]
# The matrix is never built in practice. Given dp, the gradient by p, the chain rule wants only its product with it:
#
#     dz_j = sum over i of dp_i p_i ([i is j] - p_j) = p_j (dp_j - sum over i of p_i dp_i)
#
# Each gradient, minus the mean gradient as p sees it, times p. Attention will need this line in chapter 7.


# %%
def softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    return p * (dp - (p * dp).sum())


dp = torch.randn(5, dtype=torch.float64)
assert torch.allclose(softmax_backward(p, dp), jacobian(p).T @ dp)

# %% [markdown]
# ## Cross-entropy
#
# The loss of one prediction is L = -log p_t. Shannon's name for the mean of -log p over what really happens is
# cross-entropy: -sum over i of q_i log p_i, of which, with q being 1 at t only, one term is left.
#
# **The long way**, through both functions. Only p_t enters the loss: dp_i = -[i is t] / p_t. Put this into the line
# above. The sum over i of p_i dp_i is then p_t (-1/p_t) = -1, so
#
#     dz_j = p_j (-[j is t] / p_t + 1) = p_j - [j is t]          since p_j / p_t = 1 where j is t
#
# **The short way.** Write the loss in logits and take its derivative at once:
#
#     L = -log(e^(z_t) / S) = log S - z_t
#     dz_j = e^(z_j) / S - [j is t] = p_j - [j is t]
#
# Both say **dz = p - q**: what the model said minus what it should have said. It is between -1 and 1 whatever happens,
# it is small where the model was right, and it sums to 0: probability that goes to one token is taken from others.


# %%
def cross_entropy(z: Tensor, t: int) -> Tensor:
    shifted = z - z.max()
    return shifted.exp().sum().log() - shifted[t]  # log S - z_t


def cross_entropy_backward(z: Tensor, t: int) -> Tensor:
    dz = softmax(z)
    dz[t] -= 1
    return dz


t = 3
dp = torch.zeros(5, dtype=torch.float64)
dp[t] = -1 / p[t]
dz = cross_entropy_backward(z, t)
assert torch.allclose(softmax_backward(p, dp), dz)
print("z ", [f"{v:+.3f}" for v in z.tolist()])
print("p ", [f"{v:+.3f}" for v in p.tolist()])
print("dz", [f"{v:+.3f}" for v in dz.tolist()], f"(the target is {t}; the sum is {dz.sum().item():.0e})")

# %% [markdown]
# ## Why one function and not two
#
# Where the model is surely wrong, p_t is so small that it becomes 0 in float32. Then log p_t is -infinity and 1/p_t is
# infinite: the long way ends in nonsense exactly where there is most to learn. log S - z_t never divides by it.

# %%
z32, target = torch.tensor([0.0, 200.0]), 0
print("log of softmax:", -softmax(z32)[target].log().item(), "  log S - z_t:", cross_entropy(z32, target).item())

# %% [markdown]
# ## How far to trust a nudge
#
# A nudge, (L(z + h) - L(z - h)) / 2h, is off by two things. The curve is not straight: an error of about h^2. And L is
# a rounded number: an error of about 1e-16 / h in float64. A smaller h is better only down to where they meet, near the
# cube root of 1e-16. So gradients are checked in float64, with h about 1e-5; in float32 four digits are the best.

# %%
unit = torch.eye(5, dtype=z.dtype)[t]
print("       h   error in float64   error in float32")
for exponent in range(-1, -12, -2):
    h = 10.0**exponent
    errors = []
    for kind in torch.float64, torch.float32:
        up, down = (cross_entropy((z + sign * h * unit).to(kind), t) for sign in (1, -1))
        errors.append(abs(((up - down) / (2 * h)).item() - dz[t].item()))
    print(f"  1e{exponent:+03d} {errors[0]:18.1e} {errors[1]:18.1e}")

# %% [markdown]
# ## Quire's CrossEntropy
#
# The layer takes many predictions at once and gives their mean, so each row's gradient is divided by how many count.
# A target that is IGNORED does not count, which padding needs. PyTorch's automatic differentiation, autograd, is asked
# here for a second opinion.

# %%
logits = torch.randn(4, 6, dtype=torch.float64)
targets = torch.tensor([5, 0, IGNORED, 2])
layer = CrossEntropy()
with torch.no_grad(), recording(layer):
    value, gradient = layer(logits, targets), layer.backward()

rows = [(cross_entropy(z, int(t)), cross_entropy_backward(z, int(t))) for z, t in zip(logits, targets) if t != IGNORED]
assert torch.isclose(value, sum(L for L, _ in rows) / 3)
assert torch.allclose(gradient[targets != IGNORED], torch.stack([dz for _, dz in rows]) / 3)
assert torch.equal(gradient[2], torch.zeros(6, dtype=torch.float64))

asked = logits.clone().requires_grad_()
torch.nn.functional.cross_entropy(asked, targets, ignore_index=IGNORED).backward()
assert torch.allclose(gradient, asked.grad)
print("by hand, Quire's layer, autograd: the same")

# %% [markdown]
# ## Training: more than one character, still linear
#
# With dz in hand, anything that makes logits can learn. The simplest way to read k characters instead of one is to give
# each place before the prediction a table of its own, and to add up what they say:
#
#     z = W_1[last character] + W_2[the one before] + ... + W_k[the one k before]
#
# Sums in the logits are products in the probabilities, so each table can veto what the others like. All k tables
# together have k V^2 weights; a table of counts for strings of k characters would have V^(k+1).
#
# The gradient of a sum goes to each of its terms unchanged: every table receives the same dz, each at its own row.


# %%
class Tables(Layer):
    """Logits that are a sum over the last k characters, a table for each place."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(Embedding(V, V) for _ in range(k))
        self.cross_entropy = CrossEntropy()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens (B, T) give logits (B, T, V), or the loss where the tokens that follow are given, targets (B, T)."""
        length = tokens.shape[1]
        moved = pad(tokens, (len(self.tables), 0))  # before a window there is padding, which has a row of its own, 0
        z = sum(table(moved[:, -length - i :][:, :length]) for i, table in enumerate(self.tables))
        return z if targets is None else self.cross_entropy(z, targets)

    def backward(self) -> None:
        dz = self.cross_entropy.backward()  # (B, T, V): p - q, divided by how many there are
        for table in self.tables:
            table.backward(dz)


model, learning_rate = Tables(k=6), 5.0
count = steps(1500, short=60)
for step in range(count):
    tokens, targets = batch(64)
    with torch.no_grad(), recording(model):
        loss = model(tokens, targets)
        model.backward()
        for weight in model.parameters():
            weight -= learning_rate * weight.grad
            weight.grad = None
    if step % (count // 10) == 0:
        print(f"step {step:5}   loss {loss.item():.3f}")

# %%
loss = measure(model)
print(write(model))
print(f"held-out loss: a table for one place 2.495, a sum of {len(model.tables)} tables {loss:.3f} nats per character")

# %% [markdown]
# ## Experiment
#
# Change the line
#
#     model, learning_rate = Tables(k=6), 5.0
#
# into
#
#     model, learning_rate = Tables(k=12), 5.0
#
# Twice as many characters are read. How much better does it become?
#
# **Answer.** Hardly: 2.229 in place of 2.234. (With k=2 it is 2.345.) A character that stands far back says little *by
# itself*; it says much together with what stands around it, and that a sum of tables cannot see. Four characters
# counted as one string gave 1.773 in chapter 1.
