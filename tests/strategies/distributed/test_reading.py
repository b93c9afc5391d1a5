"""One rank of a replica reads; all ranks train on its batches, and draw its random numbers."""

import os
import random
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from model_helpers import make_trainer, needs_pipelining
from projects import Project
from ranks import run_ranks
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    WeightedRandomSampler,
    random_split,
)

from lightning_ipu_bert.data.loaders import ResumableDataLoader, TrainingSampler
from lightning_ipu_bert.training.random_states import seed_generators

pytestmark = [pytest.mark.slow, needs_pipelining]
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


class Layers(Project):
    """Two layers; keeps of every step the loss, the examples and what was drawn."""

    def __init__(self, mixes=False):
        super().__init__()
        self.layers[1] = nn.Linear(6, 1)
        self.mixes, self.seen, self.draws = mixes, [], []

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
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.pipeline_loss(self.run_output(batch), batch), sync_dist=True)


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
        seed_generators(seed + (int(os.environ["LOCAL_RANK"]) if plan else 0))
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


def drawn_and_saved(folder, plan, ckpt_path=None):
    """Train two epochs, in which loader and step draw numbers, and save after every update."""
    warnings.simplefilter("ignore")
    pl.seed_everything(5, verbose=False)
    module, sampler = Layers(mixes=True), TrainingSampler([1] * EXAMPLES, BATCH)
    collate = masked(lambda: DRAWS["numpy"]() + DRAWS["python"]())
    loader = ResumableDataLoader(
        Examples(), BATCH, sampler=sampler, collate_fn=collate, generator=torch.Generator()
    )
    saving = pl.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    trainer = make_trainer(folder, saving, plan=plan, max_epochs=2)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module.losses, module.draws


@pytest.mark.parametrize("plan", [STAGES, REPLICAS], ids=["2x1", "2x2"])
def test_random_states_are_resumed(plan, tmp_path):
    world = 2 * plan.get("replication_factor", 1)
    whole = run_ranks(world, drawn_and_saved, tmp_path, plan)
    assert len({tuple(draws) for _, draws in whole}) == world // 2  # alike in a replica only
    for step in (2, 3):  # within an epoch, and at its end
        path = str(tmp_path / f"step={step}.ckpt")
        for (losses, draws), (rest, again) in zip(
            whole, run_ranks(world, drawn_and_saved, tmp_path / "rest", plan, path)
        ):
            assert rest == losses[step:]
            assert again == draws[step:]
