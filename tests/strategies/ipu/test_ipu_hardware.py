"""There are IPUs, enough of them, of the right kind; and several processes, where poprun starts."""

import sys
import types

import poptorch
import pytest
from ipu_runs import ipu_strategy, ipu_trainer, loader, with_adamw
from language_model import LanguageModel, Sentences
from models import GLOBAL_BATCH
from torch.utils.data import DistributedSampler

from lightning_ipu_bert import IPUConfig, UserError
from lightning_ipu_bert.strategies.ipu.hardware import check_hardware
from lightning_ipu_bert.strategies.ipu.program.options import ipu_options


@pytest.mark.parametrize(
    ("size", "version", "message"),
    [
        (0, 2, "No IPUs are available on this machine.*POPTORCH_IPU_MODEL=1.*compile_only"),
        (16, 1, r"have version 1, but programs need 2 \(Mk2\) or 21 \(C600\)"),
        (2, 2, "needs 4 IPUs, but this machine has no such group"),
    ],
)
def test_a_machine_without_the_ipus_of_the_plan_is_refused(size, version, message, ipus, tmp_path):
    ipus.size, ipus.version = size, version
    module, examples = with_adamw("bert")
    with pytest.raises(UserError, match=message):
        ipu_trainer(tmp_path).fit(module, loader(examples))
    assert poptorch.device.COUNTS["compilations"] == 0


def test_other_kinds_of_ipus_and_simulations_are_taken(ipus, monkeypatch):
    ipus.version = 21
    check_hardware(16)
    with pytest.raises(UserError):
        check_hardware(17)  # 32 of them
    ipus.size = 0
    monkeypatch.setenv("POPTORCH_IPU_MODEL", "1")
    check_hardware(1)


# --- poprun ---------------------------------------------------------------------------------------


@pytest.fixture
def popdist(monkeypatch):
    """The second of two processes with two replicas each."""

    class Distributed(poptorch.Options):
        def __init__(self, ipus_per_replica):
            super().__init__()
            poptorch.Options.replicationFactor(self, 2)
            popdist.ipus_per_replica = ipus_per_replica

        def replicationFactor(self, replication_factor):  # noqa: N802
            raise RuntimeError("Cannot set replicationFactor with popdist.poptorch.Options")

    popdist, submodule = types.ModuleType("popdist"), types.ModuleType("popdist.poptorch")
    popdist.begun = []
    popdist.init = lambda: popdist.begun.append(True)
    popdist.isPopdistEnvSet = lambda: True
    popdist.getInstanceIndex, popdist.getNumInstances = (lambda: 1), (lambda: 2)
    popdist.getNumLocalReplicas = lambda: 2
    submodule.Options, popdist.poptorch = Distributed, submodule
    monkeypatch.setitem(sys.modules, "popdist", popdist)
    monkeypatch.setitem(sys.modules, "popdist.poptorch", submodule)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return popdist


def test_under_poprun_popdist_knows_the_replicas(popdist):
    plan = {"layers_per_ipu": [1, 1], "gradient_accumulation_steps": 3}
    found = ipu_options(IPUConfig.from_dict(plan), True)
    assert type(found).__name__ == "Distributed"
    assert popdist.ipus_per_replica == 2
    strategy = ipu_strategy()
    assert (strategy.global_rank, strategy.world_size) == (1, 2)
    assert not strategy.is_global_zero
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": 1}
    assert popdist.begun == [True]  # once


def test_processes_share_the_training_data_and_evaluate_everything(popdist, monkeypatch, tmp_path):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    trainer = ipu_trainer(tmp_path, use_distributed_sampler=True)
    seen = []

    class Counts(LanguageModel):
        def training_step(self, batch, batch_idx):
            seen.append(batch["tokens"])
            return super().training_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            return self.run_output(batch)

    data = Sentences(4 * GLOBAL_BATCH)
    trainer.fit(Counts(), loader(data))
    assert [len(tokens) for tokens in seen] == [GLOBAL_BATCH] * 2
    sampler = trainer.train_dataloader.sampler
    assert isinstance(sampler, DistributedSampler)
    assert sum(map(len, trainer.predict(Counts(), loader(data)))) == len(data)


@pytest.mark.parametrize(
    ("plan", "seed", "message"),
    [
        (
            {"replication_factor": 4},
            "1",
            "replication_factor=4 must be 2, the replicas per process of poprun",
        ),
        (
            {"ipu_config": {"inference_replication_factor": 1}},
            "1",
            "inference_replication_factor=1 must be 2, the replicas per process of poprun",
        ),
        ({}, "", "poprun has started 2 processes, which without a seed"),
    ],
)
def test_poprun_and_the_plan_must_agree(plan, seed, message, popdist, monkeypatch, tmp_path):
    monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    module, examples = with_adamw("bert")
    with pytest.raises(UserError, match=message):
        ipu_trainer(tmp_path, strategy=ipu_strategy(**plan)).fit(module, loader(examples))


def test_losses_cannot_be_weighted_over_processes(popdist, monkeypatch, tmp_path):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    module, examples = with_adamw("bert")
    module.__class__ = type("Weighted", (type(module),), {"batch_weight": lambda *_: 1.0})
    with pytest.raises(UserError, match="2 processes, which cannot weight losses by batch_weight"):
        ipu_trainer(tmp_path).fit(module, loader(examples))


def test_a_sampler_of_the_users_own_stays(tmp_path):
    class Counts(LanguageModel):
        def predict_step(self, batch, batch_idx):
            return self.run_output(batch)

    data = Sentences(32)
    part = loader(data, sampler=DistributedSampler(data, 4, 1, shuffle=False))
    assert sum(map(len, ipu_trainer(tmp_path).predict(Counts(), part))) == 8
