"""`PoplarExecutor`: traces, compiles, attaches and runs a module, and keeps its weights in step."""

import copy
import weakref
from types import MethodType

import torch

from poptorch import optim
from poptorch.device import COUNTS, POOL, Error
from poptorch.enums import ConnectionType, MeanReductionStrategy, OutputMode, ReductionType
from poptorch.graph import Graph
from poptorch.options import Options, ShardedExecution
from poptorch.update import clipped, initial_state, update

NOT_COMPILED = "Model has not been compiled or has been destroyed."
MISMATCH = (
    "\nThis error occurred because the inputs passed at runtime don't match the inputs used to "
    "compile the model."
)
_REMEMBERED = {}
"""Classes that parameters and buffers had, by id: compiling gives them back."""

WORDS_PER_IPU = 8
"""Of the state of the random numbers; real ones have 70,656."""


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


class PoplarExecutor:
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
            _REMEMBERED[id(tensor)] = weakref.ref(tensor), type(tensor)
        self._set_kinds(self._kinds[0].__bases__[0], torch.nn.Parameter, torch.Tensor)

    def _plain(self):
        """Parameters and buffers by name, without the fetching."""
        tensors = [*self._model.named_parameters(), *self._model.named_buffers()]
        with torch._C.DisableTorchFunction():
            return {name: _bare(t) for name, t in tensors}

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

    # --- optimizer --------------------------------------------------------------------------------

    def setOptimizer(self, optimizer):
        COUNTS["set_optimizer"] += 1
        if isinstance(optimizer, optim.Optimizer):
            if self.isCompiled() and optimizer is not self._optimizer:
                optimizer.ipu_state_is_dirty = True
            optimizer.state_dict = MethodType(PoplarExecutor._optimizer_state_dict, self)
        self._optimizer = optimizer
        if getattr(optimizer, "accum_type", None) == torch.float16:
            running = MeanReductionStrategy.Running
            training = self._options.Training
            if not self.isCompiled():
                self._options._freeze(False)
                training.setMeanAccumulationAndReplicationReductionStrategy(running)
                self._options._freeze()
            elif training.meanAccumulationAndReplicationReductionStrategy != running:
                raise ValueError("Invalid optimizer: the executable is already compiled.")
        numbers = optim.describe(optimizer)
        if numbers != self._numbers:
            if self._numbers is not None and self.isCompiled():
                optim.check_replacement(self._numbers, numbers)
            self._numbers, self._numbers_dirty = numbers, True
        if self.isAttachedToDevice():
            self._numbers_dirty = False
            self._write_optimizer_state()

    def _optimizer_state_dict(self):
        optimizer = self._optimizer
        if optimizer.host_state_is_dirty:
            self._check_compiled()
            assert not self._numbers_dirty, "Both host and ipu states cannot be dirty"
            parameters = {
                f"learningRate___specific___{name}": torch.tensor(group["lr"][0])
                for group, names in zip(self._numbers["groups"], self._group_names)
                for name in names
            }
            state = {name: t.clone() for name, t in self._optimizer_state.items()}
            optimizer.set_state_dict(
                {
                    "ipu_state": state,
                    "ipu_param": parameters,
                    **torch.optim.Optimizer.state_dict(optimizer),
                }
            )
            optimizer.ipu_state_is_dirty = False
        return optimizer.get_state_dict()

    def _write_optimizer_state(self):
        optimizer = self._optimizer
        if not (isinstance(optimizer, optim.Optimizer) and optimizer.ipu_state_is_dirty):
            return
        assert not optimizer.host_state_is_dirty, "Both host and ipu states cannot be dirty"
        if optimizer.has_state():
            self.copyWeightsToHostIfNeeded()
            given = optimizer.state_dict()["ipu_state"]
            for name, mine in self._optimizer_state.items():
                # The real one copies bytes from wherever the pointer points.
                assert name in given, f"a crash: no state {name}"
                fits = given[name].dtype == mine.dtype and given[name].shape == mine.shape
                assert fits and given[name].is_contiguous(), f"garbage: wrong bytes for {name}"
                mine.copy_(given[name])
        optimizer.ipu_state_is_dirty = False

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
        wrapped = _unwrapped(self._model)
        try:
            graph = Graph(self._model, *parts)
        finally:
            for tensor, kind in wrapped:
                tensor.__class__ = kind
            for tensor in [*self._model.parameters(), *self._model.buffers()]:
                known, kind = _REMEMBERED.get(id(tensor), (None, None))
                if known is not None and known() is tensor:
                    tensor.__class__ = kind  # even that of a program which is gone
            if self._training:
                self._set_kinds(*self._kinds)
        self._check_pipeline(graph)
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

    # --- random numbers ---------------------------------------------------------------------------

    @property
    def rng_state(self):
        return self._read_rng_state()

    def _read_rng_state(self):
        self._check_compiled()
        if self._host_rng_state_is_dirty:
            self._host_rng_state_is_dirty = False
            words = [self._generator_seed, self._drawn] * (WORDS_PER_IPU // 2) * self.num_ipus
            self._cached_rng_state = [self._generator_seed, *words]
        return self._cached_rng_state

    @rng_state.setter
    def rng_state(self, state):
        self._check_compiled()
        self._host_rng_state_is_dirty = False
        self._cached_rng_state = state.copy()
        if self._is_attached:
            self._set_generator(state)

    def _set_generator(self, state):
        if len(state) not in (1, 1 + WORDS_PER_IPU * self.num_ipus):
            raise Error(
                f"Devicex::setRngStateValue received rngState of size {len(state) - 1}; was "
                f"expecting size {WORDS_PER_IPU * self.num_ipus}"
            )
        self._generator_seed = state[0]
        self._drawn = state[2] if len(state) > 1 else 0

    # --- runs -------------------------------------------------------------------------------------

    def __call__(self, *args, **kwargs):
        assert self._options.connection_type != ConnectionType.Never, (
            "Trying to run a model on an offline device (ConnectionType.Never)"
        )
        if not self.isCompiled():
            self._compile(args, kwargs)
        if not self._is_attached:
            self.attachToDevice()
        if not self._training:
            fetch = getattr(self._user_model, "copyWeightsToHostIfNeeded", None)
            if callable(fetch):
                fetch()
                version = self._user_model._host_weights_version
                if self._host_weights_version != version:
                    self.copyWeightsToDevice()
                    self._host_weights_version = version
        _validate("inputs", self._inputs, (args, dict(kwargs)))
        self._write_optimizer_state()
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._generator_seed * 1_000_003 + self._drawn)
            outputs = self._train(args, kwargs) if self._training else self._infer(args, kwargs)
        self._drawn += 1
        self._host_rng_state_is_dirty = True
        if self._training:
            self._dirty_host_weights = True
            if isinstance(self._optimizer, optim.Optimizer):
                self._optimizer.host_state_is_dirty = True
        return self._rebuild([self._returned(parts) for parts in zip(*outputs)])

    def _micro_batches(self, args, kwargs):
        """[D][A][R] micro-batches, contiguous in the batch."""
        options = self._options
        shape = (
            options.device_iterations,
            options.Training.gradient_accumulation,
            options.replication_factor,
        )

        def part(index):
            def cut(value):
                if not isinstance(value, torch.Tensor) or self._factor == 1:
                    return value
                size = len(value) // self._factor
                return value[index * size : (index + 1) * size]

            return torch.utils._pytree.tree_map(cut, (list(args), dict(kwargs)))

        steps = shape[1] * shape[2]
        return [[part(d * steps + i) for i in range(steps)] for d in range(shape[0])]

    def _infer(self, args, kwargs):
        with torch.no_grad():
            return [
                self._graph.play(self._device_state, *part)[0]
                for iteration in self._micro_batches(args, kwargs)
                for part in iteration
            ]

    def _train(self, args, kwargs):
        options, outputs = self._options, []
        trained = self._trained
        for iteration in self._micro_batches(args, kwargs):
            sums = {}
            for part in iteration:
                state = {
                    n: t.clone().requires_grad_(n in trained and t.is_floating_point())
                    for n, t in self._device_state.items()
                }
                with torch.enable_grad():
                    found, losses = self._graph.play(state, *part)
                    loss = losses[self._final_loss] * self._numbers["loss_scaling"][0]
                    weights = {n: state[n] for n in trained}
                    gradients = torch.autograd.grad(
                        loss.sum(), list(weights.values()), allow_unused=True
                    )
                outputs.append([x.detach() for x in found])
                for name, gradient in zip(weights, gradients):
                    if gradient is not None:
                        sums[name] = sums.get(name, 0) + gradient.float()
            self._update(sums, len(iteration))
        assert options.output_mode != OutputMode.EveryN
        return outputs

    def _update(self, sums, count):
        mean = ReductionType.Mean
        reduction = self._options.Training.accumulation_and_replication_reduction_type
        scale = self._numbers["loss_scaling"][0] * (count if reduction == mean else 1)
        gradients = clipped({n: g / scale for n, g in sums.items()}, self._numbers["max_grad_norm"])
        with torch.no_grad():
            groups = [*self._numbers["groups"], self._numbers["defaults"]]
            for numbers, names in zip(groups, [*self._group_names, self._ungrouped]):
                for name in names:
                    if name in gradients:
                        update(
                            self._numbers["type"],
                            numbers,
                            self._device_state[name],
                            gradients[name],
                            self._optimizer_state,
                            name,
                        )

    def _returned(self, parts):
        """Put one output of all micro-batches together, by the output mode."""
        options, mode = self._options, self._options.output_mode
        replicas = options.replication_factor
        if mode == OutputMode.Final:
            parts = parts[-replicas:]
        elif mode == OutputMode.Sum:
            parts = [torch.stack(parts[r::replicas]).sum(0) for r in range(replicas)]
        scalar = not parts[0].dim()
        result = torch.stack(list(parts)) if scalar else torch.cat(list(parts))
        if scalar and len(parts) == 1:
            result = result[0]
        narrow = {torch.int64: torch.int32, torch.float64: torch.float32}
        result = result.to(narrow.get(result.dtype, result.dtype)).detach()

        def backward(*args, **kwargs):
            raise Error("backward() cannot be called explicitly on outputs of a PopTorch model.")

        result.backward = backward
        return result

    def _rebuild(self, tensors):
        given = iter(tensors)
        graph = self._graph
        leaves = [
            next(given) if is_tensor else constant
            for is_tensor, constant in zip(graph.is_tensor, graph.constants)
        ]
        return torch.utils._pytree.tree_unflatten(leaves, graph.structure)


