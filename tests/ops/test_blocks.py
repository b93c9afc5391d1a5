"""The halves of a BERT layer beside plain formulas, numerical gradients and autograd."""

import pytest
import torch
from model_helpers import needs_pipelining
from torch.nn.functional import gelu, layer_norm, linear

from lightning_ipu_bert import UserError
from lightning_ipu_bert.ops import Dropout, attention
from lightning_ipu_bert.ops.attention_block import (
    AttentionParameters,
    AttentionSettings,
    attention_block,
)
from lightning_ipu_bert.ops.feed_forward_block import (
    FeedForwardParameters,
    FeedForwardSettings,
    feed_forward_block,
)
from lightning_ipu_bert.ops.masks import dropped_share, keep_mask, masked

pytestmark = needs_pipelining
B, S, D, F, HEADS = 3, 5, 8, 12, 2
RATES = pytest.mark.parametrize("p", [0.0, 0.3])
EPS = 1e-12


def numbers(*shapes, dtype=torch.float64):
    torch.manual_seed(1)
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def attention_inputs(dtype=torch.float64):
    shapes = [(B, S, D), *[(D, D)] * 3, *[(D,)] * 3, (D, D), (D,), (D,), (D,)]
    return numbers(*shapes, dtype=dtype)


def feed_forward_inputs(dtype=torch.float64):
    return numbers((B, S, D), (F, D), (F,), (D, F), (D,), (D,), (D,), dtype=dtype)


def score_bias(dtype=torch.float64):
    """The first example has 2 tokens, the second all, the third 4."""
    masked_keys = torch.arange(S) >= torch.tensor([2, S, 4])[:, None]
    bias = torch.zeros(B, 1, 1, S, dtype=dtype)
    return bias.masked_fill(masked_keys[:, None, None], torch.finfo(dtype).min)


def our_attention(bias, p, dtype=torch.float64):
    settings = AttentionSettings(HEADS, p, p, EPS, dtype)

    def run(x, *parameters):
        torch.manual_seed(2)
        return attention_block(x, bias, settings, AttentionParameters(*parameters))

    return run


def our_feed_forward(p, dtype=torch.float64):
    def run(x, *parameters):
        torch.manual_seed(2)
        settings = FeedForwardSettings(p, EPS, dtype)
        return feed_forward_block(x, settings, FeedForwardParameters(*parameters))

    return run


def drop(x, p):
    return masked(x, keep_mask(x.shape, p, x.dtype)) / (1 - dropped_share(p))


def plain_attention(bias, p):
    """The formulas of the paper, by autograd; masks are drawn in the same order."""

    def run(x, *tensors):
        torch.manual_seed(2)
        w = AttentionParameters(*tensors)
        q, k, v = (
            linear(x, weight, b).view(B, S, HEADS, -1).transpose(1, 2)
            for weight, b in zip(w[:3], w[3:6])
        )
        scores = q @ k.transpose(2, 3) / (D // HEADS) ** 0.5
        scores = scores if bias is None else scores + bias
        probabilities = torch.softmax(scores, -1)
        mask = keep_mask((B * HEADS, S, S), p, x.dtype)
        kept = 1.0 if mask is None else mask.ne(0).to(x.dtype).view(B, HEADS, S, S)
        context = (probabilities * kept / (1 - dropped_share(p))) @ v
        out = linear(context.transpose(1, 2).reshape(-1, D), w.output, w.output_bias)
        kept = keep_mask(out.shape, p, x.dtype)
        kept = 1.0 if kept is None else kept.ne(0).to(x.dtype)
        total = (out * kept / (1 - dropped_share(p))).view(x.shape) + x
        return layer_norm(total, (D,), w.norm, w.norm_bias, EPS)

    return run


def plain_feed_forward(p):
    def run(x, *tensors):
        torch.manual_seed(2)
        w = FeedForwardParameters(*tensors)
        out = linear(gelu(linear(x, w.inner, w.inner_bias)), w.output, w.output_bias).view(-1, D)
        kept = keep_mask(out.shape, p, x.dtype)
        kept = 1.0 if kept is None else kept.ne(0).to(x.dtype)
        total = (out * kept / (1 - dropped_share(p))).view(x.shape) + x
        return layer_norm(total, (D,), w.norm, w.norm_bias, EPS)

    return run


def gradients(run, inputs):
    output = run(*inputs)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), inputs)]


def check_equal(ours, plain, inputs):
    for one, other in zip(gradients(ours, inputs), gradients(plain, inputs)):
        torch.testing.assert_close(one, other)


BIASES = pytest.mark.parametrize(
    "bias",
    [None, score_bias(), torch.randn(B, 1, S, S, dtype=torch.float64)],
    ids=["no bias", "masked keys", "any bias"],
)


