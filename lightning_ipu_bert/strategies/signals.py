"""SIGTERM and its like take effect where all ranks are between two steps.

Lightning's handlers talk to the other ranks at once: they broadcast, or gather a checkpoint. But a
signal comes at any moment. A rank that waits for a hidden state would never hear of it, and the
rank that should send it would wait in the handler.
"""

from __future__ import annotations

import signal
import threading
from typing import Any, Callable, Dict, List, Set

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException


class SignalsBetweenSteps(ParallelStrategy):
    """A strategy that keeps signals back until all ranks have come to the same place.

    In training this is the start of every batch: the update is then made, and Lightning ends the
    run after it, or saves and goes on if it was told to. In evaluation it is every batch too,
    unless there are several replicas: they may have different numbers of batches, and wait for the
    end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create the strategy; nothing is held yet."""
        super().__init__(*args, **kwargs)
        self._handlers: Dict[int, Callable[[int, Any], Any]] = {}
        self._seen: Set[int] = set()

    def on_train_start(self) -> None:
        """Hold signals from now on."""
        self._hold()

    def on_validation_start(self) -> None:
        """Hold signals from now on."""
        self._hold()

    def on_test_start(self) -> None:
        """Hold signals from now on."""
        self._hold()

    def on_predict_start(self) -> None:
        """Hold signals from now on."""
        self._hold()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Deliver what has come since the last batch."""
        self._deliver()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own step, after what has come since the last one."""
        self._deliver_in_evaluation()
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own step, after what has come since the last one."""
        self._deliver_in_evaluation()
        return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own step, after what has come since the last one."""
        self._deliver_in_evaluation()
        return super().predict_step(*args, **kwargs)

    def on_train_end(self) -> None:
        """Deliver what has come since the last batch began."""
        self._deliver()
        self._end_if_told()

    def on_validation_end(self) -> None:
        """Deliver what has come in evaluation."""
        self._deliver()
        if self._trainer.state.fn != TrainerFn.FITTING:  # there Lightning ends after validation
            self._end_if_told()

    def on_test_end(self) -> None:
        """Deliver what has come in evaluation."""
        self._deliver()
        self._end_if_told()

    def on_predict_end(self) -> None:
        """Deliver what has come in evaluation."""
        self._deliver()
        self._end_if_told()

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _end_if_told(self) -> None:
        """End at a place where Lightning does not look any more, or a script would go on."""
        if self._trainer.received_sigterm:
            raise SIGTERMException

    def _deliver_in_evaluation(self) -> None:
        if self.distributed_sampler_kwargs["num_replicas"] == 1:
            self._deliver()

    def _hold(self) -> None:
        """Put ourselves before Lightning's handlers; with these it removes ours after the run."""
        if threading.current_thread() is not threading.main_thread():
            return  # where Python lets nobody install handlers, nor does Lightning
        for number in self._numbers():
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._note:
                self._handlers[number] = handler
                self._seen.discard(number)
                signal.signal(number, self._note)

    def _numbers(self) -> List[int]:
        """Return the signals that Lightning handles."""
        slurm = self.cluster_environment
        if isinstance(slurm, SLURMEnvironment) and slurm.auto_requeue and slurm.requeue_signal:
            return [signal.SIGTERM, slurm.requeue_signal]
        return [signal.SIGTERM]

    def _note(self, number: int, _: Any) -> None:
        self._seen.add(number)

    def _deliver(self) -> None:
        """Call the handlers of all signals that any rank has seen; all ranks do so together."""
        numbers = list(self._handlers)
        if not numbers:
            return
        seen = torch.tensor([number in self._seen for number in numbers], dtype=torch.int32)
        seen = seen.to(self.root_device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        for number, is_seen in zip(numbers, seen.tolist()):
            if is_seen:
                # Once: Lightning's launcher sends SIGTERM to the other ranks, which know already.
                self._handlers.pop(number)(number, None)
