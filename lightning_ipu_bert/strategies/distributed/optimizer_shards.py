"""RTS: the optimizer state is sharded over replicas, within every tensor.

Each replica updates a flat slice of every parameter and stores the state of only that slice; then
the replicas all-gather the slices. Sharding by parameter would place the embedding, a quarter of
BERT-Base, on one replica.

Source: Rajbhandari et al., ZeRO (arXiv:1910.02054), stage 1; Graphcore calls it RTS.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Callable, Iterator, List, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.strategies.update_hooks import around_update

ELEMENTWISE = (
    *(optim.Adadelta, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW, optim.ASGD),
    *(optim.NAdam, optim.RAdam, optim.RMSprop, optim.SGD),
)
"""Elementwise optimizers of torch, whose updates of slices equal those of full tensors."""


class OptimizerShards:
    """The slices of the parameters of an optimizer that this replica updates."""

    def __init__(
        self,
        optimizer: Optimizer,
        replica: int,
        replicas: int,
        group: dist.ProcessGroup,
        offchip: bool,
    ) -> None:
        """Create the slices.

        Args:
            optimizer: Holds the full parameters, except within `installed`.
            replica: Index of this replica.
            replicas: Number of replicas.
            group: The ranks that hold the same stages, one per replica.
            offchip: Store slices and state in host memory.

        Raises:
            UserError: If the optimizer is not known to be elementwise.
        """
        if type(optimizer) not in ELEMENTWISE:
            raise UserError(
                f"The optimizer {type(optimizer).__name__} is not known to be elementwise, but "
                "replicated_tensor_sharding and optimizer_state_offchip update slices. Turn them "
                f"off, or use one of {', '.join(sorted(kind.__name__ for kind in ELEMENTWISE))}."
            )
        self.optimizer = optimizer
        self.replica, self.replicas, self.group = replica, replicas, group
        self.offchip = offchip
        self.full = [list(g["params"]) for g in optimizer.param_groups]
        self.slices = [[self._slice(p) for p in parameters] for parameters in self.full]
        self._detach: Callable[[], None] = lambda: None

    @property
    def pairs(self) -> List[Tuple[nn.Parameter, nn.Parameter]]:
        """The parameters of the stages on this rank with their slices."""
        full = [p for parameters in self.full for p in parameters]
        slices = [p for parameters in self.slices for p in parameters]
        return [(p, s) for p, s in zip(full, slices) if p.device.type != "meta"]

    def bounds(self, parameter: Tensor, replica: int) -> slice:
        """Return the slice of a flattened parameter that a replica updates; may be empty."""
        length = -(-parameter.numel() // self.replicas)
        return slice(
            min(replica * length, parameter.numel()), min((replica + 1) * length, parameter.numel())
        )

    def attach(self) -> None:
        """Register hooks so that updates modify the slices of this replica and all-gather them."""
        self._detach = around_update(self.optimizer, self.install, self._after_update)

    def detach(self) -> None:
        """Restore the optimizer, even if an update has failed."""
        self._detach()
        self.remove()

    def _after_update(self) -> None:
        self.remove()
        self.exchange()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the parameters by slices within the context, to save or load the state."""
        self.install()
        try:
            yield
        finally:
            self.remove()

    def install(self) -> None:
        """Replace the parameters of the optimizer by slices with their gradients."""
        for parameter, part in self.pairs:
            part.grad = None
            if parameter.grad is not None:
                gradient = parameter.grad.reshape(-1)[self.bounds(parameter, self.replica)]
                part.grad = gradient.to(part.device)
        for group, slices in zip(self.optimizer.param_groups, self.slices):
            group["params"] = list(slices)

    def remove(self) -> None:
        """Restore the full parameters of the optimizer."""
        for group, parameters in zip(self.optimizer.param_groups, self.full):
            group["params"] = list(parameters)

    @torch.no_grad()
    def exchange(self) -> None:
        """All-gather the updated slices of all replicas into the full parameters."""
        for dtype in sorted({p.dtype for p, _ in self.pairs}, key=str):
            self._exchange([(p, part) for p, part in self.pairs if p.dtype == dtype])

    def _exchange(self, pairs: List[Tuple[nn.Parameter, nn.Parameter]]) -> None:
        lengths = [-(-p.numel() // self.replicas) for p, _ in pairs]
        first = pairs[0][0]
        own = torch.zeros(sum(lengths), dtype=first.dtype, device=first.device)
        for (_, part), buffer in zip(pairs, torch.split(own, lengths)):
            buffer[: part.numel()].copy_(part)
        gathered = [own]
        if self.replicas > 1:
            gathered = [torch.empty_like(own) for _ in range(self.replicas)]
            dist.all_gather(gathered, own, group=self.group)
        columns = zip(*(torch.split(each, lengths) for each in gathered))
        for (parameter, _), parts in zip(pairs, columns):
            parameter.copy_(torch.cat(parts)[: parameter.numel()].view_as(parameter))

    def _slice(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.device.type == "meta":
            return parameter
        flat = parameter.detach().view(-1)[self.bounds(parameter, self.replica)]
        return nn.Parameter(flat.cpu() if self.offchip else flat, parameter.requires_grad)
