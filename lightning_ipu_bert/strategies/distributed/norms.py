"""Gradient norms over all stages, of which a rank has only some."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, List, Optional, Sequence, Union

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_ipu_bert.strategies.distributed.mesh import Group

Number = Union[int, float]


class GradientNorms:
    """Norms of the gradients of a model, and whether an update has used them."""

    def __init__(self) -> None:
        """Create the norms of a strategy."""
        self._module: Optional[LightningModule] = None
        self._group: Group = None
        self._uses = 0  # how often gradients were clipped, or their norm computed, over all stages

    def connect(self, module: LightningModule, group: Group) -> None:
        """Set the module of a run, and the ranks of this replica."""
        self._module, self._group = module, group

    def grad_norm(self, norm_type: Number = 2.0) -> Tensor:
        """Return the norm of the gradients of the whole model; call it on all ranks.

        Args:
            norm_type: The p of the p-norm; inf for the largest absolute value.
        """
        return self.norm_of(self._gradients(), norm_type)

    def clip_grad_norm_(self, max_norm: Number, norm_type: Number = 2.0) -> Tensor:
        """Clip the gradients by the norm of the whole model, which is returned; on all ranks.

        Args:
            max_norm: Upper bound of the norm.
            norm_type: The p of the p-norm; inf for the largest absolute value.
        """
        return self.clip(self._gradients(), max_norm, norm_type)

    def norm_of(self, gradients: Sequence[Tensor], norm_type: Number = 2.0) -> Tensor:
        """Return the norm of the gradients on all ranks of a replica, as float32.

        Args:
            gradients: The gradients on this rank.
            norm_type: The p of the p-norm; inf for the largest absolute value.
        """
        self.note_use()
        p = float(norm_type)
        norms = [torch.linalg.vector_norm(g, p, dtype=torch.float32) for g in gradients]
        device = gradients[0].device if gradients else torch.device("cpu")
        largest = p == float("inf")
        parts = torch.stack(norms) if norms else torch.zeros(1, device=device)
        total = parts.max() if largest else parts.pow(p).sum()
        if dist.is_initialized():
            operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            dist.all_reduce(total, operation, self._group)
        return total if largest else total.pow(1 / p)

    def clip(
        self, gradients: Sequence[Tensor], max_norm: Number, norm_type: Number = 2.0
    ) -> Tensor:
        """Scale gradients to a norm of at most `max_norm` over all stages; return the norm."""
        norm = self.norm_of(gradients, norm_type)
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as in torch's clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
        return norm

    def note_use(self) -> None:
        """Note that an update clips as it should."""
        self._uses += 1

    @contextmanager
    def expected_in(self, module: LightningModule) -> Iterator[None]:
        """Warn if a hook of the module that clips uses none of these norms within the context."""
        before = self._uses
        yield
        if self._uses == before and is_overridden("configure_gradient_clipping", module):
            rank_zero_warn(
                f"{type(module).__name__}.configure_gradient_clipping sees only the gradients of "
                "the stages on this rank. Clip by self.clip_gradients or "
                "self.trainer.strategy.clip_grad_norm_(max_norm), and compute norms by "
                "self.trainer.strategy.grad_norm()."
            )

    def _gradients(self) -> List[Tensor]:
        assert self._module is not None, "There are no gradients before a run."
        return [p.grad for p in self._module.parameters() if p.grad is not None]
