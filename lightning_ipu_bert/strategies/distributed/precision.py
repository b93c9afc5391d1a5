"""Precision plugins that clip by the norm over all stages and share overflows."""

from __future__ import annotations

from typing import Literal, Optional, Union

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ipu_bert.strategies.distributed.norms import GradientNorms
from lightning_ipu_bert.strategies.refusals import precision_of

SUPPORTED = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")


class GlobalNorm(Precision):
    """Clips gradients by their norm over all stages instead of those of this rank."""

    norms: Optional[GradientNorms] = None
    """Norms over the ranks of this replica; None before a run."""

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: Union[int, float] = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip the gradients by their norm or value."""
        if self.norms is not None:
            self.norms.note_use()
        super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: Union[int, float]) -> None:
        """Clip the gradients to a norm of `clip_val` over all stages."""
        assert self.norms is not None
        self.norms.clip(
            [p.grad for p in self.main_params(optimizer) if p.grad is not None], clip_val
        )


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


def connect(plugin: GlobalNorm, norms: GradientNorms, everyone: dist.ProcessGroup) -> None:
    """Set how a plugin computes norms, and the ranks over which it shares overflows."""
    plugin.norms = norms
    if isinstance(plugin, PipelineMixedPrecision):
        plugin.share_overflow(everyone)


def loss_scale(plugin: Precision, device: torch.device) -> float:
    """Return the loss scale of a precision plugin."""
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    return 1.0 if scaler is None else float(scaler.scale(torch.ones((), device=device)))
