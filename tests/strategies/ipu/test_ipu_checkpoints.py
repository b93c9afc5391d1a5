"""Checkpoints know no layout: from IPUs to other IPUs, to one process, to ranks, and back."""

import copy
import csv
import json
import warnings

import lightning.pytorch as pl
import poptorch
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
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from model_helpers import Losses, needs_pipelining
from models import GLOBAL_BATCH
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ipu_bert import IPUConfig, UserError
from lightning_ipu_bert.training.checkpoint_io import AtomicCheckpointIO

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The dirpath has changed")]

UPDATES = 4
LAYOUTS = {
    "the same": {},
    "1x1": {"layers_per_stage": [6], "replication_factor": 1, "gradient_accumulation_steps": 16},
    "1x2": {"layers_per_stage": [6]},
    "4x1": {
        "layers_per_stage": [1, 2, 2, 1],
        "replication_factor": 1,
        "gradient_accumulation_steps": 8,
        "ipu_config": {"inference_device_iterations": 4},
    },
    "RTS": {"replicated_tensor_sharding": True},
}


def run(folder, layout, epochs, ckpt_path=None, dropout=0.0, **options):
    """Train; a layout of None is one plain process."""
    module, examples = with_adamw("bert", UPDATES)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = dropout
    losses, keeper = Losses(), ModelCheckpoint(folder, filename="kept", save_top_k=-1)
    if layout is None:
        trainer = plain_trainer(folder, losses, keeper, max_epochs=epochs, **options)
        replicas = 1
    else:
        strategy = ipu_strategy(**layout)
        replicas = layout.get("replication_factor", 2)
        trainer = ipu_trainer(
            folder, losses, keeper, strategy=strategy, max_epochs=epochs, **options
        )
    pl.seed_everything(7)
    trainer.fit(module, loader(examples, replicas), ckpt_path=ckpt_path)
    return losses.losses, weights_of(module), folder / "kept.ckpt"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Two epochs in one plain process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses, weights, _ = run(tmp_path_factory.mktemp("whole"), None, 2)
    return losses, weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ipus_go_on_from_ipus_of_another_layout(layout, uninterrupted, tmp_path):
    first, _, path = run(tmp_path / "a", {}, 1)
    second, weights, _ = run(tmp_path / "b", LAYOUTS[layout], 2, ckpt_path=path)
    assert first + second == pytest.approx(uninterrupted[0], rel=1e-5)
    check_weights(weights, uninterrupted[1])


def test_ipus_go_on_from_one_process_and_back(uninterrupted, tmp_path):
    first, _, path = run(tmp_path / "a", None, 1)
    second, weights, _ = run(tmp_path / "b", {}, 2, ckpt_path=path)
    assert first + second == pytest.approx(uninterrupted[0], rel=1e-5)
    check_weights(weights, uninterrupted[1])

    first, _, path = run(tmp_path / "c", {}, 1)
    second, weights, _ = run(tmp_path / "d", None, 2, ckpt_path=path)
    assert first + second == pytest.approx(uninterrupted[0], rel=1e-5)
    check_weights(weights, uninterrupted[1])


@needs_pipelining
def test_a_pipeline_of_ranks_goes_on_from_ipus_and_back(uninterrupted, tmp_path):
    from ranks import run_ranks

    first, _, path = run(tmp_path / "a", {}, 1)
    results = run_ranks(2, on_ranks, str(tmp_path / "b"), str(path), 2)
    assert first + results[0][0] == pytest.approx(uninterrupted[0], rel=1e-5)
    check_weights(results[0][1], uninterrupted[1])

    results = run_ranks(2, on_ranks, str(tmp_path / "c"), None, 1)
    second, weights, _ = run(tmp_path / "d", {}, 2, ckpt_path=tmp_path / "c" / "kept.ckpt")
    assert results[0][0] + second == pytest.approx(uninterrupted[0], rel=1e-5)
    check_weights(weights, uninterrupted[1])


