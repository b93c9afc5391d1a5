"""Weights on the host and on the IPUs, and the classes that keep them in step."""

import weakref

import torch

from poptorch import optim
from poptorch.device import COUNTS, Error

REMEMBERED = {}
"""Classes that parameters and buffers had, by id: compiling gives them back."""


class Weights:
    """The part of an executor that copies weights."""

    # --- the user's module, which fetches weights when it is looked at ----------------------------

    def _wrap(self):
        parent = weakref.ref(self)

        def fetch():
            if parent() is not None:
                parent().copyWeightsToHostIfNeeded()

        class PoptorchModel(type(self._user_model)):
            _is_poptorch_wrapper = True

            def copyWeightsToHostIfNeeded(self):
                return parent() is not None and parent().copyWeightsToHostIfNeeded()

            def __getattribute__(self, name):
                if name == "_host_weights_version":
                    return parent()._host_weights_version if parent() is not None else None
                if name in ("_buffers", "_parameters", "forward"):
                    fetch()
                return object.__getattribute__(self, name)

        class PoptorchParameter(torch.nn.Parameter):
            def __getattribute__(self, name):
                fetch()
                return object.__getattribute__(self, name)

            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                return super().__torch_function__(func, types, args, kwargs or {})

        class PoptorchBuffer(torch.Tensor):
            def __getattribute__(self, name):
                fetch()
                return super().__getattribute__(name)

            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                return super().__torch_function__(func, types, args, kwargs or {})

        for b in self._user_model.buffers():
            if type(b) is not torch.Tensor:
                raise Error(f"All buffers must be an instance of torch.Tensor (Got {type(b)})")
        PoptorchModel.__name__ = f"Poptorch{type(self._user_model).__name__}"
        self._kinds = PoptorchModel, PoptorchParameter, PoptorchBuffer
        self._set_kinds(*self._kinds)

    def _set_kinds(self, model, parameter, buffer):
        for p in self._user_model.parameters():
            p.__class__ = parameter
        for b in self._user_model.buffers():
            b.__class__ = buffer
        self._user_model.__class__ = model

    def _unwrap(self):
        """Take the classes away, and remember them, as the real one does."""
        for tensor in [*self._user_model.parameters(), *self._user_model.buffers()]:
            REMEMBERED[id(tensor)] = weakref.ref(tensor), type(tensor)
        self._set_kinds(self._kinds[0].__bases__[0], torch.nn.Parameter, torch.Tensor)

    def _plain(self):
        """Parameters and buffers by name, without the fetching."""
        tensors = [*self._model.named_parameters(), *self._model.named_buffers()]
        with torch._C.DisableTorchFunction():
            return {name: bare(t) for name, t in tensors}

    # --- weights ----------------------------------------------------------------------------------

    def copyWeightsToHostIfNeeded(self):
        if self._dirty_host_weights:
            self.copyWeightsToHost()
            return True
        return False

    def copyWeightsToHost(self):
        self._check_compiled()
        self._dirty_host_weights = False
        COUNTS["to_host"] += 1
        with torch.no_grad():
            for name, tensor in self._plain().items():
                if name in self._device_state:
                    tensor.data.copy_(self._device_state[name])
        self._host_weights_version += 1

    def copyWeightsToDevice(self):
        self._check_compiled()
        self._dirty_host_weights = False
        COUNTS["to_device"] += 1
        if self._optimizer is not None:
            self._optimizer.state_dict()
            if not isinstance(self._optimizer, optim.Optimizer):
                for state in self._optimizer_state.values():
                    state.zero_()  # never read back: it begins anew
        with torch.no_grad():
            self._device_state = {n: t.data.clone() for n, t in self._plain().items()}

    def load_state_dict(self, state_dict, strict=True):
        result = self._user_model.load_state_dict(state_dict, strict)
        if self.isAttachedToDevice():
            self.copyWeightsToDevice()
        return result

    @property
    def model(self):
        return self._user_model

    @property
    def options(self):
        return self._options


def bare(tensor):
    """The same memory as a plain tensor."""
    return tensor.detach().as_subclass(torch.Tensor)


def unwrapped(module):
    """Turn wrapped parameters into plain ones; return what they were."""
    wrapped = []
    for tensor in [*module.parameters(), *module.buffers()]:
        kind = type(tensor)
        if kind not in (torch.nn.Parameter, torch.Tensor):
            wrapped.append((tensor, kind))
            tensor.__class__ = kind.__bases__[0]
    return wrapped
