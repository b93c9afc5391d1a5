"""Blocks that something else has wrapped or changed, beside one process."""

import pytest
import torch
from model_helpers import needs_pipelining
from projects import Project, assert_alike, fit, fit_ranks
from torch import nn

from lightning_ipu_bert import UserError

pytestmark = [pytest.mark.slow, needs_pipelining]
PLANS = ["2x1", "2x2", "zero_bubble", "recomputed"]


class Compiled(Project):
    """By torch.compile, as a wrapper and in place."""

    backend = "aot_eager"

    def __init__(self):
        super().__init__()
        first = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.layers[0] = torch.compile(first, backend=self.backend)
        self.layers[1] = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        self.layers[1].compile(backend=self.backend)


@pytest.mark.parametrize("plan", ["2x1", "2x2", "recomputed"])
def test_compiled_blocks(plan, tmp_path):
    assert_alike(fit_ranks(plan, tmp_path, Compiled), fit("auto", tmp_path, Compiled))


def test_compiled_blocks_cannot_split_their_backward(tmp_path):
    with pytest.raises(UserError, match=r"does not support torch.compile, which has compiled lay"):
        fit("zero_bubble", tmp_path, Compiled)


class Adapted(Project):
    """Low-rank adapters on both layers; the rest is frozen."""

    def __init__(self):
        super().__init__()
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        for index, (inputs, outputs) in enumerate([(4, 6), (6, 3)]):
            layer = nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))
            self.layers[index] = peft.get_peft_model(layer, config)

    def stage_forward(self, blocks, hidden, batch):
        hidden = batch["x"] if hidden is None else hidden
        for name in blocks:
            hidden = torch.tanh(self.get_submodule(name)(hidden))
        return hidden


@pytest.mark.parametrize("plan", PLANS)
def test_adapters(plan, tmp_path):
    expected = fit("auto", tmp_path, Adapted)
    assert any("lora_A" in name for name in expected[1])
    assert_alike(fit_ranks(plan, tmp_path, Adapted), expected)
