"""What bench_pipeline.py looks at inside a run: actions of stages, bytes that are held."""

from __future__ import annotations

import os
import time
import weakref
from typing import Any, Dict, List, NamedTuple, Set, Tuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from pipeline_sides import LENGTH, MICRO_BATCHES, MINILM, fit
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from typing_extensions import override

from lightning_ipu_bert.strategies.distributed import fingerprints, messages
from lightning_ipu_bert.training.random_states import GeneratorStates


class Done(NamedTuple):
    """A forward or backward that a stage has done."""

    kind: str
    """F or B."""
    stage: int
    begin: float
    end: float


class Update(NamedTuple):
    """What a rank did in a weight update."""

    begin: float
    end: float
    optimizer: float
    """When the optimizer began."""
    actions: List[Done]


class Watch(pl.Callback):
    """Notes when a rank's stages run forward and backward, for every update."""

    def __init__(self) -> None:
        self.updates: List[Update] = []
        self.actions: List[Done] = []

    @override
    def on_fit_start(self, *_: Any) -> None:
        for kind, name in (("F", "forward_one_chunk"), ("B", "backward_one_chunk")):
            setattr(PipelineStage, name, self._timed(kind, getattr(PipelineStage, name)))

    def _timed(self, kind: str, method: Any) -> Any:
        def run(stage: Any, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = method(stage, *args, **kwargs)
            self.actions.append(Done(kind, stage.stage_index, begin, time.perf_counter()))
            return result

        return run

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.actions, self.begin = [], time.perf_counter()

    @override
    def on_before_optimizer_step(self, *_: Any) -> None:
        self.optimizer = time.perf_counter()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        update = Update(self.begin, time.perf_counter(), self.optimizer, self.actions)
        self.updates.append(update)


class WatchReading(pl.Callback):
    """Notes the seconds in which a rank passes batches on, or takes them, and compares them.

    Without the time in which a rank waits for another one to have read. All updates are compared,
    of which a run compares the first 10 and every 100th.
    """

    def __init__(self) -> None:
        self.updates: List[Tuple[float, float]] = []
        self.seconds, self.begin = 0.0, time.perf_counter()

    @override
    def on_fit_start(self, *_: Any) -> None:
        for owner, names in (
            (messages, ("pack", "send", "unpack")),
            (GeneratorStates, ("restore",)),
            (fingerprints, ("fingerprint",)),
        ):
            for name in names:
                setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - begin
            return result

        return run

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        end = time.perf_counter()
        self.updates.append((self.seconds, end - self.begin))
        self.seconds, self.begin = 0.0, end


def watch_reading(
    size: Dict[str, Any], plan: Dict[str, Any], micro_batch: int, updates: int
) -> List[Tuple[float, float]]:
    """Train; return the seconds of reading and all seconds, of every update but the first."""
    watch = WatchReading()
    fit(size, micro_batch * MICRO_BATCHES, updates + 1, plan, [watch])
    return watch.updates[1:]


def watch_updates(
    size: Dict[str, Any],
    plan: Dict[str, Any],
    micro_batch: int,
    updates: int,
    length: int = LENGTH,
) -> List[Update]:
    """Train, and return what this rank did in every update but the first, cold one."""
    watch = Watch()
    examples = micro_batch * plan["gradient_accumulation_steps"]
    fit(size, examples, updates + 1, plan, [watch], length)
    return watch.updates[1:]


class Stash(pl.Callback):
    """Counts the bytes that autograd holds from the forward to the backward, without weights."""

    def __init__(self) -> None:
        self.bytes, self.peak = 0, 0
        self.holders: Dict[int, int] = {}
        self.weights: Set[int] = set()

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in pl_module.parameters()}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self.hooks.__enter__()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.hooks.__exit__()

    def _pack(self, tensor: Tensor) -> Any:
        held, storage = Held(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.weights:
            self.bytes += 0 if self.holders.get(place) else size
            self.peak = max(self.peak, self.bytes)
            self.holders[place] = self.holders.get(place, 0) + 1
            weakref.finalize(held, self._free, place, size)
        return held

    def _free(self, place: int, size: int) -> None:
        self.holders[place] -= 1
        self.bytes -= 0 if self.holders[place] else size


class Held:
    """A tensor that autograd holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # or a graph that is not run backward would hold itself


def peak_stash(size: Dict[str, Any], plan: Dict[str, Any], micro_batch: int) -> int:
    """Train two updates and return the most bytes that were held on this rank."""
    stash = Stash()
    fit(size, micro_batch * plan["gradient_accumulation_steps"], 2, plan, [stash])
    return stash.peak


def predicted_stash(layers: int, first: bool, last: bool, tokens: int, recompute: bool) -> int:
    """Return the bytes that a stage holds for a micro-batch, counted by hand in float32.

    A layer holds per token: its input, query, key, value, what attention gives, the input and the
    output of the first LayerNorm and the input of the second (8 D), the input and the output of
    GELU (2 I), the log-sum of every head's softmax, and mean and deviation of two LayerNorms. The
    embeddings hold the input of their LayerNorm, the head its input and two logarithmic softmaxes.
    """
    hidden, inner = MINILM["hidden_size"], MINILM["intermediate_size"]
    layer = 8 * hidden + 2 * inner + MINILM["num_attention_heads"] + 4
    ends = (first + last) * (hidden + 2)
    return int(4 * tokens * (layers * (hidden if recompute else layer) + ends))


class StateBytes(pl.Callback):
    """Counts the bytes of the optimizer's state at the end of a run."""

    bytes = 0

    @override
    def on_train_end(self, trainer: Any, *_: Any) -> None:
        entries = trainer.optimizers[0].state.values()
        tensors = [value for entry in entries for value in entry.values() if value.dim()]
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state_bytes(plan: Dict[str, Any]) -> int:
    """Train one update and return the bytes of this rank's optimizer state."""
    counted = StateBytes()
    fit(MINILM, plan["gradient_accumulation_steps"], 1, plan, [counted])
    return counted.bytes


def transfer_seconds(micro_batch: int, times: int = 50) -> float:
    """Return the time to send a hidden state between two ranks, measured back and forth."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    hidden = torch.zeros(micro_batch, LENGTH, MINILM["hidden_size"])
    dist.barrier()
    begin = time.perf_counter()
    for i in range(2 * times):
        dist.send(hidden, 1 - rank) if i % 2 == rank else dist.recv(hidden, 1 - rank)
    seconds = time.perf_counter() - begin
    dist.destroy_process_group()
    return seconds / (2 * times)