def _bare(tensor):
    """The same memory as a plain tensor."""
    return tensor.detach().as_subclass(torch.Tensor)


def _unwrapped(module):
    """Turn wrapped parameters into plain ones; return what they were."""
    wrapped = []
    for tensor in [*module.parameters(), *module.buffers()]:
        kind = type(tensor)
        if kind not in (torch.nn.Parameter, torch.Tensor):
            wrapped.append((tensor, kind))
            tensor.__class__ = kind.__bases__[0]
    return wrapped


def _validate(name, compiled, given):
    """Check that inputs are those that were compiled for, down to plain numbers."""
    if type(compiled) is not type(given):
        raise Error(f"Type mismatch for {name}: expected {type(compiled)} but got {type(given)}")
    if isinstance(compiled, (list, tuple)):
        if len(compiled) != len(given):
            raise Error(f"Length mismatch for {name}: expected {len(compiled)} elements{MISMATCH}")
        for i, (a, b) in enumerate(zip(compiled, given)):
            _validate(f"{name}[{i}]", a, b)
    elif isinstance(compiled, dict):
        if set(compiled) != set(given):
            raise Error(f"Keys mismatch for {name}{MISMATCH}")
        for key, value in compiled.items():
            _validate(f"{name}[{key}]", value, given[key])
    elif isinstance(compiled, torch.Tensor):
        if compiled.dtype != given.dtype or compiled.shape != given.shape:
            raise Error(
                f"Shape mismatch for {name}: expected {compiled.shape} but got "
                f"{given.shape}.{MISMATCH}"
            )
    elif compiled != given:
        raise Error(f"Value mismatch for {name}: expected {compiled} but got {given}.{MISMATCH}")
