"""The optimizer on the IPUs, and the host's, whose numbers it follows.

The module's own optimizer stays what schedulers, callbacks and checkpoints see; PopTorch gets one
of its own kind with the same numbers. A checkpoint has torch's format: moments by parameter.

Source:
    PopTorch 3.4: optim.py, _optimizer_attributes.py, poptorch.cpp (readOptimizerState and
    writeOptimizerState); PopART: patterns/adamdecompose.cpp. The moments are those of the unscaled
    mean gradients, as torch's.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch
from lightning_ipu_bert.strategies.update_hooks import around_update

NUMBERS = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov")
"""What torch's optimizers keep per group and PopTorch's have, too."""

MOMENTS = {"Accl1___": "exp_avg", "Accl2___": "exp_avg_sq", "Step___": "step"}
STATE_NAMES = {
    "Adam": MOMENTS,
    "AdamW": MOMENTS,
    "LAMB": MOMENTS,
    "SGD": {"Accl1___": "momentum_buffer"},
}
"""By kind: PopART's prefixes before a parameter's name, and torch's keys."""


class OptimizerOptions(NamedTuple):
    """What PopTorch's optimizers have that torch's have not."""

    half_accumulators: bool = False
    """Add micro-batches' gradients up as float16."""
    half_momentum: bool = False
    """Keep the first moments as float16."""
    loss_scaling: Optional[float] = None
    """Factor of the loss while gradients are computed; PopTorch's own, 1, where None."""
    max_grad_norm: Optional[float] = None
    """Gradients are clipped to this norm; not at all where None."""
    lamb: bool = False
    """LAMB in place of AdamW."""


def to_poptorch(optimizer: Optimizer, options: OptimizerOptions) -> Any:
    """Return PopTorch's optimizer with the numbers of torch's.

    Every number is given by name: PopTorch compiles those that are left out as constants.

    Args:
        optimizer: One of `checks.OPTIMIZERS`.
        options: What torch's does not know.
    """
    kinds = import_poptorch().optim
    half, single = torch.float16, torch.float32
    momentum = half if options.half_momentum else single
    first = optimizer.param_groups[0]
    arguments: Dict[str, Any] = {name: first[name] for name in NUMBERS if name in first}
    for name in ("momentum", "dampening"):
        if not arguments.get(name):  # given, even a 0 would be kept for each weight
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
        arguments["betas"] = tuple(arguments["betas"])  # PopTorch takes no list
    return _kind(kinds, optimizer, options.lamb)(_groups(optimizer), **arguments)


def _kind(kinds: Any, optimizer: Optimizer, lamb: bool) -> Any:
    if isinstance(optimizer, AdamW):  # before Adam, its base in newer versions of torch
        return kinds.LAMB if lamb else kinds.AdamW
    return kinds.Adam if isinstance(optimizer, Adam) else kinds.SGD


def _groups(optimizer: Optimizer) -> List[Dict[str, Any]]:
    return [{"params": group["params"], **_numbers(group)} for group in optimizer.param_groups]


def _numbers(group: Mapping[str, Any]) -> Dict[str, Any]:
    numbers = {name: group[name] for name in NUMBERS if name in group}
    if "betas" in numbers:
        numbers["betas"] = tuple(numbers["betas"])
    return numbers


