"""The encoder-decoder: gradients by hand, torch.nn.Transformer's numbers, its cache, padding on both sides."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quire.errors import UserError
from quire.layers.cross_entropy import IGNORED
from quire.layers.layer import Block, Layer, recording
from quire.models.encoder_decoder import EncoderDecoder, EncoderDecoderSettings
from quire.training.settings import layered, typed

SIZE = {"vocabulary_size": 11, "context_length": 8, "embedding_size": 8, "layers": 2, "encoder_layers": 3, "heads": 4}


def model_of(**settings: Any) -> EncoderDecoder:
    """A model in float64 all of whose weights, biases and norms too, are random numbers of about 1/3."""
    model = EncoderDecoder(EncoderDecoderSettings(**{**SIZE, "feedforward_size": 12, **settings})).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 3
    return model


def random_tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def padded_source(batch: int = 3, width: int = 6) -> Tensor:
    """Row i has i paddings, on the right, but for the last row, which has one on the left."""
    source = random_tokens(batch, width, seed=5)
    for row in range(1, batch - 1):
        source[row, -row:] = IGNORED
    source[-1, 0] = IGNORED
    return source


# ---- gradients ----

MIXTURES = [
    dict(zip(("norm_placement", "tied", "dropout", "label_smoothing", "recomputed"), values, strict=True))
    for values in itertools.product(("post", "pre"), (True, False), (0.0, 0.2), (0.0, 0.1), (False, True))
]


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda mixture: "-".join(map(str, mixture.values())))
def test_gradients_by_hand_equal_autograd(mixture):
    recomputed = mixture.pop("recomputed")
    model = model_of(**mixture).train()
    tokens, targets, source = random_tokens(3, 5), random_tokens(3, 5, seed=3), padded_source()
    targets[1, 3:] = IGNORED
    torch.manual_seed(4)
    with recording(model):
        loss = model(tokens, targets, source=source)
        expected = torch.autograd.grad(loss * 3.0, list(model.parameters()))
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputed = recomputed
    torch.manual_seed(4)
    with torch.no_grad(), recording(model):
        again = model(tokens, targets, source=source)
        model.backward(3.0)
        assert all(not layer.tape for layer in model.modules() if isinstance(layer, Layer))
    assert torch.equal(again, loss.detach())
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for (name, parameter), theirs in zip(model.named_parameters(), expected, strict=True):
        assert float((parameter.grad - theirs).abs().max()) <= 1e-10 * largest, name
    if not mixture["dropout"]:  # and what was recorded is what is trained without recording
        torch.testing.assert_close(model(tokens, targets, source=source), loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_shared_matrix_is_one_tensor(tied):
    model = model_of(tied=tied)
    shared = {id(part.weight) for part in (model.source_embedding, model.token_embedding, model.head)}
    assert len(shared) == (1 if tied else 3)


# ---- torch.nn.Transformer ----


def theirs(ours: EncoderDecoder) -> nn.Transformer:
    """torch.nn.Transformer with the weights of `ours`.

    It ends both stacks in a LayerNorm, also where every block ends in one, which the paper does not: there ours has
    none, and theirs is taken out.
    """
    settings = ours.settings
    made = nn.Transformer(
        settings.embedding_size, settings.heads, settings.encoder_layers, settings.layers, settings.feedforward_size,
        dropout=0.0, batch_first=True, norm_first=settings.norm_placement == "pre", dtype=torch.float64,
    )  # fmt: skip

    def attention(into: nn.MultiheadAttention, out_of: Any) -> None:
        parts = (out_of.query, out_of.key, out_of.value)
        into.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        into.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        into.out_proj.load_state_dict(out_of.output.state_dict())

    with torch.no_grad():
        for into, out_of in zip(
            [*made.encoder.layers, *made.decoder.layers], [*ours.encoder, *ours.decoder], strict=True
        ):
            norms = [(into.norm1, out_of.attention_norm), (into.norm2, out_of.feedforward_norm)]
            attention(into.self_attn, out_of.attention)
            if hasattr(out_of, "cross_attention"):
                attention(into.multihead_attn, out_of.cross_attention)
                norms = [norms[0], (into.norm2, out_of.cross_norm), (into.norm3, out_of.feedforward_norm)]
            for norm, own in norms:
                norm.load_state_dict(own.state_dict())
            into.linear1.load_state_dict(out_of.feedforward.up.state_dict())
            into.linear2.load_state_dict(out_of.feedforward.down.state_dict())
        if ours.norm is None:
            made.encoder.norm = made.decoder.norm = None
        else:
            made.encoder.norm.load_state_dict(ours.encoder_norm.state_dict())
            made.decoder.norm.load_state_dict(ours.norm.state_dict())
    return made


@pytest.mark.parametrize("placement", ["post", "pre"])
def test_equal_to_torch_s_transformer(placement):
    ours = model_of(norm_placement=placement, dropout=0.0, label_smoothing=0.0)
    reference = theirs(ours)
    tokens, source = random_tokens(3, 7), padded_source()
    padding = source == IGNORED
    places = (~padding).cumsum(1) - 1

    def embedded(embedding: Any, ids: Tensor, positions: Tensor) -> Tensor:
        waves = torch.zeros(*positions.shape, 8, dtype=torch.float64)  # the paper's equations, on their own
        for i in range(4):
            angle = positions.double() / 10000 ** (2 * i / 8)
            waves[..., 2 * i], waves[..., 2 * i + 1] = angle.sin(), angle.cos()
        return embedding.weight[ids] * 8**0.5 + waves

    expected = reference(
        embedded(ours.source_embedding, source.masked_fill(padding, 0), places.clamp(min=0)),
        embedded(ours.token_embedding, tokens, torch.arange(7).expand(3, 7)),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64),
        tgt_is_causal=True,
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    logits = expected @ ours.head.weight.T
    found = ours(tokens, source=source)
    assert float(logits.std()) > 0.1
    # Positions are float32 in ours, of which a wave's last bits are lost: that is the difference that is allowed.
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-6)
    waves = ours.positions
    with torch.no_grad():
        exact = ours.token_embedding.weight[tokens] * 8**0.5 + waves(torch.arange(7)).double()
        known = ours.source_embedding.weight[source.masked_fill(padding, 0)] * 8**0.5
        expected = reference(
            known + waves(places.clamp(min=0)).double(),
            exact,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64),
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
    torch.testing.assert_close(found, expected @ ours.head.weight.T, rtol=0, atol=1e-10)


# ---- padding ----


def test_padding_changes_nothing():
    """A batch of ragged sources and targets gives every row what it gets alone."""
    model = model_of().eval()
    rows = [(4, 3), (1, 6), (6, 1)]  # tokens of source and target
    source = torch.full((3, 6), IGNORED)
    tokens, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.bool)
    expected = []
    for row, (long, wide) in enumerate(rows):
        alone, written = random_tokens(1, long, seed=row), random_tokens(1, wide, seed=9 + row)
        source[row, :long], tokens[row, 6 - wide :], mask[row, 6 - wide :] = alone[0], written[0], True
        expected.append(model(written, source=alone)[0])
    for side in (source, source.roll(0)):
        found = model(tokens, mask=mask, source=side)
        for row, logits in enumerate(expected):
            torch.testing.assert_close(found[row, 6 - len(logits) :], logits, rtol=0, atol=1e-12)
    wider = torch.cat((torch.full((3, 2), IGNORED), source), dim=1)  # and padding on the left counts no position
    torch.testing.assert_close(model(tokens, mask=mask, source=wider), found, rtol=0, atol=1e-12)


def test_a_source_of_padding_alone_disturbs_nobody():
    model, source, tokens = model_of().eval(), padded_source(), random_tokens(3, 4)
    expected = model(tokens, source=source)
    source[1] = IGNORED
    found = model(tokens, source=source)
    assert found.isfinite().all()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)


# ---- the cache ----


@pytest.mark.parametrize("placement", ["post", "pre"])
def test_cached_is_uncached(placement):
    """Token by token, then in pieces; the encoder and the keys of its memory are computed once."""
    model = model_of(norm_placement=placement).eval()
    tokens, source = random_tokens(3, 7), padded_source()
    mask = torch.arange(7) >= torch.tensor([0, 2, 1]).unsqueeze(1)
    expected = model(tokens, mask=mask, source=source)
    encoded = []
    model.encoder[0].register_forward_hook(lambda *_: encoded.append(1))
    model.decoder[0].cross_attention.key.register_forward_hook(lambda *_: encoded.append(2))
    for pieces in ([1] * 7, [3, 1, 2, 1], [7]):
        cache, at, found = model.new_cache(3), 0, []
        for count in pieces:
            part = slice(at, at + count)
            found.append(model(tokens[:, part], cache=cache, mask=mask[:, part], source=None if at else source))
            at += count
            assert cache.length == at
        assert encoded == [1, 2]
        encoded.clear()
        for row, skipped in enumerate([0, 2, 1]):
            torch.testing.assert_close(torch.cat(found, 1)[row, skipped:], expected[row, skipped:], rtol=0, atol=1e-12)


def test_a_cache_is_cut_copied_and_reordered():
    model = model_of().eval()
    tokens, source = random_tokens(3, 7), padded_source()
    cache = model.new_cache(3)
    model(tokens[:, :5], cache=cache, source=source)
    kept = cache.copy()
    cache.cut(3)
    assert (cache.length, kept.length) == (3, 5)
    expected = model(tokens, source=source)
    torch.testing.assert_close(model(tokens[:, 3:], cache=cache), expected[:, 3:], rtol=0, atol=1e-12)
    rows = torch.tensor([2, 0, 2, 1])
    other = kept.reordered(rows)
    torch.testing.assert_close(model(tokens[rows, 5:], cache=other), expected[rows, 5:], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(tokens[:, 5:], cache=kept), expected[:, 5:], rtol=0, atol=1e-12)
    cache.cut(0)  # the source stays
    torch.testing.assert_close(model(tokens, cache=cache), expected, rtol=0, atol=1e-12)


def test_without_a_source_there_is_nothing_to_say():
    with pytest.raises(AssertionError, match="called with a source"):
        model_of()(random_tokens(2, 3))


# ---- label smoothing ----


def test_only_the_loss_in_training_is_smoothed():
    model = model_of(dropout=0.0, label_smoothing=0.2)
    arguments = {"tokens": random_tokens(3, 5), "targets": random_tokens(3, 5, seed=3), "source": padded_source()}
    logits = model(arguments["tokens"], source=arguments["source"]).flatten(0, 1)
    for training, smoothing in ((True, 0.2), (False, 0.0)):
        wanted = nn.functional.cross_entropy(logits, arguments["targets"].flatten(), label_smoothing=smoothing)
        torch.testing.assert_close(model.train(training)(**arguments), wanted)


# ---- settings ----


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("embedding_size", 0, "--model.embedding-size must be at least 1"),
        ("heads", 3, "--model.embedding-size 512 cannot be divided among 3 heads"),
        ("layers", 0, "--model.layers must be at least 1"),
        ("encoder_layers", -1, "--model.encoder-layers must be positive"),
        ("feedforward_size", -1, "--model.feedforward-size must be positive"),
        ("context_length", 1, "--model.context-length must be at least 2"),
        ("dropout", 1.0, "--model.dropout must be at least 0 and below 1"),
        ("label_smoothing", -0.1, "--model.label-smoothing must be at least 0 and below 1"),
        ("separate_documents", True, "leave it out, pairs are apart already"),
    ],
)
def test_impossible_settings_are_refused(setting, value, sentence):
    with pytest.raises(UserError, match=sentence):
        EncoderDecoderSettings(**{setting: value})


def test_the_base_model_of_the_paper():
    """Table 3: 65 million parameters with a shared vocabulary of 37,000."""
    settings = typed(layered("transformer-base"))
    shape, training = settings.model, settings.training
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in EncoderDecoder(shape).parameters())
    assert parameters == pytest.approx(65e6, rel=0.04)
    assert (shape.layers, shape.embedding_size, shape.heads, shape.feedforward_size) == (6, 512, 8, 2048)
    assert (shape.dropout, shape.label_smoothing, shape.tied, shape.norm_placement) == (0.1, 0.1, True, "post")
    assert (training.optimizer, training.beta1, training.beta2) == ("adam", 0.9, 0.98)
    assert (training.schedule, training.warmup_steps, training.steps) == ("inverse-square-root", 4000, 100_000)
    assert training.learning_rate == pytest.approx((512 * 4000) ** -0.5, rel=0.01)
