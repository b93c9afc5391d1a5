"""What IPUs do not do is said in one line, before anything is compiled."""

import re
import sys

import lightning.pytorch as pl
import poptorch
import pytest
import torch
from ipu_runs import ipu_strategy, ipu_trainer, loader, plain_trainer, with_adamw
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from models import make_model
from torch import nn

from lightning_ipu_bert import IPUAccelerator, IPUStrategy, UserError
from lightning_ipu_bert.models.bert import SpanLogits


class TwoOptimizers:
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]


class WithLBFGS:
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class WithRMSprop:
    def configure_optimizers(self):
        return torch.optim.RMSprop(self.parameters())


class OwnUpdate(torch.optim.AdamW):
    pass


class WithOwnUpdate:
    def configure_optimizers(self):
        return OwnUpdate(self.parameters())


class WithAmsgrad:
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), amsgrad=True)


class HeadOnly:
    def configure_optimizers(self):
        return torch.optim.AdamW(self.qa_outputs.parameters())


class WithSGD:
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class WithDecayingAdam:
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), weight_decay=0.1)


class ByHand:
    automatic_optimization = False


class OwnClipping:
    def configure_gradient_clipping(self, *args, **kwargs):
        pass


class OddSchedule:
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 3}]


class ScaledLoss:
    def training_step(self, batch, batch_idx):
        return 0.5 * self.run_loss(batch)


class OutputInTraining:
    def training_step(self, batch, batch_idx):
        self.run_output(batch)
        return self.run_loss(batch)


class NumberInBatch:
    def training_step(self, batch, batch_idx):
        return self.run_loss({**batch, "weight": torch.tensor(2.0)})


class PlainNumberInBatch:
    def training_step(self, batch, batch_idx):
        return self.run_loss({**batch, "double": True})

    def stage_forward(self, blocks, hidden, batch):
        hidden = super().stage_forward(blocks, hidden, batch)
        return tuple(2 * h for h in hidden) if batch["double"] else hidden


class Penalty:
    def training_step(self, batch, batch_idx):
        return self.run_loss(batch) + sum(p.square().sum() for p in self.parameters())


class TwoLosses:
    def training_step(self, batch, batch_idx):
        return self.run_loss(batch) + self.run_loss(batch)


class PartsOfBlocks:
    def stage_forward(self, blocks, hidden, batch):
        head = self.qa_outputs
        hidden = super().stage_forward(blocks[:-1], hidden, batch)
        scores = nn.functional.linear(hidden, head.weight, head.bias)
        return SpanLogits(*scores.unbind(-1))


class WithoutEps:
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), eps=0.0)


class WithDampening:
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, dampening=0.5)


