"""Tracing: a module becomes a graph of tensor operations, placed on IPUs by its blocks.

The module runs once. What it does in Python happens then and never again; numbers and branches are
those of the trace; what would need a tensor's value raises.
"""

from collections import OrderedDict

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from poptorch.device import Error

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


class _Trace:
    """The trace that is going on."""

    active = None

    def __init__(self):
        self.blocks = []
        """(user_id, ipu_id) of every block, in the order in which they began."""
        self.ipus = []
        """The IPU of every operation."""

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


class _Placement(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _NEED_VALUES:
            raise Error(f"{func} needs the value of a tensor, which has none while it is traced")
        _Trace.active.ipus.append(_Trace.active.ipu)
        return func(*args, **(kwargs or {}))


class Graph:
    """A traced module."""

    def __init__(self, module, args, kwargs):
        self.state_names = [
            name for name, _ in [*module.named_parameters(), *module.named_buffers()]
        ]
        trace = _Trace()
        out_structure = []

        def run(state, args, kwargs):
            with _Placement():
                out = torch.func.functional_call(module, state, tuple(args), kwargs)
            leaves, structure = torch.utils._pytree.tree_flatten(out)
            out_structure.append((leaves, structure))
            return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        _Trace.active = trace
        try:
            with torch.enable_grad():
                # Real tensors are traced faster, but CPUs lack kernels for half precision.
                mode = "fake" if _has_half((state, args, kwargs)) else "real"
                with torch.random.fork_rng(devices=[]):
                    traced = make_fx(run, tracing_mode=mode)(
                        _copies(state), list(args), dict(kwargs)
                    )
        finally:
            _Trace.active = None
        leaves, self.structure = out_structure[-1]
        self.constants = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        self.is_tensor = [isinstance(x, torch.Tensor) for x in leaves]
        self.module, self.blocks = traced, trace.blocks
        self.ipus_of_ops = trace.ipus
        losses = [n for n in traced.graph.nodes if n.op == "call_function" and n.target in LOSSES]
        self.losses = losses
        self._replay = _replayed(traced, losses)

    @property
    def num_stages(self):
        """Forward stages: changes of the IPU, and one."""
        ipus = [0, *self.ipus_of_ops]
        return 1 + sum(a != b for a, b in zip(ipus, ipus[1:]))

    @property
    def num_ipus(self):
        return max(len(set(self.ipus_of_ops)), max(self.ipus_of_ops, default=0) + 1)

    @property
    def recomputation_checkpoints(self):
        nodes = self.module.graph.nodes
        return sum(n.target is RECOMPUTATION_CHECKPOINT for n in nodes)

    def final_loss(self):
        """The node from which backward goes: the last loss, on which all others must lead."""
        if not self.losses:
            raise Error("Couldn't find a loss in graph!")
        final = self.losses[-1]
        reached, todo = set(), [final]
        while todo:
            node = todo.pop()
            if node not in reached:
                reached.add(node)
                todo.extend(node.all_input_nodes)
        if any(loss not in reached for loss in self.losses):
            raise Error("Multiple independent losses found in graph")
        return final

    def play(self, state, args, kwargs):
        """Run the graph; return its outputs and the value of every node that is a loss."""
        leaves = torch.utils._pytree.tree_flatten((state, list(args), dict(kwargs)))[0]
        if _has_half(leaves):
            player = _Player(self.module)
            return player.run(*leaves), player.kept
        outputs, losses = self._replay(*leaves)
        values = [value[0] if isinstance(value, tuple) else value for value in losses]
        return outputs, dict(zip(self.losses, values))


def _has_half(values):
    leaves = torch.utils._pytree.tree_flatten(values)[0]
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.float16 for x in leaves)


def _copies(state):
    """Tensors that a trace may change in place, and that need gradients where the originals do."""
    return {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in state.items()}


def _replayed(traced, losses):
    """The graph as a function that also returns the losses; custom operations have gradients."""
    graph, copies = torch.fx.Graph(), {}
    outputs = graph.graph_copy(traced.graph, copies)
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = REPLAYED.get(node.target, node.target)
    graph.output((outputs, [copies[node] for node in losses]))
    return torch.fx.GraphModule(traced, graph)


class _Player(torch.fx.Interpreter):
    """Plays a graph of half precision: computed in single and rounded, since CPUs lack kernels."""

    def __init__(self, module):
        super().__init__(module)
        self.kept = {}

    def run_node(self, n):
        value = super().run_node(n)
        if n.op == "call_function" and n.target in LOSSES:
            self.kept[n] = value[0] if isinstance(value, tuple) else value
        return value

    def call_function(self, target, args, kwargs):
        target = REPLAYED.get(target, target)
        leaves = torch.utils._pytree.tree_flatten((args, kwargs))[0]
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if not any(t.dtype == torch.float16 for t in tensors) or target is OPERATOR_GETITEM:
            return target(*args, **kwargs)
        args, kwargs = torch.utils._pytree.tree_map(_to_single, (args, kwargs))
        half = all(t.dtype == torch.float16 for t in tensors if t.is_floating_point())
        value = target(*args, **kwargs)
        return torch.utils._pytree.tree_map(_to_half, value) if half else value


OPERATOR_GETITEM = __import__("operator").getitem


def _to_single(x):
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float16 else x


def _to_half(x):
    return x.half() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
