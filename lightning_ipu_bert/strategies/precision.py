"""Precision under a pipeline: gradients lie on many ranks, but have one norm and one overflow."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Union

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from torch import Tensor
from torch.optim import Optimizer

from lightning_ipu_bert.errors import UserError

SUPPORTED = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")


class _GlobalNorm(Precision):
    """Clips by the norm over all stages, not only over those of this rank."""

    group: Any = None
    """The ranks whose gradients together make the norm; set by the strategy, as the next."""
    before_update: Optional[Callable[[Optimizer], None]] = None
    """Called when gradients are averaged, unscaled, seen by hooks and clipped."""

    def _after_closure(self, model: LightningModule, optimizer: Any) -> None:
        super()._after_closure(model, optimizer)
        if self.before_update is not None:
            self.before_update(optimizer)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: Union[int, float]) -> None:
        """Scale the gradients down if their norm over all stages is above `clip_val`."""
        gradients = [p.grad for p in self.main_params(optimizer) if p.grad is not None]
        norm = global_norm(gradients, self.group)
        factor = torch.clamp(clip_val / (norm + 1e-6), max=1.0)  # as in torch's clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device, gradient.dtype))


def global_norm(gradients: List[Tensor], group: Any) -> Tensor:
    """Return the 2-norm of gradients that lie on all ranks of a group, as float32."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    device = gradients[0].device if gradients else torch.device("cpu")
    total = torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
    if dist.is_initialized():
        dist.all_reduce(total, group=group)
    return total.sqrt()


class PipelinePrecision(_GlobalNorm):
    """32-true."""


class PipelineHalfPrecision(_GlobalNorm, HalfPrecision):
    """bf16-true."""


class PipelineMixedPrecision(_GlobalNorm, MixedPrecision):
    """bf16-mixed and 16-mixed. An overflow on any rank makes all skip the update."""

    def share_overflow(self, group: Any) -> None:
        """Let the ranks of `group` agree on an overflow."""
        if self.scaler is not None:
            from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

            state = self.scaler.state_dict()
            self.scaler = ShardedGradScaler(device=self.device, process_group=group)
            self.scaler.load_state_dict(state)


def for_pipeline(plugin: Optional[Precision]) -> Optional[Precision]:
    """Return the counterpart of one of Lightning's plugins that knows of stages.

    Raises:
        UserError: If the precision cannot be had on a pipeline.
    """
    if plugin is None or isinstance(plugin, _GlobalNorm):
        return plugin
    precision = getattr(plugin, "precision", "32-true")
    if precision not in SUPPORTED:
        raise UserError(
            f"precision={precision!r} is not supported on a pipeline. "
            f"Use one of {', '.join(SUPPORTED)}."
        )
    if type(plugin) is MixedPrecision:
        kind = "16-mixed" if plugin.scaler is not None else "bf16-mixed"
        return PipelineMixedPrecision(kind, plugin.device, plugin.scaler)  # type: ignore[arg-type]
    if type(plugin) is HalfPrecision:
        return PipelineHalfPrecision(plugin.precision)
    if type(plugin) is Precision:
        return PipelinePrecision()
    raise UserError(
        f"The precision plugin {type(plugin).__name__} does not know of stages. Leave it out and "
        f"give Trainer(precision=...), one of {', '.join(SUPPORTED)}."
    )