TWICE = {"ipu_config": {"device_iterations": 2}}
REFUSALS = {
    "two optimizers": (TwoOptimizers, {}, {}, "must return exactly one optimizer"),
    "LBFGS": (WithLBFGS, {}, {}, "LBFGS is not supported on IPUs"),
    "own update": (WithOwnUpdate, {}, {}, "OwnUpdate is not supported on IPUs"),
    "amsgrad": (WithAmsgrad, {}, {}, r"AdamW\(amsgrad=True\)"),
    "manual optimization": (ByHand, {}, {}, "uses manual optimization"),
    "accumulation of the Trainer": (
        None,
        {"accumulate_grad_batches": 2},
        {},
        "must be 1 with a pipeline strategy",
    ),
    "clipping by value": (
        None,
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
        {},
        "clips by norm only",
    ),
    "RMSprop": (
        WithRMSprop,
        {},
        {},
        "torch.optim.rmsprop.RMSprop is not supported on IPUs. Use torch.optim.AdamW, ",
    ),
    "clipping of SGD": (WithSGD, {"gradient_clip_val": 1.0}, {}, "with SGD"),
    "clipping of Adam": (WithDecayingAdam, {"gradient_clip_val": 1.0}, {}, "with Adam"),
    "parameters in no group": (
        HeadOnly,
        {},
        {},
        r"bert\.embeddings.* is in no parameter group of AdamW",
    ),
    "clipping of LAMB": (None, {"gradient_clip_val": 1.0}, {"lamb": True}, "with LAMB"),
    "own clipping": (OwnClipping, {}, {}, "overrides configure_gradient_clipping"),
    "SWA": (None, {"callbacks": [StochasticWeightAveraging(0.1)]}, {}, "StochasticWeightAveraging"),
    "GradientAccumulationScheduler": (
        None,
        {"callbacks": [GradientAccumulationScheduler({1: 1})]},
        {},
        "compiled into the program",
    ),
    "max_steps": (None, {"max_steps": 3}, TWICE, "max_steps=3 must be divisible by device_iter"),
    "every_n_train_steps": (
        None,
        {"callbacks": [ModelCheckpoint(every_n_train_steps=3)], "enable_checkpointing": True},
        TWICE,
        "every_n_train_steps=3",
    ),
    "val_check_interval": (None, {"val_check_interval": 2}, TWICE, "val_check_interval=2 counts"),
    "frequency of a schedule": (OddSchedule, {}, TWICE, "frequency=3 updates"),
    "scaled loss": (ScaledLoss, {}, {}, "was multiplied by 0.5 after run_loss"),
    "run_output in training": (OutputInTraining, {}, {}, "would switch programs on the IPUs"),
    "penalty": (Penalty, {}, {}, "has a part that is not computed by run_loss"),
    "two losses": (TwoLosses, {}, {}, "run_loss was called twice"),
    "parts of blocks": (PartsOfBlocks, {}, {}, "does not call the block qa_outputs as a module"),
    "what is no tensor": (PlainNumberInBatch, {}, {}, "uses a value of the batch that is not a"),
    "eps": (WithoutEps, {}, {}, "must be above 0 on IPUs"),
    "dampening": (WithDampening, {}, {}, r"SGD\(dampening=0.5\)"),
    "finetuning": (None, {"callbacks": [BackboneFinetuning()]}, {}, "BaseFinetuning changes which"),
    "numbers in a batch": (NumberInBatch, {}, {}, r"has a tensor of shape \[\]"),
    "devices": (None, {"devices": 8}, {}, "devices=8 must be 4: 2 stages x"),
    "accumulation": (None, {}, {"gradient_accumulation_steps": 2}, "the 3 training stages"),
    "layers": (None, {}, {"layers_per_stage": [3, 4]}, "the model has 6"),
    "number of IPUs": (
        None,
        {},
        {"layers_per_stage": [2, 2, 2], "gradient_accumulation_steps": 8},
        "power of two",
    ),
    "serialization": (
        None,
        {},
        {"ipu_config": {"embedding_serialization_factor": 3}},
        "does not divide the 50 rows",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_fit_refuses(case, tmp_path):
    mixin, options, plan, message = REFUSALS[case]
    module, examples = with_adamw("bert", updates=4)
    if mixin is not None:
        module.__class__ = type("Mine", (mixin, type(module)), {})
    trainer = ipu_trainer(tmp_path, strategy=ipu_strategy(**plan), **options)
    with pytest.raises(UserError, match=message) as caught:
        trainer.fit(module, loader(examples))
    assert "\n" not in str(caught.value)
    if case not in ("scaled loss", "penalty", "two losses"):  # the first update was done by then
        assert poptorch.device.COUNTS["to_device"] == 0


def test_inference_that_cannot_be_filled_is_refused_only_where_there_is_some(tmp_path):
    plan = {"ipu_config": {"inference_device_iterations": 1}}
    module, examples = with_adamw("bert")
    ipu_trainer(tmp_path, strategy=ipu_strategy(**plan)).fit(module, loader(examples))
    with pytest.raises(UserError, match="cannot fill the 2 stages of inference"):
        ipu_trainer(tmp_path, strategy=ipu_strategy(**plan)).validate(module, loader(examples))
    plan["ipu_config"]["sharded_execution_for_inference"] = True
    ipu_trainer(tmp_path, strategy=ipu_strategy(**plan)).validate(module, loader(examples))


def test_training_rules_do_not_refuse_an_evaluation(tmp_path):
    """Two stages without accumulation cannot train, and evaluate as one process does."""
    module, examples = with_adamw("bert")
    plan = {"replication_factor": 1, "gradient_accumulation_steps": 1}
    (expected,) = plain_trainer(tmp_path).validate(module, loader(examples), verbose=False)
    trainer = ipu_trainer(tmp_path, strategy=ipu_strategy(**plan))
    (found,) = trainer.validate(module, loader(examples), verbose=False)
    assert found["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-5)
    trainer = ipu_trainer(tmp_path, strategy=ipu_strategy(**plan))
    with pytest.raises(UserError, match=r"gradient_accumulation_steps=1 .* 3") as caught:
        trainer.fit(module, loader(examples))
    assert "gpipe" not in str(caught.value)  # which IPUs have not


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
def test_other_precisions_are_refused(precision, tmp_path):
    with pytest.raises(UserError, match=f"precision='{precision}' is not supported on IPUs"):
        ipu_trainer(tmp_path, precision=precision)


@pytest.mark.parametrize("changes", [{"stages_per_rank": 2}, {"schedule": "gpipe"}])
def test_what_only_ranks_have_is_refused(changes):
    with pytest.raises(UserError, match="is not supported on IPUs"):
        ipu_strategy(**changes)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_ipus_with_another_strategy_are_refused_and_nothing_is_started(
    strategy, tmp_path, monkeypatch
):
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # DDP sets them, and leaves them
        monkeypatch.delenv(name)
    module, examples = make_model("language model")
    trainer = ipu_trainer(tmp_path, strategy=strategy, devices=4)
    with pytest.raises(UserError, match="accelerator='ipu' requires IPUStrategy"):
        trainer.fit(module, loader(examples))


@pytest.mark.parametrize("devices", ["auto", -1, 4, "4", [0, 1, 2, 3]])
def test_devices_are_ipus(devices, tmp_path):
    trainer = ipu_trainer(tmp_path, devices=devices)
    assert trainer.num_devices == 4
    assert isinstance(trainer.accelerator, IPUAccelerator)


def test_devices_that_are_no_number_are_refused(tmp_path):
    with pytest.raises(UserError, match="devices='many' must be a number of IPUs"):
        ipu_trainer(tmp_path, devices="many")


@pytest.mark.parametrize("given", [{"strategy": "ipu_pipeline"}, {"accelerator": "auto"}])
def test_the_strategy_alone_means_ipus(given, tmp_path):
    options = {"strategy": ipu_strategy(), "accelerator": "auto", **given}
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, **options)
    assert isinstance(trainer.strategy, IPUStrategy)
    assert isinstance(trainer.accelerator, IPUAccelerator)


def test_without_the_sdk_one_line_says_what_is_missing_and_what_runs_instead(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "poptorch", None)
    module, examples = with_adamw("bert")
    trainer = ipu_trainer(tmp_path)
    with pytest.raises(UserError) as caught:
        trainer.fit(module, loader(examples))
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r"needs PopTorch.*Poplar SDK 3.4.*torch 2.0.1", message)
    assert "--trainer.devices 4" in message
    assert "--trainer.strategy.class_path lightning_ipu_bert.PipelineParallelStrategy" in message
