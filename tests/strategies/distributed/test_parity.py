"""A pipeline computes what one plain process computes, to the last digits of float32.

Three updates on the same data in the same order, without dropout, by SGD: AdamW would turn the
rounding noise of gradients that are mathematically zero (the bias of attention keys, of the head of
a span softmax, of the last LayerNorm before it) into full steps.
"""

import os
import warnings

import lightning.pytorch as pl
import pytest
from model_helpers import needs_pipelining
from models import GLOBAL_BATCH, assert_equal, make_model
from ranks import run_ranks
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ipu_bert import PipelineParallelStrategy
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.strategies.distributed import embeddings

CENTRE = {
    "layers_per_stage": [3, 3],
    "replication_factor": 2,
    "gradient_accumulation_steps": 4,
    "schedule": "1f1b",
}
LOOPED = {"layers_per_stage": [2, 1, 2, 1], "stages_per_rank": 2}
ONE_AT_A_TIME = {
    "centre": {},
    "1x1": {"layers_per_stage": [6], "replication_factor": 1},
    "2x1": {"replication_factor": 1},
    "1x2": {"layers_per_stage": [6]},
    "4x1": {"layers_per_stage": [1, 2, 2, 1], "replication_factor": 1},
    "3x1 uneven": {"layers_per_stage": [1, 2, 3], "replication_factor": 1},
    "gpipe": {"schedule": "gpipe"},
    "interleaved": {"schedule": "interleaved_1f1b", **LOOPED},
    "zero_bubble": {"schedule": "zero_bubble"},
    "zero_bubble looped": {"schedule": "zero_bubble", **LOOPED},
    "RTS": {"replicated_tensor_sharding": True},
    "recomputation": {"recompute_checkpoint_every_layer": True},
    "accumulation 1": {"gradient_accumulation_steps": 1, "schedule": "gpipe"},
    "accumulation 8": {"gradient_accumulation_steps": 8},
    "clipping": {"clip": 0.05},
    "offchip": {"optimizer_state_offchip": True},
}
PAIRS = {
    "RTS, clipping, 1x2": {
        "replicated_tensor_sharding": True,
        "clip": 0.05,
        "layers_per_stage": [6],
    },
    "RTS, gpipe, recomputation": {
        "replicated_tensor_sharding": True,
        "schedule": "gpipe",
        "recompute_checkpoint_every_layer": True,
    },
    "RTS, interleaved, accumulation 8, offchip": {
        "replicated_tensor_sharding": True,
        "schedule": "interleaved_1f1b",
        "gradient_accumulation_steps": 8,
        "optimizer_state_offchip": True,
        **LOOPED,
    },
    "zero_bubble, recomputation, clipping": {
        "schedule": "zero_bubble",
        "recompute_checkpoint_every_layer": True,
        "clip": 0.05,
    },
    "3x1 uneven, clipping, accumulation 8": {
        "layers_per_stage": [1, 2, 3],
        "replication_factor": 1,
        "clip": 0.05,
        "gradient_accumulation_steps": 8,
    },
    "gpipe, 4x1, accumulation 1": {
        "schedule": "gpipe",
        "layers_per_stage": [2, 1, 1, 2],
        "replication_factor": 1,
        "gradient_accumulation_steps": 1,
    },
}


class Recorder(pl.Callback):
    """Keeps every loss, and the last gradients before clipping."""

    def __init__(self):
        self.losses, self.gradients = [], {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {
            name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None
        }

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.losses.append(float(outputs["loss"]))


def train_kind(kind, plan, clip, folder, otherwise="auto"):
    """Train in this process, as one of the plan's ranks, or by another strategy without a plan."""
    warnings.simplefilter("ignore")
    module, examples = make_model(kind)
    strategy = PipelineParallelStrategy(**plan) if plan else otherwise
    ddp = {"replication_factor": 2} if otherwise == "ddp" else {}
    config = PipelineConfig(**plan) if plan else PipelineConfig([6], **ddp)
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=config.shape.num_devices,
        strategy=strategy,
        max_epochs=1,
        callbacks=[recorder],
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    replicas = config.replication_factor
    rank = (
        strategy.distributed_sampler_kwargs["rank"]
        if plan
        else int(os.environ["LOCAL_RANK"])
        if ddp
        else 0
    )
    sampler = DistributedSampler(examples, replicas, rank, shuffle=False)
    trainer.fit(module, DataLoader(examples, GLOBAL_BATCH // replicas, sampler=sampler))
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return recorder.losses, recorder.gradients, weights


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Plain runs, each done once."""
    done = {}

    def reference(kind, clip):
        if (kind, clip) not in done:
            done[kind, clip] = train_kind(kind, None, clip, tmp_path_factory.mktemp("plain"))
        return done[kind, clip]

    return reference


QUICK = ("centre", "2x1", "1x2", "zero_bubble", "RTS")
CASES = [
    case if case in QUICK else pytest.param(case, marks=pytest.mark.slow)
    for case in [*ONE_AT_A_TIME, *PAIRS]
]


@needs_pipelining
@pytest.mark.parametrize("kind", ["bert", "language model"])
@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_weights_equal_one_process(kind, case, references, tmp_path):
    compare(kind, case, references, tmp_path)


@pytest.mark.slow
@needs_pipelining
@pytest.mark.parametrize("kind", ["bert", "language model"])
@pytest.mark.parametrize("case", ["centre", "1x1", "zero_bubble looped", "RTS"])
def test_so_do_those_of_large_tables(kind, case, references, tmp_path, monkeypatch):
    """Their gradients go another way; here all tables count as large."""
    monkeypatch.setattr(embeddings, "LARGE", 0)
    compare(kind, case, references, tmp_path)


@pytest.mark.parametrize("kind", ["bert", "language model"])
def test_the_same_module_trains_under_ddp(kind, references, tmp_path):
    losses, gradients, weights = references(kind, None)
    results = run_ranks(2, train_kind, kind, None, None, tmp_path, "ddp")
    for rank_losses, rank_gradients, rank_weights in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        assert_equal(kind, rank_gradients, gradients)
        assert_equal(kind, rank_weights, weights)


def compare(kind, case, references, tmp_path):
    changes = {**ONE_AT_A_TIME, **PAIRS}[case]
    plan = {**CENTRE, **changes}
    clip = plan.pop("clip", None)
    losses, gradients, weights = references(kind, clip)
    config = PipelineConfig(**plan)
    results = run_ranks(config.shape.num_devices, train_kind, kind, plan, clip, tmp_path)

    of_all = results[0][0]
    assert of_all == pytest.approx(losses, rel=1e-5)
    seen = {}
    for rank, (rank_losses, rank_gradients, rank_weights) in enumerate(results):
        replica = rank // config.shape.ranks_per_replica
        assert rank_losses == of_all  # every rank knows the loss of the global batch
        assert_equal(kind, rank_gradients, gradients)
        for name in rank_gradients:
            seen.setdefault(name, []).append(replica)
        # Afterwards every rank has the whole trained model.
        assert list(rank_weights) == list(weights)
        assert_equal(kind, rank_weights, weights)
    assert seen.keys() == gradients.keys()
    assert all(r == list(range(config.replication_factor)) for r in seen.values())
