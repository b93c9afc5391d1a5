"""What a run on IPUs saves and goes on from: weights, moments and random state."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_ipu_bert.pipeline.ipu_config import IPUConfig
from lightning_ipu_bert.pipeline.ipu_rules import CHECKPOINT_KEY, check_progress
from lightning_ipu_bert.strategies.ipu.config_file import save_ipu_config
from lightning_ipu_bert.strategies.ipu.executor import IPUExecutor
from lightning_ipu_bert.strategies.ipu.process import IPUProcess


class IPUStates(IPUProcess):
    """The part of the strategy that checkpoints see: as of any strategy, and a key of its own."""

    ipu_config: IPUConfig

    def __init__(self, *args: Any) -> None:
        """Create it; arguments are those of `ParallelStrategy`."""
        super().__init__(*args)
        self._executor: Optional[IPUExecutor] = None
        self._loaded: Dict[str, Any] = {}
        self._last_rng_state: Optional[List[int]] = None

    def lightning_module_state_dict(self) -> Dict[str, Any]:
        """Return the weights as plain tensors, up to date."""
        assert self.lightning_module is not None
        if self._executor is not None:
            self._executor.copy_weights_to_host()
        with torch._C.DisableTorchFunction():
            return {
                name: value.detach().as_subclass(Tensor) if isinstance(value, Tensor) else value
                for name, value in self.lightning_module.state_dict().items()
            }

    def optimizer_state(self, optimizer: Optimizer) -> Dict[str, Any]:
        """Return the optimizer's state as torch's optimizer would have it."""
        if self._executor is None or self._executor.optimizer is None:
            return super().optimizer_state(optimizer)
        return self._executor.optimizer.state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the state of any strategy's optimizer."""
        assert self._executor is not None
        assert self._executor.optimizer is not None
        self._executor.optimizer.load_state_dict(checkpoint["optimizer_states"][0])

    def save_checkpoint(
        self, checkpoint: Dict[str, Any], filepath: Any, storage_options: Optional[Any] = None
    ) -> None:
        """Save, with the random state of the IPUs; the IPU config goes into the same folder."""
        rng_state = self._executor.rng_state() if self._executor else self._last_rng_state
        checkpoint[CHECKPOINT_KEY] = {
            "config": self.ipu_config.to_dict(),
            "num_ipus": self.num_ipus,
            "rng_state": rng_state,
        }
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.is_global_zero and "://" not in str(filepath):
            save_ipu_config(self.ipu_config, Path(filepath).parent)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: Optional[bool] = None
    ) -> Dict[str, Any]:
        """Load a checkpoint and keep what belongs to the IPUs."""
        # Lightning 2.3 does not know weights_only.
        given = {} if weights_only is None else {"weights_only": weights_only}
        checkpoint: Dict[str, Any] = super().load_checkpoint(checkpoint_path, **given)
        self._loaded = checkpoint.get(CHECKPOINT_KEY) or {}
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            check_progress(checkpoint, self.ipu_config.device_iterations)
        return checkpoint
