"""Devices while a module is traced: its tensors are on an IPU, and mix with no others."""

import torch
from torch.overrides import TorchFunctionMode

from poptorch.device import Error

IPU = torch.device("ipu", 0)


class Devices(TorchFunctionMode):
    """What is made of tensors on the IPU is on the IPU, and so is what is made without a device."""

    def __init__(self, tensors):
        super().__init__()
        self._there = {id(tensor): tensor for tensor in tensors}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return IPU if id(args[0]) in self._there else func(*args)
        tensors = _tensors_in((args, kwargs))
        there = [id(tensor) in self._there for tensor in tensors]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "ipu":
            kwargs["device"] = "cpu"  # where the trace computes
        elif device is not None or (there and not any(there)):
            return func(*args, **kwargs)
        args = [_computed_on_cpu(x) for x in args] if any(there) else args
        if any(there) and not all(there) and func not in (torch.Tensor.copy_, torch.Tensor.to):
            wrong = tensors[there.index(False)]
            raise Error(
                f"Expected an IPU tensor but got tensor(device={wrong.device}, "
                f"shape={list(wrong.shape)}, dtype={wrong.dtype})."
            )
        result = func(*args, **kwargs)
        self._there.update((id(tensor), tensor) for tensor in _tensors_in(result))
        return result


def _computed_on_cpu(value):
    """Devices as positional arguments, as of `to`."""
    is_ipu = isinstance(value, (str, torch.device)) and str(value).startswith("ipu")
    return torch.device("cpu") if is_ipu else value


def _tensors_in(values):
    leaves = torch.utils._pytree.tree_flatten(values)[0]
    return [x for x in leaves if isinstance(x, torch.Tensor)]