def on_ranks(folder, ckpt_path, epochs):
    from lightning_ipu_bert import PipelineParallelStrategy

    warnings.simplefilter("ignore")
    module, examples = with_adamw("bert", UPDATES)
    losses, keeper = Losses(), ModelCheckpoint(folder, filename="kept", save_top_k=-1)
    strategy = PipelineParallelStrategy(layers_per_stage=[3, 3], gradient_accumulation_steps=8)
    trainer = plain_trainer(folder, losses, keeper, strategy=strategy, devices=2, max_epochs=epochs)
    sampler = DistributedSampler(examples, 1, 0, shuffle=False)
    trainer.fit(module, DataLoader(examples, GLOBAL_BATCH, sampler=sampler), ckpt_path=ckpt_path)
    return losses.losses, weights_of(module)


def test_dropout_masks_go_on_where_they_stopped(tmp_path):
    whole, _, _ = run(tmp_path / "a", {}, 2, dropout=0.3)
    first, _, path = run(tmp_path / "b", {}, 1, dropout=0.3)
    second, _, _ = run(tmp_path / "c", {}, 2, ckpt_path=path, dropout=0.3)
    assert first + second == whole
    again, _, _ = run(tmp_path / "d", {}, 1, dropout=0.3)
    assert again == first  # one seed, one run
    other, _, _ = run(tmp_path / "e", {}, 2, ckpt_path=without_rng(path), dropout=0.3)
    assert first + other != whole


def without_rng(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["ipu"]["rng_state"] = None
    torch.save(checkpoint, path.with_name("without.ckpt"))
    return path.with_name("without.ckpt")


def test_on_other_ipus_only_the_seed_goes_on_and_a_line_says_so(tmp_path, caplog):
    _, _, path = run(tmp_path / "a", {}, 1, dropout=0.3)
    run(tmp_path / "b", {"layers_per_stage": [6]}, 2, ckpt_path=path, dropout=0.3)
    assert "is for another number of IPUs; only its seed is used" in caplog.text


def test_a_checkpoint_is_plain_and_its_config_lies_beside_it(tmp_path):
    _, weights, path = run(tmp_path, {"replicated_tensor_sharding": True}, 1)
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(weights)
    assert {type(v) for v in checkpoint["state_dict"].values()} == {torch.Tensor}
    state = checkpoint["optimizer_states"][0]["state"]
    assert len(state) == len(weights)
    assert set(state[0]) == {"exp_avg", "exp_avg_sq", "step"}
    assert float(state[0]["step"]) == UPDATES
    config = IPUConfig.from_dict(json.loads((tmp_path / "ipu_config.json").read_text()))
    assert config.replicated_tensor_sharding
    assert config.layers_per_ipu == [3, 3]


def test_half_precision_goes_on_as_if_nothing_had_been(tmp_path):
    options = {"precision": "16-true"}
    layout = {"ipu_config": {"enable_half_first_order_momentum": True}}
    whole, expected, _ = run(tmp_path / "a", layout, 2, **options)
    first, _, path = run(tmp_path / "b", layout, 1, **options)
    second, weights, _ = run(tmp_path / "c", layout, 2, ckpt_path=path, **options)
    assert first + second == whole
    assert all((weights[name] == expected[name]).all() for name in weights)


def test_momentum_goes_on_too(tmp_path):
    """PopART keeps SGD's velocity times the loss scaling."""

    def momentum(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)

    def fit(name, make, epochs, ckpt_path=None, **options):
        module, examples = with_adamw("language model")
        type(module).configure_optimizers = momentum
        losses, keeper = Losses(), ModelCheckpoint(tmp_path / name, filename="kept")
        trainer = make(tmp_path, losses, keeper, max_epochs=epochs, **options)
        replicas = 1 if make is plain_trainer else 2
        trainer.fit(module, loader(examples, replicas), ckpt_path=ckpt_path)
        return losses.losses, tmp_path / name / "kept.ckpt"

    whole, _ = fit("whole", plain_trainer, 3)
    first, path = fit("a", plain_trainer, 1)
    second, path = fit("b", ipu_trainer, 2, path, strategy=ipu_strategy(loss_scaling=16.0))
    third, _ = fit("c", plain_trainer, 3, path)
    assert first + second + third == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "16-true"])
def test_a_checkpoint_saved_after_fit_is_as_whole_as_one_saved_in_it(precision, tmp_path):
    module, examples = with_adamw("bert")
    keeper = ModelCheckpoint(tmp_path, filename="inside")
    trainer = ipu_trainer(tmp_path, keeper, precision=precision)
    trainer.fit(module, loader(examples))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    inside, after = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("inside", "after")
    )
    assert after["ipu"] == inside["ipu"]
    for index, entry in inside["optimizer_states"][0]["state"].items():
        for name, value in entry.items():
            kept = after["optimizer_states"][0]["state"][index][name]
            assert kept.dtype == value.dtype == torch.float32
            assert (kept == value).all()


