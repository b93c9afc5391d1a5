"""What a compiled program cannot see change: compared with the values when it was compiled."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

from torch import Tensor, nn

from lightning_ipu_bert._compat.torch import plain_requires_grad, plain_version
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.strategies.pipelined import PipelinedModule

PLAIN = (bool, int, float, str, type(None))
"""Types of attributes that a trace turns into constants."""
Modes = Tuple[bool, ...]
"""Whether each submodule is in training mode."""


def modes_of(module: PipelinedModule) -> Modes:
    """Return whether a module and the parts of its blocks are in training mode."""
    return (module.training, *(part.training for _, part in _parts(module)))


def mode_rule(module: PipelinedModule, compiled: Modes) -> None:
    """Check that the modes are those that a training program was compiled with.

    Raises:
        UserError: If one of them has changed.
    """
    names = [type(module).__name__, *(name for name, _ in _parts(module))]
    for name, now, before in zip(names, modes_of(module), compiled):
        if now != before:
            raise UserError(
                f"{name} is in {_mode(now)} mode, but the training program was compiled with it in "
                f"{_mode(before)} mode. Set modes before the first training step, e.g. in "
                "on_fit_start."
            )


class Constants:
    """Attributes that are constants of a program, with their values when it was compiled."""

    def __init__(self, module: PipelinedModule) -> None:
        """Create the object, without values before a trace.

        Args:
            module: The LightningModule.
        """
        self._module = module
        self._of_parts: Dict[str, Dict[str, object]] = {}
        self._of_module: Dict[str, object] = {}

    @contextmanager
    def of_a_trace(self) -> Iterator[None]:
        """Note the attributes of all parts, and those of the LightningModule that are read."""
        module, noted = self._module, self._of_module
        kind: Any = type(module)

        def __getattribute__(own: object, name: str) -> object:  # noqa: N807
            value: object = kind.__getattribute__(own, name)
            own_attributes = object.__getattribute__(own, "__dict__")
            if isinstance(value, PLAIN) and name in own_attributes and _is_public(name):
                noted[name] = value
            return value

        module.__class__ = type(kind.__name__, (kind,), {"__getattribute__": __getattribute__})
        try:
            yield
        finally:
            module.__class__ = kind
        self._of_parts = {name: _plain(part) for name, part in _parts(module)}

    def check(self) -> None:
        """Check that the attributes have the values with which the program was compiled.

        Raises:
            UserError: If one of them has changed.
        """
        own = vars(self._module)
        _compare(type(self._module).__name__, self._of_module, own)
        for name, part in _parts(self._module):
            _compare(name, self._of_parts.get(name, {}), vars(part))


class HostTensors:
    """Parameters and buffers on the host: whether they train, and whether someone changed them.

    Attributes of PopTorch's tensors are read without PopTorch, which would copy all weights.
    """

    def __init__(self, module: nn.Module) -> None:
        """Note the tensors of a module, before a program is compiled.

        Args:
            module: The LightningModule.
        """
        self._module = module
        self._tensors = _tensors_of(module)
        self._trained = self._flags()
        self._versions = self._current()

    def note_trained(self) -> None:
        """Note which parameters are trained, before the training program is compiled."""
        self._trained = self._flags()

    def changed(self) -> bool:
        """Return whether a tensor was modified in place since the last call.

        Raises:
            UserError: If it was replaced by another one, which is not in the programs.
        """
        now = _tensors_of(self._module)
        for name, tensor in self._tensors.items():
            if now.get(name) is not tensor:
                raise UserError(
                    f"{name} was replaced by another tensor, which is not in the compiled program. "
                    "Modify it in place, e.g. by copy_() or fill_()."
                )
        before, self._versions = self._versions, self._current()
        return before != self._versions

    def check_trained(self) -> None:
        """Check that the same parameters are trained as when the program was compiled.

        Raises:
            UserError: If `requires_grad` of one has changed.
        """
        for name, now, before in zip(self._tensors, self._flags(), self._trained):
            if now != before:
                raise UserError(
                    f"requires_grad of {name} has changed to {not before}, but the training "
                    f"program was compiled with {before}. Freeze and unfreeze parameters before "
                    "fit, or use another strategy."
                )

    def _current(self) -> List[int]:
        return [plain_version(tensor) for tensor in self._tensors.values()]

    def _flags(self) -> List[bool]:
        return [plain_requires_grad(tensor) for tensor in self._tensors.values()]


def _tensors_of(module: nn.Module) -> Dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def check_groups(before: Sequence[int], now: Sequence[int]) -> None:
    """Check that the optimizer has the parameter groups that the program was compiled with.

    Args:
        before: Numbers of parameters in the groups.
        now: The same, now.

    Raises:
        UserError: If they differ.
    """
    if list(before) != list(now):
        raise UserError(
            f"The optimizer has groups of {list(now)} parameters, but the training program was "
            f"compiled for {list(before)}. On IPUs, configure_optimizers must return all groups: "
            "add_param_group has no effect later."
        )


def _parts(module: PipelinedModule) -> Iterator[Tuple[str, nn.Module]]:
    for block in module.pipeline_blocks():
        yield from module.get_submodule(block).named_modules(prefix=block)


def _plain(part: nn.Module) -> Dict[str, object]:
    return {
        name: deepcopy(value)
        for name, value in vars(part).items()
        if _is_public(name) and _is_plain(value)
    }


def _is_public(name: str) -> bool:
    return name != "training" and not name.startswith("_")


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(entry) for entry in value)
    return isinstance(value, PLAIN)


def _compare(owner: str, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    for name, value in before.items():
        if now.get(name) != value:
            raise UserError(
                f"{owner}.{name} has changed to {now.get(name)!r}, but the program was compiled "
                f"with {value!r}, which is a constant in it. Set it before the first step, or make "
                "it a buffer or an entry of the batch."
            )


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"
