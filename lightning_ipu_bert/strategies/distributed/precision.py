"""Precision plugins that clip by the norm over all stages and share overflows."""

from __future__ import annotations

from typing import List, Literal, Union

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ipu_bert.strategies.distributed.mesh import Group
from lightning_ipu_bert.strategies.refusals import precision_of

SUPPORTED = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")


class GlobalNorm(Precision):
    """Clips gradients by their norm over all stages instead of those of this rank."""

    group: Group = None
    """The ranks of this replica, over which the norm is computed; None before they are created."""

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: Union[int, float]) -> None:
        """Clip the gradients to a norm of `clip_val` over all stages."""
        gradients = [p.grad for p in self.main_params(optimizer) if p.grad is not None]
        norm = global_norm(gradients, self.group)
        factor = torch.clamp(clip_val / (norm + 1e-6), max=1.0)  # as in torch's clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device, gradient.dtype))


def global_norm(gradients: List[Tensor], group: Group) -> Tensor:
    """Return the 2-norm of the gradients on all ranks of a group, as float32."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    device = gradients[0].device if gradients else torch.device("cpu")
    total = torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
    if dist.is_initialized():
        dist.all_reduce(total, group=group)
    return total.sqrt()


class PipelinePrecision(GlobalNorm):
    """32-true."""


class PipelineHalfPrecision(GlobalNorm, HalfPrecision):
    """bf16-true."""


class PipelineMixedPrecision(GlobalNorm, MixedPrecision):
    """bf16-mixed and 16-mixed. All ranks skip the update after an overflow on any rank."""

    def share_overflow(self, group: dist.ProcessGroup) -> None:
        """Share overflows among the ranks of `group`."""
        if self.scaler is not None:
            from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

            state = self.scaler.state_dict()
            self.scaler = ShardedGradScaler(device=self.device, process_group=group)
            self.scaler.load_state_dict(state)


def for_pipeline(plugin: Precision) -> GlobalNorm:
    """Return the counterpart of a precision plugin of Lightning for pipelines.

    Raises:
        UserError: If the precision is not supported.
    """
    if isinstance(plugin, GlobalNorm):
        return plugin
    kinds = (Precision, HalfPrecision, MixedPrecision)
    precision_of(plugin, kinds, SUPPORTED, "on a pipeline")
    if isinstance(plugin, MixedPrecision):
        kind: Literal["16-mixed", "bf16-mixed"] = (
            "bf16-mixed" if plugin.scaler is None else "16-mixed"
        )
        return PipelineMixedPrecision(kind, plugin.device, plugin.scaler)
    return (
        PipelineHalfPrecision(plugin.precision)
        if isinstance(plugin, HalfPrecision)
        else PipelinePrecision()
    )


def connect(
    plugin: GlobalNorm, pipeline_group: dist.ProcessGroup, everyone: dist.ProcessGroup
) -> None:
    """Set the ranks over which a plugin computes the norm, and over which it shares overflows."""
    plugin.group = pipeline_group
    if isinstance(plugin, PipelineMixedPrecision):
        plugin.share_overflow(everyone)


def loss_scale(plugin: Precision, device: torch.device) -> float:
    """Return the loss scale of a precision plugin."""
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    return 1.0 if scaler is None else float(scaler.scale(torch.ones((), device=device)))
