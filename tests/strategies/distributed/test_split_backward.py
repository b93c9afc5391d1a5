"""What a schedule that splits the backward cannot run is refused by name, before the first step."""

import pytest
import torch
from model_helpers import needs_pipelining
from projects import PLANS, Project, assert_close, fit
from ranks import run_ranks
from torch import nn

from lightning_ipu_bert import UserError

pytestmark = [pytest.mark.slow, needs_pipelining]
SPLIT = {"schedule": "zero_bubble", **PLANS["2x1"]}


class FrozenFirst(Project):
    def __init__(self):
        super().__init__()
        self.layers[0].requires_grad_(False)


class Repeated(Project):
    """A layer that is applied twice."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(6, 6)
        self.layers[1] = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(6, 3))


class Queries(Project):
    """Learned queries that meet the hidden states at several places."""

    def __init__(self):
        super().__init__()
        self.layers[1] = Attention()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(6, 3))
        self.mix = nn.Linear(3, 3)

    def forward(self, hidden):
        scores = self.mix(hidden @ self.queries)
        return scores + torch.softmax(scores, -1) @ self.queries.T @ self.queries


class Unfreezing(FrozenFirst):
    """Freezes its first layer for one batch only, as BaseFinetuning does for epochs."""

    def on_train_batch_start(self, batch, batch_idx):
        self.layers[0].requires_grad_(batch_idx > 0)


def error_of(plan, folder, kind):
    """Train two stages; return the message of the error, and whether a step was made."""
    PLANS["tried"] = plan
    module = []

    def make():
        module.append(kind())
        return module[0]

    try:
        losses, state, _ = fit("tried", folder, make)
    except UserError as error:
        return str(error), module[0].losses, None
    return None, losses, state


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (FrozenFirst, "its input needs no gradient"),
        (Queries, "torch cannot split its backward: Trying to backward through the graph a second"),
    ],
)
def test_what_cannot_be_split_is_refused(kind, reason, tmp_path):
    for said, losses, _ in run_ranks(2, error_of, SPLIT, tmp_path, kind):
        assert said.startswith("schedule='zero_bubble' cannot run stage 1 (layers.1): ")
        assert reason in said
        assert said.endswith("Use schedule='1f1b'.")
        assert losses == []
    expected = fit("auto", tmp_path, kind)
    for said, losses, state in run_ranks(2, error_of, PLANS["2x1"], tmp_path, kind):
        assert said is None
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert_close([state], expected[1])


def test_a_layer_applied_twice_equals_one_process_or_is_refused(tmp_path):
    """It depends on the version of torch."""
    expected = fit("auto", tmp_path, Repeated)
    for said, losses, state in run_ranks(2, error_of, SPLIT, tmp_path, Repeated):
        if said:
            assert "torch cannot split its backward" in said
        else:
            assert losses == pytest.approx(expected[0], rel=1e-5)
            assert_close([state], expected[1])


def test_parameters_may_be_frozen_and_trained_again(tmp_path):
    expected = fit("auto", tmp_path, Unfreezing)
    for _, losses, state in run_ranks(2, error_of, PLANS["2x1"], tmp_path, Unfreezing):
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert_close([state], expected[1])
