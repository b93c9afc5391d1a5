"""Values that a module logs while its stages run, on one rank and once per micro-batch.

`self.log` in `pipeline_loss` is collected, averaged over micro-batches and replicas by the weights
of their losses, and logged once, with the same value on every rank. In `stage_forward` it is
averaged by examples.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union

import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.strategies.distributed.stage import ScheduleCall

REDUCTIONS: Dict[str, Callable[[List[float]], float]] = {"sum": sum, "max": max, "min": min}
"""How values of micro-batches are combined, besides by a weighted mean."""
PASSED_ON = ("prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx", "rank_zero_only")
"""Options of `log`; the others are about combining values, which is done here."""


class Entry(NamedTuple):
    """A value that was logged for a micro-batch."""

    name: str
    value: Union[float, Tensor]
    stage: int
    weight: float
    """Weight of the micro-batch."""
    examples: Optional[int]
    """As given by the module."""
    reduction: str
    options: Mapping[str, object]


class LoggedValues:
    """What the stages of this rank log during one call of a schedule."""

    def __init__(self, call: ScheduleCall) -> None:
        """Create an object without values.

        Args:
            call: The call, with its current micro-batch.
        """
        self._call = call
        self._entries: List[Entry] = []

    def __len__(self) -> int:
        """Return how many values were logged."""
        return len(self._entries)

    @contextmanager
    def collected_from(self, model: nn.Module) -> Iterator[None]:
        """Collect what a module logs within the context, instead of logging it."""
        with replaced_log(model, self._collect):
            yield

    def _collect(self, *args: object, **kwargs: object) -> None:
        bound = inspect.signature(LightningModule.log).bind(None, *args, **kwargs)
        bound.apply_defaults()
        given, call = bound.arguments, self._call
        reduction = given["reduce_fx"]
        if isinstance(given["value"], (Metric, MetricCollection)):
            raise UserError(
                f"self.log({given['name']!r}) in pipeline_loss or stage_forward is given a metric, "
                "which exists on one stage only. Update and log it in training_step, with "
                "loss, output = self.run_loss(batch, return_output=True)."
            )
        self._entries.append(
            Entry(
                given["name"],
                given["value"].detach() if isinstance(given["value"], Tensor) else given["value"],
                call.stage,
                call.loss_weights[call.current] if call.in_loss else float(call.size),
                given["batch_size"],
                reduction if isinstance(reduction, str) else reduction.__name__,
                {name: given[name] for name in PASSED_ON},
            )
        )

    def log_everywhere(self, model: LightningModule, replicas: int) -> None:
        """Log the values of all ranks on this one; all ranks must call it.

        Args:
            model: The model.
            replicas: Number of replicas, over which Lightning combines values again.
        """
        own = [entry._replace(value=float(entry.value)) for entry in self._entries]
        parts: List[Tuple[int, List[Entry]]] = [(0, [])] * dist.get_world_size()
        dist.all_gather_object(parts, (len(self._call.micro_batches) * self._call.size, own))
        log: Callable[..., None] = model.log
        # The ranks of a replica have the same batch.
        global_batch = sum(examples for examples, _ in parts) * replicas // len(parts)
        for entries in by_name([entries for _, entries in parts]):
            given = [entry.examples for entry in entries if entry.examples is not None]
            share = 1 / replicas if entries[0].reduction == "sum" else 1.0
            log(
                entries[0].name,
                combined(entries) * share,
                batch_size=sum(given) or global_batch,
                reduce_fx=entries[0].reduction,
                sync_dist=True,  # replicas log the same; without it, Lightning warns
                **entries[0].options,
            )


def by_name(parts: List[List[Entry]]) -> List[List[Entry]]:
    """Return the values of every name; if several stages log a name, those of the last."""
    found: Dict[str, List[Entry]] = {}
    for entry in (entry for part in parts for entry in part):
        found.setdefault(entry.name, []).append(entry)
    last = {name: max(entry.stage for entry in entries) for name, entries in found.items()}
    return [[e for e in found[name] if e.stage == last[name]] for name in found]


def combined(entries: List[Entry]) -> float:
    """Return the value of the global batch from those of its micro-batches."""
    reduction = REDUCTIONS.get(entries[0].reduction)
    if reduction is not None:
        return reduction([float(entry.value) for entry in entries])
    total = sum(entry.weight for entry in entries)
    weighted = sum(float(e.value) * (e.weight if total else 1.0) for e in entries)
    return weighted / (total or len(entries))


@contextmanager
def replaced_log(model: nn.Module, log: Callable[..., None]) -> Iterator[None]:
    """Replace `model.log` within the context."""
    own = vars(model)
    before = own.get("log")
    own["log"] = log
    try:
        yield
    finally:
        del own["log"]  # restores the method of the class
        if before is not None:
            own["log"] = before


@contextmanager
def unlogged(model: nn.Module) -> Iterator[None]:
    """Log nothing within the context."""

    def nothing(*_: object, **__: object) -> None:
        """Do nothing."""

    with replaced_log(model, nothing):
        yield
