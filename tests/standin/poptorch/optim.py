"""PopTorch's optimizers: numbers for the IPUs. Their `step` is never run.

A number that is given to the constructor can change later; one that is left out is compiled in.
"""

import torch

from poptorch.device import Error

HALF_OR_SINGLE = (torch.float16, torch.float32)


class VariableAttributes:
    def __init__(self, variable, allowed):
        self._variable, self._allowed = list(variable), list(allowed)

    def isConstant(self, attr):
        return attr not in self._variable

    def markAsConstant(self, attr):
        assert attr in self._allowed, f"Unknown attribute {attr}"
        self._variable = [a for a in self._variable if a != attr]

    def markAsVariable(self, attr):
        assert attr in self._allowed, f"Unknown attribute {attr}"
        self._variable.append(attr)


class Optimizer:
    """State that lives on the IPUs; the executor replaces `state_dict` by one that fetches it."""

    def _begin(self, given, extras):
        """Take apart what the constructor was given; return what torch's constructor gets."""
        given = {k: v for k, v in given.items() if k not in ("self", "__class__")}
        self._variable = [k for k, v in given.items() if v is not None]
        self._extras = {k: given[k] for k in extras}
        for name, value in self._extras.items():
            if name.endswith("accum_type"):
                value = torch.float32 if value is None else value
                assert value in HALF_OR_SINGLE, "Accumulation types must be float32 or float16"
            default = {"loss_scaling": 1.0, "max_grad_norm": float("inf")}
            setattr(self, name, default.get(name) if value is None else value)
        self._state_dict = {"ipu_state": None, "ipu_param": None}
        self.ipu_state_is_dirty = self.host_state_is_dirty = False
        return {k: v for k, v in given.items() if v is not None and k not in extras}

    def _end(self):
        self.variable_attrs = VariableAttributes(
            self._variable, [*self.defaults, "loss_scaling", "max_weight_norm"]
        )

    def state_dict(self):
        return self.get_state_dict()

    def get_state_dict(self):
        return {**self._state_dict, **torch.optim.Optimizer.state_dict(self)}

    def load_state_dict(self, state):
        torch.optim.Optimizer.load_state_dict(self, state)
        self.set_state_dict(state)

    def set_state_dict(self, state):
        if not state:
            raise RuntimeError("Cannot load optimizer state dictionary because it is empty.")
        if not ("ipu_state" in state and "ipu_param" in state):
            raise RuntimeError("Only IPU optimizer states can be loaded onto the IPU.")
        self._state_dict = state
        self.ipu_state_is_dirty, self.host_state_is_dirty = True, False

    def has_state(self):
        return None not in (self._state_dict.get("ipu_state"), self._state_dict.get("ipu_param"))


_MOMENTS = (
    "loss_scaling",
    "accum_type",
    "first_order_momentum_accum_type",
    "second_order_momentum_accum_type",
)


class Adam(Optimizer, torch.optim.Adam):
    def __init__(
        self,
        params,
        lr=None,
        betas=None,
        eps=None,
        weight_decay=None,
        amsgrad=None,
        foreach=None,
        maximize=None,
        capturable=None,
        differentiable=None,
        fused=None,
        loss_scaling=None,
        accum_type=None,
        first_order_momentum_accum_type=None,
        second_order_momentum_accum_type=None,
        max_grad_norm=None,
    ):
        given = dict(locals())
        extras = (*_MOMENTS, "max_grad_norm")
        torch.optim.Adam.__init__(self, **self._begin(given, extras))
        self._end()


class AdamW(Optimizer, torch.optim.AdamW):
    def __init__(
        self,
        params,
        lr=None,
        betas=None,
        eps=None,
        weight_decay=None,
        amsgrad=None,
        maximize=None,
        foreach=None,
        capturable=None,
        differentiable=None,
        fused=None,
        loss_scaling=None,
        bias_correction=None,
        accum_type=None,
        first_order_momentum_accum_type=None,
        second_order_momentum_accum_type=None,
        max_grad_norm=None,
    ):
        given = dict(locals())
        extras = (*_MOMENTS, "bias_correction", "max_grad_norm")
        torch.optim.AdamW.__init__(self, **self._begin(given, extras))
        self._end()


class SGD(Optimizer, torch.optim.SGD):
    def __init__(
        self,
        params,
        lr,
        momentum=None,
        dampening=None,
        weight_decay=None,
        nesterov=None,
        maximize=None,
        foreach=None,
        differentiable=None,
        loss_scaling=None,
        velocity_scaling=None,
        use_combined_accum=None,
        accum_type=None,
        velocity_accum_type=None,
        max_grad_norm=None,
    ):
        given = dict(locals())
        extras = (
            "loss_scaling",
            "velocity_scaling",
            "use_combined_accum",
            "accum_type",
            "velocity_accum_type",
            "max_grad_norm",
        )
        torch.optim.SGD.__init__(self, **self._begin(given, extras))
        self._end()


class LAMB(Optimizer, torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=None,
        betas=None,
        eps=None,
        weight_decay=None,
        bias_correction=None,
        loss_scaling=None,
        max_weight_norm=None,
        accum_type=None,
        first_order_momentum_accum_type=None,
        second_order_momentum_accum_type=None,
    ):
        given = self._begin(locals(), (*_MOMENTS, "bias_correction"))
        defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        defaults["max_weight_norm"] = 65500.0
        defaults.update({k: v for k, v in given.items() if k != "params"})
        torch.optim.Optimizer.__init__(self, given["params"], defaults)
        self._end()


def group_numbers(group):
    """What of a parameter group goes to the IPUs."""
    names = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "max_weight_norm")
    numbers = {name: group[name] for name in names if name in group}
    if "betas" in numbers:
        assert isinstance(numbers["betas"], tuple), (
            f"Expected a pair for betas but got {numbers['betas']} instead"
        )
    for name, value in numbers.items():
        if isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a number and is a tensor")
    if numbers.get("eps", 1.0) <= 0:
        raise Error(f"Non-positive eps ({numbers['eps']}) in Adam is not supported")
    if group.get("amsgrad"):
        raise ValueError("Only non-amsgrad Adam/AdamW optimizers are supported.")
    return numbers


def describe(optimizer):
    """All numbers of an optimizer, each with whether it is constant."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise AssertionError("Unsupported optimizer type.")
    constant = getattr(optimizer, "variable_attrs", None)

    def pairs(numbers):
        return {
            name: (value, constant.isConstant(name) if constant else name != "lr")
            for name, value in numbers.items()
        }

    scaling = getattr(optimizer, "loss_scaling", 1.0)
    return {
        "type": type(optimizer).__name__,
        "defaults": pairs(group_numbers(optimizer.defaults)),
        "loss_scaling": (scaling, constant.isConstant("loss_scaling") if constant else True),
        "max_grad_norm": getattr(optimizer, "max_grad_norm", float("inf")),
        "groups": [pairs(group_numbers(group)) for group in optimizer.param_groups],
    }


def check_replacement(old, new):
    """What PopART checks when numbers change: constants must not."""
    if old["type"] != new["type"]:
        raise Error(f"Can not replace optimizer of type {old['type']} with {new['type']}")
    if old["max_grad_norm"] != new["max_grad_norm"]:
        raise Error("Clip norm settings at index 0 do not match.")
    for before, after in zip([old["defaults"], *old["groups"]], [new["defaults"], *new["groups"]]):
        for name, (value, constant) in before.items():
            if constant and after[name][0] != value:
                raise Error(f"Problem with {name}. Values are constant but do not match.")