class IPUOptimizer:
    """Both optimizers of a run: the host's, and the one that the IPUs run."""

    def __init__(self, host: Optimizer, module: nn.Module, options: OptimizerOptions) -> None:
        """Create PopTorch's from the host's.

        Args:
            host: The module's own.
            module: Names the parameters.
            options: What torch's does not know.
        """
        self.host = host
        self.poptorch = to_poptorch(host, options)
        # A look at a parameter, for a gradient that is never there, would fetch all weights.
        vars(host)["zero_grad"] = _no_gradients
        # The host's updates nothing, but counts its steps: schedulers look at that.
        self._groups = [list(group["params"]) for group in host.param_groups]
        self._detach = around_update(host, self._hide_parameters, self._show_parameters)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._names = [names[id(p)] for group in host.param_groups for p in group["params"]]
        self._loaded: Dict[str, Dict[str, Any]] = {}
        """State of a checkpoint by parameter, until there is a program to take it."""

    def refresh(self, poplar: Any) -> None:
        """Send the host's numbers to the IPUs if they have changed."""
        numbers = [_numbers(group) for group in self.host.param_groups]
        if numbers == [_numbers(group) for group in self.poptorch.param_groups]:
            return
        for group, values in zip(self.poptorch.param_groups, numbers):
            group.update(values)
        poplar.setOptimizer(self.poptorch)

    def state_dict(self) -> Dict[str, Any]:
        """Return the state in the format of the host's optimizer, on the CPU."""
        state = self.poptorch.state_dict().get("ipu_state")
        by_name = self._loaded if state is None or self._loaded else self._by_parameter(state)
        numbered = {
            index: by_name[name] for index, name in enumerate(self._names) if name in by_name
        }
        return {**self.host.state_dict(), "state": numbered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take numbers at once, and moments as soon as there is a program."""
        self.host.load_state_dict({**state, "state": {}})
        self._loaded = {self._names[index]: entry for index, entry in state["state"].items()}

    def write_loaded_state(self) -> None:
        """Give the moments of a checkpoint to the program that was just compiled.

        PopTorch copies bytes without a look at shape or type, and crashes over missing entries: the
        state that it has itself is filled in.
        """
        loaded, self._loaded = self._loaded, {}
        if not loaded:
            return  # a look at the state would fetch it, and all weights
        whole = self.poptorch.state_dict()
        if whole.get("ipu_state") is None:
            return
        filled = {key: self._filled(key, v, loaded) for key, v in whole["ipu_state"].items()}
        self.poptorch.load_state_dict({**whole, "ipu_state": filled})

    def give_back(self) -> None:
        """Leave numbers and state with the host's optimizer: the IPUs are about to be gone."""
        state = self.state_dict()
        self._detach()
        self._show_parameters()
        del vars(self.host)["zero_grad"]
        self.host.load_state_dict({**state, "state": {}})
        parameters = [p for group in self.host.param_groups for p in group["params"]]
        for index, entry in state["state"].items():
            # Not by load_state_dict: it would turn moments into the type of float16 weights.
            self.host.state[parameters[index]] = entry

    def _hide_parameters(self) -> None:
        for group in self.host.param_groups:
            group["params"] = []

    def _show_parameters(self) -> None:
        for group, parameters in zip(self.host.param_groups, self._groups):
            group["params"] = list(parameters)

    @property
    def _kind(self) -> str:
        return type(self.poptorch).__name__

    @property
    def _scale(self) -> float:
        """PopART keeps SGD's velocity times the loss scaling, and Adam's moments without."""
        return float(self.poptorch.loss_scaling) if self._kind == "SGD" else 1.0

    def _by_parameter(self, state: Mapping[str, Tensor]) -> Dict[str, Dict[str, Tensor]]:
        """Turn PopART's names into torch's entries of each parameter, as float32."""
        result: Dict[str, Dict[str, Tensor]] = {}
        for key, value in state.items():
            prefix, name = _split(key, self._kind)
            if name:
                entry = result.setdefault(key[len(prefix) :], {})
                entry[name] = value.detach().float() / self._scale
        return result

    def _filled(self, key: str, value: Tensor, loaded: Mapping[str, Mapping[str, Any]]) -> Tensor:
        """Return the checkpoint's value for one of PopART's entries, in its shape and type."""
        prefix, name = _split(key, self._kind)
        found = loaded.get(key[len(prefix) :], {}).get(name)
        if found is None:
            return value.clone()
        scaled = torch.as_tensor(found).detach().to("cpu", torch.float32) * self._scale
        return scaled.to(value.dtype).reshape(value.shape).contiguous()


def _split(key: str, kind: str) -> Tuple[str, str]:
    """Return the prefix of one of PopART's entries and torch's name for it, or nothing twice."""
    for prefix, name in STATE_NAMES[kind].items():
        if key.startswith(prefix):
            return prefix, name
    return "", ""


def _no_gradients(set_to_none: bool = True) -> None:
    """Do nothing: there are no gradients on the host."""
