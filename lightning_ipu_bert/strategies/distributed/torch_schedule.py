"""Schedules of torch.distributed.pipelining for the stages of a rank."""

from __future__ import annotations

from typing import Dict, List, Sequence

import torch
from torch import Tensor

from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.schedules import SCHEDULES, torch_class_of
from lightning_ipu_bert.strategies.distributed.hidden_states import HiddenStates
from lightning_ipu_bert.strategies.distributed.mesh import Group
from lightning_ipu_bert.strategies.distributed.stage import Stage


def build_schedule(
    plan: Plan,
    stages: List[Stage],
    hidden_states: Sequence[HiddenStates],
    number: int,
    device: torch.device,
    group: Group,
) -> object:
    """Create the schedule for `number` micro-batches.

    Ragged last batches and evaluation may have fewer micro-batches than the schedule of the plan
    needs; they use a schedule that supports any number.

    Args:
        plan: The plan of the run.
        stages: The stages on this rank.
        hidden_states: What all stages receive.
        number: Number of micro-batches.
        device: Device of this rank.
        group: The ranks of this replica.
    """
    from torch.distributed.pipelining import PipelineStage, schedules

    def given(loss: Tensor, _: Tensor) -> Tensor:
        return loss  # computed by the last stage

    scalar = torch.zeros((), device=device, requires_grad=True)
    pipeline = plan.main
    made = [
        PipelineStage(
            stage,
            stage.index,
            pipeline.num_stages,
            device,
            input_args=hidden_states[stage.index].zeros(device),
            output_args=(scalar,)
            if stage.is_last
            else hidden_states[stage.index + 1].zeros(device),
            group=group,
        )
        for stage in stages
    ]
    name = torch_class_of(plan.schedule, pipeline.num_stages, pipeline.ranks_per_replica, number)
    return vars(schedules)[name](
        made if SCHEDULES[plan.schedule].takes_stage_list else made[0],
        n_microbatches=number,
        loss_fn=given,
        scale_grads=False,
    )


def chunked(num_micro_batches: int) -> Dict[str, object]:
    """Return the arguments of a call of a schedule.

    A schedule splits its tensor arguments into one chunk per micro-batch. The chunks of `index` are
    thus the indices of the micro-batches, from which a stage knows which one it runs. Without a
    `target` no loss would be computed; its value is not used.
    """
    index = torch.arange(num_micro_batches)
    return {"index": index, "target": index, "return_outputs": False}
