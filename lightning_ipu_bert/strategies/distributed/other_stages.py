"""Parameters of stages on other ranks: meta tensors that explain why they cannot be used."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ipu_bert._compat.torch import without_torch_function
from lightning_ipu_bert.batch_trees import tensors_of
from lightning_ipu_bert.errors import UserError

MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)


class OtherStageParameter(nn.Parameter):
    """A meta tensor in place of a parameter that is on another rank.

    Optimizers, averages and copies may treat it like any other: nothing is computed. What would
    need its values raises an error.
    """

    location: str = ""
    """Name of the parameter and its stage."""

    @classmethod
    def of(cls, parameter: nn.Parameter, location: str) -> OtherStageParameter:
        """Return a parameter that replaces one of another stage.

        Args:
            parameter: The parameter, whose attributes are preserved.
            location: Name of the parameter and its stage.
        """
        result = cls(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        vars(result).update(vars(parameter), location=location)
        return result

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Any,
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
        location = next((x.location for x in tensors_of(list(args)) if isinstance(x, cls)), "")
        try:
            with without_torch_function():
                result: object = func(*args, **(kwargs or {}))
        except (RuntimeError, NotImplementedError) as error:
            if func in MOVES:
                return args[0]  # e.g. of copy.cpu()
            raise UserError(_message(location)) from error
        if torch.is_grad_enabled() and any(tensor.grad_fn for tensor in tensors_of(result)):
            raise UserError(_message(location))
        return result

    @override
    def __deepcopy__(self, memo: Dict[int, object]) -> OtherStageParameter:
        """Return a copy that is on the other rank, too."""
        if id(self) not in memo:
            memo[id(self)] = self.of(self, self.location)
        copied = memo[id(self)]
        assert isinstance(copied, OtherStageParameter)
        return copied


def _message(location: str) -> str:
    return (
        f"The parameter {location} is on another rank: a step cannot call self(...) or layers, or "
        "compute a function of self.parameters(). Use self.run_loss and self.run_output; add "
        "penalties as weight_decay of the optimizer or in pipeline_loss."
    )
