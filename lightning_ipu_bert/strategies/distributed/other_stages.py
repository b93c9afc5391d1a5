"""Parameters of stages on other ranks: meta tensors that explain why they cannot be used."""

from __future__ import annotations

from typing import Callable, Dict, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ipu_bert._compat.torch import without_torch_function
from lightning_ipu_bert.batch_trees import map_tree, tensors_of
from lightning_ipu_bert.errors import UserError

MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)
COPIES = (torch.clone, Tensor.clone)


class OtherStageTensor(Tensor):
    """A meta tensor in place of one that is on another rank.

    Optimizers, averages and copies may treat it like any other: nothing is computed. What would
    need its values raises an error.
    """

    location: str = ""
    """Name of the parameter and its stage."""

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Optional[Mapping[str, object]] = None,
    ) -> object:
        """Run an operation on meta tensors.

        Raises:
            UserError: If it needs the values, or computes gradients.
        """
        if func in (torch.equal, Tensor.equal):
            return args[0] is args[1]
        others = [x for x in tensors_of(list(args)) if isinstance(x, OtherStageTensor)]
        location = others[0].location if others else ""
        try:
            with without_torch_function():
                result: object = func(*args, **(kwargs or {}))
        except (RuntimeError, NotImplementedError) as error:
            if func in MOVES:
                return args[0]  # e.g. of copy.cpu()
            raise UserError(_message(location)) from error
        if func in COPIES and isinstance(result, Tensor):
            result = result.detach()
        if torch.is_grad_enabled() and any(tensor.grad_fn for tensor in tensors_of(result)):
            raise UserError(_message(location))
        return map_tree(result, lambda x: _also_elsewhere(x, location))


class OtherStageParameter(OtherStageTensor, nn.Parameter):
    """A parameter that is on another rank."""

    @classmethod
    def of(cls, parameter: nn.Parameter, location: str) -> OtherStageParameter:
        """Return a parameter that replaces one of another stage.

        Args:
            parameter: The parameter, whose attributes are preserved.
            location: Name of the parameter and its stage.
        """
        with without_torch_function():
            meta = parameter.detach().to("meta").as_subclass(Tensor)
            result = cls(meta, requires_grad=parameter.requires_grad)
        vars(result).update(vars(parameter), location=location)
        return result

    @override
    def __deepcopy__(self, memo: Dict[int, object]) -> OtherStageParameter:
        """Return a copy that is on the other rank, too."""
        if id(self) not in memo:
            memo[id(self)] = OtherStageParameter.of(self, self.location)
        copied = memo[id(self)]
        assert isinstance(copied, OtherStageParameter)
        return copied


def _also_elsewhere(value: object, location: str) -> object:
    """Return a result, marked as being on another rank if it is a meta tensor."""
    if type(value) is not Tensor or not value.is_meta:
        return value
    marked = value.as_subclass(OtherStageTensor)
    vars(marked)["location"] = location
    return marked


def _message(location: str) -> str:
    return (
        f"The parameter {location} is on another rank: a step cannot call self(...) or layers, or "
        "compute a function of self.parameters(). Use self.run_loss and self.run_output; add "
        "penalties as weight_decay of the optimizer or in pipeline_loss."
    )
