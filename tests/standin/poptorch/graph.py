"""Tracing: a module becomes a graph of tensor operations, placed on IPUs by its blocks.

The module runs once. What it does in Python happens then and never again; numbers and branches are
those of the trace; what would need a tensor's value raises.
"""

from collections import OrderedDict

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from poptorch.device import Error
from poptorch.devices import Devices

_LIBRARY = torch.library.Library("poptorch_standin", "DEF")
for _name, _schema in (
    ("identity_loss", "(Tensor x, int reduction) -> Tensor"),
    ("recomputation_checkpoint", "(Tensor x) -> Tensor"),
):
    _LIBRARY.define(_name + _schema)


def _reduced(x, reduction):
    return (x.sum(), x.mean(), x.clone())[reduction]


_LIBRARY.impl("identity_loss", _reduced, "CompositeExplicitAutograd")
_LIBRARY.impl("recomputation_checkpoint", lambda x: x.clone(), "CompositeExplicitAutograd")

IDENTITY_LOSS = torch.ops.poptorch_standin.identity_loss.default
RECOMPUTATION_CHECKPOINT = torch.ops.poptorch_standin.recomputation_checkpoint.default
REPLAYED = {IDENTITY_LOSS: _reduced, RECOMPUTATION_CHECKPOINT: lambda x: x.clone()}
"""Custom operations as plain functions, which have gradients."""

LOSSES = (
    IDENTITY_LOSS,
    torch.ops.aten.nll_loss_forward.default,
    torch.ops.aten.nll_loss2d_forward.default,
    torch.ops.aten.mse_loss.default,
    torch.ops.aten.binary_cross_entropy.default,
)
"""Where backward may begin. PopTorch takes these loss functions for identity losses, too."""

BATCH_NORMS = (
    torch.ops.aten.native_batch_norm.default,
    torch.ops.aten.cudnn_batch_norm.default,
)


class _Trace:
    """The trace that is going on."""

    active = None

    def __init__(self):
        self.blocks = []
        """(user_id, ipu_id) of every block, in the order in which they began."""

    @property
    def ipu(self):
        return self.blocks[-1][1] if self.blocks else 0


class _BlockHook:
    def __init__(self, user_id, ipu_id):
        self.user_id, self.ipu_id = user_id, ipu_id

    def __call__(self, module, inputs):
        if _Trace.active is not None:
            _Trace.active.blocks.append((self.user_id, self.ipu_id))


class Block:
    """Its blocks are not needed here; the name is, for those who ask whether a trace is on."""


def BeginBlock(layer_to_call, user_id=None, ipu_id=None):
    if any(isinstance(hook, _BlockHook) for hook in layer_to_call._forward_pre_hooks.values()):
        raise Error("module has already been assigned to a block.")
    layer_to_call.register_forward_pre_hook(_BlockHook(user_id, ipu_id))
    return layer_to_call


def removeBlocks(module):
    assert isinstance(module, torch.nn.Module)
    for m in module.modules():
        m._forward_pre_hooks = OrderedDict(
            (key, hook)
            for key, hook in m._forward_pre_hooks.items()
            if not isinstance(hook, _BlockHook)
        )


def identity_loss(x, reduction):
    return IDENTITY_LOSS(x, ("sum", "mean", "none").index(reduction))


def recomputationCheckpoint(*tensors):
    kept = tuple(RECOMPUTATION_CHECKPOINT(t) for t in tensors)
    return kept if len(kept) > 1 else kept[0]


_NEED_VALUES = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
)


class Operation:
    """An operation of a graph, whose tensors are named by numbers."""

    def __init__(self, function, arguments, value, results, ipu):
        self.function, self.arguments, self.results, self.ipu = function, arguments, results, ipu
        self.is_one = isinstance(value, torch.Tensor)
        self.is_flat = not self.is_one and all(isinstance(x, torch.Tensor) for x in value)

    @property
    def inputs(self):
        return {leaf.number for leaf in _leaves(self.arguments) if isinstance(leaf, _Number)}

    @property
    def gives_half(self):
        """Whether it is computed in single precision, as CPUs lack kernels, and gives half."""
        leaves = [leaf for leaf in _leaves(self.arguments) if isinstance(leaf, _Number)]
        kinds = {leaf.dtype for leaf in leaves if leaf.dtype.is_floating_point}
        return kinds == {torch.float16}

    @property
    def changes_half(self):
        """Whether it changes a half tensor in place."""
        return _is_in_place(self.function) and self.arguments[0][0].dtype == torch.float16


class _Number:
    def __init__(self, number, dtype):
        self.number, self.dtype = number, dtype


