"""Micro-batches that share weights and products beside micro-batches that do not."""

import pytest
import torch
from model_helpers import needs_pipelining
from test_blocks import (
    B,
    attention_inputs,
    feed_forward_inputs,
    our_attention,
    our_feed_forward,
    score_bias,
)

from lightning_ipu_bert.ops import accumulation
from lightning_ipu_bert.ops.accumulation import accumulating, once

pytestmark = needs_pipelining
BLOCKS = {
    "attention": (lambda p: our_attention(score_bias(), p), attention_inputs),
    "feed_forward": (our_feed_forward, feed_forward_inputs),
}
BLOCK = pytest.mark.parametrize("block", BLOCKS)
MICRO_BATCHES = 3


def backward(block, p, frozen=(), within=accumulating):
    """Run micro-batches of one example; return the gradients of hidden states and parameters."""
    make, inputs_of = BLOCKS[block]
    hidden, *parameters = inputs_of()
    for number in frozen:
        parameters[number].requires_grad_(False)
    run = make(p)
    with within():
        outputs = [run(hidden * factor, *parameters) for factor in range(1, MICRO_BATCHES + 1)]
        for output in outputs:
            output.backward(torch.linspace(-1, 1, output.numel()).to(output).view(output.shape))
    return [hidden.grad, *(parameter.grad for parameter in parameters)]


def check_equal(found, expected):
    for one, other in zip(found, expected):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def separately():
    return torch.enable_grad()


@BLOCK
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 2 * B * 5, 4096], ids=["at once", "by two", "at the end"])
def test_gradients_are_the_sum_over_micro_batches(block, p, rows, monkeypatch):
    monkeypatch.setattr(accumulation, "ROWS", rows)
    check_equal(backward(block, p), backward(block, p, within=separately))


@BLOCK
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1, 2), tuple(range(4))])
def test_frozen_parameters_have_no_gradient(block, frozen):
    found = backward(block, 0.0, frozen)
    assert all(found[1 + number] is None for number in frozen)
    check_equal(found, backward(block, 0.0, frozen, within=separately))


@BLOCK
def test_gradients_are_added_to_those_of_before(block):
    make, inputs_of = BLOCKS[block]
    hidden, *parameters = inputs_of()
    for _ in range(2):
        with accumulating():
            make(0.0)(hidden, *parameters).sum().backward()
    twice = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    make(0.0)(hidden, *parameters).sum().backward()
    check_equal(twice, [2 * parameter.grad for parameter in parameters])


def test_weights_are_made_once_an_update_and_anew_in_the_next():
    weight, made = torch.nn.Parameter(torch.ones(2)), []

    def make():
        made.append(weight.detach().clone())
        return made[-1]

    for value in (1.0, 2.0):
        weight.data.fill_(value)  # which no version of the tensor shows
        with accumulating():
            assert once(weight, "cast", make) is once(weight, "cast", make)
    assert [float(x[0]) for x in made] == [1.0, 2.0]
    assert once(weight, "cast", make) is not once(weight, "cast", make)


def test_a_failed_update_leaves_nothing_behind():
    hidden, *parameters = feed_forward_inputs()

    def fail():
        with accumulating():
            our_feed_forward(0.0)(hidden, *parameters).sum().backward()
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    assert parameters[0].grad is None
    our_feed_forward(0.0)(hidden, *parameters).sum().backward()
    assert parameters[0].grad is not None
