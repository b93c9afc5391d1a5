"""16-mixed: the loss is scaled inside the schedule, and ranks agree on an overflow."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from language_model import LanguageModel, Sentences
from lightning.pytorch.plugins.precision import MixedPrecision
from model_helpers import make_trainer, needs_pipelining, ordered_loader
from ranks import run_ranks

pytestmark = needs_pipelining
TWO_BY_TWO = {
    "layers_per_stage": [3, 3],
    "gradient_accumulation_steps": 4,
    "replication_factor": 2,
}
OVERFLOW_AT = 2


class Overflowing(LanguageModel):
    """The gradient of the first layer is infinite in one step; that of later layers is not."""

    def __init__(self):
        super().__init__()
        self.losses, self.scales, self.norms, self.weights = [], [], [], []

    def stage_forward(self, blocks, hidden, batch):
        for name in blocks:
            hidden = super().stage_forward([name], hidden, batch)
            overflows = self.trainer.fit_loop.total_batch_idx == OVERFLOW_AT
            if name == "layers.0" and hidden.requires_grad and overflows:
                hidden.register_hook(lambda gradient: gradient * float("inf"))
        return hidden

    def on_before_optimizer_step(self, optimizer):
        gradients = [p.grad.flatten() for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(gradients).norm()))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())
        weights = [p.detach().flatten() for p in self.parameters() if not p.is_meta]
        self.weights.append(torch.cat(weights))


def train_in_float16(plan, folder):
    """Train with float16 on the CPU, which the Trainer's flag reserves for CUDA."""
    warnings.simplefilter("ignore")
    pl.seed_everything(5, verbose=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = make_trainer(folder, plan=plan, max_epochs=1, plugins=[plugin])
    module = Overflowing()
    trainer.fit(module, ordered_loader(Sentences(80), 16, trainer, plan))
    return module.losses, module.scales, module.norms, module.weights


@pytest.mark.parametrize("rts", [False, True], ids=["whole", "RTS"])
def test_an_overflow_on_one_stage_makes_all_ranks_skip_the_update(rts, tmp_path):
    losses, scales, norms, _ = train_in_float16(None, tmp_path)
    assert scales == [1024.0, 1024.0, 512.0, 512.0, 512.0]
    results = run_ranks(
        4, train_in_float16, {**TWO_BY_TWO, "replicated_tensor_sharding": rts}, tmp_path
    )
    for _, seen, _, weights in results:
        assert seen == scales
        moved = [not torch.equal(a, b) for a, b in zip(weights, weights[1:])]
        assert moved == [True, False, True, True]
    mean = (torch.tensor(results[0][0]) + torch.tensor(results[2][0])) / 2
    assert mean.tolist() == pytest.approx(losses, rel=1e-2)
    together = [a**2 + b**2 for a, b in zip(results[0][2], results[1][2])]
    finite = [i for i in range(5) if i != OVERFLOW_AT]
    assert [together[i] ** 0.5 for i in finite] == pytest.approx(
        [norms[i] for i in finite], rel=1e-2
    )
