import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.batches import (
    BatchPlan,
    equal_micro_batches,
    micro_batch_size_of,
)
from lightning_ipu_bert.pipeline.config import PipelineConfig


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"layers_per_stage": []}, ["layers_per_stage=[]", "[3, 7, 7, 7]"]),
        ({"layers_per_stage": [3, -2]}, ["layers_per_stage=[3, -2]"]),
        ({"replication_factor": 0}, ["replication_factor=0", "at least 1"]),
        ({"gradient_accumulation_steps": 2.5}, ["gradient_accumulation_steps=2.5"]),
        ({"stages_per_rank": 3}, ["stages_per_rank=3", "does not divide the 4 stages"]),
        ({"schedule": "1b1f"}, ["'1b1f' is unknown", "'1f1b'"]),
        ({"schedule": "gpip"}, ["Did you mean 'gpipe'"]),
        ({"schedule": "interleaved_1f1b"}, ["stages_per_rank=1", "2 or more"]),
        ({"schedule": "gpipe", "stages_per_rank": 2}, ["one stage on a rank"]),
        ({"gradient_accumulation_steps": 3}, ["=3 is too few", "on 4 stages", "4 or more"]),
        (
            {"schedule": "zero_bubble", "gradient_accumulation_steps": 9},
            ["=9 does not part into 2 equal rounds", "12"],
        ),
    ],
)
def test_rules_are_told_in_one_line(values, parts):
    fitting = {"layers_per_stage": [3, 7, 7, 7], "gradient_accumulation_steps": 8}
    with pytest.raises(UserError) as error:
        PipelineConfig(**{**fitting, **values})
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


def test_ranks_and_stages():
    config = PipelineConfig(
        [3, 3, 3, 3],
        replication_factor=2,
        gradient_accumulation_steps=4,
        stages_per_rank=2,
        schedule="interleaved_1f1b",
    )
    assert (config.num_stages, config.ranks_per_replica, config.world_size) == (4, 2, 4)
    assert [config.stages_of(position) for position in range(2)] == [[0, 2], [1, 3]]


def test_sharding_needs_replicas():
    assert not PipelineConfig([6], replicated_tensor_sharding=True).shards_optimizer
    assert PipelineConfig([6], 2, replicated_tensor_sharding=True).shards_optimizer


sizes = st.integers(1, 64)


@given(sizes, sizes, sizes, sizes)
def test_batch_algebra(micro, steps, replicas, iterations):
    plan = BatchPlan(micro, steps, replicas, iterations)
    assert plan.global_batch_size == micro * steps * replicas
    assert plan.host_batch_size == plan.global_batch_size * iterations
    assert micro_batch_size_of(plan.replica_batch_size, steps) == micro


def test_a_batch_that_micro_batches_do_not_divide():
    with pytest.raises(
        UserError, match=r"batch_size=10 does not part into .*=4 .* batch_size=12\."
    ):
        micro_batch_size_of(10, 4)
    with pytest.raises(UserError, match="batch_size=4"):
        micro_batch_size_of(3, 4)


@given(st.integers(1, 500), st.integers(1, 32))
def test_ragged_batches_lose_no_example(examples, micro_batch_size):
    number, size = equal_micro_batches(examples, micro_batch_size)
    assert number * size == examples
    assert size <= micro_batch_size
    larger = range(size + 1, min(examples, micro_batch_size) + 1)
    assert all(examples % other for other in larger)
