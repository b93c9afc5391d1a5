"""Copies of the module in callbacks, and state dicts that its author has changed."""

from copy import deepcopy

import lightning.pytorch as pl
import pytest
import torch
from model_helpers import needs_pipelining
from projects import PLANS, Project, assert_close, fit, fit_ranks, loader_of, table, world_of
from ranks import run_ranks
from torch import nn

pytestmark = [pytest.mark.slow, needs_pipelining]
needs_averaging = pytest.mark.skipif(
    not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="came with Lightning 2.6"
)


class Normalizing(Project):
    def __init__(self):
        super().__init__()
        self.layers[0] = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None))
        self.layers[1] = nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3))
        self.register_buffer("scale", torch.tensor(2.0))


class PartlySaved(Project):
    """Saves only the second layer, under other names, and its half."""

    strict_loading = False

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        kept = {f"head.{k[9:]}": v for k, v in state.items() if k.startswith("layers.1")}
        return {**kept, "half": state["layers.1.weight"] / 2}

    def load_state_dict(self, state, *args, **kwargs):
        layers = {f"layers.1.{k[5:]}": v for k, v in state.items() if k.startswith("head")}
        return super().load_state_dict({**layers}, strict=False)


def parameters_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def saving(folder, name):
    return [pl.callbacks.ModelCheckpoint(folder / name, save_last=True)]


@pytest.mark.parametrize("plan", PLANS)
def test_what_a_module_saves_is_its_own_decision(plan, tmp_path):
    _, _, expected = fit(
        "auto", tmp_path, PartlySaved, None, parameters_of, callbacks=saving(tmp_path, "auto")
    )
    runs = fit_ranks(
        plan, tmp_path, PartlySaved, None, parameters_of, callbacks=saving(tmp_path, "ranks")
    )
    assert_close([state for _, _, state in runs], expected)
    one, other = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("auto", "ranks")
    )
    assert list(one) == list(other) == ["head.weight", "head.bias", "half"]
    assert_close([other], one)


class Keeping(pl.Callback):
    """Keeps copies of the module, and evaluates one of them."""

    def __init__(self):
        self.kept = []
        self.outputs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2:
            self.kept.append(deepcopy(pl_module).cpu())
        with torch.no_grad():
            self.outputs.append([copy.eval().run_output(batch) for copy in self.kept])


def keep(name, folder, kind):
    callback = Keeping()
    fit(name, folder, kind, callbacks=[callback])
    return [copy.state_dict() for copy in callback.kept], callback.outputs


@pytest.mark.parametrize("plan", ["2x1", "2x2"])
def test_copies_are_whole_at_the_end_and_run_before_it(plan, tmp_path):
    states, outputs = keep("auto", tmp_path, Project)
    for found, found_outputs in run_ranks(world_of(plan), keep, plan, tmp_path, Project):
        assert len(found) == len(states) == 2
        for one, other in zip(found, states):
            assert_close([one], other)
        if plan == "2x1":
            torch.testing.assert_close(found_outputs, outputs, rtol=1e-4, atol=1e-5)


def averaging(kind, folder, name):
    callbacks = {
        "SWA": lambda: pl.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1),
        "average": lambda: pl.callbacks.WeightAveraging(),
        "EMA": lambda: pl.callbacks.EMAWeightAveraging(decay=0.7),
        "EMA of weights": lambda: pl.callbacks.EMAWeightAveraging(decay=0.7, use_buffers=False),
    }
    return [callbacks[kind](), *saving(folder, name)]


class Validated(Normalizing):
    def __init__(self):
        super().__init__()
        self.validated = []

    def val_dataloader(self):
        return loader_of("auto", self.trainer, table(8))

    def validation_step(self, batch, batch_idx):
        self.validated.append(float(self.run_loss(batch)))


def validated(module):
    return module.validated


