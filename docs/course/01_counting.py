# %% [markdown]
# # 1. Counting
#
# A language model answers one question: given what has been read so far, how likely is each thing that could come
# next? This chapter answers it by counting. Nothing is learned yet, but everything that later chapters need is here:
# a text turned into numbers, probabilities, the loss, text that was kept aside, and sampling.
#
# Claude Shannon did this by hand, with a book and its pages opened at random ("A Mathematical Theory of Communication",
# 1948, section 3). Andrei Markov had counted the letters of *Eugene Onegin* before him, in 1913.
#
# | symbol | meaning |
# |---|---|
# | V | vocabulary size: how many different tokens there are |
# | N | how many pairs of neighbours the text has |
# | n(a, b) | how often b comes right after a |
# | p(b given a) | the probability that b comes next after a |

# %%
import math

import torch
from course import V, held_out, held_out_text, steps, tokenizer, training, training_text

from quire.layers.cross_entropy import CrossEntropy

torch.manual_seed(1)
print(training_text[:150])
print(f"{len(training_text):,} characters to learn from, {len(held_out_text):,} kept aside to measure on")

# %% [markdown]
# ## Characters as numbers
#
# A tokenizer gives each token an id from 0 to V - 1. Here a token is one character. Quire puts two special tokens
# first: padding (0), which fills up what is too short, and the separator of documents (1). This text needs neither.

# %%
print(f"V = {V}: 2 special tokens and {V - 2} characters")
print("first ids:", training[:12].tolist(), "=", repr(tokenizer.decode(training[:12].tolist())))

# %% [markdown]
# ## The table
#
# Each pair of neighbours (a, b) is one observation: after a came b. The pair has the number a V + b, which is different
# for every pair. Counting those numbers fills a table with a row for each a and a column for each b.

# %%
a, b = training[:-1], training[1:]  # (N), (N): each character, and the one after it
counts = torch.bincount(a * V + b, minlength=V * V).view(V, V).double()  # counts[a, b] = n(a, b)

for character in training_text[0], "e", " ":
    row = counts[tokenizer.encode(character)[0]]
    most = row.topk(5)
    shown = [f"{tokenizer.name(int(i))!r} {int(n):,}" for n, i in zip(most.values, most.indices)]
    print(f"after {character!r} most often: {', '.join(shown)}")

# %% [markdown]
# ## From counts to probabilities
#
# Which p(b given a) fits the text best? The model's probability of the text is the product of the probabilities of all
# its pairs. A product of a million numbers below 1 is too small for a computer, so take its logarithm, which is largest
# at the same p:
#
#     log of the product = sum over a, b of n(a, b) log p(b given a)
#
# For one row a, look for the p(b) that make the sum largest while they add up to 1. With a Lagrange multiplier m for
# that condition, the derivative by p(b) must vanish:
#
#     n(a, b) / p(b) - m = 0,   so   p(b) = n(a, b) / m,   and as they add up to 1,   m = n(a) = sum over b of n(a, b)
#
# So the best table is the one that everyone would have guessed: the share of b among all that followed a.

# %%
p = counts / counts.sum(1, keepdim=True).clamp(min=1)  # (V, V); a row without observations stays at 0
print(f"after 'e' comes a space with probability {p[tokenizer.encode('e')[0], tokenizer.encode(' ')[0]]:.3f}")

# %% [markdown]
# ## The loss
#
# How good is it? Take the mean of -log p over the characters that really came:
#
#     loss = -1/N * sum over pairs of log p(b given a)
#
# It is 0 for a model that is always certain and right. With the natural logarithm its unit is the nat; divided by log 2
# it is in bits, Shannon's unit. And e^loss, the *perplexity*, says among how many equally likely characters the model
# is left to choose.


# %%
def loss_of(p: torch.Tensor, ids: torch.Tensor) -> float:
    """Nats per character that the table p (V, V) needs for a text, its first character given."""
    return -p[ids[:-1], ids[1:]].log().mean().item()


def report(name: str, nats: float) -> None:
    print(f"{name:<36} {nats:6.3f} nats  {nats / math.log(2):6.3f} bits  perplexity {math.exp(nats):6.1f}")


report("all tokens alike: log V", math.log(V))
alone = counts.sum(0) / counts.sum()  # how often each character occurs, whatever came before
report("each as often as it occurs", loss_of(alone.expand(V, V), training))
report("the table, on its own text", loss_of(p, training))

# %% [markdown]
# ## Text it has not seen
#
# A model that has learned a text by heart is not a good model of the language. So the last tenth of the text was kept
# aside, and only the loss on that part says how good a model is. One pair there that never occurred in the training
# part has probability 0. Its -log is infinite, and so is the mean.

