"""Full models and stages: parameters placed on other ranks are meta tensors.

Meta tensors keep names, shapes and order, so that optimizers, state dicts and checkpoints use the
names and indices of the full model. This module makes checkpoints layout-independent;
`optimizer_states` does the same for the optimizer.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, Iterator, List, Mapping, Sequence, Set, Tuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_ipu_bert._compat.lightning import set_device
from lightning_ipu_bert._compat.torch import apply_to_tensors
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.strategies.distributed.other_stages import OtherStageParameter

State = Dict[str, Any]
EXTRA = "_extra_state"
"""Last part of the name of an extra state."""


class StageWeights:
    """Which weights of a model, or of a copy of it, are on this rank, and where the others are."""

    def __init__(self, plan: Plan, own_stages: Set[int], group: dist.ProcessGroup) -> None:
        """Create the object for the stages of a rank.

        Args:
            plan: The plan of the run.
            own_stages: The stages on this rank.
            group: The ranks of this replica.
        """
        self._plan = plan
        self._own_stages = own_stages
        self._group = group

    def is_here(self, name: str) -> bool:
        """Return whether a parameter or buffer is in a stage on this rank."""
        return bool(self._own_stages.intersection(self._plan.stages_of(name)))

    def drop_others(self, module: nn.Module) -> None:
        """Free the parameters of stages on other ranks."""
        for name, parameter in list(module.named_parameters()):
            if not self.is_here(name):
                stages = ", ".join(map(str, self._plan.stages_of(name)))
                other = OtherStageParameter.of(parameter, f"{name} of stage {stages}")
                _replace(module, name, other)

    def state_dict(self, module: nn.Module) -> State:
        """Return the full state dict on the first rank of the replica, and {} on the others.

        What it contains is decided by the `state_dict` of the module, which may be overridden: it
        is called on every rank, and entries with weights of other stages are taken from them.
        """
        state = module.state_dict()
        own = {name: _on_cpu(state[name]) for name in self._own_entries(module, state)}
        first = dist.get_rank(self._group) == 0
        parts: List[State] = [{}] * dist.get_world_size(self._group)
        source = dist.get_global_rank(self._group, 0)
        dist.gather_object(own, parts if first else None, source, self._group)
        found = {name: value for part in parts for name, value in part.items()}
        return {name: found.get(name, value) for name, value in state.items()} if first else {}

    def _own_entries(self, module: nn.Module, state: Mapping[str, object]) -> Iterator[str]:
        """Yield the entries of a state dict with values of this rank, under whatever name."""
        names = _all_names(module)
        tensors = [(name, x) for name, x in _tensors(module) if not x.is_meta]
        entries = {tensor.data_ptr(): name for name, tensor in tensors}
        for entry, value in state.items():
            name = entry
            if isinstance(value, Tensor) and entry not in names and not value.is_meta:
                name = entries.get(value.data_ptr(), entry)
            derived = isinstance(value, Tensor) and name not in names and not value.is_meta
            if derived or self._any_is_here(names.get(name, [name])):
                yield entry

    def load_all(self, module: nn.Module) -> None:
        """Load the weights of all stages into the module; all ranks of the replica must call it."""
        contents: Dict[str, object] = {**dict(module.named_parameters()), **_extra_states(module)}
        self._load(module, {**contents, **dict(_buffers(module))})

    def load_buffers(self, module: nn.Module) -> None:
        """Load the buffers of all stages into the module; all ranks of the replica must call it."""
        self._load(module, dict(_buffers(module)))

    def _any_is_here(self, names: Iterable[str]) -> bool:
        return any(map(self.is_here, names))

    def _load(self, module: nn.Module, contents: Mapping[str, object]) -> None:
        names = _all_names(module)
        here = {name for name in contents if self._any_is_here(names.get(name, [name]))}
        own = {name: _on_cpu(contents[name]) for name in here}
        parts: List[State] = [{}] * dist.get_world_size(self._group)
        dist.all_gather_object(parts, own, group=self._group)
        for name, value in ((n, v) for part in parts for n, v in part.items() if n not in own):
            _set(module, name, value)


def _buffers(module: nn.Module) -> Iterator[Tuple[str, Tensor]]:
    """Yield the buffers under all their names: the first one may be outside of all blocks."""
    return module.named_buffers(remove_duplicate=False)


def _tensors(module: nn.Module) -> Iterator[Tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from _buffers(module)


def _parts_with_extra_state(module: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """Yield the submodules that have an extra state, by its names in a state dict."""
    for name, part in module.named_modules(remove_duplicate=False):
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield f"{name}.{EXTRA}", part


def _extra_states(module: nn.Module) -> Dict[str, object]:
    return {name: part.get_extra_state() for name, part in _parts_with_extra_state(module)}


def _all_names(module: nn.Module) -> Dict[str, Sequence[str]]:
    """Return all names of what each entry of a state dict holds, by each of them."""
    names_by_id: Dict[int, List[str]] = {}
    for name, thing in (*_tensors(module), *_parts_with_extra_state(module)):
        names_by_id.setdefault(id(thing), []).append(name)
    return {name: names for names in names_by_id.values() for name in names}


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Set a parameter, buffer or extra state."""
    owner, _, last = name.rpartition(".")
    if last == EXTRA:
        module.get_submodule(owner).set_extra_state(value)
    elif last in dict(module.get_submodule(owner).named_parameters(recurse=False)):
        old = module.get_parameter(name)
        new = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
        vars(new).update({k: v for k, v in vars(old).items() if k != "location"})
        _replace(module, name, new)
    else:
        buffer = module.get_buffer(name)
        setattr(module.get_submodule(owner), last, value.to(buffer.device))


def _replace(module: nn.Module, name: str, new: nn.Parameter) -> None:
    """Replace a parameter, under all its names if it is tied."""
    old = module.get_parameter(name)
    for other, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter is old:
            owner, _, last = other.rpartition(".")
            setattr(module.get_submodule(owner), last, new)


def _on_cpu(value: object) -> object:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def broadcast_parameters(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Broadcast the weights of the first replica."""
    source = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if not tensor.is_meta:
                dist.broadcast(tensor, source, group)


def move_to(module: LightningModule, device: torch.device) -> None:
    """Move the tensors of this rank to a device; meta tensors remain."""
    apply_to_tensors(module, lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    set_device(module, device)
