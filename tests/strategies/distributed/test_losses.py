"""Losses that average over something else than examples, and gradients that only some have."""

import warnings
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from model_helpers import needs_pipelining
from projects import PLANS, Project, assert_close, fit, fit_ranks, table
from ranks import run_ranks
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_ipu_bert import UserError

EVERYWHERE = ["ddp", *(pytest.param(name, marks=needs_pipelining) for name in PLANS)]
NONE = -100
pytestmark = pytest.mark.slow


class Ignoring(Project):
    """A mean over the examples that have a label."""

    def pipeline_loss(self, output, batch):
        return cross_entropy(output, batch["y"], ignore_index=NONE)

    def batch_weight(self, batch):
        return (batch["y"] != NONE).sum()


class Weighing(Project):
    """A mean by the weights of classes."""

    def __init__(self):
        super().__init__()
        weights = torch.tensor([1.0, 5.0, 0.2])
        self.register_buffer("weights", weights, persistent=False)  # on IPUs a buffer, too

    def pipeline_loss(self, output, batch):
        return cross_entropy(output, batch["y"], self.weights)

    def batch_weight(self, batch):
        return self.weights[batch["y"]].sum()


def with_few_labels():
    """A micro-batch, a replica, and a global batch (the third) are without a label."""
    examples = table()
    y = examples.columns["y"]
    y[[0, 2, 3, 5, 7]] = NONE
    y[8:16:2] = NONE
    y[16:24] = NONE
    return examples


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("kind", [Ignoring, Weighing])
def test_losses_are_weighted_over_the_global_batch(name, kind, tmp_path):
    examples = with_few_labels() if kind is Ignoring else table()
    losses, weights, _ = fit("auto", tmp_path, kind, examples)
    assert len(losses) == 4
    if kind is Ignoring:
        assert losses[2] == 0
    results = fit_ranks(name, tmp_path, kind, examples)
    for rank_losses, _, _ in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
    assert_close([state for _, state, _ in results], weights)


def test_accumulation_by_the_trainer_is_refused_with_own_weights(tmp_path):
    with pytest.raises(UserError, match="accumulate_grad_batches=2 cannot weight losses by Ig"):
        fit("auto", tmp_path, Ignoring, accumulate_grad_batches=2)
    fit("auto", tmp_path, Project, accumulate_grad_batches=2)


class Heads(Project):
    """A head for every task; a batch has examples of some tasks only."""

    optimizer, learning_rate = torch.optim.AdamW, 0.05

    def __init__(self):
        super().__init__()
        self.layers[1] = nn.ModuleList([nn.Linear(6, 3) for _ in range(3)])

    def stage_forward(self, blocks, hidden, batch):
        hidden = batch["x"] if hidden is None else hidden
        for name in blocks:
            block = self.get_submodule(name)
            if name == "layers.0":
                hidden = torch.tanh(block(hidden))
                continue
            tasks = batch["task"].tolist()
            hidden = torch.stack([block[task](row) for task, row in zip(tasks, hidden)])
        return hidden


class Dropping(Heads):
    """LayerDrop by the batch: a layer that is not run anywhere has no gradient."""

    def stage_forward(self, blocks, hidden, batch):
        dropped = bool(batch["task"].sum() == 0)
        if hidden is None:
            hidden = nn.functional.pad(batch["x"], (0, 2))
            if not dropped:
                hidden = hidden + self.layers[0](batch["x"])
        return self.layers[1][0](hidden) if "layers.1" in blocks else hidden


# Neighbors go to different replicas: in the first batch of Heads each has another head.
TASKS = {
    Heads: [0, 1] * 4 + [0, 2] * 4 + [1, 1] * 4 + [2, 0] * 4,
    Dropping: [1] * 8 + [0] * 8 + [1] * 16,
}


@needs_pipelining
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", TASKS)
def test_gradients_of_some_replicas_or_of_none_equal_one_process(kind, name, tmp_path):
    examples = table(task=torch.tensor(TASKS[kind]))
    losses, weights, _ = fit("auto", tmp_path, kind, examples)
    results = fit_ranks(name, tmp_path, kind, examples)
    assert results[0][0] == pytest.approx(losses, rel=1e-5)
    assert_close([state for _, state, _ in results], weights)


class ClippingByHook(Project):
    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        if isinstance(self.trainer.strategy, pl.strategies.SingleDeviceStrategy):
            norm = nn.utils.clip_grad_norm_(self.parameters(), 0.1)
        else:
            norm = self.trainer.strategy.clip_grad_norm_(0.1)
        self.norms.append(float(norm))

    def on_before_optimizer_step(self, optimizer):
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        alone = isinstance(self.trainer.strategy, pl.strategies.SingleDeviceStrategy)
        for p in (1.0, 2.0, float("inf")):
            norms = torch.stack([g.norm(p) for g in gradients])
            self.norms.append(float(norms.norm(p) if alone else self.trainer.strategy.grad_norm(p)))

    def __init__(self):
        super().__init__()
        self.norms = []


@pytest.mark.parametrize("name", PLANS)
@needs_pipelining
def test_norms_are_those_of_the_whole_model(name, tmp_path):
    _, weights, norms = fit("auto", tmp_path, ClippingByHook, None, norms_of)
    results = fit_ranks(name, tmp_path, ClippingByHook, None, norms_of)
    assert_close([state for _, state, _ in results], weights)
    for _, _, found in results:
        assert found == pytest.approx(norms, rel=1e-5)


def norms_of(module):
    return module.norms


class ClippingItself(Project):
    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


def warned(name, folder, kind):
    """Return the warnings of a run about clipping."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with patch("warnings.simplefilter"):
            fit(name, folder, kind)
    return [str(w.message) for w in caught if "configure_gradient_clipping" in str(w.message)]


@needs_pipelining
def test_a_hook_that_clips_by_a_part_of_the_model_is_warned_about(tmp_path):
    said = run_ranks(2, warned, "2x1", tmp_path, ClippingItself)[0]
    assert "ClippingItself.configure_gradient_clipping sees only the gradients" in said[0]
    assert "strategy.clip_grad_norm_(max_norm)" in said[0]
    assert not run_ranks(2, warned, "2x1", tmp_path, ClippingByHook)[0]
