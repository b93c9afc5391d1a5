"""Checkpoints: written whole or not at all, and complete in themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ipu_bert.files import written_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and renames it.

    Lightning's own goes through a temporary folder that may lie on another disk: a kill while it is
    copied from there breaks the previous checkpoint of that name.
    """

    def save_checkpoint(
        self, checkpoint: Dict[str, Any], path: Any, storage_options: Optional[Any] = None
    ) -> None:
        """Write a checkpoint; stores like s3:// replace an object at once and are Lightning's."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with written_atomically(Path(path)) as partial:
            torch.save(checkpoint, partial)


class RandomStates(Callback):
    """Puts the states of the random generators into the checkpoint and back.

    Lightning does not; without them a resumed run draws other dropout masks.
    """

    def __init__(self) -> None:
        """Create the callback."""
        self._loaded: Optional[Dict[str, Any]] = None

    def state_dict(self) -> Dict[str, Any]:
        """Return the states of this process's generators."""
        cuda: List[torch.Tensor] = []
        if torch.cuda.is_available():
            cuda = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Keep the states until the first batch."""
        self._loaded = state_dict

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the states as late as possible: setting up a run draws random numbers too."""
        state, self._loaded = self._loaded, None
        # A checkpoint holds the states of one process; several must not draw the same masks.
        if state is None or trainer.world_size > 1:
            return
        torch.set_rng_state(state["cpu"].cpu())
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda.cpu(), device)


class SaveOnTermination(Callback):
    """Saves to `last.ckpt` when SIGTERM ends a run, as on a cluster whose time is up.

    Lightning's own ModelCheckpoint does so only if told to by `save_on_exception` and `save_last`,
    the first of which the SDK's Lightning does not know.
    """

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save where the run's other checkpoints lie."""
        keeper: Any = trainer.checkpoint_callback
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not (training and isinstance(exception, SIGTERMException)):
            return  # evaluation has nothing to save, and must not overwrite what training saved
        if isinstance(keeper, ModelCheckpoint) and keeper.dirpath:
            path = Path(keeper.dirpath) / f"{keeper.CHECKPOINT_NAME_LAST}{keeper.FILE_EXTENSION}"
            trainer.save_checkpoint(path)
            rank_zero_info(f"Ended by SIGTERM; go on with --ckpt_path {path}")
