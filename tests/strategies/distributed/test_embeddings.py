"""Gradients of large tables equal autograd's."""

import pytest
import torch
from torch import nn

from lightning_ipu_bert.strategies.distributed import embeddings
from lightning_ipu_bert.strategies.distributed.embeddings import accumulated_in_place

IDS = torch.tensor([[[4, 1, 4], [0, 2, 4]], [[0, 0, 3], [1, 1, 4]]])
"""Two micro-batches with repeated words and padding."""


class Stage(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(6, 5, **options)

    def forward(self, ids):
        hidden = self.table(ids)
        hidden *= 2  # what users do in place
        return (hidden + 1).sin().pow(2).sum()  # + 1: padding is 0, and would have no gradient


def gradient_of(stage):
    for ids in IDS:
        stage(ids).backward()
    return stage.table.weight.grad


@pytest.fixture
def all_are_large(monkeypatch):
    monkeypatch.setattr(embeddings, "LARGE", 0)


@pytest.mark.parametrize("padding_idx", [None, 0, 4])
def test_they_equal_autograds(padding_idx, all_are_large):
    stage = Stage(padding_idx=padding_idx)
    with accumulated_in_place([stage]):
        assert "AddRows" in names_of_graph(stage.table(IDS[0]).grad_fn)
        found = gradient_of(stage)
    torch.testing.assert_close(found, gradient_of(Stage(padding_idx=padding_idx)))
    assert "AddRows" not in names_of_graph(stage.table(IDS[0]).grad_fn)


def test_a_users_hook_on_the_lookup_counts(all_are_large):
    stages = Stage(), Stage()
    for stage in stages:
        stage.table.register_forward_hook(lambda _, args, rows: 3 * rows)
    with accumulated_in_place([stages[0]]):
        found = gradient_of(stages[0])
    torch.testing.assert_close(found, gradient_of(stages[1]))


class Scaled(nn.Embedding):
    """As in many language models."""

    def forward(self, ids):
        return 3 * super().forward(ids)


def scaled(stage):
    table = Scaled(6, 5)
    table.weight = stage.table.weight
    stage.table = table


SPECIAL = {
    "sparse": lambda stage: setattr(stage.table, "sparse", True),
    "scale_grad_by_freq": lambda stage: setattr(stage.table, "scale_grad_by_freq", True),
    "frozen": lambda stage: stage.table.weight.requires_grad_(False),
    # Freezes some words, say.
    "hook": lambda stage: stage.table.weight.register_hook(lambda gradient: 0 * gradient),
    "subclass": scaled,
    "normalised": lambda stage: nn.utils.parametrizations.spectral_norm(stage.table),
}


@pytest.mark.parametrize("special", SPECIAL)
def test_special_tables_are_left_alone(special, all_are_large):
    stage = Stage()
    SPECIAL[special](stage)
    with accumulated_in_place([stage]):
        assert "AddRows" not in names_of_graph(stage.table(IDS[0]).grad_fn)


def test_small_tables_are_left_alone(monkeypatch):
    stage = Stage()
    for large, replaced in ((30, True), (31, False)):
        monkeypatch.setattr(embeddings, "LARGE", large)
        with accumulated_in_place([stage]):
            assert ("AddRows" in names_of_graph(stage.table(IDS[0]).grad_fn)) is replaced


def names_of_graph(node):
    if node is None:
        return ""
    return type(node).__name__ + "".join(names_of_graph(child) for child, _ in node.next_functions)
