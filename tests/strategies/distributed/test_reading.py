"""One rank of a replica reads; all ranks train on its batches, and draw its random numbers."""

import os
import random
import warnings
from itertools import chain

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from model_helpers import make_trainer, needs_pipelining
from ranks import run_ranks
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    WeightedRandomSampler,
    random_split,
)

from lightning_ipu_bert import PipelineModule, UserError
from lightning_ipu_bert.training.random_streams import seed_streams

pytestmark = needs_pipelining
STAGES = {"layers_per_stage": [1, 1], "gradient_accumulation_steps": 2}
REPLICAS = {**STAGES, "replication_factor": 2}
ONE_STAGE = {"layers_per_stage": [2], "replication_factor": 2, "gradient_accumulation_steps": 2}
EXAMPLES, BATCH = 24, 8


class Examples(Dataset):
    """Numbered examples; keeps what was read in this process."""

    def __init__(self, draw=lambda: 0.0, count=EXAMPLES):
        self.draw, self.count, self.read = draw, count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        x = torch.arange(4.0) + index + self.draw()
        return {"x": x / self.count, "y": torch.tensor([float(index % 3)]), "id": index}


class Stream(IterableDataset):
    """Examples of unknown number, divided among replicas."""

    def __init__(self, draw, rank=0, num_replicas=1):
        self.examples, self.rank, self.num_replicas = Examples(draw), rank, num_replicas

    def __iter__(self):
        for index in range(self.rank, EXAMPLES, self.num_replicas):
            yield self.examples[index]


class Batches:
    """An iterable that is no loader and has no attributes to add to."""

    __slots__ = ("batches",)

    def __init__(self, loader):
        self.batches = list(loader)

    def __iter__(self):
        return iter(self.batches)


class Layers(PipelineModule, pl.LightningModule):
    """Two layers; keeps of every step the loss and the examples."""

    def __init__(self, mixes=False):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)])
        self.mixes, self.losses, self.seen, self.draws = mixes, [], [], []

    def pipeline_blocks(self):
        return ["layers.0", "layers.1"]

    def stage_forward(self, blocks, hidden, batch):
        hidden = batch["x"] if hidden is None else hidden
        for name in blocks:
            hidden = torch.tanh(self.get_submodule(name)(hidden))
        return hidden

    def pipeline_loss(self, output, batch):
        return (output - batch["y"]).square().mean()

    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict) and "first" in batch:
            batch = {key: torch.cat([batch["first"][key], batch["second"][key]]) for key in "xy"}
        elif isinstance(batch, dict):
            self.seen.append(batch["id"].tolist())
        if self.mixes:
            share = sum(draw() for draw in DRAWS.values())
            batch = {**batch, "x": batch["x"] * share}
        self.draws.append(share if self.mixes else None)
        loss = self.run_loss(batch)
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.pipeline_loss(self.run_output(batch), batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def masked(draw):
    def collate(examples):
        batch = torch.utils.data.default_collate(examples)
        return {**batch, "x": batch["x"] * (1 + draw())}

    return collate


DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
    "python": random.random,
}


def in_parts(examples):
    return random_split(examples, [16, 8])[0]


LOADERS = {
    "collate with torch": lambda _: DataLoader(
        Examples(), BATCH, collate_fn=masked(DRAWS["torch"])
    ),
    "collate with numpy": lambda _: DataLoader(
        Examples(), BATCH, collate_fn=masked(DRAWS["numpy"])
    ),
    "dataset with python": lambda _: DataLoader(Examples(DRAWS["python"]), BATCH, shuffle=True),
    "random_split": lambda _: DataLoader(in_parts(Examples()), BATCH),
    "weighted sampler": lambda _: DataLoader(
        Examples(), BATCH, sampler=WeightedRandomSampler(range(1, EXAMPLES + 1), EXAMPLES)
    ),
    "workers": lambda _: DataLoader(
        Examples(DRAWS["torch"]), BATCH, num_workers=2, persistent_workers=False
    ),
    "stream": lambda _: DataLoader(Stream(DRAWS["numpy"]), BATCH),
    "any iterable": lambda _: Batches(DataLoader(Examples(DRAWS["torch"]), BATCH)),
    "several": lambda _: {
        "first": DataLoader(Examples(DRAWS["torch"]), BATCH),
        "second": DataLoader(Examples(DRAWS["numpy"], 16), BATCH),
    },
}


def train(plan, folder, loader, seed, mixes=False, workers=False, **changes):
    """Train two epochs; return losses, examples and how many of them this process has read."""
    warnings.simplefilter("ignore")
    pl.seed_everything(0, workers=workers, verbose=False)
    module = Layers(mixes)
    if not workers:  # ranks differ until the run begins, as without a seed
        del os.environ["PL_GLOBAL_SEED"]
        seed_streams(seed + (int(os.environ["LOCAL_RANK"]) if plan else 0))
    made = LOADERS[loader](None) if isinstance(loader, str) else loader()
    trainer = make_trainer(folder, plan=plan, **{"max_epochs": 2, **changes})
    trainer.fit(module, made)
    dataset = getattr(made, "dataset", None)
    return module.losses, module.seen, len(getattr(dataset, "read", [])), module.draws


@pytest.mark.parametrize("loader", sorted(LOADERS))
def test_two_stages_train_on_the_batches_of_one_process(loader, tmp_path):
    workers = loader == "workers"
    expected = train(None, tmp_path, loader, 3, mixes=True, workers=workers)
    results = run_ranks(2, train, STAGES, tmp_path, loader, 3, True, workers)
    for losses, seen, _, draws in results:
        assert draws == expected[3]
        assert seen == expected[1]
        assert losses == pytest.approx(expected[0], rel=1e-5)


def test_only_one_rank_of_a_replica_reads(tmp_path):
    results = run_ranks(4, train, REPLICAS, tmp_path, "collate with torch", 3)
    assert [result[2] for result in results] == [EXAMPLES, 0, EXAMPLES, 0]


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
