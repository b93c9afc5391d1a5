"""Fused steps beside those of a loop over parameters."""

import copy

import pytest
import torch
from model_helpers import needs_pipelining
from torch import nn

from lightning_ipu_bert.training.fused import use_fused_steps

pytestmark = needs_pipelining


def trained(kind, fused, steps=5, **arguments):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = kind(model.parameters(), lr=0.01, **arguments)
    seen = []
    if fused:
        use_fused_steps(optimizer)
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["fused"]))
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), 0.1 * step)).square().sum().backward()
        optimizer.step()
    return model, optimizer, seen


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("changes", [{}, {"amsgrad": True}, {"weight_decay": 0.1}])
def test_parameters_are_those_of_a_loop(kind, changes):
    fused, optimizer, seen = trained(kind, True, **changes)
    plain, other, _ = trained(kind, False, foreach=False, **changes)
    assert seen == [True] * 5
    for one, two in zip(fused.parameters(), plain.parameters()):
        torch.testing.assert_close(one, two)
    for one, two in zip(optimizer.state.values(), other.state.values()):
        for name, value in one.items():
            torch.testing.assert_close(value, two[name])


def test_checkpoints_know_nothing_of_it():
    _, optimizer, _ = trained(torch.optim.AdamW, True, foreach=True)
    _, other, _ = trained(torch.optim.AdamW, False, foreach=True)
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]


def test_an_update_that_fails_before_it_begins_leaves_no_flag():
    _, optimizer, _ = trained(torch.optim.AdamW, True)

    def closure():
        raise ValueError("wrong data")

    with pytest.raises(ValueError, match="wrong data"):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["fused"] is None


def test_a_group_that_cannot_be_fused_runs_as_before():
    _, _, seen = trained(torch.optim.AdamW, True, foreach=False, differentiable=True, steps=0)
    assert not seen
    model = nn.Linear(2, 2)
    whole = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    use_fused_steps(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["fused"] is None
    assert not torch.equal(model.weight, whole.weight)


def test_parameters_of_other_stages_may_be_on_the_meta_device():
    here, elsewhere = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    parameters = [*here.parameters(), *elsewhere.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    use_fused_steps(optimizer)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["fused"]))
    before = here.weight.detach().clone()
    here(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert seen == [True]
    assert not torch.equal(here.weight, before)
