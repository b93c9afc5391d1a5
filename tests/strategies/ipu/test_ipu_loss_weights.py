"""Losses that average over something else than examples, on IPUs."""

import lightning.pytorch as pl
import pytest
import torch
from ipu_runs import ipu_strategy, ipu_trainer, plain_trainer
from model_helpers import Losses
from projects import BATCH, table
from test_losses import NONE, Ignoring, Weighing, with_few_labels
from torch.utils.data import DataLoader

from lightning_ipu_bert import UserError

LAYOUTS = {
    "2x2": {"replication_factor": 2, "gradient_accumulation_steps": 4},
    "2x1": {"replication_factor": 1, "gradient_accumulation_steps": 4},
    "2x1, two updates a call": {
        "replication_factor": 1,
        "gradient_accumulation_steps": 4,
        "ipu_config": {"device_iterations": 2},
    },
}


class LossPerUpdate(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", [Ignoring, Weighing])
def test_losses_are_weighted_over_the_global_batch(name, kind, tmp_path):
    examples = with_few_labels() if kind is Ignoring else table()
    plain, losses = kind(), Losses()
    plain_trainer(tmp_path, losses).fit(plain, DataLoader(examples, BATCH))

    layout = dict(LAYOUTS[name])
    strategy = ipu_strategy(layers_per_stage=[1, 1], **{"ipu_config": {}, **layout})
    module, found = kind(), LossPerUpdate()
    per_replica = BATCH // layout["replication_factor"]
    ipu_trainer(tmp_path, found, strategy=strategy).fit(module, DataLoader(examples, per_replica))
    updates = layout.get("ipu_config", {}).get("device_iterations", 1)
    expected = torch.tensor(losses.losses).reshape(-1, updates).mean(1).tolist()
    assert found.losses == pytest.approx(expected, rel=1e-4)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_a_first_batch_without_any_weight_is_refused(tmp_path):
    examples = table()
    examples.columns["y"][:] = NONE
    strategy = ipu_strategy(layers_per_stage=[1, 1], gradient_accumulation_steps=4)
    with pytest.raises(UserError, match="No micro-batch of the first training batch has a weight"):
        ipu_trainer(tmp_path, strategy=strategy).fit(Ignoring(), DataLoader(examples, BATCH // 2))
