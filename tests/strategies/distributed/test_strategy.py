"""What Lightning promises holds on a pipeline, too."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from language_model import LanguageModel, Sentences
from model_helpers import make_trainer, needs_pipelining, ordered_loader
from ranks import run_ranks
from torch.utils.data import DataLoader

from lightning_ipu_bert import PipelineModule, PipelineParallelStrategy, UserError

TWO = {"layers_per_stage": [3, 3], "gradient_accumulation_steps": 4}
TWO_BY_TWO = {**TWO, "replication_factor": 2}
HOOKS = [
    name
    for name in vars(pl.callbacks.Callback)
    if name.startswith("on_") and "checkpoint" not in name and "exception" not in name
]


class Trace(pl.Callback):
    """Notes every hook of Lightning, in order."""

    def __init__(self):
        self.calls = []


def _note(name):
    def hook(self, *args, **kwargs):
        self.calls.append(name)

    return hook


for _name in HOOKS:
    setattr(Trace, _name, _note(_name))


class Recording(LanguageModel):
    """Notes what it evaluates and predicts, its steps and learning rates."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen, self.rates, self.steps, self.losses, self.total = [], [], [], [], None

    def training_step(self, batch, batch_idx):
        self.steps.append(self.global_step)
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        output = self.run_output(batch)
        self.seen += [tuple(row) for row in batch["tokens"].tolist()]
        assert len(output) == len(batch["tokens"])

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.run_output(batch)

    def configure_optimizers(self):
        self.total = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=int(self.total))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def make_recording(plan, folder, *callbacks, seed=5, dropout=0.0, **changes):
    """Make a module and its Trainer, as one of the plan's ranks or plain."""
    warnings.simplefilter("ignore")
    pl.seed_everything(seed, verbose=False)
    module = Recording(dropout=dropout)
    return module, make_trainer(folder, *callbacks, plan=plan, **{"max_epochs": 1, **changes})


def loader(count, batch_size, plan=None, trainer=None):
    """A loader, and with a trainer one that shares the examples in order instead of shuffled."""
    if trainer:
        return ordered_loader(Sentences(count), batch_size, trainer, plan)
    return DataLoader(Sentences(count), batch_size // (plan or {}).get("replication_factor", 1))


def _hooks(plan, folder):
    trace = Trace()
    module, trainer = make_recording(plan, folder, trace, max_steps=3)
    trainer.fit(module, loader(64, 16, plan), loader(8, 4))
    trainer.validate(module, loader(8, 4), verbose=False)
    return trace.calls


@needs_pipelining
def test_hooks_come_in_lightnings_order(tmp_path):
    plain = _hooks(None, tmp_path)
    assert "on_before_optimizer_step" in plain
    for calls in run_ranks(2, _hooks, TWO, tmp_path):
        assert calls == plain


def _steps(plan, folder):
    module, trainer = make_recording(plan, folder, max_epochs=2)
    trainer.fit(module, loader(50, 16, plan))  # the last batch of an epoch has two examples
    return module.steps, module.rates, int(module.total), trainer.global_step


@needs_pipelining
@pytest.mark.parametrize("plan", [TWO, TWO_BY_TWO], ids=["2x1", "2x2"])
def test_steps_and_learning_rates_are_lightnings(plan, tmp_path):
    plain = _steps(None, tmp_path)
    assert plain[3] == 8
    world = 2 * plan.get("replication_factor", 1)
    assert all(result == plain for result in run_ranks(world, _steps, plan, tmp_path))


def _ragged(plan, folder):
    module, trainer = make_recording(plan, folder)
    trainer.fit(module, loader(37, 8, plan, trainer))
    return module.losses, [p.detach().clone() for p in module.parameters()]


@needs_pipelining
def test_a_ragged_last_batch_is_a_smaller_update(tmp_path):
    losses, weights = _ragged(None, tmp_path)
    for seen, trained in run_ranks(2, _ragged, TWO, tmp_path):
        assert seen == pytest.approx(losses, rel=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(trained, weights))


def _evaluate(plan, folder):
    module, trainer = make_recording(plan, folder)
    found = trainer.validate(module, loader(11, 4), verbose=False)[0]["val/loss"]
    validated, module.seen = module.seen, []
    trainer.test(module, loader(11, 4), verbose=False)
    predictions = trainer.predict(module, loader(11, 4))
    return found, validated, module.seen, torch.cat(predictions)


@needs_pipelining
def test_every_example_is_evaluated_once(tmp_path):
    """Eleven examples on two replicas."""
    loss, validated, tested, predictions = _evaluate(None, tmp_path)
    assert len(validated) == 11
    results = run_ranks(4, _evaluate, TWO_BY_TWO, tmp_path)
    for which, truth in ((1, validated), (2, tested)):
        for position in range(2):
            seen = [example for result in results[position::2] for example in result[which]]
            assert sorted(seen) == sorted(truth)
    assert all(found == pytest.approx(loss, rel=1e-5) for found, *_ in results)
    together = torch.stack([row for pair in _interleave(results) for row in pair])
    assert torch.allclose(together, predictions, atol=1e-5)


def _interleave(results):
    """Replicas take the examples in turn."""
    first, second = results[0][3], results[2][3]
    for i in range(len(first)):
        yield [first[i], *second[i : i + 1]]


def _all_verbs(plan, folder):
    module, trainer = make_recording(plan, folder)
    trainer.fit(module, loader(32, 16, plan), loader(8, 4))
    after_fit = trainer.validate(module, loader(8, 4), verbose=False)[0]["val/loss"]
    with torch.no_grad():
        batch = {"tokens": Sentences(8).tokens}
        alone = float(module.eval().pipeline_loss(module.run_output(batch), batch))
    module.train()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(32, 16, plan), loader(8, 4))
    return after_fit, alone, trainer.global_step


