"""What a model offers so that it can be cut into stages, and what it gets for it."""

from __future__ import annotations

from typing import Any, Iterator, Mapping, Optional, Protocol, Sequence, Tuple

from lightning_ipu_bert.pipeline.facts import facts_of
from lightning_ipu_bert.pipeline.rules import Violation


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

    pipeline_executor: Optional[PipelineExecutor] = None
    """Runs the stages; set by a pipeline strategy for the length of a run."""

    def pipeline_blocks(self) -> Sequence[str]:
        """Return the names of all blocks in forward order, e.g. ["embed", "layers.0", "head"].

        A block is a submodule that is placed on one stage as a whole; every parameter belongs to
        exactly one. Blocks that are numbered are the layers that `layers_per_stage` counts.
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
        if self.pipeline_executor is not None:
            return self.pipeline_executor.loss(batch)
        return self.pipeline_loss(self.run_output(batch), batch)

    def run_output(self, batch: Any) -> Any:
        """Return the output of the last block for a batch. On a pipeline: without gradients."""
        if self.pipeline_executor is not None:
            return self.pipeline_executor.output(batch)
        return self.stage_forward(self.pipeline_blocks(), None, batch)

    def estimated_updates(self) -> int:
        """Return the weight updates of the whole `fit`, for learning rate schedules.

        Lightning's `trainer.estimated_stepping_batches` counts batches, and on IPUs a batch may be
        several updates (`device_iterations`).
        """
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        updates = trainer.estimated_stepping_batches * facts_of(trainer).updates_per_batch
        return int(updates if trainer.max_steps == -1 else min(updates, trainer.max_steps))


def module_rules(module: Any) -> Iterator[Violation]:
    """A module derives from `PipelineModule` and defines its three methods."""
    own, base = type(module), PipelineModule
    missing: Tuple[str, ...] = ("pipeline_blocks", "stage_forward", "pipeline_loss")
    if isinstance(module, base):
        missing = tuple(
            name
            for name, method in (
                ("pipeline_blocks", own.pipeline_blocks is base.pipeline_blocks),
                ("stage_forward", own.stage_forward is base.stage_forward),
                ("pipeline_loss", own.pipeline_loss is base.pipeline_loss),
            )
            if method
        )
    if missing:
        yield Violation(
            own.__name__,
            None,
            f"cannot be cut into stages: it lacks {', '.join(missing)}",
            "Derive it from lightning_ipu_bert.PipelineModule and define its three methods, or use "
            "another strategy, e.g. --trainer.strategy auto.",
        )