@RATES
@BIASES
def test_the_attention_block_is_the_formula_of_the_paper(p, bias):
    inputs = attention_inputs()
    check_equal(our_attention(bias, p), plain_attention(bias, p), inputs)
    assert torch.autograd.gradcheck(our_attention(bias, p), inputs)


@RATES
def test_the_feed_forward_block_is_the_formula_of_the_paper(p):
    inputs = feed_forward_inputs()
    check_equal(our_feed_forward(p), plain_feed_forward(p), inputs)
    assert torch.autograd.gradcheck(our_feed_forward(p), inputs)


@BIASES
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["evaluation", "dropout stays on"])
def test_without_a_gradient_the_attention_block_is_the_same(p, bias):
    inputs = attention_inputs()
    with torch.no_grad():
        found = our_attention(bias, p)(*inputs)
    torch.testing.assert_close(found, plain_attention(bias, p)(*inputs).detach())


@RATES
def test_without_a_gradient_the_feed_forward_block_is_the_same(p):
    inputs = feed_forward_inputs()
    with torch.inference_mode():
        found = our_feed_forward(p)(*inputs)
    torch.testing.assert_close(found, plain_feed_forward(p)(*inputs).detach())


@pytest.mark.parametrize("half", ["attention", "feed_forward"])
def test_without_a_gradient_bfloat16_is_within_its_error(half):
    if half == "attention":
        inputs, bias = attention_inputs(torch.float32), score_bias(torch.bfloat16)
        ours = our_attention(bias, 0.0, torch.bfloat16)
        exact = plain_attention(score_bias(torch.float32), 0.0)(*inputs)
    else:
        inputs = feed_forward_inputs(torch.float32)
        ours, exact = our_feed_forward(0.0, torch.bfloat16), plain_feed_forward(0.0)(*inputs)
    with torch.no_grad():
        error = (ours(*inputs).float() - exact).abs().max()
    trained = (ours(*inputs).float() - exact).abs().max()
    assert error <= 2 * trained + 2**-7


@pytest.mark.parametrize("examples", [1, 2])
def test_chunks_of_examples_change_nothing(examples, monkeypatch):
    inputs, bias = attention_inputs(), score_bias()
    whole = gradients(our_attention(bias, 0.0), inputs)
    monkeypatch.setattr(attention, "CHUNK", examples * HEADS * S * S)
    for one, other in zip(gradients(our_attention(bias, 0.0), inputs), whole):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(our_attention(bias, 0.3), inputs)


@pytest.mark.parametrize("half", ["attention", "feed_forward"])
def test_bfloat16_is_as_close_to_float32_as_autograds(half):
    bfloat16 = torch.bfloat16
    inputs = (attention_inputs if half == "attention" else feed_forward_inputs)(torch.float32)
    if half == "attention":
        ours, plain = our_attention(None, 0.0, bfloat16), plain_attention(None, 0.0)
    else:
        ours, plain = our_feed_forward(0.0, bfloat16), plain_feed_forward(0.0)

    def autocast(*inputs):
        with torch.autocast("cpu", bfloat16):
            return plain(*inputs).float()

    exact = gradients(plain, inputs)
    pairs = zip(gradients(ours, inputs), gradients(autocast, inputs), exact)
    for number, (one, theirs, right) in enumerate(pairs):
        scale = right.abs().max().clamp_min(1.0)  # the gradient of the key bias is 0
        ours, theirs = ((x.float() - right).abs().max() / scale for x in (one, theirs))
        # Autograd does not round the gradients that LayerNorm adds up over B * S tokens.
        rounding = 2**-7 if theirs else B * S * 2**-8
        assert ours <= 2 * theirs + rounding, f"tensor {number}: {ours}, {theirs}"


@pytest.mark.parametrize("frozen", range(1, 11))
def test_frozen_parameters_have_no_gradient(frozen):
    inputs = attention_inputs()
    expected = gradients(our_attention(None, 0.0), inputs)
    inputs[frozen].requires_grad_(False)
    our_attention(None, 0.0)(*inputs).sum().backward()
    assert inputs[frozen].grad is None
    trained = [i for i in range(len(inputs)) if i != frozen]
    weight = torch.linspace(-1, 1, B * S * D, dtype=torch.float64).view(B, S, D)
    for x in inputs:
        x.grad = None
    (our_attention(None, 0.0)(*inputs) * weight).sum().backward()
    for i in trained:
        torch.testing.assert_close(inputs[i].grad, expected[i + 1])


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    inputs = feed_forward_inputs()
    for x in (our_feed_forward(0.0)(*inputs), Dropout(0.1)(inputs[0])):
        with pytest.raises(UserError, match=r"no second derivatives.* Set fast_kernels=False"):
            torch.autograd.grad(x.sum(), inputs[:1], create_graph=True)
