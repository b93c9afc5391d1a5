"""`PoplarExecutor`: traces, compiles, attaches and runs a module, and keeps its weights in step."""

import copy

import torch

from poptorch import optim
from poptorch.device import COUNTS, POOL, Error
from poptorch.enums import ConnectionType, OutputMode
from poptorch.graph import Graph
from poptorch.optimizing import Optimizing
from poptorch.options import Options, ShardedExecution
from poptorch.runs import Runs
from poptorch.update import initial_state
from poptorch.weights import REMEMBERED, Weights, unwrapped

NOT_COMPILED = "Model has not been compiled or has been destroyed."


def trainingModel(model, options=None, optimizer=None):
    if isinstance(model, PoplarExecutor):
        model = model._user_model
    if getattr(type(model), "_is_poptorch_wrapper", False):
        raise RuntimeError("Model has already been wrapped in 'poptorch.trainingModel'.")
    return PoplarExecutor(copy.copy(model), options, True, "", optimizer, model)


def inferenceModel(model, options=None):
    if isinstance(model, PoplarExecutor):
        model = model._user_model
    return PoplarExecutor(copy.copy(model), options, False, "")


class PoplarExecutor(Weights, Optimizing, Runs):
    def __init__(self, model, options, training, poptorch_version, optimizer=None, user_model=None):
        self._user_model = user_model if user_model is not None else model
        self._model = model
        if options is not None:
            options._freeze()
        self._options = options.clone() if options is not None else Options()
        self._training = training
        if self._options.defaultOutputMode():
            self._options.outputMode(OutputMode.Final if training else OutputMode.All)
        if not training and self._options.Training.gradient_accumulation != 1:
            raise Error("You must set Training.gradientAccumulation to 1 for inferenceModel().")
        assert training or optimizer is None, "Optimizer should be None for inference"
        self._graph = None
        self._device_state, self._optimizer_state = {}, {}
        self._is_attached = False
        self._dirty_host_weights = self._host_rng_state_is_dirty = False
        self._host_weights_version = 0
        self._optimizer, self._numbers, self._numbers_dirty = None, None, False
        self._cached_rng_state = None
        if self._options.exists("random_seed"):
            self._cached_rng_state = [self._options.random_seed]
        if training:
            self.setOptimizer(optimizer or optim.SGD(self._user_model.parameters(), lr=0.01))
            self._wrap()
        self._options._freeze()

    # --- compilation ------------------------------------------------------------------------------

    def compile(self, *args, **kwargs):
        if self._graph is None:
            self._compile(args, kwargs)

    def _compile(self, args, kwargs):
        COUNTS["compilations"] += 1
        options = self._options
        for value in torch.utils._pytree.tree_flatten((args, kwargs))[0]:
            if isinstance(value, torch.Tensor):
                self._check_batch(value)
        self._inputs = (args, dict(kwargs))
        parts = [
            torch.utils._pytree.tree_map(self._narrow, value) for value in (args, dict(kwargs))
        ]
        if self._training:
            self._set_kinds(self._kinds[0].__bases__[0], torch.nn.Parameter, torch.Tensor)
        wrapped = unwrapped(self._model)
        try:
            graph = Graph(self._model, *parts)
        finally:
            for tensor, kind in wrapped:
                tensor.__class__ = kind
            for tensor in [*self._model.parameters(), *self._model.buffers()]:
                known, kind = REMEMBERED.get(id(tensor), (None, None))
                if known is not None and known() is tensor:
                    tensor.__class__ = kind  # even that of a program which is gone
            if self._training:
                self._set_kinds(*self._kinds)
        self._check_pipeline(graph)
        if graph.updates_buffers and options.replication_factor > 1 and options.broadcast_buffers:
            raise Error(
                "PopTorch does not support broadcasting buffers. If your model is able to tolerate "
                "buffers becoming out of sync between replicas, you can disable buffer "
                "broadcasting using poptorch.Options.broadcastBuffers(False)."
            )
        self._final_loss = graph.final_loss() if self._training else None
        self._graph = graph
        if self._training:
            self._place_optimizer()
        if options.connection_type != ConnectionType.Never:
            POOL.take(self.num_ipus)
            self._is_attached = True
            self._on_attach()

    def _place_optimizer(self):
        names = {id(p): name for name, p in self._model.named_parameters()}
        by_pointer = {t.data_ptr(): name for name, t in self._plain().items()}
        self._group_names = []
        for group in self._optimizer.param_groups:
            found = [names.get(id(p)) or by_pointer[p.data_ptr()] for p in group["params"]]
            self._group_names.append(found)
        grouped = [n for names in self._group_names for n in names]
        # What needs gradients and is in no group trains by the optimizer's defaults.
        self._ungrouped = [
            n for n, p in self._model.named_parameters() if p.requires_grad and n not in grouped
        ]
        self._trained = [*(n for n in self._plain() if n in grouped), *self._ungrouped]
        trained = {n: t for n, t in self._plain().items() if n in self._trained}
        self._optimizer_state = initial_state(self._numbers["type"], self._optimizer, trained)

    @property
    def num_ipus(self):
        count = self._graph.num_ipus * self._options.replication_factor
        return 1 << (count - 1).bit_length()

    def _check_pipeline(self, graph):
        options, stages = self._options, graph.num_stages
        count = graph.num_ipus * options.replication_factor
        pipelined = not isinstance(options._execution_strategy, ShardedExecution)
        steps = options.Training.gradient_accumulation
        if pipelined and self._training and steps < 2 * stages - 1:
            raise Error(
                "poptorch.Options().Training.gradientAccumulation must be greater than or equal to "
                f"the number of pipeline stages ({2 * stages - 1})"
            )
        if pipelined and not self._training and options.device_iterations < stages:
            raise Error(
                "poptorch.Options().deviceIterations must be greater than or equal to the number "
                f"of pipeline stages ({stages})"
            )
        if count > 64:
            raise Error(f"Too many IPUs requested ({count}).")
        if count & (count - 1) and not options.auto_round_num_ipus:
            raise Error(f"The model specifies the use of {count} IPUs: not a power of 2")

    @property
    def _factor(self):
        options = self._options
        per_iteration = options.Training.gradient_accumulation * options.replication_factor
        return options.device_iterations * per_iteration

    def _check_batch(self, tensor):
        if self._factor > 1 and (not tensor.dim() or len(tensor) % self._factor):
            raise Error(
                f"Invalid batch dimension: In the input {list(tensor.shape)}, the batch dimension "
                f"must be a multiple of {self._factor}"
            )

    def _narrow(self, value):
        if not isinstance(value, torch.Tensor) or self._factor == 1:
            return value
        return value[: len(value) // self._factor]

    # --- device -----------------------------------------------------------------------------------

    def isCompiled(self):
        return self._graph is not None

    def isAttachedToDevice(self):
        return self._is_attached

    def _check_compiled(self):
        if self._graph is None:
            raise Error(NOT_COMPILED)

    def attachToDevice(self):
        self._check_compiled()
        assert self._options.connection_type != ConnectionType.Never
        if self._is_attached:
            raise Error("Device is already attached")
        POOL.take(self.num_ipus)
        self._is_attached = True
        self._on_attach()

    def _on_attach(self):
        optimizer = self._optimizer
        self.copyWeightsToDevice()
        self._numbers_dirty = False
        if isinstance(optimizer, optim.Optimizer):
            if optimizer.has_state():
                optimizer.ipu_state_is_dirty = True
                self._write_optimizer_state()
            else:
                optimizer.host_state_is_dirty, optimizer.ipu_state_is_dirty = True, False
        if self._cached_rng_state is not None:
            self._set_generator(self._cached_rng_state)
        else:
            self._set_generator([0])

    def detachFromDevice(self):
        self._check_compiled()
        if not self._is_attached:
            raise Error("Device is not attached")
        self._read_rng_state()
        if self._training:
            self.copyWeightsToHostIfNeeded()
            if isinstance(self._optimizer, optim.Optimizer):
                self._optimizer.state_dict()
        POOL.give(self.num_ipus)
        self._is_attached = False

    def destroy(self):
        if self._graph is None:
            return
        if self._training:
            if self._is_attached:
                self.copyWeightsToHostIfNeeded()
                self._optimizer.state_dict()
            self._unwrap()
        if self._is_attached:
            POOL.give(self.num_ipus)
        self._is_attached, self._graph = False, None