@needs_averaging
@pytest.mark.parametrize("kind", ["average", "EMA", "EMA of weights"])
@pytest.mark.parametrize("plan", ["2x1", "2x2"])
def test_averaged_weights_are_those_of_one_process(plan, kind, tmp_path):
    def run(run_fit, name, **more):
        callbacks = averaging(kind, tmp_path, name)
        return run_fit(name, tmp_path, make, None, validated, callbacks=callbacks, **more)

    make = PlainValidated  # statistics of BatchNorm are those of micro-batches
    losses, expected, values = run(fit, "auto", max_epochs=2)
    results = run(fit_ranks, plan, max_epochs=2)
    for found, state, _ in results:
        assert found == pytest.approx(losses, rel=1e-4)
        assert_close([state], expected)
    means = [sum(of_ranks) / len(results) for of_ranks in zip(*(v for _, _, v in results))]
    assert means == pytest.approx(values, rel=1e-4)
    one, other = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("auto", plan)
    )
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert_close([other[key]], one[key])
    more = {"max_epochs": 3, "ckpt_path": tmp_path / plan / "last.ckpt"}
    losses, expected, _ = run(fit, "auto", **more)
    for found, state, _ in run(fit_ranks, plan, **more):
        assert found == pytest.approx(losses, rel=1e-4)
        assert_close([state], expected)


class PlainValidated(Validated):
    def __init__(self):
        super().__init__()
        self.layers = Project().layers


@needs_averaging
def test_averaged_statistics_are_those_of_their_stage(tmp_path):
    """Of BatchNorm, which sees micro-batches: the weights of rank 0 are those of rank 1."""
    callbacks = averaging("EMA", tmp_path, "ranks")
    runs = fit_ranks("2x1", tmp_path, Validated, max_epochs=2, callbacks=callbacks)
    assert_close([runs[0][1]], runs[1][1])
    saved = torch.load(tmp_path / "ranks" / "last.ckpt", weights_only=True)["state_dict"]
    assert_close([saved], runs[0][1])
    assert saved["layers.0.1.num_batches_tracked"] > 0


class OwnAverage(pl.Callback):
    """Averages weights as people write it: a copy in setup, a dictionary, and saves both."""

    def setup(self, trainer, pl_module, stage):
        self.average = deepcopy(pl_module)

    def on_train_start(self, trainer, pl_module):
        self.shadow = {n: p.clone().detach().cpu() for n, p in pl_module.named_parameters()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *args):
        for own, p in zip(self.average.parameters(), pl_module.parameters()):
            own.lerp_(p, 0.5)
        for name, p in pl_module.named_parameters():
            self.shadow[name].mul_(0.5).add_(p.detach() * 0.5)

    def state_dict(self):
        return {"average": self.average.state_dict(), "shadow": self.shadow}


@pytest.mark.parametrize("plan", ["2x1", "2x2"])
def test_averages_of_other_callbacks_are_those_of_one_process(plan, tmp_path):
    for name in ("auto", plan):
        callbacks = [OwnAverage(), *saving(tmp_path, name)]
        (fit if name == "auto" else fit_ranks)(name, tmp_path, Project, callbacks=callbacks)
    one, other = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["callbacks"]["OwnAverage"]
        for name in ("auto", plan)
    )
    assert_close([other["average"]], one["average"])
    assert_close([other["shadow"]], one["shadow"])


class Teaching(pl.Callback):
    """Keeps another model of the same class, which is not a copy."""

    def __init__(self):
        self.teacher = Project()
        nn.init.ones_(self.teacher.layers[0].weight)

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        output = self.teacher.stage_forward(self.teacher.pipeline_blocks(), None, batch)
        assert output.shape == (len(batch["x"]), 3)


@pytest.mark.parametrize("plan", ["2x1", "1x2"])
def test_another_model_of_the_class_is_no_copy(plan, tmp_path):
    def taught(module):
        (callback,) = (c for c in module.trainer.callbacks if isinstance(c, Teaching))
        return parameters_of(callback.teacher)

    _, _, expected = fit("auto", tmp_path, Project, None, taught, callbacks=[Teaching()])
    runs = fit_ranks(plan, tmp_path, Project, None, taught, callbacks=[Teaching()])
    assert_close([state for _, _, state in runs], expected)


def pickled(name, folder):
    import pickle

    class Pickling(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.restored = pickle.loads(pickle.dumps(pl_module))

    callback = Pickling()
    fit(name, folder, Project, callbacks=[callback])
    return callback.restored.pipeline_executor


def test_a_pickled_module_has_no_executor(tmp_path):
    assert run_ranks(2, pickled, "2x1", tmp_path) == [None, None]


def alone(name, folder):
    """A copy on one rank only."""

    class Keep(pl.Callback):
        copies = ()

        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_rank == 1:
                self.copies = [deepcopy(pl_module)]

    fit(name, folder, Project, callbacks=[Keep()])


def test_a_copy_on_one_rank_does_not_hang(tmp_path):
    run_ranks(2, alone, "2x1", tmp_path)