def test_updates_are_counted_on_with_the_same_iterations_only(tmp_path):
    module, examples = with_adamw("bert", updates=4)
    keeper = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=2)
    twice = {"ipu_config": {"device_iterations": 2}}
    ipu_trainer(tmp_path, keeper, strategy=ipu_strategy(**twice)).fit(module, loader(examples))
    path = tmp_path / "half.ckpt"
    whole = torch.load(path, weights_only=True)

    def refused(trainer, message):
        with pytest.raises(UserError, match=message):
            trainer.fit(module, loader(examples), ckpt_path=path)

    middle = copy.deepcopy(whole)
    middle["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
    torch.save(middle, path)
    for make in (ipu_trainer, plain_trainer):
        trainer = make(tmp_path, max_epochs=2)
        refused(
            trainer,
            "device_iterations=1 cannot resume .* middle of an epoch with device_iterations=2",
        )
    ipu_trainer(tmp_path).validate(module, loader(examples), ckpt_path=path)  # counts nothing

    torch.save({**whole, "global_step": 3}, path)
    trainer = ipu_trainer(tmp_path, max_epochs=2, strategy=ipu_strategy(**twice))
    refused(trainer, "device_iterations=2 must divide the 3 updates")


def test_logs_go_on_at_the_same_steps(tmp_path):
    def rates(name, epochs, ckpt_path=None):
        module, examples = with_adamw("bert", updates=4)
        keeper = ModelCheckpoint(tmp_path / name, filename="kept")
        monitor, logger = LearningRateMonitor("step"), CSVLogger(tmp_path, name, "logs")
        strategy = ipu_strategy(ipu_config={"device_iterations": 2})
        trainer = ipu_trainer(
            tmp_path,
            *(keeper, monitor),
            strategy=strategy,
            logger=logger,
            log_every_n_steps=2,
            max_epochs=epochs,
        )
        trainer.fit(module, loader(examples), ckpt_path=ckpt_path)
        rows = csv.DictReader((tmp_path / name / "logs" / "metrics.csv").read_text().splitlines())
        return {row["step"]: row["lr-AdamW"] for row in rows if row["lr-AdamW"]}

    whole, first = rates("whole", 2), rates("first", 1)
    second = rates("second", 2, tmp_path / "first" / "kept.ckpt")
    assert list(whole) == ["1", "3", "5", "7"]
    assert {**first, **second} == whole


@pytest.mark.parametrize("part", ["", "bert.encoder.layer.1"])
def test_weights_loaded_in_between_reach_the_ipus(part, tmp_path):
    class BackToStart(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            state = pl_module.get_submodule(part).state_dict()
            self.state = {k: v.clone() for k, v in state.items()}

        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.get_submodule(part).load_state_dict(self.state)

    found = []
    for make, replicas in ((plain_trainer, 1), (ipu_trainer, 2)):
        module, examples = with_adamw("bert")
        losses = Losses()
        trainer = make(tmp_path, losses, BackToStart(), max_epochs=2)
        trainer.fit(module, loader(examples, replicas), loader(examples, replicas))
        found.append([*losses.losses, float(trainer.callback_metrics["val/loss"])])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_plugins_finish_what_they_do(tmp_path):
    ended = []

    class Later(AtomicCheckpointIO):
        def teardown(self):
            ended.append(poptorch.device.POOL.held)

    module, examples = with_adamw("bert")
    ipu_trainer(tmp_path, plugins=[Later()]).fit(module, loader(examples))
    assert ended == [0]


def test_a_save_that_is_interrupted_leaves_the_last_one_whole(tmp_path, monkeypatch):
    module, examples = with_adamw("bert")
    trainer = ipu_trainer(tmp_path, plugins=[AtomicCheckpointIO()])
    trainer.fit(module, loader(examples))
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    before = (tmp_path / "kept.ckpt").read_bytes()

    def interrupted(checkpoint, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.strategy.save_checkpoint({}, tmp_path / "kept.ckpt")
    assert (tmp_path / "kept.ckpt").read_bytes() == before
    assert poptorch.device.POOL.held == 0
