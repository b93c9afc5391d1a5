"""Shares of the data: every example is read exactly once an epoch, and mistakes are refused."""

import os
import warnings
from itertools import chain

import datasets
import lightning.pytorch as pl
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from model_helpers import make_trainer, needs_pipelining
from ranks import run_ranks
from test_reading import BATCH, EXAMPLES, ONE_STAGE, REPLICAS, STAGES, Examples, Layers, Stream
from torch.utils.data import DataLoader, DistributedSampler, WeightedRandomSampler, random_split

from lightning_ipu_bert import UserError
from lightning_ipu_bert.training.random_states import seed_generators

pytestmark = [pytest.mark.slow, needs_pipelining]


def everything_once(plan, folder, make):
    """Train an epoch; return the examples of every step."""
    warnings.simplefilter("ignore")
    module = Layers()
    trainer = make_trainer(folder, plan=plan, max_epochs=1)
    trainer.fit(module, make(trainer))
    return list(chain.from_iterable(module.seen))


def divided_stream(trainer):
    return DataLoader(Stream(lambda: 0.0, **trainer.distributed_sampler_kwargs), BATCH // 2)


def shuffled(trainer):
    return DataLoader(Examples(), BATCH // 2, shuffle=True)


def weighted(trainer):
    sampler = WeightedRandomSampler(torch.ones(EXAMPLES), EXAMPLES, replacement=False)
    return DataLoader(Examples(), BATCH // 2, sampler=sampler)


@pytest.mark.parametrize("plan", [REPLICAS, ONE_STAGE], ids=["2x2", "1x2"])
@pytest.mark.parametrize("make", [divided_stream, shuffled, weighted])
def test_every_example_is_read_exactly_once(make, plan, tmp_path):
    results = run_ranks(len(plan["layers_per_stage"]) * 2, everything_once, plan, tmp_path, make)
    of_replicas = results[:: len(plan["layers_per_stage"])]
    assert sorted(chain.from_iterable(of_replicas)) == list(range(EXAMPLES))
    assert all(found in of_replicas for found in results)  # alike in a replica


def by_global_rank(trainer):
    sampler = DistributedSampler(Examples(), trainer.world_size, trainer.global_rank)
    return DataLoader(sampler.dataset, BATCH // 2, sampler=sampler)


def streamed_by_global_rank(trainer):
    rows = datasets.Dataset.from_dict({"x": [[0.0] * 4] * 24}).to_iterable_dataset(num_shards=4)
    part = split_dataset_by_node(rows, trainer.global_rank, trainer.world_size)
    return DataLoader(part, BATCH // 2)


def error_of(plan, folder, make, kind=Layers):
    warnings.simplefilter("ignore")
    trainer = make_trainer(folder, plan=plan, max_epochs=1)
    with pytest.raises(UserError) as error:
        trainer.fit(kind(), make(trainer))
    return str(error.value)


@pytest.mark.parametrize("make", [by_global_rank, streamed_by_global_rank])
def test_a_share_by_the_global_rank_is_refused(make, tmp_path):
    said = run_ranks(4, error_of, REPLICAS, tmp_path, make)
    assert "(3, 4) divides the data among 4 processes" in said[3]
    assert all("Use trainer.distributed_sampler_kwargs" in line for line in said)


class ByRank(Layers):
    """Changes its batches by the rank."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            batch["x"] = batch["x"] + self.global_rank
        return super().training_step(batch, batch_idx)


def test_batches_that_differ_in_a_replica_end_the_run(tmp_path):
    for line in run_ranks(
        2, error_of, STAGES, tmp_path, lambda _: DataLoader(Examples(), 8), ByRank
    ):
        assert line.startswith("In step 2 rank 0 and rank 1 of one replica have different batches.")


class Unpicklable:
    def __reduce__(self):
        raise TypeError("this object holds a socket")


def with_socket(examples):
    return {**torch.utils.data.default_collate(examples), "socket": Unpicklable()}


def sockets(folder):
    try:
        return error_of(STAGES, folder, lambda _: DataLoader(Examples(), 8, collate_fn=with_socket))
    except BaseException as error:  # the other rank loses its connection
        return f"{type(error).__name__}"


def test_a_batch_that_cannot_be_pickled_is_one_line(tmp_path):
    said = run_ranks(2, sockets, tmp_path)[0]
    assert said.startswith("A batch of type dict cannot be sent to the other stages, because")
    assert "this object holds a socket" in said
    assert "\n" not in said


def uneven(trainer):
    rank = trainer.distributed_sampler_kwargs["rank"]
    return DataLoader(Examples(count=16 + 8 * rank), BATCH)


def test_uneven_shares_end_an_epoch_with_the_least(tmp_path):
    changes = {"use_distributed_sampler": False}
    for losses, seen, _, _ in run_ranks(4, train_uneven, tmp_path, changes):
        assert len(losses) == 2 * 2
        assert len(seen) == 2 * 2


def train_uneven(folder, changes):
    warnings.simplefilter("ignore")
    module = Layers()
    trainer = make_trainer(folder, plan=REPLICAS, max_epochs=2, **changes)
    trainer.fit(module, uneven(trainer))
    return module.losses, module.seen, None, None


def half(folder, plan):
    """Train on a random half of the data; return the examples that were read."""
    seed_generators(3 + int(os.environ.get("LOCAL_RANK", 0)))  # ranks differ until the run begins
    return everything_once(plan, folder, HalfOfData)


class HalfOfData(pl.LightningDataModule):
    """Splits the data when it is asked for it, without a generator."""

    def __init__(self, _):
        super().__init__()

    def setup(self, stage):
        self.half = random_split(Examples(), [16, 8])[0]

    def train_dataloader(self):
        return DataLoader(self.half, BATCH // 2)


@pytest.mark.parametrize("plan", [STAGES, ONE_STAGE, REPLICAS], ids=["2x1", "1x2", "2x2"])
def test_a_random_split_is_the_one_of_a_single_process(plan, tmp_path):
    expected = sorted(half(tmp_path, None))
    stages = len(plan["layers_per_stage"])
    results = run_ranks(stages * plan.get("replication_factor", 1), half, tmp_path, plan)
    assert sorted(chain.from_iterable(results[::stages])) == expected


def time_first(_):
    collate = torch.utils.data.default_collate
    return DataLoader(
        [{"x": torch.zeros(30, 4)} for _ in range(8)],
        8,
        collate_fn=lambda examples: {"x": collate(examples)["x"].transpose(0, 1)},
    )


def test_batches_with_the_time_first_are_refused(tmp_path):
    said = run_ranks(2, refused_at_reading, tmp_path)[0]
    assert said.startswith("A batch of a loader with batch_size=8 has a tensor of shape [30, 8, 4]")


def refused_at_reading(folder):
    try:
        return error_of(STAGES, folder, time_first)
    except BaseException as error:  # the other rank loses its connection
        return type(error).__name__
