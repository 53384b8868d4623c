"""A GPT in one file: from the characters of a text to a text of its own, with every gradient written out by hand.

    python examples/one_file_gpt.py book.txt
    python examples/one_file_gpt.py book.txt --steps 5000 --prompt "It was"

It needs torch, and takes from it tensors and their arithmetic alone. The model is GPT-2's (Radford et al. 2019), its
tokens are characters. Read it from top to bottom: nothing is used before it is explained.

B batch, T time (places in a window), C channels, H heads, D = C / H channels of a head, V vocabulary.
The gradient of the loss by a number x says how fast the loss grows as x grows. It is written dx, and is shaped like x.
"""

import argparse
import math
from pathlib import Path

import torch

torch.set_grad_enabled(False)  # torch is not to note how numbers came about: we find the way back ourselves


class Characters:
    """The tokenizer: a character's number is its place among all the characters of the text, in order."""

    def __init__(self, text):
        self.characters = sorted(set(text))
        self.numbers = {character: number for number, character in enumerate(self.characters)}

    def encode(self, text):
        return torch.tensor([self.numbers[character] for character in text])

    def decode(self, numbers):
        return "".join(self.characters[number] for number in numbers)


def draw_batch(text, size, time):
    """Windows from random places in the text: inputs (B, T), and as targets the character after each of them."""
    places = torch.randint(len(text) - time, (size, 1)) + torch.arange(time)  # (B, 1) + (T) = (B, T)
    return text[places], text[places + 1]


class Parameter:
    """Numbers to be learned, their gradient, and AdamW's running means of the gradient and of its square."""

    def __init__(self, value):
        self.value, (self.grad, self.mean, self.square) = value, value.new_zeros(3, *value.shape)

    def update(self, step, rate, decay=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8):
        """AdamW (Loshchilov and Hutter 2019): against the mean gradient, in steps of about `rate`, from step 1 on.

        Divided by its root mean square a gradient that keeps its sign has size 1, and one that wavers is small. Both
        means begin at 0, and after t steps hold a share 1 - beta^t of what they should. Matrices also shrink a little.
        """
        self.mean = beta1 * self.mean + (1 - beta1) * self.grad
        self.square = beta2 * self.square + (1 - beta2) * self.grad * self.grad
        mean, square = self.mean / (1 - beta1**step), self.square / (1 - beta2**step)
        self.value *= 1 - rate * decay * (self.value.dim() >= 2)
        self.value -= rate * mean / (square.sqrt() + epsilon)


# A layer is a function that returns two things: its output y, and the way back, a function from dy to dx, which also
# adds to the gradients of the layer's parameters. What it needs of the way there stands in the variables around it.
# All of it is the chain rule: dx = sum over all y that depend on x of dy times the derivative of y by x.


def linear(x, weight, bias):
    """y = x W + b: (..., inputs) to (..., outputs)."""

    def back(dy):
        # y_j = sum_i x_i W_ij + b_j. All rows of x meet the same W and b, whose gradients are sums over the rows.
        rows, drows = x.flatten(0, -2), dy.flatten(0, -2)
        weight.grad += rows.T @ drows  # dW_ij = sum over rows of x_i dy_j
        bias.grad += drows.sum(0)  # db_j = sum over rows of dy_j
        return dy @ weight.value.T  # dx_i = sum_j dy_j W_ij

    return x @ weight.value + bias.value, back


def gelu(x):
    """y = x/2 (1 + tanh(a (x + b x^3))): near 0 where x is negative, near x where positive, and smooth between."""
    a, b = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(a * x * (1 + b * x * x))

    def back(dy):
        # The product rule, and tanh' = 1 - tanh^2: dy/dx = (1 + t)/2 + x/2 (1 - t^2) a (1 + 3 b x^2)
        return dy * 0.5 * (1 + t + x * (1 - t * t) * a * (1 + 3 * b * x * x))

    return 0.5 * x * (1 + t), back


def layer_norm(x, gain, shift, epsilon=1e-5):
    """y = n gain + shift, where n = (x - mean) / deviation over the channels (Ba et al. 2016): (..., C) to (..., C)."""
    centred = x - x.mean(-1, keepdim=True)
    r = ((centred * centred).mean(-1, keepdim=True) + epsilon) ** -0.5  # 1 / deviation
    n = centred * r

    def back(dy):
        gain.grad += (dy * n).flatten(0, -2).sum(0)  # y = n gain + shift: dgain = sum over rows of dy n
        shift.grad += dy.flatten(0, -2).sum(0)  # dshift = sum over rows of dy
        dn = dy * gain.value
        # x_i moves n_i by r, and every n_j through the mean by -r / C and through the deviation by -r n_i n_j / C.
        return r * (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True))

    return n * gain.value + shift.value, back


