"""IPUs compute what one plain process computes, and what a pipeline of ranks computes.

By AdamW with a learning rate that changes; the kinds of BERT's gradients that are mathematically
zero, of which AdamW makes full steps of noise, are left out by name.
"""

import warnings

import pytest
import torch
from ipu_runs import (
    check_weights,
    ipu_strategy,
    ipu_trainer,
    loader,
    plain_trainer,
    weights_of,
    with_adamw,
)
from language_model import LanguageModel, Sentences
from model_helpers import Losses, needs_pipelining
from models import GLOBAL_BATCH, make_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

pytestmark = pytest.mark.slow

FOUR_STAGES = {
    "layers_per_stage": [1, 2, 2, 1],
    "replication_factor": 2,
    "gradient_accumulation_steps": 8,
    "ipu_config": {"inference_device_iterations": 4},
}
UPDATES = 5
KINDS = ["bert", "language model"]


def fit_plain(kind, folder, **changes):
    module, examples = with_adamw(kind, UPDATES)
    losses = Losses()
    plain_trainer(folder, losses, **changes).fit(module, DataLoader(examples, GLOBAL_BATCH))
    return losses, weights_of(module)


def fit_ipu(kind, folder, plan, **changes):
    module, examples = with_adamw(kind, UPDATES)
    losses = Losses()
    trainer = ipu_trainer(folder, losses, strategy=ipu_strategy(**plan), **changes)
    trainer.fit(module, loader(examples))
    return losses, weights_of(module)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_rates_and_weights_equal_one_process(kind, tmp_path):
    plain, expected = fit_plain(kind, tmp_path)
    ours, weights = fit_ipu(kind, tmp_path, FOUR_STAGES)
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    assert ours.rates == plain.rates
    assert ours.steps == plain.steps == [1, 2, 3, 4, 5]
    check_weights(weights, expected)


CASES = {
    "1x1": {"layers_per_stage": [6], "replication_factor": 1},
    "4x1, wildcards": {"layers_per_stage": [1, -1, -1, 1], "replication_factor": 1},
    "1x4": {"layers_per_stage": [6], "replication_factor": 4},
    "zeros": {"layers_per_stage": [0, 6]},
    "recomputation": {"recompute_checkpoint_every_layer": True},
    "RTS": {"replicated_tensor_sharding": True, "optimizer_state_offchip": True},
    "serialized": {"ipu_config": {"embedding_serialization_factor": 2}},
    "all losses": {"ipu_config": {"output_mode": "all"}},
    "loss scaling": {"loss_scaling": 64.0},
}


def test_the_option_rts_reaches_the_ipus(tmp_path):
    module, examples = with_adamw("bert")
    seen = []
    strategy = ipu_strategy(**CASES["RTS"], edit_options=lambda given, _: seen.append(given))
    ipu_trainer(tmp_path, strategy=strategy).fit(module, loader(examples))
    location = seen[0].toDict()["location_optimizer"]
    assert (location["useReplicatedTensorSharding"], location["onChip"]) == (1, 0)