class _Recorder(TorchDispatchMode):
    """Records the operations of a trace. Tensors that no operation has made are constants."""

    def __init__(self, inputs):
        super().__init__()
        self.operations, self.constants, self.kept = [], {}, []
        self.numbers = {}
        self.inputs = [self.number_of(x) for x in inputs]

    def number_of(self, tensor):
        if id(tensor) not in self.numbers:
            self.kept.append(tensor)  # or another one could have its id
            self.numbers[id(tensor)] = len(self.kept)
        dtype = tensor.dtype if isinstance(tensor, torch.Tensor) else torch.int64
        return _Number(self.numbers[id(tensor)], dtype)

    def argument(self, leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in self.numbers:
            self.constants[self.number_of(leaf).number] = leaf
        return self.number_of(leaf)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _NEED_VALUES:
            raise Error(f"{func} needs the value of a tensor, which has none while it is traced")
        arguments = _map(self.argument, (args, kwargs or {}))
        value = _computed(REPLAYED.get(func, func), *args, **(kwargs or {}))
        results = [self.number_of(x) for x in _tensors(value)]
        op = Operation(func, arguments, value, results, _Trace.active.ipu)
        self.operations.append(op)
        return value


class Graph:
    """A traced module."""

    def __init__(self, module, args, kwargs):
        self.state_names = [
            name for name, _ in [*module.named_parameters(), *module.named_buffers()]
        ]
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        state, args, kwargs = _copies((state, list(args), dict(kwargs)))
        trace, recorder = _Trace(), _Recorder([*state.values(), *_leaves((args, kwargs))])
        _Trace.active = trace
        try:
            devices = Devices([*state.values(), *_tensors((args, kwargs))])
            with torch.enable_grad(), torch.random.fork_rng(devices=[]), recorder, devices:
                out = torch.func.functional_call(module, state, tuple(args), kwargs)
        finally:
            _Trace.active = None
        leaves, self.structure = torch.utils._pytree.tree_flatten(out)
        self.is_tensor = [isinstance(x, torch.Tensor) for x in leaves]
        self.constants = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        outputs = [recorder.argument(x) for x in leaves if isinstance(x, torch.Tensor)]
        self.operations, self.blocks = recorder.operations, trace.blocks
        self.losses = [op for op in self.operations if op.function in LOSSES]
        self._replay = _compiled(self, recorder.inputs, outputs, recorder.constants)

    @property
    def ipus_of_ops(self):
        return [op.ipu for op in self.operations]

    @property
    def num_stages(self):
        """Forward stages: changes of the IPU, and one."""
        ipus = [0, *self.ipus_of_ops]
        return 1 + sum(a != b for a, b in zip(ipus, ipus[1:]))

    @property
    def num_ipus(self):
        return max(len(set(self.ipus_of_ops)), max(self.ipus_of_ops, default=0) + 1)

    @property
    def updates_buffers(self):
        """Whether the forward changes buffers: their replicas would have to be broadcast."""
        return any(
            op.function in BATCH_NORMS and op.arguments[0][5] is True for op in self.operations
        )

    @property
    def recomputation_checkpoints(self):
        return sum(op.function is RECOMPUTATION_CHECKPOINT for op in self.operations)

    def final_loss(self):
        """The operation from which backward goes: the last loss, on which all others must lead."""
        if not self.losses:
            raise Error("Couldn't find a loss in graph!")
        final = self.losses[-1]
        needed, reached = {result.number for result in final.results}, set()
        for op in reversed(self.operations):
            if needed.intersection(result.number for result in op.results):
                needed |= op.inputs
                reached.add(op)
        if any(loss not in reached for loss in self.losses):
            raise Error("Multiple independent losses found in graph")
        return final

    def play(self, state, args, kwargs):
        """Run the graph; return its outputs and the value of every operation that is a loss."""
        outputs, losses = self._replay([*state.values(), *_leaves((list(args), dict(kwargs)))])
        return outputs, dict(zip(self.losses, losses))


def _compiled(graph, inputs, outputs, own_tensors):
    """Return a function of the inputs that runs all operations: code without any look-up."""
    constants = []

    def code_of(value, half_as=""):
        if isinstance(value, _Number):
            return f"v{value.number}{half_as if value.dtype == torch.float16 else ''}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(code_of(item, half_as) for item in value)}]"
        constants.append(value)
        return f"c[{len(constants) - 1}]"

    lines = ["def replay(inputs):", f"  {code_of(inputs)} = inputs"]
    lines += [f"  v{number} = {code_of(tensor)}" for number, tensor in own_tensors.items()]
    for op in graph.operations:
        args, kwargs = op.arguments
        words = [code_of(value, ".float()") for value in args]
        words += [f"{key}={code_of(value, '.float()')}" for key, value in kwargs.items()]
        call = f"{code_of(REPLAYED.get(op.function, op.function))}({', '.join(words)})"
        if op.changes_half:
            call = f"{code_of(args[0])}.copy_({call})"
        call = call if op.is_one or op.is_flat else f"tensors({call})"
        names = code_of(op.results[0] if op.is_one else op.results)
        lines.append(f"  {names} = {call}")
        halves = [code_of(r) for r in op.results if op.gives_half and r.dtype == torch.float16]
        lines += [f"  {name} = {name}.half()" for name in halves]
    losses = [op.results[0] for op in graph.losses]
    lines.append(f"  return {code_of(outputs)}, {code_of(losses)}")
    names = {"c": constants, "tensors": _tensors}
    exec("\n".join(lines), names)
    return names["replay"]


def _leaves(values):
    return torch.utils._pytree.tree_flatten(values)[0]


def _tensors(values):
    return [x for x in _leaves(values) if isinstance(x, torch.Tensor)]


def _map(function, values):
    return torch.utils._pytree.tree_map(function, values)


def _copies(values):
    """Tensors that a trace may change in place, and that need gradients where the originals do."""
    return _map(
        lambda x: (
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        ),
        values,
    )


def _computed(function, *args, **kwargs):
    """The value of an operation; half precision is computed in single: CPUs lack kernels."""
    tensors = _tensors((args, kwargs))
    if not any(t.dtype == torch.float16 for t in tensors):
        return function(*args, **kwargs)
    half = all(t.dtype == torch.float16 for t in tensors if t.is_floating_point())
    single, options = _map(_to_single, (args, kwargs))
    value = function(*single, **options)
    value = _map(_to_half, value) if half else value
    return args[0].copy_(value) if _is_in_place(function) else value


def _is_in_place(function):
    return function.__name__.split(".")[0].endswith("_")


def _to_single(x):
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float16 else x


def _to_half(x):
    return x.half() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
