"""What a run does at the hooks of its Trainer, before the callbacks of the user."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import callbacks_of
from lightning_ipu_bert.strategies.distributed.generators import ReplicaGenerators
from lightning_ipu_bert.strategies.distributed.mesh import Mesh
from lightning_ipu_bert.strategies.distributed.step_replicas import StepReplicas


class RunHooks(Callback):
    """Callback of a run: random states, metrics, writers and weights of replicas."""

    def __init__(
        self,
        mesh: Mesh,
        replicas: StepReplicas,
        generators: ReplicaGenerators,
        load_all: Callable[[], None],
        load_buffers: Callable[[], None],
    ) -> None:
        """Create the callback.

        Args:
            mesh: Mesh coordinates and groups of this rank.
            replicas: The replicas that run a step.
            generators: Random states of the replicas.
            load_all: Loads the weights of all stages into the module, on every rank.
            load_buffers: The same for buffers only.
        """
        self._mesh = mesh
        self._generators = generators
        self._load_all = load_all
        self._load_buffers = load_buffers
        self._gather = ReplicaGather(replicas)
        self._metrics: List[Metric] = []
        self._silenced: List[Tuple[BasePredictionWriter, type]] = []
        self._watch = WholeStateWatch()
        self._handles: List[RemovableHandle] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._generators.begin(trainer)
        self._attach(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)
        if self._mesh.pipeline_rank:
            self._silence(trainer)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Dict[str, object]
    ) -> None:
        self._generators.save(checkpoint)
        self._load_buffers()  # for callbacks that save copies of the module

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Callbacks of the user may look at the trained weights from here on.
        self._load_all()

    def attach(self, module: nn.Module) -> None:
        """Warn where a state dict of the module has no weights of other stages."""
        for part in module.modules():
            register: Any = part.register_state_dict_post_hook  # untyped in torch
            self._handles.append(register(self._watch))

    @contextmanager
    def expecting_parts(self) -> Iterator[None]:
        """Expect state dicts without the weights of other stages within the context."""
        before, self._watch.expects_parts = self._watch.expects_parts, True
        yield
        self._watch.expects_parts = before

    def detach(self) -> None:
        """Restore module, metrics and writers."""
        while self._handles:
            self._handles.pop().remove()
        for metric in self._metrics:
            metric.dist_sync_fn = None
        self._metrics.clear()
        while self._silenced:
            writer, kind = self._silenced.pop()
            writer.__class__ = kind

    def _attach(self, trainer: Trainer) -> None:
        """Let the metrics of module and callbacks synchronize over one rank of each replica."""
        callbacks = callbacks_of(trainer)
        module = trainer.lightning_module
        owners = [module, *(vars(owner) for owner in (module, *callbacks))]
        for metric in metrics_in(owners):
            if metric.dist_sync_fn is None:
                metric.dist_sync_fn = self._gather
                self._metrics.append(metric)

    def _silence(self, trainer: Trainer) -> None:
        """Let only the first rank of the replica write predictions."""

        def nothing(*_: object, **__: object) -> None:
            """Do nothing: the first rank writes."""

        present = callbacks_of(trainer)
        for writer in present:
            if isinstance(writer, BasePredictionWriter):
                kind = type(writer)
                names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
                silent = {"write_on_batch_end": nothing, "write_on_epoch_end": nothing}
                writer.__class__ = type(kind.__name__, (kind,), {**names, **silent})
                self._silenced.append((writer, kind))


def metrics_in(value: object, depth: int = 4) -> Iterator[Metric]:
    """Yield the metrics in a module, a collection of modules, or one of collections.

    Args:
        value: Where to look.
        depth: How many collections may contain each other.
    """
    if isinstance(value, nn.Module):
        yield from (part for part in value.modules() if isinstance(part, Metric))
    elif isinstance(value, (Mapping, list, tuple)) and depth:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from metrics_in(item, depth - 1)


class ReplicaGather:
    """Gathers the states of a metric over one rank of each replica; copied with the metric."""

    def __init__(self, replicas: StepReplicas) -> None:
        """Create the function.

        Args:
            replicas: The replicas that run a step.
        """
        self._replicas = replicas

    def __call__(self, state: Tensor, group: object = None) -> List[Tensor]:
        """Return the states of all replicas."""
        gathered: List[Tensor] = gather_all_tensors(state, group or self._replicas.group)
        return gathered

    def __deepcopy__(self, _: object) -> ReplicaGather:
        """Return this object: process groups cannot be copied."""
        return self

    @override
    def __reduce__(self) -> Tuple[Callable[[], object], Tuple[()]]:
        """Return what a pickled metric synchronizes by: all processes, as without a pipeline."""
        return _every_process, ()


class WholeStateWatch:
    """Hook of `state_dict`, which warns once if the weights of other stages are missing."""

    def __init__(self) -> None:
        """Create a hook that warns."""
        self.expects_parts = False

    def __call__(self, _: nn.Module, state: Dict[str, object], *__: object) -> None:
        """Warn if there are meta tensors."""
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        if self.expects_parts or not any(tensor.is_meta for tensor in tensors):
            return
        self.expects_parts = True
        rank_zero_warn(
            "A state_dict() has no weights of other stages. Save them by trainer.save_checkpoint, "
            "or from on_train_end on, where every rank has all weights."
        )


def _every_process() -> object:
    return gather_all_tensors
