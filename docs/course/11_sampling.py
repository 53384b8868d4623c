# %% [markdown]
# # 11. Writing
#
# A trained model gives probabilities. This last chapter turns them into text: how to draw the next character and which
# ones to leave out, how to search for the likeliest text and why one may not want it, and how to write without reading
# everything again for each character. At its end stands a page of text.
#
# | symbol | meaning |
# |---|---|
# | B, T | batch, time: windows at once, and positions in a window |
# | V | vocabulary size |
# | z, p | logits (V), and the probabilities softmax(z) |
# | t | temperature |
# | k, P | how many tokens, or how much probability, may be drawn from |
# | K | beams: how many unfinished texts a search follows |

# %%
import lzma
import math
import zlib

import torch
from course import T, V, batch, held_out, held_out_text, measure, steps, tokenizer
from torch import Tensor

from quire.data.batches import Batch
from quire.generation.beams import BeamSearch
from quire.generation.sampling import SamplingSettings, keep_top_k, keep_top_p, sample
from quire.generation.stream import tokens as stream
from quire.layers.attention import MultiHeadAttention
from quire.models.gpt import GPT, GPTSettings
from quire.training.engines import ENGINES
from quire.training.schedules import cosine, warmed_up

torch.manual_seed(1)

# %% [markdown]
# ## A model to write with
#
# Much as in chapter 10, with two blocks and AdamW alone.

