"""torch: differences between 2.0 and 2.13, and private names.

Files are relative to https://github.com/pytorch/pytorch/tree/main.

- `Module._apply` (torch/nn/modules/module.py): `Module.to` fails on meta tensors, which must
  remain. No public API in 2.13.
- `Module._compiled_call_impl` (torch/nn/modules/module.py), `torch._dynamo.OptimizedModule`
  (torch/_dynamo/eval_frame.py): how a compiled module is called. No public API in 2.13.
- `Module._forward_pre_hooks` and the like, `_has_any_global_hook` (torch/nn/modules/module.py):
  whether hooks are registered or were removed. No public API in 2.13.
- `Tensor._backward_hooks`, `_post_accumulate_grad_hooks` (torch/_tensor.py): whether hooks are
  registered. No public API in 2.13.
- `torch._C._is_tracing` (torch/csrc/jit): whether torch.jit traces. The public
  `torch.jit.is_tracing` is deprecated in 2.13.
- `torch._C._are_functorch_transforms_active`, `forward_ad._current_level`
  (torch/autograd/forward_ad.py): whether functions with their own backward cannot run. No public
  API in 2.13.
- `torch._C.DisableTorchFunction` (torch/csrc (docs: "Extending PyTorch")): PopTorch's parameters
  are a subclass of Tensor. Ends with the SDK stack.
- `aten._softmax_backward_data`, `gelu_backward`, `native_layer_norm_backward`
  (aten/src/ATen/native/native_functions.yaml): operators that have no public function in 2.13.
- `stage_backward_input`, `stage_backward_weight` (torch/distributed/pipelining/_backward.py): the
  split backward of schedules, tried before a run. No public API in 2.13.
- `_get_default_store` (torch/distributed/distributed_c10d.py): messages that no
  collective can block. No public API in 2.13.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Callable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


HAS_CPU_KERNELS = "get_autocast_dtype" in vars(torch)
"""Whether torch has the operators of `ops` and fused optimizers on CPUs: from 2.4 on."""


def has_pipelining() -> bool:
    """Return whether torch supports pipelining; torch 2.0 does not, and 2.4 lacks options.

    Ends when the SDK stack (torch 2.0.1) is no longer supported.
    """
    if importlib.util.find_spec("torch.distributed.pipelining") is None:
        return False
    from torch.distributed.pipelining import ScheduleGPipe

    return "return_outputs" in inspect.signature(ScheduleGPipe.step).parameters


def apply_to_tensors(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer of a module in place, keeping the identity of parameters.

    `nn.Module.to` fails on meta tensors, which must remain.
    """
    module._apply(function)  # type: ignore[no-untyped-call]


@contextmanager
def replaced_call(module: nn.Module, call: Callable[..., object]) -> Iterator[None]:
    """Replace how a module is called within the context, outside of what torch.compile compiles.

    Args:
        module: The module.
        call: Called with the original function and the arguments of the module.
    """
    name = "_compiled_call_impl" if is_compiled_in_place(module) else "forward"
    own, original = vars(module).get(name), getattr(module, name)
    setattr(module, name, partial(call, original))
    try:
        yield
    finally:
        delattr(module, name)  # restores the method of the class
        if own is not None:
            setattr(module, name, own)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called."""
    return vars(module).get("_compiled_call_impl") is not None


def is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile has compiled a module, or wraps it."""
    dynamo: Any = sys.modules.get("torch._dynamo")  # not imported here: it takes a second
    wraps = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return wraps or is_compiled_in_place(module)


def count_pre_hooks(module: nn.Module) -> int:
    """Return the number of forward pre-hooks of a module and all its parts."""
    return sum(len(part._forward_pre_hooks) for part in module.modules())


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Return whether a hook is registered on the gradient of a parameter.

    `register_post_accumulate_grad_hook` came with torch 2.1.
    """
    later = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(parameter._backward_hooks or later)


def without_torch_function() -> Any:
    """Return a context in which subclasses of Tensor, like PopTorch's parameters, act as Tensor."""
    return torch._C.DisableTorchFunction()


def backward_in_two_parts(
    outputs: List[Tensor],
    gradients: List[Tensor],
    inputs: List[Tensor],
    parameters: List[nn.Parameter],
) -> None:
    """Compute gradients as split by zero-bubble schedules: of inputs, then of parameters.

    Args:
        outputs: Outputs of a stage.
        gradients: Gradients of the outputs.
        inputs: Inputs of the stage.
        parameters: Parameters of the stage, whose `grad` is set.

    Raises:
        RuntimeError: If torch cannot split this backward.
    """
    from torch.distributed.pipelining import _backward

    _, groups = _backward.stage_backward_input(outputs, gradients, inputs, iter(parameters))
    _backward.stage_backward_weight(iter(parameters), groups)


def lost_connection(exception: BaseException) -> bool:
    """Return whether an exception only reports that another rank is gone.

    Decided by its text where there is no type: gloo raises plain RuntimeErrors.
    """
    import torch.distributed as dist

    if isinstance(exception, vars(dist).get("DistError", ())):  # new in torch 2.2
        return True
    return isinstance(exception, RuntimeError) and any(
        text in str(exception)
        for text in ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    )


def wait_for_keys(keys: List[str], key: str, value: str, seconds: float) -> List[str]:
    """Set a value in the store of the process group, and return the values of all keys.

    Uses no collective, so that a pending one cannot block it.

    Raises:
        RuntimeError: If a key is missing after the timeout.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    store.set(key, value)
    store.wait(keys, timedelta(seconds=seconds))
    return [store.get(name).decode() for name in keys]


def runs_eagerly_on_cpu(tensor: Tensor) -> bool:
    """Return whether what is done with a tensor is done now, on the CPU.

    It is not where it is traced, transformed by `torch.func`, or differentiated forward.
    """
    if not HAS_CPU_KERNELS or torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"


def is_untouched(module: nn.Module) -> bool:
    """Return whether calling a module runs the forward of its class, and nothing else."""
    own = vars(module)
    hooks = any(own[name] for name in HOOKS)
    return not (hooks or "forward" in own or is_compiled_in_place(module))


def has_global_hooks() -> bool:
    """Return whether hooks are registered that run with every module."""
    from torch.nn.modules.module import _has_any_global_hook  # new in torch 2.1

    function: Callable[[], bool] = _has_any_global_hook
    return function()


def cpu_autocast_dtype() -> Optional[torch.dtype]:
    """Return the type of autocast on CPUs, or None if it is off."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def softmax_backward(gradient: Tensor, output: Tensor) -> Tensor:
    """Return the gradient of the input of a softmax over the last dimension."""
    return torch._softmax_backward_data(gradient, output, -1, output.dtype)


def gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the input of GELU."""
    result: Tensor = torch.ops.aten.gelu_backward(gradient, x)
    return result


def layer_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input, weight and bias of LayerNorm over the last dimension."""
    function = torch.ops.aten.native_layer_norm_backward
    dx, d_weight, d_bias = function(
        gradient, x, weight.shape, mean, rstd, weight, bias, [True, True, True]
    )
    return dx, d_weight, d_bias


BASE = vars(Tensor.__mro__[1])
"""Attributes of the class of tensors in C++."""


def plain_version(tensor: Tensor) -> int:
    """Return how often a tensor was modified in place, without the code of its subclass."""
    with without_torch_function():
        return int(BASE["_version"].__get__(tensor))


def plain_requires_grad(tensor: Tensor) -> bool:
    """Return whether a tensor requires gradients, without the code of its subclass."""
    with without_torch_function():
        return bool(BASE["requires_grad"].__get__(tensor))
