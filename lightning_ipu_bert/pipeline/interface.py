"""What a model offers so that it can be cut into stages, and what it gets for it."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Protocol, Sequence

from lightning_ipu_bert.errors import UserError


class PipelineExecutor(Protocol):
    """Runs a model's batches on stages; a strategy provides one."""

    def loss(self, batch: Any) -> Any:
        """Return the loss of a batch; with gradients on, its `backward` gives the gradients."""

    def output(self, batch: Any) -> Any:
        """Return the output of the last block for the whole batch, on every rank."""


class PipelineModule:
    """Base of a LightningModule that can be cut into stages.

    ::

        class MyModule(PipelineModule, LightningModule):
            def pipeline_blocks(self): ...
            def stage_forward(self, blocks, hidden, batch): ...
            def pipeline_loss(self, output, batch): ...

            def training_step(self, batch, batch_idx):
                loss = self.run_loss(batch)
                self.log("train/loss", loss)
                return loss

    `run_loss` and `run_output` run the stages where the strategy has some, and all blocks one after
    the other where it has none: under `auto`, DDP and so on the module trains as any other.
    """

    block_labels: Mapping[str, str] = {}
    """Names for people in the table "Device Allocation", by block or by series of numbered ones."""

    _executor: Optional[PipelineExecutor] = None

    def pipeline_blocks(self) -> Sequence[str]:
        """Return the names of all blocks in forward order, e.g. ["embed", "layers.0", "head"].

        A block is a submodule and lies on one stage as a whole; every parameter belongs to exactly
        one. Blocks that are numbered are the layers that `layers_per_stage` counts.
        """
        raise NotImplementedError

    def stage_forward(self, blocks: Sequence[str], hidden: Any, batch: Any) -> Any:
        """Run consecutive blocks on a micro-batch.

        Args:
            blocks: Names of the blocks to run, in order.
            hidden: What the block before the first one returned: one tensor, or a tuple of some;
                None before the very first block.
            batch: The micro-batch as the loader gives it, with fewer examples; every stage has it.

        Returns:
            What the next block takes; for the last block the model's output, a tensor or a nested
            structure of tensors whose first dimension counts the examples.
        """
        raise NotImplementedError

    def pipeline_loss(self, output: Any, batch: Any) -> Any:
        """Return the loss of a micro-batch, a scalar: the mean over its examples.

        Args:
            output: What the last block returned.
            batch: The micro-batch.
        """
        raise NotImplementedError

    def run_loss(self, batch: Any) -> Any:
        """Return the mean loss of a batch, whose `backward` gives the gradients of every block.

        Under a pipeline strategy the stages have run forward and backward already when it returns.
        Scale the loss as you like; only what is linear in it reaches the gradients.
        """
        if self._executor is not None:
            return self._executor.loss(batch)
        return self.pipeline_loss(self.run_output(batch), batch)

    def run_output(self, batch: Any) -> Any:
        """Return the output of the last block for a batch. On a pipeline: without gradients."""
        if self._executor is not None:
            return self._executor.output(batch)
        return self.stage_forward(self.pipeline_blocks(), None, batch)

    def estimated_updates(self) -> int:
        """Return the weight updates of the whole `fit`, for learning rate schedules.

        Lightning's `trainer.estimated_stepping_batches` counts batches, and on IPUs a batch may be
        several updates (`device_iterations`).
        """
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        updates = trainer.estimated_stepping_batches * getattr(
            trainer.strategy, "updates_per_batch", 1
        )
        return int(updates if trainer.max_steps == -1 else min(updates, trainer.max_steps))


REQUIRED = ("pipeline_blocks", "stage_forward", "pipeline_loss")


def check_module(module: Any) -> None:
    """Check that a module can be cut into stages.

    Raises:
        UserError: If it is no `PipelineModule`, lacks one of its methods, or its blocks and its
            parameters do not fit.
    """
    name = type(module).__name__
    missing = [
        method
        for method in REQUIRED
        if getattr(type(module), method, None) in (None, getattr(PipelineModule, method))
    ]
    if missing or not isinstance(module, PipelineModule):
        raise UserError(
            f"{name} cannot be cut into stages: it lacks {', '.join(missing) or 'run_loss'}. "
            "Derive it from lightning_ipu_bert.PipelineModule and define its three methods, or use "
            "another strategy, e.g. --trainer.strategy auto."
        )
    check_blocks(name, list(module.pipeline_blocks()), parameter_homes(module))


def parameter_homes(module: Any) -> Dict[str, List[str]]:
    """Return for every parameter all names that it has; tied ones have several."""
    homes: Dict[int, List[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        homes.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in homes.values()}


def block_of(parameter: str, blocks: Sequence[str]) -> Optional[str]:
    """Return the block that a parameter belongs to, by name."""
    return next((block for block in blocks if parameter.startswith(f"{block}.")), None)


def check_blocks(name: str, blocks: List[str], homes: Dict[str, List[str]]) -> None:
    """Check that blocks are distinct and hold every parameter once.

    Raises:
        UserError: If they do not.
    """
    twice = sorted({block for block in blocks if blocks.count(block) > 1})
    if twice or not blocks:
        raise UserError(
            f"{name}.pipeline_blocks() names {twice or 'no block'}"
            f"{' more than once' if twice else ''}. Return every block once, in forward order."
        )
    for names in homes.values():
        of = {block_of(parameter, blocks) for parameter in names}
        if None in of:
            raise UserError(
                f"The parameter {names[0]} of {name} belongs to no block of pipeline_blocks(): "
                f"{blocks}. Put it into one of them."
            )
        if len(of) > 1:
            raise UserError(
                f"{name} ties the parameters {' and '.join(names)}, which belong to different "
                "blocks. Untie them: stages cannot share weights."
            )
