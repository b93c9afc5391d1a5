"""The optimizer on the IPUs, which follows the hyperparameters of the optimizer on the host.

Schedulers, callbacks and checkpoints use the optimizer of the module; PopTorch runs an optimizer of
its own with the same hyperparameters. Checkpoints have the format of torch: moments by parameter.

Source:
    PopTorch 3.4: optim.py, _optimizer_attributes.py, poptorch.cpp (readOptimizerState and
    writeOptimizerState); PopART: patterns/adamdecompose.cpp. Moments are those of unscaled
    mean gradients, as in torch.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_ipu_bert.strategies.ipu.program.changes import check_groups
from lightning_ipu_bert.strategies.ipu.program.outside import names_of_parameters
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch
from lightning_ipu_bert.strategies.pipelined import PipelinedModule
from lightning_ipu_bert.training.update_hooks import around_update

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov")
"""Hyperparameters of parameter groups that both torch and PopTorch have."""

MOMENTS = {"Accl1___": "exp_avg", "Accl2___": "exp_avg_sq", "Step___": "step"}
"""State of Adam, AdamW and LAMB: prefix of PopART before the name of a parameter: key of torch."""
VELOCITY = {"Accl1___": "momentum_buffer"}
"""State of SGD."""


class OptimizerOptions(NamedTuple):
    """Options of PopTorch optimizers that torch optimizers do not have."""

    half_accumulators: bool = False
    """Accumulate gradients as float16."""
    half_momentum: bool = False
    """Store first moments as float16."""
    loss_scaling: Optional[float] = None
    """Factor of the loss while gradients are computed; None is 1."""
    max_grad_norm: Optional[float] = None
    """Maximum norm of gradients; None disables clipping."""
    lamb: bool = False
    """Whether LAMB replaces AdamW."""


def to_poptorch(optimizer: Optimizer, options: OptimizerOptions) -> Any:
    """Return the PopTorch optimizer with the hyperparameters of a torch optimizer.

    All hyperparameters are passed explicitly: PopTorch compiles omitted ones as constants.

    Args:
        optimizer: One of `optimizer_checks.OPTIMIZERS`.
        options: Options without a counterpart in torch.
    """
    kinds = import_poptorch().optim
    half, single = torch.float16, torch.float32
    momentum = half if options.half_momentum else single
    first = optimizer.param_groups[0]
    arguments: Dict[str, Any] = {name: first[name] for name in HYPERPARAMETERS if name in first}
    for name in ("momentum", "dampening"):
        if not arguments.get(name):  # if passed, even 0 allocates state for each weight
            arguments.pop(name, None)
    arguments["accum_type"] = half if options.half_accumulators else single
    if options.loss_scaling is not None:
        arguments["loss_scaling"] = options.loss_scaling
    if options.max_grad_norm is not None:
        arguments["max_grad_norm"] = options.max_grad_norm
    if isinstance(optimizer, SGD):
        arguments["velocity_accum_type"] = momentum
    else:
        arguments["first_order_momentum_accum_type"] = momentum
        arguments["second_order_momentum_accum_type"] = single
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])  # PopTorch rejects lists
    return _kind(kinds, optimizer, options.lamb)(_groups(optimizer), **arguments)


def _kind(kinds: Any, optimizer: Optimizer, lamb: bool) -> Any:
    if isinstance(optimizer, AdamW):  # before Adam, its base class in newer versions of torch
        return kinds.LAMB if lamb else kinds.AdamW
    return kinds.Adam if isinstance(optimizer, Adam) else kinds.SGD


def _groups(optimizer: Optimizer) -> List[Dict[str, Any]]:
    return [
        {"params": group["params"], **_hyperparameters(group)} for group in optimizer.param_groups
    ]


def _hyperparameters(group: Mapping[str, Any]) -> Dict[str, object]:
    values = {name: group[name] for name in HYPERPARAMETERS if name in group}
    if "betas" in values:
        values["betas"] = tuple(values["betas"])
    return values


class IPUOptimizer:
    """The optimizers of a run: on the host, and on the IPUs."""

    def __init__(self, host: Optimizer, module: PipelinedModule, options: OptimizerOptions) -> None:
        """Create the PopTorch optimizer from that of the host.

        Args:
            host: The optimizer of the module.
            module: The module, for the names of parameters.
            options: Options without a counterpart in torch.
        """
        self.host = host
        self.poptorch = to_poptorch(host, options)
        # Accessing parameters, whose gradients are never set, would copy all weights to the host.
        vars(host)["zero_grad"] = _no_gradients
        # The optimizer on the host has nothing to update, but schedulers read its step counter.
        self._groups = [list(group["params"]) for group in host.param_groups]
        self._detach = around_update(host, self._hide_parameters, self._show_parameters)
        names = names_of_parameters(module)
        self._names = [names[id(p)] for group in host.param_groups for p in group["params"]]
        self._loaded: Dict[str, Dict[str, object]] = {}
        """State of a checkpoint by parameter, until there is a program to write it to."""

    def refresh(self, poplar: Any) -> None:
        """Send the hyperparameters to the IPUs if they have changed."""
        values = [_hyperparameters(group) for group in self.host.param_groups]
        if values == [_hyperparameters(group) for group in self.poptorch.param_groups]:
            return
        for group, new in zip(self.poptorch.param_groups, values):
            group.update(new)
        poplar.setOptimizer(self.poptorch)

    def check_groups(self) -> None:
        """Check that no parameter group was added.

        Raises:
            UserError: If one was: its parameters are not in the program.
        """
        now = [list(group["params"]) for group in self.host.param_groups]
        check_groups([len(group) for group in self._groups], [len(group) for group in now])

    def state_dict(self) -> Dict[str, Any]:
        """Return the state in the format of the optimizer on the host, on the CPU."""
        state = self.poptorch.state_dict().get("ipu_state")
        by_name = self._loaded if state is None or self._loaded else self._by_parameter(state)
        numbered = {
            index: by_name[name] for index, name in enumerate(self._names) if name in by_name
        }
        return {**self.host.state_dict(), "state": numbered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load hyperparameters immediately, and moments once there is a program."""
        self.host.load_state_dict({**state, "state": {}})
        self._loaded = {self._names[index]: entry for index, entry in state["state"].items()}

    def write_loaded_state(self) -> None:
        """Write the moments of a checkpoint to the program that was just compiled.

        PopTorch copies bytes without checking shape or dtype, and crashes on missing entries:
        entries that are not in the checkpoint keep their current value.
        """
        loaded, self._loaded = self._loaded, {}
        if not loaded:
            return  # accessing the state would copy it, and all weights
        current = self.poptorch.state_dict()
        if current.get("ipu_state") is None:
            return
        filled = {key: self._filled(key, v, loaded) for key, v in current["ipu_state"].items()}
        self.poptorch.load_state_dict({**current, "ipu_state": filled})

    def release(self) -> None:
        """Copy hyperparameters and state to the optimizer on the host, before IPUs are released."""
        state = self.state_dict()
        self._detach()
        self._show_parameters()
        del vars(self.host)["zero_grad"]
        self.host.load_state_dict({**state, "state": {}})
        parameters = [p for group in self.host.param_groups for p in group["params"]]
        for index, entry in state["state"].items():
            # Not by load_state_dict, which would convert moments to the dtype of float16 weights.
            self.host.state[parameters[index]] = entry

    def _hide_parameters(self) -> None:
        for group in self.host.param_groups:
            group["params"] = []

    def _show_parameters(self) -> None:
        for group, parameters in zip(self.host.param_groups, self._groups):
            group["params"] = list(parameters)

    @property
    def _state_names(self) -> Mapping[str, str]:
        return VELOCITY if isinstance(self.host, SGD) else MOMENTS

    @property
    def _scale(self) -> float:
        """PopART scales the velocity of SGD by the loss scaling, but not the moments of Adam."""
        return float(self.poptorch.loss_scaling) if isinstance(self.host, SGD) else 1.0

    def _by_parameter(self, state: Mapping[str, Tensor]) -> Dict[str, Dict[str, Tensor]]:
        """Return the state by parameter with the keys of torch, as float32."""
        result: Dict[str, Dict[str, Tensor]] = {}
        for key, value in state.items():
            prefix, name = _split(key, self._state_names)
            if name:
                entry = result.setdefault(key[len(prefix) :], {})
                entry[name] = value.detach().float() / self._scale
        return result

    def _filled(self, key: str, value: Tensor, loaded: Mapping[str, Mapping[str, Any]]) -> Tensor:
        """Return the value of a checkpoint for an entry of PopART, with its shape and dtype."""
        prefix, name = _split(key, self._state_names)
        found = loaded.get(key[len(prefix) :], {}).get(name)
        if found is None:
            return value.clone()
        scaled = torch.as_tensor(found).detach().to("cpu", torch.float32) * self._scale
        return scaled.to(value.dtype).reshape(value.shape).contiguous()


def _split(key: str, names: Mapping[str, str]) -> Tuple[str, str]:
    """Return the prefix of an entry of PopART and the key of torch, or empty strings."""
    for prefix, name in names.items():
        if key.startswith(prefix):
            return prefix, name
    return "", ""


def _no_gradients(set_to_none: bool = True) -> None:
    """Do nothing: there are no gradients on the host."""