# %%
shape = {"layers": 2, "heads": 4, "embedding_size": 64, "tied": False, "positions": "rotary"}
settings = GPTSettings(
    vocabulary_size=V, context_length=T, feedforward="squared-relu", initialization="zero-output", **shape
)
model = GPT(settings)
torch.nn.init.normal_(model.token_embedding.weight, std=0.3)
adamw = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
count = steps(1000)
for step in range(count):
    tokens, targets = batch(16)
    loss = ENGINES["manual"].backpropagate(model, Batch(tokens, targets, targets.numel()), 1.0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adamw.param_groups[0]["lr"] = 0.006 * warmed_up(cosine, step, count // 20, step / count, 0.05, 0.0)
    adamw.step()
    adamw.zero_grad()
    if step % (count // 10) == 0:
        print(f"step {step:5}   loss {loss.item():.3f}")
model.eval()
torch.set_grad_enabled(False)  # nothing is trained below

# %%
loss = measure(model)
print(f"held-out loss: {loss:.3f} nats per character")

# %% [markdown]
# ## What bits per byte mean
#
# Shannon (1948): with an ideal code a token of probability p costs log2(1/p) bits, and no code does better on average.
# So the loss is a length. Summed up over a text, divided by log 2, it is the number of bits into which the model could
# pack that text; an arithmetic coder comes within a few bits of it. Divided by the bytes of the text it is *bits per
# byte*. It does not depend on what a token is: a model of words has a larger loss per token, over fewer tokens. That is
# why Quire reports it.

# %%
size = len(held_out_text.encode())
bits = loss * (len(held_out) - 1) / math.log(2)
print(f"bits per byte: {bits / size:.3f}")
print(f"{size:,} bytes of held-out text, packed by the model: {bits / 8:,.0f} bytes")
for name, packed in ("zlib", zlib.compress(held_out_text.encode(), 9)), ("xz", lzma.compress(held_out_text.encode())):
    print(f"by {name:<4}: {len(packed):,} bytes, {8 * len(packed) / size:.3f} bits per byte")

# %% [markdown]
# The comparison flatters the model, for its own weights are not in that figure; zlib and xz have to learn everything
# from the text that they pack. On a text of many millions of bytes the weights would hardly count.
#
# ## Temperature
#
# Divide all logits by t before softmax. Since p_i is proportional to e^(z_i), this is
#
#     e^(z_i / t) = (e^(z_i))^(1/t),   so   p_i becomes p_i^(1/t), made to add up to 1 again
#
# The ratio of two tokens, p_i / p_j, becomes its power 1/t. At t = 1/2 what was ten times likelier is a hundred times
# likelier. As t goes to 0 only the largest is left (*greedy*); as t grows all become alike.


# %%
def next_logits(text: str) -> Tensor:
    """Logits (V) of what follows."""
    ids = tokenizer.encode(text, unknown="skip")  # should your own text lack some of its characters
    return model(torch.tensor([ids[-T:]]))[0, -1]


def entropy(p: Tensor) -> float:
    return -(p * p.clamp(min=1e-30).log()).sum().item()


z = next_logits("ROMEO:\nI will not st")
p = torch.softmax(z, dim=-1)
for t in 0.25, 0.5, 1.0, 2.0:
    tempered = torch.softmax(z / t, dim=-1)
    assert torch.allclose(tempered, p ** (1 / t) / (p ** (1 / t)).sum(), atol=1e-6)
    best = tempered.topk(5)
    shown = [f"{tokenizer.name(i)!r} {q:.3f}" for q, i in zip(best.values.tolist(), best.indices.tolist())]
    print(f"t = {t:<4}  entropy {entropy(tempered):.2f} nats   {', '.join(shown)}")

# %% [markdown]
# ## Leaving out the tail
#
# Most characters are very unlikely at any one place, but there are many of them. Suppose the unlikely ones together
# have 3%. Then a text of 300 characters has about nine of them, and each is read by the model afterwards as if it were
# good text. Two cuts help:
#
# *top-k* keeps the k likeliest tokens (Fan et al. 2018). But where one token is nearly certain, k = 10 keeps nine bad
# ones, and where all letters are possible it cuts good ones off.
#
# *top-p*, or nucleus (Holtzman et al. 2020), keeps the smallest set of likeliest tokens that together have at least P.
# The number of tokens follows from the model's own certainty. In order from the likeliest down, a token is kept while
# the sum *before* it is still below P.
#
# What is left is divided by its sum. In logits: those left out become -infinity.


# %%
def top_k(p: Tensor, k: int) -> Tensor:
    kept = p * (p >= p.topk(k).values[-1])
    return kept / kept.sum()


def top_p(p: Tensor, P: float) -> Tensor:
    ordered, order = p.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.zeros_like(p).scatter(0, order, ordered * (before < P))
    return kept / kept.sum()


for text in (
    "ROMEO:\nI will not st",
    "ROMEO:\nI will not stan",
    "KING RICHARD III:\nWhat, sir, th",
    "And then he said, ",
):
    z = next_logits(text)
    p = torch.softmax(z, dim=-1)
    assert torch.allclose(top_k(p, 10), torch.softmax(keep_top_k(z, 10), dim=-1), atol=1e-6)
    assert torch.allclose(top_p(p, 0.9), torch.softmax(keep_top_p(z, 0.9), dim=-1), atol=1e-6)
    nucleus, ten = (top_p(p, 0.9) > 0).sum().item(), p.topk(10).values.sum().item()
    print(f"after {text[-12:]!r:<16} top-p 0.9 keeps {nucleus:>2} tokens; the best 10 have {ten:.3f}")

windows = held_out[: len(held_out) // T * T].view(-1, T)[:200]
p = torch.softmax(model(windows), dim=-1).flatten(0, 1).sort(descending=True).values  # (N, V)
tail = (p * (p.cumsum(-1) - p >= 0.95)).sum(-1).mean()
print(f"the tail behind P = 0.95 has {tail:.1%} on average: {300 * tail:.0f} draws from it in 300 characters")

# %% [markdown]
# ## The likeliest text
#
# Why draw at all? One could ask for the text with the largest probability. Its logarithm is a sum over its tokens,
#
#     log p(text) = log p(first) + log p(second, given the first) + ...
#
# but there are V^n texts of n tokens. *Greedy* takes the likeliest token each time, which need not lead to the
# likeliest text: a good word may begin with a less likely letter. *Beam search* follows the K likeliest beginnings at
# once. At each step every one is written on in all V ways, and of these K V texts the K likeliest go on. K = 1 is
# greedy; K = V is exact for two tokens.


# %%
def beam_search(start: list[int], n: int, K: int) -> tuple[float, list[int]]:
    """The likeliest text of n tokens after `start` that K beams find, with its log-probability."""
    sums, texts = torch.zeros(1), [start]
    for _ in range(n):
        log_p = torch.log_softmax(model(torch.tensor([text[-T:] for text in texts]))[:, -1], dim=-1)  # (K, V)
        best = (sums.unsqueeze(1) + log_p).flatten().topk(min(K, len(texts) * V))
        texts = [[*texts[i // V], i % V] for i in best.indices.tolist()]
        sums = best.values
    return sums[0].item(), texts[0][len(start) :]


start = tokenizer.encode("ROMEO:\nI will not ", unknown="skip")
first = torch.log_softmax(model(torch.tensor([start]))[0, -1], dim=-1)  # (V)
second = torch.log_softmax(model(torch.tensor([[*start, i] for i in range(V)]))[:, -1], dim=-1)  # (V, V)
assert math.isclose(beam_search(start, 2, V)[0], (first.unsqueeze(1) + second).max().item(), abs_tol=1e-4)

for K in 1, 2, 4, 16:
    log_p, found = beam_search(start, 30, K)
    print(f"K = {K:>2}: log p {log_p:7.3f}  {tokenizer.decode(found)!r}")

# %% [markdown]
# Quire's BeamSearch, which also knows texts that end by themselves, finds the same:

# %%
search = BeamSearch(prompts=1, beams=4, count=1, length=30, length_penalty=0.0, ended=lambda text: None)
for _ in stream(model, [start], search.choose, torch.device("cpu")):
    pass
log_p, found = beam_search(start, 30, 4)
assert list(search.results[0][0].tokens) == found
assert math.isclose(search.results[0][0].log_probability, log_p, abs_tol=1e-3)

# %% [markdown]
# More beams find likelier texts. They are not better to read. The likeliest text is made of what is always likely,
# common words and repetition: "that that that" is found by four beams. A human text is not like that. Now and then it
# says something unexpected, for otherwise it need not have been written (Holtzman et al. 2020). Beam search is for
# tasks with one right answer, such as translation.
#
# ## Not reading everything again
#
# To write character n the model reads the n - 1 before it. Done naively, the whole text passes through all layers again
# for each new character. But look at chapter 7's mask: position s never sees what comes after it. So its vectors, its
# key k_s and its value v_s in every layer, stay the same whatever is written later. Keep them, and a new position needs
# only its own q, k and v:
#
#     y_n = softmax(q_n [k_1 ... k_n]^T / sqrt(D)) [v_1 ... v_n]
#
# That is the last row of the whole attention, and the only one that matters for the next character.

# %%
attention = MultiHeadAttention(64, heads=1, kv_heads=1, head_size=64)
x = torch.randn(20, 64)
whole = attention(x.unsqueeze(0))[0]  # (20, 64)

keys, values = [], []
for n in range(20):
    keys.append(attention.key(x[n]))
    values.append(attention.value(x[n]))
    k, v = torch.stack(keys), torch.stack(values)  # (n + 1, 64)
    weights = torch.softmax(attention.query(x[n]) @ k.T / math.sqrt(64), dim=-1)  # (n + 1)
    assert torch.allclose(attention.output(weights @ v), whole[n], atol=1e-5)
print("row by row, with keys and values kept: the same as all at once")

# %% [markdown]
# A Quire model makes such a cache for all its layers. Read with it, one character at a time, the logits are the same:

# %%
ids = held_out[:T].unsqueeze(0)  # (1, T)
cache = model.new_cache(batch=1)
one_by_one = torch.cat([model(ids[:, n : n + 1], cache=cache) for n in range(T)], dim=1)
assert torch.allclose(one_by_one, model(ids), atol=1e-4)
numbers = sum(kept.numel() for kept in [*cache.keys, *cache.values])
print(f"positions read for {T} characters: {T * (T + 1) // 2} without the cache, {T} with it")
print(f"the cache holds 2 * layers * channels * positions = {numbers:,} numbers")

# %% [markdown]
# It is a trade of memory for work. When the context is full, the oldest text has to go. Then all positions change, and
# Quire reads the last half of the window anew and goes on from there.
#
# ## A page
#
# Quire's `sample` does what was derived above, in this order: divide by the temperature, cut, softmax, draw. `stream`
# is the loop around it, with the cache.

# %%
temperature = 0.8
drawing = SamplingSettings(temperature=temperature, top_p=0.95)
generator = torch.Generator().manual_seed(1)
length = steps(1500, short=100)


def choose(logits: Tensor, windows: list[list[int]]) -> list[int]:
    return [sample(logits[0], windows[0], drawing, generator)]


written: list[int] = []
for tokens in stream(model, [tokenizer.encode("\n")], choose, torch.device("cpu")):
    written += tokens
    if len(written) == length:
        break
print(tokenizer.decode(written))
words = tokenizer.decode(written).split()
print(f"[{len(words)} words, {len(set(words))} of them different]")

# %% [markdown]
# So far this model comes, in about a minute on one core: lines, speakers, words that mostly exist, sentences that mean
# nothing. Nothing else has to change for a better one. A larger model, more text and more time give it, and `quire
# train` is this course in one command.
#
# ## Experiment
#
# Change the line
#
#     temperature = 0.8
#
# into
#
#     temperature = 0.2
#
# What do you expect of a model that nearly always says what it finds likeliest?
#
# **Answer.** "the some the death the so the so the have the so the be": of 360 words only 31 are different; above it
# was 180 of 300. After a space "t" is the likeliest letter, after "t" an "h", and then it stands before the same choice
# again. Each step is likely, and the whole is unlike anything in the text: one sentence without an end. Real text has
# the entropy that the model measures in it, about, and drawing near t = 1 keeps that. The better a model is, the lower
# its temperature may be before it runs in such circles.