@pytest.mark.parametrize("case", CASES)
def test_so_they_do_with_every_option(case, tmp_path):
    plan = {**FOUR_STAGES, "layers_per_stage": [3, 3], **CASES[case]}
    replicas, stages = plan["replication_factor"], len(plan["layers_per_stage"])
    plan["gradient_accumulation_steps"] = max(2 * stages - 1, GLOBAL_BATCH // replicas)
    plain, expected = fit_plain("bert", tmp_path)
    module, examples = with_adamw("bert", UPDATES)
    losses = Losses()
    trainer = ipu_trainer(tmp_path, losses, strategy=ipu_strategy(**plan))
    trainer.fit(module, loader(examples, replicas))
    assert losses.losses == pytest.approx(plain.losses, rel=1e-5)
    check_weights(weights_of(module), expected)


class Weighted(LanguageModel):
    """Its loss has weights that belong to no block."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5))
        self.criterion = nn.Module()
        self.criterion.register_buffer("of_place", torch.linspace(0, 2, 12))

    def pipeline_loss(self, output, batch):
        losses = cross_entropy(output.mT, batch["tokens"][:, 1:], reduction="none")
        return (losses * self.criterion.of_place).mean() * self.scale


def test_buffers_beside_the_blocks_are_on_the_ipus_too(tmp_path):
    found = []
    for make, replicas in ((plain_trainer, 1), (ipu_trainer, 2)):
        torch.manual_seed(3)
        module, losses = Weighted(), Losses()
        data = Sentences(3 * GLOBAL_BATCH)
        trainer = make(tmp_path, losses)
        trainer.fit(module, loader(data, replicas), loader(data, replicas))
        found.append((losses, weights_of(module), float(trainer.callback_metrics["val/loss"])))
        assert (module.criterion.of_place == torch.linspace(0, 2, 12)).all()
        assert type(module.scale) is torch.Tensor
    (plain, expected, validated), (ours, weights, ours_validated) = found
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    assert ours_validated == pytest.approx(validated, rel=1e-5)
    check_weights(weights, expected, 1e-5)


def test_clipping_by_norm_equals_torchs(tmp_path):
    plain, expected = fit_plain("bert", tmp_path, gradient_clip_val=0.05)
    ours, weights = fit_ipu("bert", tmp_path, FOUR_STAGES, gradient_clip_val=0.05)
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    check_weights(weights, expected)


def test_final_losses_are_those_of_the_last_micro_batches(tmp_path):
    plan = {**FOUR_STAGES, "ipu_config": {"output_mode": "final"}}
    plain, expected = fit_plain("bert", tmp_path)
    ours, weights = fit_ipu("bert", tmp_path, plan)
    assert ours.losses != pytest.approx(plain.losses, rel=1e-3)
    check_weights(weights, expected)  # the update is the same


def test_half_precision_trains_in_half_and_comes_close(tmp_path):
    plain, _ = fit_plain("bert", tmp_path)
    module, examples = with_adamw("bert", UPDATES)
    losses, plan = Losses(), {**FOUR_STAGES, "loss_scaling": 64.0}
    trainer = ipu_trainer(tmp_path, losses, strategy=ipu_strategy(**plan), precision="16-true")
    trainer.fit(module, loader(examples), loader(examples))
    assert {w.dtype for w in weights_of(module).values()} == {torch.float16}
    assert losses.losses == pytest.approx(plain.losses, rel=2e-2)
    assert trainer.callback_metrics["val/loss"].dtype == torch.float32


@needs_pipelining
def test_weights_equal_those_of_a_pipeline_of_ranks(tmp_path):
    from ranks import run_ranks

    plan = {name: value for name, value in FOUR_STAGES.items() if name != "ipu_config"}
    results = run_ranks(8, on_ranks, plan, str(tmp_path))
    ours, weights = fit_ipu("bert", tmp_path, FOUR_STAGES)
    assert ours.losses == pytest.approx(torch.tensor([r[0] for r in results]).mean(0).tolist())
    check_weights(weights, results[0][1])


def on_ranks(plan, folder):
    from lightning_ipu_bert import PipelineParallelStrategy

    warnings.simplefilter("ignore")
    module, examples = with_adamw("bert", UPDATES)
    strategy, losses = PipelineParallelStrategy(**plan), Losses()
    trainer = plain_trainer(folder, losses, strategy=strategy, devices=8)
    sampler = DistributedSampler(
        examples, 2, strategy.distributed_sampler_kwargs["rank"], shuffle=False
    )
    trainer.fit(module, DataLoader(examples, GLOBAL_BATCH // 2, sampler=sampler))
    return losses.losses, weights_of(module)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "momentum"])
def test_other_optimizers_are_translated(optimizer, tmp_path):
    def configure(self):
        kinds = {
            "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
            "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
            "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        }
        return kinds[optimizer](self.parameters())

    found = []
    for make, replicas in ((plain_trainer, 1), (ipu_trainer, 2)):
        module, examples = make_model("language model")
        type(module).configure_optimizers, before = configure, type(module).configure_optimizers
        try:
            make(tmp_path).fit(module, loader(examples, replicas))
        finally:
            type(module).configure_optimizers = before
        found.append(weights_of(module))
    check_weights(found[1], found[0], 1e-5)


def test_lamb_takes_its_numbers_from_adamw(tmp_path):
    """The first update, by the paper (arXiv:1904.00962, algorithm 2)."""
    module, examples = with_adamw("bert", updates=1)
    before = weights_of(module)
    batch = {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
    module.pipeline_loss(module.run_output(batch), batch).backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    ipu_trainer(tmp_path, strategy=ipu_strategy(lamb=True)).fit(module, loader(examples))
    expected = {}
    for name, weight in before.items():
        step = gradients[name] / (gradients[name].abs() + 1e-8) + 0.1 * weight
        trust = weight.norm() / step.norm() if weight.norm() > 0 else 1.0
        expected[name] = weight - 1e-2 * trust * step
    check_weights(weights_of(module), expected, 1e-3)  # 1 / (|g| + eps) of the smallest gradients
