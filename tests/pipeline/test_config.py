import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.batches import (
    BatchAlgebra,
    equal_micro_batches,
    micro_batch_size_of,
)
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.rules import enforce


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"layers_per_stage": []}, ["layers_per_stage=[]", "[3, 7, 7, 7]"]),
        ({"layers_per_stage": [3, -2]}, ["layers_per_stage=[3, -2]"]),
        ({"replication_factor": 0}, ["replication_factor=0", "at least 1"]),
        ({"gradient_accumulation_steps": 2.5}, ["gradient_accumulation_steps=2.5"]),
        (
            {"stages_per_rank": 3, "schedule": "zero_bubble"},
            ["stages_per_rank=3", "must divide the 4 stages"],
        ),
        ({"schedule": "1b1f"}, ["'1b1f' is unknown", "'1f1b'"]),
        ({"schedule": "gpip"}, ["Did you mean 'gpipe'"]),
        ({"schedule": "interleaved_1f1b"}, ["stages_per_rank=1", "2 or more"]),
        ({"schedule": "gpipe", "stages_per_rank": 2}, ["one stage per rank"]),
        ({"gradient_accumulation_steps": 3}, ["=3 is too few", "with 4 stages", "4 or more"]),
        (
            {"schedule": "zero_bubble", "gradient_accumulation_steps": 9},
            ["=9 must be divisible by 2, the number of rounds", "12"],
        ),
    ],
)
def test_rules_are_told_in_one_line(values, parts):
    fitting = {"layers_per_stage": [3, 7, 7, 7], "gradient_accumulation_steps": 8}
    config = PipelineConfig(**{**fitting, **values})
    broken = [str(violation) for violation in violations(config)]
    assert all(part in broken[0] for part in parts), broken
    assert "\n" not in broken[0]
    with pytest.raises(UserError) as error:
        enforce(violations(config))
    assert str(error.value) == broken[0]


def violations(config):
    """All of them; rules of values together count once single values are right."""
    broken = list(config.value_rules())
    return broken or [*config.shape_rules(), *config.training_rules()]


def test_all_violations_are_told_at_once():
    config = PipelineConfig([3, -2], 0, True, stages_per_rank=0.5, schedule="nothing")
    broken = [violation.field for violation in config.value_rules()]
    assert broken == [
        "layers_per_stage",
        "replication_factor",
        "stages_per_rank",
        "gradient_accumulation_steps",
        "schedule",
    ]


def test_training_rules_are_no_rules_of_evaluation():
    config = PipelineConfig([3, 3], gradient_accumulation_steps=1)
    assert not [*config.value_rules(), *config.shape_rules()]
    (violation,) = config.training_rules()
    assert violation.field == "gradient_accumulation_steps"


def test_devices_fit_stages_and_replicas():
    config = PipelineConfig([3, 3], 2)
    assert not list(config.device_rules(4))
    assert not list(config.device_rules(2, num_nodes=2))
    (violation,) = config.device_rules(3)
    assert "Set devices to 4, or" in str(violation)
    (violation,) = config.device_rules(3, num_nodes=2)
    assert "devices=3 x num_nodes=2 must be 4" in str(violation)
    assert "Set devices to 4 in total" in str(violation)


@given(st.integers(1, 9), st.integers(1, 4))
def test_without_stages_every_device_has_one(devices, replicas):
    config = PipelineConfig(replication_factor=replicas).for_devices(devices * replicas)
    assert config.layers_per_stage == [-1] * devices
    assert config.gradient_accumulation_steps == devices
    assert config.shape.num_devices == devices * replicas
    assert not [*config.value_rules(), *config.shape_rules(), *config.training_rules()]


def test_ranks_and_stages():
    config = PipelineConfig(
        [3, 3, 3, 3],
        replication_factor=2,
        gradient_accumulation_steps=4,
        stages_per_rank=2,
        schedule="interleaved_1f1b",
    )
    shape = config.shape
    assert (shape.num_stages, shape.ranks_per_replica, shape.num_devices) == (4, 2, 4)


sizes = st.integers(1, 64)


@given(sizes, sizes, sizes, sizes)
def test_batch_algebra(micro, steps, replicas, iterations):
    batches = BatchAlgebra(steps, replicas, iterations)
    assert batches.global_batch_size(micro) == micro * steps * replicas
    assert batches.host_batch_size(micro) == micro * steps * replicas * iterations
    assert batches.host_batch_size(micro) == micro * batches.micro_batches_per_call
    assert micro_batch_size_of(batches.replica_batch_size(micro), steps) == micro


def test_a_batch_that_micro_batches_do_not_divide():
    with pytest.raises(
        UserError, match=r"batch_size=10 must be divisible by .*=4, .* batch_size=12\."
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
