"""The protocol between a model that can be pipelined and the executor that runs its stages."""

from __future__ import annotations

from typing import Any, Iterator, Mapping, Optional, Protocol, Sequence, Tuple

from lightning_ipu_bert.pipeline.facts import facts_of
from lightning_ipu_bert.pipeline.rules import Violation


class PipelineExecutor(Protocol):
    """Runs the stages of a model on a batch; provided by a strategy."""

    def loss(self, batch: Any) -> Any:
        """Return the loss of a batch; if gradients are enabled, its `backward` sets them."""

    def output(self, batch: Any) -> Any:
        """Return the output of the last block for the full batch, on every rank."""

    def loss_and_output(self, batch: object) -> Tuple[Any, object]:
        """Return the loss, as `loss` does, and the detached output, without a second forward."""


class PipelineModule:
    """Mixin for a LightningModule that can be pipelined.

    ::

        class MyModule(PipelineModule, LightningModule):
            def pipeline_blocks(self): ...
            def stage_forward(self, blocks, hidden, batch): ...
            def pipeline_loss(self, output, batch): ...

            def training_step(self, batch, batch_idx):
                loss = self.run_loss(batch)
                self.log("train/loss", loss)
                return loss

    `run_loss` and `run_output` run the stages under a pipeline strategy, and all blocks in order
    under any other: with `auto`, DDP and so on the module trains like any LightningModule.
    """

    block_labels: Mapping[str, str] = {}
    """Display names in the table "Device Allocation", by block or by series of numbered blocks."""

    pipeline_executor: Optional[PipelineExecutor] = None
    """Runs the stages; set by a pipeline strategy for the duration of a run."""

    def pipeline_blocks(self) -> Sequence[str]:
        """Return the names of all blocks in forward order, e.g. ["embed", "layers.0", "head"].

        A block is a submodule that is placed on one stage as a unit; blocks share no parameters.
        Parameters outside of blocks are on the last stage, where `pipeline_loss` can use them.
        Numbered blocks are the layers that `layers_per_stage` counts.
        """
        raise NotImplementedError

    def stage_forward(self, blocks: Sequence[str], hidden: Any, batch: Any) -> Any:
        """Run consecutive blocks on a micro-batch.

        Args:
            blocks: Names of the blocks to run, in order.
            hidden: Output of the preceding block: a tensor or a tuple of tensors; None for the
                first block of the model.
            batch: The micro-batch: a batch of the loader with fewer examples, on every stage.

        Returns:
            Input of the next block; for the last block the output of the model, a tensor or a
            nested structure of tensors of shape [examples, ...].
        """
        raise NotImplementedError

    def pipeline_loss(self, output: Any, batch: Any) -> Any:
        """Return the loss of a micro-batch, a scalar: the mean over its examples.

        If it is a mean over something else, override `batch_weight`.

        Args:
            output: Output of the last block.
            batch: The micro-batch.
        """
        raise NotImplementedError

    def batch_weight(self, batch: Any) -> Any:
        """Return the weight of the loss of a micro-batch in the loss of the global batch.

        It is what `pipeline_loss` divides by: the number of examples, unless a subclass returns
        e.g. the number of labels that are not ignored, or the sum of their class weights. A
        micro-batch of weight 0 has the loss 0, and `pipeline_loss` is not called for it.

        Args:
            batch: The micro-batch, from which alone the weight is computed.

        Returns:
            A number, or a tensor with one value; 0 or more.
        """
        from lightning_ipu_bert.examples import count_examples

        return count_examples(batch)

    def run_loss(self, batch: Any, return_output: bool = False) -> Any:
        """Return the loss of the global batch, whose `backward` sets the gradients of every block.

        The losses of micro-batches, replicas and processes count by their `batch_weight`, so that
        the loss is the one of a single process with the global batch. In evaluation it is the loss
        of the batch.

        A pipeline strategy runs forward and backward of all stages inside this call. The loss may
        be multiplied by a factor; other functions of it do not reach the gradients.

        Args:
            batch: The batch.
            return_output: Whether to return the loss and the output of the last block for the
                batch, detached, e.g. for metrics. It costs no second forward.
        """
        if self.pipeline_executor is not None and return_output:
            return self.pipeline_executor.loss_and_output(batch)
        if self.pipeline_executor is not None:
            return self.pipeline_executor.loss(batch)
        from lightning_ipu_bert.global_loss import detached, global_loss

        output = self.run_output(batch)
        loss = global_loss(self, output, batch, has_own_weights(self))
        return (loss, detached(output)) if return_output else loss

    def run_output(self, batch: Any) -> Any:
        """Return the output of the last block; a pipeline strategy runs without gradients."""
        if self.pipeline_executor is not None:
            return self.pipeline_executor.output(batch)
        return self.stage_forward(self.pipeline_blocks(), None, batch)

    def estimated_updates(self) -> int:
        """Return the total number of weight updates of `fit`, for learning rate schedules.

        `trainer.estimated_stepping_batches` counts batches, and on IPUs a batch may be several
        updates (`device_iterations`).
        """
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        updates = trainer.estimated_stepping_batches * facts_of(trainer).updates_per_batch
        return int(updates if trainer.max_steps == -1 else min(updates, trainer.max_steps))


def has_own_weights(module: PipelineModule) -> bool:
    """Return whether a module overrides `batch_weight`."""
    return type(module).batch_weight is not PipelineModule.batch_weight


def module_rules(module: Any) -> Iterator[Violation]:
    """A module must derive from `PipelineModule` and override its three methods."""
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
            f"cannot be pipelined: it does not define {', '.join(missing)}",
            "Derive it from lightning_ipu_bert.PipelineModule and override its three methods, or "
            "use another strategy, e.g. --trainer.strategy auto.",
        )