def attention(qkv, heads):
    """softmax(Q K^T / sqrt(D)) V (Vaswani et al. 2017), where a place looks at itself and at what came before it.

    `qkv` (B, T, 3 C) holds for each place a query (what it looks for), a key (what it is found by) and a value (what it
    gives). y (B, T, C) is for each place a mean of the values, weighted by how well its query fits their keys.
    """
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(-2, -1) * scale  # (B, H, T, T): who looks, at whom
    scores += torch.full(scores.shape[-2:], -math.inf).triu(1)  # the future is hidden
    w = torch.exp(scores - scores.amax(-1, keepdim=True))  # softmax: the largest becomes e^0, and nothing overflows
    w /= w.sum(-1, keepdim=True)

    def back(dy):
        dy = dy.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, T, D)
        dv = w.transpose(-2, -1) @ dy  # Y = W V: dV = W^T dY, dW = dY V^T
        dw = dy @ v.transpose(-2, -1)
        # Softmax: the derivative of w_i by score j is w_i (1 if i = j else 0) - w_i w_j; what is hidden has w = 0.
        dscores = w * (dw - (w * dw).sum(-1, keepdim=True)) * scale
        dq = dscores @ k  # S = Q K^T (scale is in dS already): dQ = dS K, dK = dS^T Q
        dk = dscores.transpose(-2, -1) @ q
        return torch.stack((dq, dk, dv)).permute(1, 3, 0, 2, 4).flatten(2)  # as qkv lay

    return (w @ v).transpose(1, 2).flatten(2), back  # the heads side by side


def cross_entropy(logits, targets):
    """The mean of -log p(target), in nats, where p = softmax(logits): logits (B, T, V), targets (B, T)."""
    shifted = logits - logits.amax(-1, keepdim=True)
    log_p = shifted - shifted.exp().sum(-1, keepdim=True).log()

    def back():
        # -log p_t = log(sum_j e^z_j) - z_t, whose derivative by z_i is p_i - (1 if i = t else 0); of a mean, its share.
        dlogits = log_p.exp()
        return dlogits.scatter_add_(-1, targets[..., None], -torch.ones_like(dlogits)) / targets.numel()

    return -log_p.gather(-1, targets[..., None]).mean(), back


def block(x, w, heads):
    """Two parts, each added to the stream x (B, T, C): attention moves between places, feedforward works on each."""
    a, norm_1_back = layer_norm(x, *w["norm 1"])
    a, qkv_back = linear(a, *w["qkv"])
    a, attention_back = attention(a, heads)
    a, out_back = linear(a, *w["out"])
    x = x + a
    f, norm_2_back = layer_norm(x, *w["norm 2"])
    f, up_back = linear(f, *w["up"])
    f, gelu_back = gelu(f)
    f, down_back = linear(f, *w["down"])

    def back(dx):
        # The same lines from the last to the first. Both terms of a sum receive its gradient: x, and what was added.
        dx = dx + norm_2_back(up_back(gelu_back(down_back(dx))))
        return dx + norm_1_back(qkv_back(attention_back(out_back(dx))))

    return x + f, back


def pair(*shape, deviation=0.02):
    """What a layer learns: the matrix and bias of a map, or the gain and shift of a norm."""
    first = torch.randn(shape) * deviation if len(shape) == 2 else torch.ones(shape)
    return Parameter(first), Parameter(torch.zeros(shape[-1]))


class GPT:
    """Characters (B, T) in; out come, for each place, the logits (B, T, V) of the character after it."""

    def __init__(self, vocabulary_size, context_length, embedding_size, layers, heads):
        self.context_length, self.heads, C = context_length, heads, embedding_size
        self.characters = Parameter(torch.randn(vocabulary_size, C) * 0.02)
        self.places = Parameter(torch.randn(context_length, C) * 0.02)
        small = 0.02 / math.sqrt(2 * layers)  # for what is added to the stream, lest a deep model's stream grow large
        self.blocks = [
            {"norm 1": pair(C), "qkv": pair(C, 3 * C), "out": pair(C, C, deviation=small),
             "norm 2": pair(C), "up": pair(C, 4 * C), "down": pair(4 * C, C, deviation=small)}
            for _ in range(layers)
        ]  # fmt: skip
        self.norm = pair(C)
        pairs = [self.norm, *(two for w in self.blocks for two in w.values())]
        self.parameters = [self.characters, self.places, *(parameter for two in pairs for parameter in two)]

    def __call__(self, inputs):
        E, P, T = self.characters, self.places, inputs.shape[1]
        x = E.value[inputs] + P.value[:T]  # (B, T, C): what stands there, and where
        backs = []
        for w in self.blocks:
            x, block_back = block(x, w, self.heads)
            backs.append(block_back)
        x, norm_back = layer_norm(x, *self.norm)

        def back(dlogits):
            E.grad += dlogits.flatten(0, 1).T @ x.flatten(0, 1)  # logits = x E^T: dE = dlogits^T x, dx = dlogits E
            dx = norm_back(dlogits @ E.value)
            for block_back in reversed(backs):
                dx = block_back(dx)
            E.grad.index_add_(0, inputs.flatten(), dx.flatten(0, 1))  # a character that stands in many places: the sum
            P.grad[:T] += dx.sum(0)  # a place's row was read by every window of the batch: the sum again

        return x @ E.value.T, back  # logits: how alike x is to each character's row


