"""RTS: the optimizer state sharded over the replicas, inside every tensor.

Each replica updates a flat slice of every parameter and keeps the state of that slice alone;
afterwards the replicas exchange the slices. Whole parameters would leave the embedding, a quarter
of BERT-Base, to one replica.

Source: Rajbhandari et al., ZeRO (arXiv:1910.02054), stage 1; Graphcore calls it RTS.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.strategies.update_hooks import around_update

ELEMENTWISE = {
    "Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD",
}  # fmt: skip
"""Optimizers of torch that treat every number by itself, so that slices do as well as tensors."""


class OptimizerShards:
    """The slices of one optimizer's parameters that this replica updates."""

    def __init__(
        self, optimizer: Optimizer, replica: int, replicas: int, group: Any, offchip: bool
    ) -> None:
        """Create the slices.

        Args:
            optimizer: Holds whole parameters, and still does outside of `installed`.
            replica: Which replica this is.
            replicas: Number of replicas.
            group: The ranks that hold the same stages in all replicas.
            offchip: Keep slices and state in the host's memory.

        Raises:
            UserError: If the optimizer is not known to work on slices.
        """
        if type(optimizer).__name__ not in ELEMENTWISE:
            raise UserError(
                f"The optimizer {type(optimizer).__name__} may look at whole tensors, but "
                "replicated_tensor_sharding and optimizer_state_offchip give it slices. Turn them "
                f"off, or use one of {', '.join(sorted(ELEMENTWISE))}."
            )
        self.optimizer = optimizer
        self.replica, self.replicas, self.group = replica, replicas, group
        self.offchip = offchip
        self.whole = [list(g["params"]) for g in optimizer.param_groups]
        self.slices = [[self._slice(p) for p in parameters] for parameters in self.whole]
        self._detach: Callable[[], None] = lambda: None

    @property
    def pairs(self) -> List[Tuple[nn.Parameter, nn.Parameter]]:
        """Every parameter of this rank's stages and its slice."""
        whole = [p for parameters in self.whole for p in parameters]
        slices = [p for parameters in self.slices for p in parameters]
        return [(p, s) for p, s in zip(whole, slices) if p.device.type != "meta"]

    def bounds(self, parameter: Tensor, replica: int) -> slice:
        """Return which part of a flat parameter a replica updates; perhaps an empty one."""
        length = -(-parameter.numel() // self.replicas)
        return slice(
            min(replica * length, parameter.numel()), min((replica + 1) * length, parameter.numel())
        )

    def attach(self) -> None:
        """Let every update of the optimizer be one of this replica's slices, and exchange them."""
        self._detach = around_update(self.optimizer, self.install, self._after_update)

    def detach(self) -> None:
        """Leave the optimizer as it was, also where an update has failed."""
        self._detach()
        self.remove()

    def _after_update(self) -> None:
        self.remove()
        self.exchange()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the optimizer see the slices, while its state is read or loaded."""
        self.install()
        try:
            yield
        finally:
            self.remove()

    def install(self) -> None:
        """Put the slices, with their gradients, into the optimizer."""
        for parameter, part in self.pairs:
            part.grad = None
            if parameter.grad is not None:
                gradient = parameter.grad.reshape(-1)[self.bounds(parameter, self.replica)]
                part.grad = gradient.to(part.device)
        for group, slices in zip(self.optimizer.param_groups, self.slices):
            group["params"] = list(slices)

    def remove(self) -> None:
        """Put the whole parameters back."""
        for group, whole in zip(self.optimizer.param_groups, self.whole):
            group["params"] = list(whole)

    @torch.no_grad()
    def exchange(self) -> None:
        """Bring the updated slices of all replicas into the whole parameters."""
        for dtype in sorted({p.dtype for p, _ in self.pairs}, key=str):
            self._exchange([(p, part) for p, part in self.pairs if p.dtype == dtype])

    def _exchange(self, pairs: List[Tuple[nn.Parameter, nn.Parameter]]) -> None:
        lengths = [-(-p.numel() // self.replicas) for p, _ in pairs]
        first = pairs[0][0]
        mine = torch.zeros(sum(lengths), dtype=first.dtype, device=first.device)
        for (_, part), place in zip(pairs, torch.split(mine, lengths)):
            place[: part.numel()].copy_(part)
        everyones = [mine]
        if self.replicas > 1:
            everyones = [torch.empty_like(mine) for _ in range(self.replicas)]
            dist.all_gather(everyones, mine, group=self.group)
        columns = zip(*(torch.split(each, lengths) for each in everyones))
        for (parameter, _), parts in zip(pairs, columns):
            parameter.copy_(torch.cat(parts)[: parameter.numel()].view_as(parameter))

    def _slice(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.device.type == "meta":
            return parameter
        flat = parameter.detach().view(-1)[self.bounds(parameter, self.replica)]
        return nn.Parameter(flat.cpu() if self.offchip else flat, parameter.requires_grad)
