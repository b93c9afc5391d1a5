"""Dropout masks: their rate, independence and repetition, and the module that uses them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import needs_pipelining
from torch import nn

from lightning_ipu_bert.ops import Dropout
from lightning_ipu_bert.ops.masks import dropped_share, has_mask, keep_mask, masked

pytestmark = needs_pipelining
COUNT = 4_000_000


def dropped(p, count=COUNT):
    return keep_mask((count,), p, torch.bfloat16) == 0


def assert_binomial(events, probability):
    """The number of events is within 4 sigma of the mean of independent ones."""
    count = events.numel()
    sigma = math.sqrt(count * probability * (1 - probability))
    assert abs(int(events.sum()) - count * probability) < 4 * sigma


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_every_word_of_a_draw_has_the_rate(p):
    torch.manual_seed(1)
    mask = dropped(p)
    for position in range(4):
        assert_binomial(mask[position::4], p)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 192, 36_864])
def test_elements_are_independent(lag):
    torch.manual_seed(2)
    mask = dropped(0.1)
    assert_binomial(mask[lag:] & mask[:-lag], 0.01)
    assert_binomial(mask[lag:] & ~mask[:-lag], 0.09)


def test_masks_one_after_the_other_are_independent():
    torch.manual_seed(3)
    masks = [dropped(0.1) for _ in range(4)]  # of layers, and of steps
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert_binomial(one & other, 0.01)


def test_masks_of_ranks_are_independent_and_repeat():
    masks = []
    for seed in (7, 8, 7):
        torch.manual_seed(seed)
        masks.append(dropped(0.1))
    assert_binomial(masks[0] & masks[1], 0.01)
    assert torch.equal(masks[0], masks[2])


def test_masks_repeat_from_a_random_state():
    torch.manual_seed(4)
    dropped(0.1)
    state = torch.get_rng_state()
    first = [dropped(0.1, 1000) for _ in range(3)]
    torch.set_rng_state(state)
    assert all(torch.equal(mask, dropped(0.1, 1000)) for mask in first)


@given(st.floats(0, 1), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_a_mask_multiplies_by_zero_or_one(p, dtype):
    torch.manual_seed(5)
    x = torch.randn(3, 5, 7, dtype=dtype)
    assert abs(dropped_share(p) - p) <= 2**-17
    mask = keep_mask(x.shape, p, dtype) if has_mask(p) else None
    kept = torch.ones_like(x) if mask is None else mask.ne(0).to(dtype)
    assert torch.equal(masked(x, mask).abs(), (x * kept).abs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_scales_what_it_keeps_and_its_gradient(dtype):
    torch.manual_seed(6)
    x = torch.randn(64, 48, dtype=dtype).t().requires_grad_()  # not contiguous
    output = Dropout(0.25)(x)
    output.sum().backward()
    scale = torch.where(output == 0, 0.0, 1 / (1 - 0.25)).to(dtype)
    assert 0.2 < float((output == 0).double().mean()) < 0.3
    torch.testing.assert_close(output, x * scale)
    torch.testing.assert_close(x.grad, scale)


def test_the_backward_of_dropout_passes_gradcheck():
    module, x = Dropout(0.3), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def seeded(x):
        torch.manual_seed(0)
        return module(x)

    assert torch.autograd.gradcheck(seeded, (x,))


def run_like_torch(module, plain, x):
    torch.manual_seed(9)
    expected = plain(x.clone())
    torch.manual_seed(9)
    assert torch.equal(module(x.clone()), expected)


def test_dropout_is_that_of_torch_where_masks_do_not_apply():
    x = torch.randn(4, 100)
    run_like_torch(Dropout(0.1).eval(), nn.Dropout(0.1).eval(), x)
    run_like_torch(Dropout(0.0), nn.Dropout(0.0), x)
    run_like_torch(Dropout(1.0), nn.Dropout(1.0), x)
    run_like_torch(Dropout(0.1, inplace=True), nn.Dropout(0.1, inplace=True), x)
    assert Dropout(0.1)(x.to("meta")).device.type == "meta"


def test_compiled_dropout_is_that_of_torch():
    x = torch.randn(4, 100)
    compiled = torch.compile(Dropout(0.1), backend="eager", fullgraph=True)
    run_like_torch(compiled, nn.Dropout(0.1), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_traced_dropout_is_that_of_torch():
    x = torch.randn(4, 100)
    traced = torch.jit.trace(Dropout(0.1), x, check_trace=False)
    run_like_torch(traced, nn.Dropout(0.1), x)
