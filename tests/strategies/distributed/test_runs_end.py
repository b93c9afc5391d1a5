"""State of a run ends with it, even if all ranks raise and the script continues."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from forked_script import run_script
from language_model import LanguageModel
from model_helpers import make_trainer, needs_pipelining
from ranks import run_ranks
from test_strategy import TWO, TWO_BY_TWO, loader, make_recording

from lightning_ipu_bert import PipelineParallelStrategy

pytestmark = needs_pipelining
FAILS_AT = 2
SCRIPT = Path(__file__).parents[1] / "exception_script.py"


class FailsOnce(pl.Callback):
    """Raises on every rank, once."""

    failed = False

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == FAILS_AT and not self.failed:
            self.failed = True
            raise ValueError("no more of this")


def train_twice(trainer, module, batches):
    """Fit, catch what it raises, look at the weights, and fit again."""
    with pytest.raises(ValueError, match="no more of this"):
        trainer.fit(module, batches)
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    caught = copy.deepcopy(module.state_dict())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches)
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    trainer.validate(module, loader(8, 4), verbose=False)
    return caught, module.state_dict()


def run_twice(plan, folder):
    module, trainer = make_recording(plan, folder, FailsOnce())
    return train_twice(trainer, module, loader(64, 16, plan, trainer))


@pytest.mark.parametrize("start", ["fork", "popen"])
def test_weights_are_whole_after_an_exception_and_after_the_next_fit(start, tmp_path):
    truths = run_twice(None, tmp_path)
    if start == "fork":
        found = run_ranks(4, run_twice, TWO_BY_TWO, tmp_path)
    else:
        done = run_script(SCRIPT, str(tmp_path), folder=tmp_path)
        assert done.returncode == 0, done.output
        assert "Traceback" not in done.output
        found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for states in found:
        for state, truth in zip(states, truths):
            assert state.keys() == truth.keys()
            for name, weight in truth.items():
                torch.testing.assert_close(state[name], weight, rtol=1e-5, atol=1e-6)


def test_nothing_is_left_of_a_run_that_is_over(tmp_path):
    assert set(run_ranks(2, _fields, TWO, tmp_path)) == {(True, True, True)}


def _fields(plan, folder):
    module, trainer = make_recording(plan, folder, max_epochs=1)
    trainer.fit(module, loader(16, 16, plan, trainer))
    return (
        trainer.strategy._run is None,
        module.pipeline_executor is None,
        not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()),
    )


class Counting(LanguageModel):
    """Counts how often it prepares its masks."""

    calls = 0

    def stage_forward(self, blocks, hidden, batch):
        self.calls += torch.is_grad_enabled()
        return super().stage_forward(blocks, hidden, batch)


def _calls(plan, folder, recompute):
    torch.manual_seed(3)
    module = Counting()
    strategy = PipelineParallelStrategy(**plan, recompute_checkpoint_every_layer=recompute)
    trainer = make_trainer(folder, strategy=strategy, devices=2, max_epochs=1)
    trainer.fit(module, loader(32, 16, plan, trainer))
    return module.calls, [p.detach() for p in module.parameters()]


def test_recomputation_calls_the_model_once_for_a_stage_and_micro_batch(tmp_path):
    usual = run_ranks(2, _calls, TWO, tmp_path, False)
    recomputed = run_ranks(2, _calls, TWO, tmp_path, True)
    updates, micro_batches = 2, 4
    for (calls, weights), (expected, truths) in zip(recomputed, usual):
        assert calls == expected
        assert expected - updates * micro_batches in (0, 1)  # once for the shapes that are sent
        for weight, truth in zip(weights, truths):
            torch.testing.assert_close(weight, truth, rtol=1e-6, atol=1e-8)


def _mesh(plan, folder):
    import torch.distributed as dist

    module, trainer = make_recording(plan, folder, max_epochs=1)
    trainer.fit(module, loader(16, 16, plan, trainer))
    mesh = trainer.strategy._ranks.mesh
    groups = [dist.get_process_group_ranks(g) for g in (mesh.replica_group, mesh.pipeline_group)]
    return mesh.replica, mesh.pipeline_rank, groups


def test_a_rank_knows_its_place_in_the_mesh(tmp_path):
    """rank = replica x ranks per replica + pipeline rank."""
    assert run_ranks(4, _mesh, TWO_BY_TWO, tmp_path) == [
        (0, 0, [[0, 2], [0, 1]]),
        (0, 1, [[1, 3], [0, 1]]),
        (1, 0, [[0, 2], [2, 3]]),
        (1, 1, [[1, 3], [2, 3]]),
    ]


def test_validation_needs_no_accumulation(tmp_path):
    plan = {"layers_per_stage": [3, 3]}
    alone = _validate(None, tmp_path)
    for found in run_ranks(2, _validate, plan, tmp_path):
        assert found[0]["val/loss"] == pytest.approx(alone[0]["val/loss"], rel=1e-5)


def _validate(plan, folder):
    module, trainer = make_recording(plan, folder)
    return trainer.validate(module, loader(8, 4), verbose=False)
