"""Runs of a compiled graph: micro-batches, updates, results."""

import torch

from poptorch import optim
from poptorch.device import Error
from poptorch.enums import ConnectionType, OutputMode, ReductionType
from poptorch.update import clipped, update

MISMATCH = (
    "\nThis error occurred because the inputs passed at runtime don't match the inputs used to "
    "compile the model."
)
WORDS_PER_IPU = 8
"""Of the state of the random numbers; real ones have 70,656."""


class Runs:
    """The part of an executor that runs."""

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
        validate("inputs", self._inputs, (args, dict(kwargs)))
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
                    n: t.detach().requires_grad_(n in trained and t.is_floating_point())
                    for n, t in self._device_state.items()
                }
                # A forward may change buffers in place; changes end with the micro-batch.
                state.update((n, t.clone()) for n, t in state.items() if n not in trained)
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
                            self._numbers["loss_scaling"][0],
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


def validate(name, compiled, given):
    """Check that inputs are those that were compiled for, down to plain numbers."""
    if type(compiled) is not type(given):
        raise Error(f"Type mismatch for {name}: expected {type(compiled)} but got {type(given)}")
    if isinstance(compiled, (list, tuple)):
        if len(compiled) != len(given):
            raise Error(f"Length mismatch for {name}: expected {len(compiled)} elements{MISMATCH}")
        for i, (a, b) in enumerate(zip(compiled, given)):
            validate(f"{name}[{i}]", a, b)
    elif isinstance(compiled, dict):
        if set(compiled) != set(given):
            raise Error(f"Keys mismatch for {name}{MISMATCH}")
        for key, value in compiled.items():
            validate(f"{name}[{key}]", value, given[key])
    elif isinstance(compiled, torch.Tensor):
        if compiled.dtype != given.dtype or compiled.shape != given.shape:
            raise Error(
                f"Shape mismatch for {name}: expected {compiled.shape} but got "
                f"{given.shape}.{MISMATCH}"
            )
    elif compiled != given:
        raise Error(f"Value mismatch for {name}: expected {compiled} but got {given}.{MISMATCH}")
