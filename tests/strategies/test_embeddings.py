"""Gradients of large tables equal autograd's, and take fewer bytes on their way."""

import pytest
import torch
from torch import nn

from lightning_ipu_bert.strategies import embeddings
from lightning_ipu_bert.strategies.embeddings import rows_added_in_place

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
        return hidden.sin().pow(2).sum()


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
    with rows_added_in_place([stage]):
        assert "AddRows" in _first_node(stage.table(IDS[0]))
        found = gradient_of(stage)
    torch.testing.assert_close(found, gradient_of(Stage(padding_idx=padding_idx)))
    assert "Embedding" in _first_node(stage.table(IDS[0]))


def _first_node(rows):
    return type(rows.grad_fn).__name__


@pytest.mark.parametrize("special", ["small", "sparse", "scale_grad_by_freq", "frozen", "hook"])
def test_special_tables_are_left_alone(special, monkeypatch):
    monkeypatch.setattr(embeddings, "LARGE", 31 if special == "small" else 0)
    named = special in ("sparse", "scale_grad_by_freq")
    stage = Stage(**({special: True} if named else {}))
    if special == "frozen":
        stage.table.weight.requires_grad = False
    if special == "hook":  # freezes some words, say
        stage.table.weight.register_hook(lambda gradient: gradient * 0)
    with rows_added_in_place([stage]):
        assert "AddRows" not in _first_node(stage.table(IDS[0]))