def train_step(model, inputs, targets, step, rate, clip=1.0):
    """There, back, and one update of every parameter; returns the loss."""
    for p in model.parameters:
        p.grad.zero_()
    logits, model_back = model(inputs)
    loss, loss_back = cross_entropy(logits, targets)
    model_back(loss_back())
    length = math.sqrt(sum(float((p.grad * p.grad).sum()) for p in model.parameters))  # of the whole gradient
    for p in model.parameters:
        p.grad *= min(1.0, clip / (length + 1e-6))  # one steep batch must not throw the weights far off
        p.update(step, rate)
    return float(loss)


def learning_rate(step, steps, peak, floor=0.1):
    """A straight rise over the first twentieth (at most 100 steps), then half a cosine wave down to a tenth."""
    rise = min(100, 1 + steps // 20)
    wave = math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))  # from 1 to -1
    return peak * min(step / rise, floor + (1 - floor) * (1 + wave) / 2)


def held_out_loss(model, text):
    """Nats per character over a whole text, in windows side by side: each character but the first counts once."""
    T, total, places = model.context_length, 0.0, torch.arange(len(text) - 1)
    whole = len(places) // T * T
    for window in (*places[:whole].view(-1, T).split(64), places[whole:].unsqueeze(0)):  # the very last is shorter
        if window.numel():
            loss, _ = cross_entropy(model(text[window])[0], text[window + 1])
            total += float(loss) * window.numel()
    return total / len(places)


def write(model, text, count, temperature=0.8, top_k=100):
    """The text and `count` characters more, each drawn among the `top_k` likeliest; temperature 0: the likeliest."""
    temperature, top_k = (temperature, top_k) if temperature else (1.0, 1)
    for _ in range(count):
        logits = model(text[None, -model.context_length :])[0][0, -1] / temperature  # (V), of the last place
        if top_k < len(logits):
            logits[logits < logits.sort().values[-top_k]] = -math.inf
        drawn = torch.multinomial(torch.exp(logits - logits.max()), 1)  # in proportion to these
        text = torch.cat((text, drawn))
    return text


FLAGS = {"steps": 1000, "learning-rate": 4e-3, "batch-size": 8, "context-length": 64, "embedding-size": 128,
         "layers": 2, "heads": 4, "prompt": "", "tokens": 500, "temperature": 0.8, "top-k": 100, "seed": 1}  # fmt: skip


def read(options):
    """The text, if it and the options can be used; else an OSError or a ValueError that says why not."""
    for flag, value in ((name.replace("_", "-"), value) for name, value in options.items()):
        if not isinstance(value, str) and not (value >= 1 if isinstance(value, int) else 0 <= value < 10):
            raise ValueError(f"--{flag} must be at least 1, or for a rate or temperature from 0 to 10, not {value}.")
    if options["embedding_size"] % options["heads"]:
        raise ValueError("--embedding-size must be a multiple of --heads.")
    text, least = Path(options["text"]).read_text("utf-8", "replace"), 20 + 2 * options["context_length"]
    if set(text) & set("\0\ufffd") or len(text) < least:
        raise ValueError(f"{options['text']} is not UTF-8 text, or has fewer than {least} characters: give more.")
    if unknown := sorted(set(options["prompt"]) - set(text)):
        raise ValueError(f"The text lacks what stands in the prompt: {', '.join(map(repr, unknown))}.")
    return text


def main():
    parser = argparse.ArgumentParser(description="Train a small GPT on a text, and let it write.")
    parser.add_argument("text", help="a file of UTF-8 text")
    for name, value in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value!r}")
    options = vars(parser.parse_args())
    try:
        text = read(options)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    torch.manual_seed(options["seed"])
    tokenizer, cut, steps, losses = Characters(text), len(text) * 9 // 10, options["steps"], []
    numbers, size = tokenizer.encode(text), len(tokenizer.characters)
    model = GPT(size, *(options[name] for name in ("context_length", "embedding_size", "layers", "heads")))
    for step in range(1, steps + 1):
        inputs, targets = draw_batch(numbers[:cut], options["batch_size"], model.context_length)
        losses.append(train_step(model, inputs, targets, step, learning_rate(step, steps, options["learning_rate"])))
        if step % math.ceil(steps / 10) == 0 or step == steps:
            print(f"step {step}: loss {sum(losses) / len(losses):.4f}", flush=True)
            losses = []
    print(f"loss of the last tenth of the text, which was held out: {held_out_loss(model, numbers[cut:]):.4f}")
    prompt = tokenizer.encode(options["prompt"] or text[0])
    written = write(model, prompt, options["tokens"], options["temperature"], options["top_k"])
    print(f"\n{tokenizer.decode(written)}")


if __name__ == "__main__":
    main()
