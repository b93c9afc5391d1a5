"""RTS: the optimizer state is sharded over replicas.

Each replica updates its part of the parameters, and stores the state of only that part; then the
replicas exchange what they have updated. If the optimizer is elementwise, every parameter is cut
into flat slices: sharding by parameter would place the embedding, a quarter of BERT-Base, on one
replica. Other optimizers (Adafactor, Muon) update whole parameters, each on one replica.

Source: Rajbhandari et al., ZeRO (arXiv:1910.02054), stage 1; Graphcore calls it RTS.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_ipu_bert.batch_trees import map_tree
from lightning_ipu_bert.training.elementwise import ElementwiseOptimizer
from lightning_ipu_bert.training.update_hooks import around_update

ELEMENTWISE = (
    *(optim.Adadelta, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW, optim.ASGD),
    *(optim.NAdam, optim.RAdam, optim.RMSprop, optim.Rprop, optim.SGD),
)
"""Elementwise optimizers of torch, whose updates of slices equal those of full tensors."""


def is_elementwise(optimizer: Optimizer) -> bool:
    """Return whether the update of an element depends on its own gradients only."""
    # Not isinstance: a subclass of Adam may compute norms of parameters.
    return type(optimizer) in ELEMENTWISE or isinstance(optimizer, ElementwiseOptimizer)


class OptimizerShards:
    """The parts of the parameters of an optimizer that this replica updates."""

    def __init__(
        self,
        optimizer: Optimizer,
        replica: int,
        replicas: int,
        group: dist.ProcessGroup,
        offchip: bool,
    ) -> None:
        """Create the parts, and move the state that the optimizer already has to them.

        Args:
            optimizer: Holds the full parameters, except within `installed`.
            replica: Index of this replica.
            replicas: Number of replicas.
            group: The ranks that hold the same stages, one per replica.
            offchip: Store parts and state in host memory.
        """
        self.optimizer = optimizer
        self.replica, self.replicas, self.group = replica, replicas, group
        self.offchip = offchip
        self.slices = is_elementwise(optimizer)
        """Whether parts are slices; otherwise every parameter has one owner."""
        self.full: List[List[nn.Parameter]] = []
        self.parts: List[List[nn.Parameter]] = []
        self._owners: Dict[int, int] = {}
        self._owned = [0] * replicas  # elements
        self._follow()
        self._detach: Callable[[], None] = lambda: None

    @property
    def pairs(self) -> List[Tuple[nn.Parameter, nn.Parameter]]:
        """The parameters of the stages on this rank with their parts."""
        full = [p for parameters in self.full for p in parameters]
        parts = [p for parameters in self.parts for p in parameters]
        return [(p, s) for p, s in zip(full, parts) if not p.is_meta]

    def owns(self, parameter: nn.Parameter) -> bool:
        """Return whether this replica updates a part of the parameter."""
        return self.slices or self._owners[id(parameter)] == self.replica

    def bounds(self, parameter: Tensor, replica: int) -> slice:
        """Return the slice of a flattened parameter that a replica updates; may be empty."""
        length = -(-parameter.numel() // self.replicas)
        return slice(
            min(replica * length, parameter.numel()), min((replica + 1) * length, parameter.numel())
        )

    def own_part(self, parameter: nn.Parameter, value: object) -> object:
        """Return the part of this replica of a state of the parameter, or of its gradient."""
        if not self.slices or not isinstance(value, Tensor) or not value.dim():
            return value
        return value.reshape(-1)[self.bounds(parameter, self.replica)]

    def attach(self) -> None:
        """Register hooks so that updates modify the parts of this replica, and exchange them."""
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
        """Replace the parameters by parts within the context, to save or load the state."""
        self.install()
        try:
            yield
        finally:
            self.remove()

    def install(self) -> None:
        """Replace the parameters of the optimizer by parts with their gradients."""
        self._follow()
        for parameter, part in self.pairs:
            gradient = self.own_part(parameter, parameter.grad) if self.owns(parameter) else None
            part.grad = gradient.to(part.device) if isinstance(gradient, Tensor) else None
        for group, parts in zip(self.optimizer.param_groups, self.parts):
            group["params"] = list(parts)

    def remove(self) -> None:
        """Restore the full parameters of the optimizer."""
        for group, parameters in zip(self.optimizer.param_groups, self.full):
            group["params"] = list(parameters)

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the updated parts of all replicas into the full parameters."""
        for dtype in sorted({p.dtype for p, _ in self.pairs}, key=str):
            pairs = [(p, part) for p, part in self.pairs if p.dtype == dtype]
            if self.slices:
                self._gather(pairs)
            else:
                self._broadcast(pairs)

    def _gather(self, pairs: List[Tuple[nn.Parameter, nn.Parameter]]) -> None:
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

    def _broadcast(self, pairs: List[Tuple[nn.Parameter, nn.Parameter]]) -> None:
        for replica in range(self.replicas):
            owned = [(p, part) for p, part in pairs if self._owners[id(p)] == replica]
            if not owned:
                continue
            flat = torch.cat([part.reshape(-1).to(p.device) for p, part in owned])
            if self.replicas > 1:
                dist.broadcast(flat, dist.get_global_rank(self.group, replica), self.group)
            for (p, _), values in zip(owned, torch.split(flat, [p.numel() for p, _ in owned])):
                p.copy_(values.view_as(p))

    def _follow(self) -> None:
        """Create the parts of parameter groups that were added, e.g. by BaseFinetuning."""
        for group in self.optimizer.param_groups[len(self.full) :]:
            parameters: List[nn.Parameter] = list(group["params"])
            self.full.append(parameters)
            self.parts.append([self._part(parameter) for parameter in parameters])

    def _part(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:
            return parameter
        owner = self._owned.index(min(self._owned))
        self._owners[id(parameter)] = owner
        self._owned[owner] += parameter.numel()
        values = self.own_part(parameter, parameter.detach())
        assert isinstance(values, Tensor)
        part = nn.Parameter(values.cpu() if self.offchip else values, parameter.requires_grad)
        vars(part).update(vars(parameter))  # e.g. marks for the optimizer
        state = self.optimizer.state.pop(parameter, None)
        if state is not None and self.owns(parameter):
            self.optimizer.state[part] = map_tree(state, lambda x: self._moved(parameter, x))
        return part

    def _moved(self, parameter: nn.Parameter, value: object) -> object:
        own = self.own_part(parameter, value)
        return own.to("cpu", copy=True) if self.offchip and isinstance(own, Tensor) else own
