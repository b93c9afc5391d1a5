"""The optimizer of an executor: its numbers, and its state on the IPUs."""

from types import MethodType

import torch

from poptorch import optim
from poptorch.device import COUNTS
from poptorch.enums import MeanReductionStrategy


class Optimizing:
    """The part of an executor that knows the optimizer."""

    # --- optimizer --------------------------------------------------------------------------------

    def setOptimizer(self, optimizer):
        COUNTS["set_optimizer"] += 1
        if isinstance(optimizer, optim.Optimizer):
            if self.isCompiled() and optimizer is not self._optimizer:
                optimizer.ipu_state_is_dirty = True
            optimizer.state_dict = MethodType(Optimizing._optimizer_state_dict, self)
        self._optimizer = optimizer
        if getattr(optimizer, "accum_type", None) == torch.float16:
            running = MeanReductionStrategy.Running
            training = self._options.Training
            if not self.isCompiled():
                self._options._freeze(False)
                training.setMeanAccumulationAndReplicationReductionStrategy(running)
                self._options._freeze()
            elif training.meanAccumulationAndReplicationReductionStrategy != running:
                raise ValueError("Invalid optimizer: the executable is already compiled.")
        numbers = optim.describe(optimizer)
        if numbers != self._numbers:
            if self._numbers is not None and self.isCompiled():
                optim.check_replacement(self._numbers, numbers)
            self._numbers, self._numbers_dirty = numbers, True
        if self.isAttachedToDevice():
            self._numbers_dirty = False
            self._write_optimizer_state()

    def _optimizer_state_dict(self):
        optimizer = self._optimizer
        if optimizer.host_state_is_dirty:
            self._check_compiled()
            assert not self._numbers_dirty, "Both host and ipu states cannot be dirty"
            parameters = {
                f"learningRate___specific___{name}": torch.tensor(group["lr"][0])
                for group, names in zip(self._numbers["groups"], self._group_names)
                for name in names
            }
            COUNTS["to_host"] += 1  # PopART has one way to the host, and it takes the weights, too
            state = {name: t.clone() for name, t in self._optimizer_state.items()}
            optimizer.set_state_dict(
                {
                    "ipu_state": state,
                    "ipu_param": parameters,
                    **torch.optim.Optimizer.state_dict(optimizer),
                }
            )
            optimizer.ipu_state_is_dirty = False
        return optimizer.get_state_dict()

    def _write_optimizer_state(self):
        optimizer = self._optimizer
        if not (isinstance(optimizer, optim.Optimizer) and optimizer.ipu_state_is_dirty):
            return
        assert not optimizer.host_state_is_dirty, "Both host and ipu states cannot be dirty"
        if optimizer.has_state():
            self.copyWeightsToHostIfNeeded()
            given = optimizer.state_dict()["ipu_state"]
            for name, mine in self._optimizer_state.items():
                # The real one copies bytes from wherever the pointer points.
                assert name in given, f"a crash: no state {name}"
                fits = given[name].dtype == mine.dtype and given[name].shape == mine.shape
                assert fits and given[name].is_contiguous(), f"garbage: wrong bytes for {name}"
                mine.copy_(given[name])
        optimizer.ipu_state_is_dirty = False
