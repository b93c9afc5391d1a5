"""Optimizers of other projects, with sharded and offloaded state; saved and resumed."""

import lightning.pytorch as pl
import pytest
import torch
from model_helpers import needs_pipelining
from projects import Project, assert_alike, fit, fit_ranks
from torch import optim

from lightning_ipu_bert import ElementwiseOptimizer

pytestmark = [pytest.mark.slow, needs_pipelining]


class Own(optim.Optimizer):
    """Updates one parameter after the other."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.direction(p, self.state[p]) * group["lr"])
        return loss


class Signs(Own):
    """Elementwise, with a momentum that exists from the beginning, and marks of parameters."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = [torch.zeros_like(p), 1]

    def direction(self, p, state):
        momentum = state["momentum"]
        momentum[0].mul_(0.9).add_(p.grad)
        momentum[1] += 1
        return momentum[0].sign() * p.speed / momentum[1]


class MarkedSigns(ElementwiseOptimizer, Signs):
    """Says so itself."""


class RegisteredSigns(Signs):
    """Is said to be so by somebody else."""


ElementwiseOptimizer.register(RegisteredSigns)


class Normed(Own):
    """Divides by the norm of the whole gradient of a parameter: slices would be wrong."""

    def direction(self, p, state):
        norms = state.setdefault("norms", torch.zeros(3))
        norms += p.grad.norm()
        return p.grad / norms[0]


OPTIMIZERS = {
    kind.__name__: kind
    for kind in (
        *(optim.Adadelta, optim.Adagrad, optim.Adamax, optim.AdamW, optim.ASGD, optim.NAdam),
        *(optim.RAdam, optim.RMSprop, optim.Rprop, optim.SGD),
        *(Signs, MarkedSigns, RegisteredSigns, Normed),
        *(vars(optim)[name] for name in ("Adafactor",) if name in vars(optim)),
    )
}


class Optimized(Project):
    kind = "SGD"

    def configure_optimizers(self):
        for p in self.parameters():
            p.speed = 1 + 0.5 * p.dim()
        return OPTIMIZERS[self.kind](self.parameters(), lr=0.05)


def checkpointed(folder, name):
    return [pl.callbacks.ModelCheckpoint(folder / name, save_last=True, every_n_train_steps=2)]


def module_of(kind):
    return type("Optimized", (Optimized,), {"kind": kind})


SOME = ("AdamW", "NAdam", "RAdam", "Adagrad", "MarkedSigns", "Normed", "Adafactor")
CASES = [
    (plan, kind)
    for plan in ("2x1", "2x2", "sharded", "offchip")
    for kind in OPTIMIZERS
    if plan == "sharded" or kind in SOME
]


@pytest.mark.parametrize(("plan", "kind"), CASES)
def test_optimizers_train_and_resume_as_in_one_process(plan, kind, tmp_path):
    make = module_of(kind)
    losses, state, _ = fit("auto", tmp_path, make, max_epochs=2)
    assert_alike(fit_ranks(plan, tmp_path, make, max_epochs=2), (losses, state), rel=1e-4)

    first = {"max_epochs": 1, "callbacks": checkpointed(tmp_path, "first")}
    more = {"max_epochs": 2, "ckpt_path": tmp_path / "first" / "last.ckpt"}
    fit_ranks(plan, tmp_path, make, **first)
    another_layout = fit("auto", tmp_path, make, **more)
    resumed = [*fit_ranks(plan, tmp_path, make, **more), another_layout]
    assert_alike(resumed, (losses[4:], state), rel=1e-4)


def test_state_is_sharded(tmp_path):
    def elements(module):
        states = module.optimizers().optimizer.state.values()
        return sum(x.numel() for state in states for x in state.values() if x.dim())

    for kind in ("AdamW", "Adafactor"):
        if kind in OPTIMIZERS:
            whole = [e for _, _, e in fit_ranks("2x2", tmp_path, module_of(kind), None, elements)]
            parts = [
                e for _, _, e in fit_ranks("sharded", tmp_path, module_of(kind), None, elements)
            ]
            assert sum(parts) == pytest.approx(sum(whole) / 2, abs=4)


class Sparse(Project):
    """The gradients of an embedding are sparse."""

    def __init__(self):
        super().__init__()
        self.layers[0] = torch.nn.Embedding(9, 6, sparse=True)

    def stage_forward(self, blocks, hidden, batch):
        rows = (batch["x"][:, 0] * 2).long().clamp(-4, 4) + 4
        return super().stage_forward(blocks, hidden, {"x": rows})

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("plan", ["2x1", "2x2"])
def test_sparse_gradients(plan, tmp_path):
    expected = fit("auto", tmp_path, Sparse)
    assert_alike(fit_ranks(plan, tmp_path, Sparse), expected, rel=1e-4)


class LineSearching(Project):
    def configure_optimizers(self):
        return optim.LBFGS(self.parameters())


@pytest.mark.usefixtures("short_grace")
def test_lbfgs_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="LBFGS runs several forwards per update"):
        fit_ranks("2x1", tmp_path, LineSearching)