@needs_pipelining
def test_validate_after_fit_and_fit_twice(tmp_path):
    for after_fit, alone, steps in run_ranks(2, _all_verbs, TWO, tmp_path):
        assert after_fit == pytest.approx(alone, rel=1e-5)
        assert steps == 4


def _flag(plan, folder, flag):
    module, trainer = make_recording(plan, folder, max_epochs=2, **flag)
    trainer.fit(module, loader(64, 16, plan, trainer), loader(8, 4))
    return trainer.global_step, [str(p.dtype) for p in module.parameters()][:1], module.losses


@needs_pipelining
@pytest.mark.parametrize(
    ("flag", "steps", "dtype"),
    [
        ({"fast_dev_run": True}, 1, "float32"),
        ({"overfit_batches": 1}, 2, "float32"),
        ({"precision": "bf16-mixed", "max_steps": 2}, 2, "float32"),
        ({"precision": "bf16-true", "max_steps": 2}, 2, "bfloat16"),
        ({"profiler": "simple", "max_steps": 2}, 2, "float32"),
        ({"detect_anomaly": True, "max_steps": 2}, 2, "float32"),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_flags_of_the_trainer(flag, steps, dtype, tmp_path):
    plain = _flag(None, tmp_path, flag)
    for result in run_ranks(2, _flag, TWO, tmp_path, flag):
        assert result[:2] == (steps, [f"torch.{dtype}"])
        tolerance = 1e-5 if flag.get("precision", "32-true") == "32-true" else 2e-2
        assert result[2] == pytest.approx(plain[2], rel=tolerance)


class Noise(Recording):
    """Returns the dropout mask of each stage's first layer."""

    def stage_forward(self, blocks, hidden, batch):
        hidden = super().stage_forward(blocks, hidden, batch)
        if self.training and torch.is_grad_enabled():
            self.drawn.append(torch.rand(()).item())
        return hidden


def _noise(plan, folder, seed):
    module, trainer = make_recording(plan, folder, seed=seed, dropout=0.3, max_steps=2)
    module.__class__, module.drawn = Noise, []
    trainer.fit(module, loader(32, 16, plan))
    return module.drawn, module.losses, torch.rand(()).item()


@needs_pipelining
def test_dropout_differs_on_stages_and_replicas_and_repeats_with_the_seed(tmp_path):
    first = run_ranks(4, _noise, TWO_BY_TWO, tmp_path, 6)
    again = run_ranks(4, _noise, TWO_BY_TWO, tmp_path, 6)
    other = run_ranks(4, _noise, TWO_BY_TWO, tmp_path, 7)
    assert first == again
    assert first != other
    drawn = [number for numbers, _, _ in first for number in numbers]
    assert len(set(drawn)) == len(drawn)
    # Elsewhere the ranks of a replica draw the same.
    outside = [drawn for _, _, drawn in first]
    assert outside[0] == outside[1] != outside[2] == outside[3]


def error_of(plan, folder, module=None, loaders=None, devices=None, **changes):
    """Return the message with which a run is refused, before it has started any process."""
    strategy = PipelineParallelStrategy(**plan)
    world = strategy.config.shape.num_devices if devices is None else devices

    def run():
        trainer = make_trainer(folder, strategy=strategy, devices=world, **changes)
        trainer.fit(module or LanguageModel(), loaders or loader(16, 16))

    with pytest.raises(UserError) as error:
        run()
    assert "\n" not in str(error.value)
    return str(error.value)


class NoProtocol(pl.LightningModule):
    pass


class HalfProtocol(PipelineModule, pl.LightningModule):
    def pipeline_blocks(self):
        return []


def test_what_cannot_work_is_refused_before_processes_start(tmp_path):
    message = error_of({**TWO, "layers_per_stage": [3, 4]}, tmp_path)
    assert "[3, 4] places 7 layers, but the model has 6" in message
    message = error_of(TWO, tmp_path, devices=3)
    assert "devices=3" in message
    assert "Set devices to 2" in message
    message = error_of(TWO, tmp_path, loaders=loader(20, 10))
    assert "batch_size=10" in message
    message = error_of(TWO, tmp_path, accumulate_grad_batches=2)
    assert "accumulate_grad_batches=2 must be 1" in message
    message = error_of(TWO, tmp_path, precision="64-true")
    assert "64-true" in message
    assert "bf16-mixed" in message
    message = error_of(TWO, tmp_path, module=NoProtocol())
    assert "NoProtocol cannot be pipelined" in message
    message = error_of(TWO, tmp_path, module=HalfProtocol())
    assert "does not define stage_forward, pipeline_loss" in message


class OwnAveraging(pl.callbacks.StochasticWeightAveraging):
    pass


@pytest.mark.parametrize(
    ("make_callback", "name"),
    [
        (lambda: OwnAveraging(swa_lrs=1e-2), "StochasticWeightAveraging"),
        (lambda: pl.callbacks.ModelPruning("l1_unstructured"), "ModelPruning"),
        (
            lambda: pl.callbacks.GradientAccumulationScheduler({0: 1, 2: 4}),
            "GradientAccumulationScheduler",
        ),
    ],
    ids=["SWA", "pruning", "accumulation"],
)
def test_callbacks_that_cannot_work_are_refused(make_callback, name, tmp_path):
    message = error_of(TWO, tmp_path, callbacks=[make_callback()])
    assert message.startswith(f"{name} ")
    assert "Remove it, or use another strategy." in message


def test_blocks_must_not_share_parameters(tmp_path):
    class Tied(LanguageModel):
        def __init__(self):
            super().__init__()
            self.head.weight = self.embed.weight

    message = error_of(TWO, tmp_path, Tied())
    assert "ties the parameters embed.weight and head.weight" in message


def test_registered_names_share_the_layers_evenly(tmp_path):
    trainer = make_trainer(tmp_path, strategy="pipeline", devices=3)
    assert trainer.strategy.config.layers_per_stage == [-1, -1, -1]
    assert trainer.strategy.config.gradient_accumulation_steps == 3
