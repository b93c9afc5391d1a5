"""The module that PopTorch traces: tensors in, tensors out, around the blocks of a model.

The LightningModule itself is not traced: its steps would run only once, logged values would be
constant, and metrics would be moved to the IPU.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Iterator, List, NamedTuple, Sequence, Set, Tuple

from torch import Tensor, nn
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import on_device
from lightning_ipu_bert.batch_trees import map_tree, tensors_of
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.examples import count_examples
from lightning_ipu_bert.global_loss import checked_loss
from lightning_ipu_bert.strategies.ipu.program.outside import OutsideTensors, container
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch
from lightning_ipu_bert.strategies.pipelined import PipelinedModule


class OnHost:
    """Placeholder for values of a batch that are not tensors and not on the IPUs."""

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise UserError(
            "stage_forward or pipeline_loss uses a value of the batch that is not a tensor: on "
            "IPUs it would be a constant from the first batch. Make it a tensor with one value per "
            "example, or store it in the module."
        )

    __bool__ = __len__ = __iter__ = __getitem__ = __float__ = __int__ = __index__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = _refuse
    __lt__ = __gt__ = __call__ = _refuse
    __eq__ = __ne__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class BatchLayout(NamedTuple):
    """Positions of the tensors in a batch. Other values remain on the host."""

    structure: object
    """The batch with True for tensors and False for other values."""

    @classmethod
    def of(cls, batch: object) -> BatchLayout:
        """Return the layout of a batch."""
        return cls(map_tree(batch, lambda leaf: isinstance(leaf, Tensor), sort_keys=True))

    def rebuild(self, tensors: Sequence[Tensor]) -> object:
        """Return a batch of these tensors; other values are `OnHost`."""
        given = iter(tensors)
        return map_tree(
            self.structure, lambda is_tensor: next(given) if is_tensor else OnHost(), sort_keys=True
        )


def batch_tensors(batch: object) -> List[Tensor]:
    """Return the tensors of a batch in the order of its layout.

    Raises:
        UserError: If the first dimension of a tensor is not the number of examples.
    """
    # Sorted, so that the order does not depend on how a loader builds the batch.
    tensors = tensors_of(map_tree(batch, lambda leaf: leaf, sort_keys=True))
    examples = count_examples(batch)
    for tensor in tensors:
        if not tensor.dim() or len(tensor) != examples:
            raise UserError(
                f"A batch of {examples} examples has a tensor of shape {list(tensor.shape)}. On "
                "IPUs the first dimension of every tensor must be the examples: repeat it for each,"
                " or store it in the module."
            )
    return tensors


class TracedNetwork(nn.Module):
    """The blocks of a model by name, and tensors outside of blocks."""

    def __init__(self, module: PipelinedModule, layout: BatchLayout) -> None:
        """Create the module.

        Args:
            module: The LightningModule; its blocks are shared, not copied.
            layout: Layout of the batches.
        """
        super().__init__()
        self._host = (module,)  # in a tuple, so that it is not a submodule
        self._layout = layout
        self.scalars: List[bool] = []
        """Whether each tensor of the output is a scalar, which IPUs return once per micro-batch;
        filled when the network is traced, also in the copy that PopTorch traces."""
        for name in module.pipeline_blocks():
            path, _, last = name.rpartition(".")
            container(self, path).add_module(last, module.get_submodule(name))
        self._outside = OutsideTensors(module, self)
        # Not of the blocks, which users may have set to evaluation mode.
        self.training = module.training

    def _run(self, tensors: Tuple[Tensor, ...]) -> Tuple[object, object]:
        """Run all blocks; return the output of the last one and the batch."""
        module = self._host[0]
        batch = self._layout.rebuild(tensors)
        with every_block_called(module):
            output = module.stage_forward(module.pipeline_blocks(), None, batch)
        self.scalars[:] = [not tensor.dim() for tensor in tensors_of(output)]
        return output, batch

    @contextmanager
    def _traced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Prepare the LightningModule for a trace within the context."""
        module = self._host[0]
        # Tensors that it creates on self.device must be on the device of the batch.
        with on_device(module, tensors[0].device), refused_log(module), self._outside.lent_by(self):
            yield


class TrainingNetwork(TracedNetwork):
    """Tensors of a micro-batch in, and the factor of its loss if it has one; its loss out."""

    def __init__(
        self, module: PipelinedModule, layout: BatchLayout, weighted: bool, returns_output: bool
    ) -> None:
        """Create the module.

        Args:
            module: The LightningModule.
            layout: Layout of the batches.
            weighted: Whether the last input is the factor of the loss, of shape [1].
            returns_output: Whether to return the output of the last block, too.
        """
        super().__init__(module, layout)
        self._weighted = weighted
        self._returns_output = returns_output

    @override
    def forward(self, *tensors: Tensor) -> object:
        """Return the loss, from which PopTorch goes backward, and the output if requested."""
        module, poptorch = self._host[0], import_poptorch()
        inputs = tensors[:-1] if self._weighted else tensors
        with self._traced(inputs):
            output, batch = self._run(inputs)
            loss = checked_loss(module, output, batch)
            if self._weighted:
                loss = loss * tensors[-1].reshape(()).to(loss.dtype)
            loss = poptorch.identity_loss(loss, "none")
        loss = loss.float()  # a sum of many losses would be coarse in float16
        return (loss, output) if self._returns_output else loss


class InferenceNetwork(TracedNetwork):
    """Tensors of a micro-batch in, the model's output out."""

    @override
    def forward(self, *tensors: Tensor) -> object:
        """Return the output of the last block."""
        with self._traced(tensors):
            return self._run(tensors)[0]


@contextmanager
def refused_log(module: PipelinedModule) -> Iterator[None]:
    """Refuse `self.log` within the context, in which values have no content.

    Raises:
        UserError: If the module logs a value.
    """

    def refuse(name: str, *_: object, **__: object) -> None:
        raise UserError(
            f"self.log({name!r}) in pipeline_loss or stage_forward would log a constant on IPUs, "
            "where they run only once, to be compiled. Log it in training_step, with "
            "loss, output = self.run_loss(batch, return_output=True)."
        )

    module.log = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log  # restores the method of the class


@contextmanager
def every_block_called(module: PipelinedModule) -> Iterator[None]:
    """Check that all blocks are called within the context: only called modules are placed.

    Raises:
        UserError: If one is not.
    """
    blocks = list(module.pipeline_blocks())
    called: Set[str] = set()
    with ExitStack() as undo:
        for name in blocks:
            note = partial(_note, called, name)
            undo.callback(module.get_submodule(name).register_forward_pre_hook(note).remove)
        yield
    missing = [name for name in blocks if name not in called]
    if missing:
        raise UserError(
            f"stage_forward does not call the block {missing[0]} as a module, so it cannot be "
            "placed on an IPU. Call the submodule itself, block(hidden), instead of parts of it."
        )


def _note(called: Set[str], name: str, module: nn.Module, inputs: object) -> None:
    called.add(name)