# %%
report("the table, on held-out text", loss_of(p, held_out))
new = (counts[held_out[:-1], held_out[1:]] == 0).sum().item()
print(f"because {new} of {len(held_out) - 1:,} pairs are new")

# %% [markdown]
# ## Smoothing
#
# Nothing is impossible only because it has not happened yet. Laplace's remedy: pretend that every pair was seen a few
# times more than it was.
#
#     p(b given a) = (n(a, b) + s) / (n(a) + s V)
#
# The rows still add up to 1. A small s trusts the counts; a huge s makes all tokens alike.

# %%
for s in 0.0001, 0.01, 1.0, 100.0:
    report(f"held-out text, s = {s:g}", loss_of((counts + s) / (counts.sum(1, keepdim=True) + s * V), held_out))

smoothing = 0.01
p = (counts + smoothing) / (counts.sum(1, keepdim=True) + smoothing * V)
assert torch.allclose(p.sum(1), torch.ones(V, dtype=p.dtype))

# %% [markdown]
# ## The same number from Quire
#
# Quire's layer CrossEntropy computes this loss for any model. It is given *logits*, numbers z from which softmax makes
# probabilities: p(b) = e^z(b) / sum of e^z. With z = log p, softmax gives back p, since e^(log p) = p and the sum is 1.
# Chapter 3 takes this layer apart.

# %%
z = p.log()  # (V, V)
loss = CrossEntropy()(z[held_out[:-1]], held_out[1:]).item()
assert math.isclose(loss, loss_of(p, held_out), rel_tol=1e-9)
report("the table, held out (CrossEntropy)", loss)

# %% [markdown]
# ## Sampling
#
# The table can also write. Draw the next character from its row, then go on from there. To draw from p, lay the
# probabilities end to end on the line from 0 to 1, throw a dart, and see whose piece it hit.


# %%
def draw(p: torch.Tensor) -> int:
    """A token drawn from the probabilities p (V)."""
    ends = p.cumsum(0)  # where each token's piece ends
    return int(torch.searchsorted(ends, torch.rand((), dtype=p.dtype) * ends[-1]))


ids = tokenizer.encode("\n")
for _ in range(steps(300)):
    ids.append(draw(p[ids[-1]]))
print(tokenizer.decode(ids))

# %% [markdown]
# It looks like English from very far away: pairs of letters are right, words are not. One character of context is too
# little.
#
# ## Why not simply count further back?
#
# Count what follows each *string* of k characters. A row for every string would need V^k rows, so keep only those that
# occur. The string and the character after it are one number again, written in base V.


# %%
def contexts(ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of the k characters before each character, and of these k with it."""
    before = sum((ids[i : len(ids) - k + i] * V ** (k - 1 - i) for i in range(k)), torch.zeros_like(ids[k:]))
    return before, before * V + ids[k:]


def occurrences(seen: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """How often each number of `asked` is among those of `seen`."""
    numbers, times = seen.unique(return_counts=True)
    places = torch.searchsorted(numbers, asked).clamp(max=len(numbers) - 1)
    return torch.where(numbers[places] == asked, times[places], 0).double()


print("characters before   training   held out   new strings in the held-out text")
for k in range(7):
    found = []
    for text in training, held_out:
        (rows, pairs), (before, both) = contexts(training, k), contexts(text, k)
        n_before, n_both = occurrences(rows, before), occurrences(pairs, both)
        found.append(-((n_both + smoothing) / (n_before + smoothing * V)).log().mean().item())
    print(f"{k:<19} {found[0]:8.3f} {found[1]:10.3f} {(n_before == 0).double().mean().item():12.1%}")

# %% [markdown]
# On its own text the loss falls and falls. On held-out text it falls at first and then rises: the longer a string, the
# fewer times it was seen, and more and more strings were never seen at all. To a table, "the king w" and "the queen w"
# have nothing in common. What is needed is a model in which strings that resemble each other share what was learned.
# The road there begins with the same table, found in a different way: by learning.
#
# ## Experiment
#
# Change the line
#
#     smoothing = 0.01
#
# into
#
#     smoothing = 1.0
#
# and look at the last table. What changes for one character before, what for six, and why so differently?
#
# **Answer.** For one character almost nothing: held out 2.482 in place of 2.488. Most rows hold thousands of
# observations, and 67 pretended ones do not matter. For six, the loss on the training text goes from 0.903 to 2.567 and
# held out from 2.375 to 3.051: a string of six was seen a few times, and what was pretended drowns what was seen. One s
# cannot be right for all rows. Good counting models blend long strings with short ones, row by row (Chen and Goodman
# 1998); this course takes the other road.
