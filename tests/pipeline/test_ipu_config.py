"""IPUConfig: Graphcore's fields of both generations, and the rules of PopTorch."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ipu_bert import IPUConfig, UserError
from lightning_ipu_bert.pipeline.ipu.file import read_values, save_ipu_config
from lightning_ipu_bert.pipeline.ipu.program import enough_data_rule, program_rules
from lightning_ipu_bert.pipeline.plan import partition
from lightning_ipu_bert.pipeline.rules import enforce
from lightning_ipu_bert.strategies.ipu.console import ignored_fields

FIRST_GENERATION = {  # what optimum-graphcore 0.3.1 wrote for BERT-Large
    "use_popdist": False,
    "seed": None,
    "ipus_per_replica": 4,
    "layers_per_ipu": [3, 7, 7, 7],
    "replication_factor": {"pod4": 1, "pod8": 2, "pod16": 4, "pod32": 8, "default": 4},
    "inference_replication_factor": {"default": 4},
    "gradient_accumulation_steps": 16,
    "device_iterations": 1,
    "inference_device_iterations": 4,
    "optimizer_state_offchip": True,
    "replicated_tensor_sharding": True,
    "decompose_grad_sum": True,
    "sharded_execution_for_inference": False,
    "matmul_proportion": [0.15, 0.18, 0.2, 0.25],
    "enable_half_first_order_momentum": True,
    "enable_half_partials": True,
    "executable_cache_dir": "./exe_cache",
    "profile_dir": "",
    "embedding_serialization_factor": 2,
    "recompute_checkpoint_every_layer": True,
    "output_mode": "final",
    "execute_encoder_on_cpu_for_generation": False,
    "optimum_version": "1.2.0",
    "transformers_version": "4.18.0",
}
SECOND_GENERATION = {  # 0.7.1
    "layers_per_ipu": [-1],
    "ipus_per_replica": 4,
    "inference_layers_per_ipu": [12, 12],
    "inference_ipus_per_replica": 2,
    "matmul_proportion": 0.22,
    "inference_matmul_proportion": [0.3, 0.3],
    "inference_embedding_serialization_factor": 3,
    "serialized_embedding_splits_per_ipu": None,
    "projection_serialization_factor": None,
    "auto_loss_scaling": True,
    "explicit_ir_inference": True,
    "gradient_accumulation_steps": 512,
    "inference_device_iterations": 2,
    "parallelize_kwargs": {},
}


def test_a_file_of_the_first_generation():
    config = IPUConfig.from_dict(FIRST_GENERATION, "pod16")
    assert config.training.shape.num_devices == 16
    assert config.training.shape.batches.micro_batches_per_call == 64
    assert config.inference.shape.batches.micro_batches_per_call == 16
    assert config.inference.pipelined
    assert config.plan_fields()["layers_per_stage"] == [3, 7, 7, 7]
    assert config.decompose_grad_sum
    assert config.output_mode == "final"
    assert IPUConfig.from_dict(FIRST_GENERATION, "pod8").training.shape.num_devices == 8
    assert IPUConfig.from_dict(FIRST_GENERATION).replication_factor == 4


def test_a_file_of_the_second_generation():
    config = IPUConfig.from_dict(SECOND_GENERATION)
    assert config.training.shape.layers_per_stage == (-1, -1, -1, -1)
    assert config.training.matmul_proportion == [0.22] * 4
    assert config.inference.shape.layers_per_stage == (12, 12)
    assert config.inference.matmul_proportion == [0.3, 0.3]
    assert config.inference.embedding_serialization_factor == 3
    assert config.training.embedding_serialization_factor == 1


def test_a_plan_takes_the_place_of_a_file():
    config = IPUConfig.from_dict(FIRST_GENERATION, overrides={"layers_per_stage": [12, 12, 0, 0]})
    assert config.layers_per_ipu == [12, 12, 0, 0]
    config = IPUConfig.from_dict(
        {"matmul_proportion": [0.1, 0.2]},
        overrides={"layers_per_stage": [1, 1], "replication_factor": None},
    )
    assert config.training.matmul_proportion == [0.1, 0.2]


def read(source):
    return IPUConfig.from_dict(read_values(source))


@pytest.mark.parametrize("values", [FIRST_GENERATION, SECOND_GENERATION, {}])
def test_round_trips(values, tmp_path):
    config = IPUConfig.from_dict(values)
    path = save_ipu_config(config, tmp_path)
    assert read(path) == read(tmp_path) == config
    written = json.loads(path.read_text())
    assert IPUConfig.from_dict(written).to_dict() == written


def test_every_field_has_a_description():
    from lightning_ipu_bert.pipeline.ipu import config

    text = Path(config.__file__).read_text("utf8").split("class IPUConfig", 1)[1]
    for field in fields(IPUConfig):
        behind = text.split(f"    {field.name}: ", 1)[1].split("\n", 1)[1]
        assert behind.lstrip().startswith('"""'), field.name


def test_our_spelling_is_graphcores():
    config = IPUConfig.from_dict({"layers_per_stage": [1, 2], "gradient_accumulation_steps": 3})
    assert config.layers_per_ipu == [1, 2]


@pytest.mark.parametrize(
    ("name", "near"),
    [("layers_per_ipus", "layers_per_ipu"), ("replicationfactor", "replication_factor")],
)
def test_unknown_names_are_refused_with_the_nearest(name, near):
    with pytest.raises(
        UserError, match=rf"^{name}=1 is an unknown field .* Did you mean '{near}'\?"
    ):
        IPUConfig.from_dict({name: 1})


def test_what_has_no_effect_is_named():
    values = {"use_popdist": True, "projection_serialization_factor": 2, "parallelize_kwargs": {}}
    names = [text for text, _ in ignored_fields(IPUConfig.from_dict(values))]
    assert names == ["projection_serialization_factor=2", "use_popdist=True"]
    assert not list(ignored_fields(IPUConfig.from_dict(FIRST_GENERATION)))


WRONG = {
    "pod": ({"replication_factor": {"pod4": 1}}, "has no value for default"),
    "count": ({"gradient_accumulation_steps": 0}, "must be an integer of at least 1"),
    "boolean": ({"device_iterations": True}, "must be an integer"),
    "layers": ({"layers_per_ipu": [3, -2]}, "-1 share the remaining layers equally"),
    "entries": ({"layers_per_ipu": [3, 3], "ipus_per_replica": 4}, "2 entries for 4 IPUs"),
    "proportions": ({"matmul_proportion": [0.1, 0.2]}, "2 entries for 1 IPUs"),
    "proportion above 1": ({"matmul_proportion": 1.5}, r"1.5, which must be in \(0, 1\]"),
    "proportion of 0": ({"inference_matmul_proportion": 0.0}, r"0.0, which must be in \(0, 1\]"),
    "output mode": ({"output_mode": "last"}, "Use one of sum, all, final, default"),
    "splits": ({"serialized_embedding_splits_per_ipu": [1]}, "Use embedding_serialization_factor"),
    "encoder on CPU": ({"execute_encoder_on_cpu_for_generation": True}, "is not supported"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused(case):
    values, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        IPUConfig.from_dict(values)


def test_an_unknown_pod_is_refused():
    with pytest.raises(UserError, match="pod_type='pod5' is unknown"):
        IPUConfig.from_dict({"replication_factor": {"pod4": 1}}, "pod5")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="No IPU config could be read from"):
        read(tmp_path)
    with pytest.raises(UserError, match="Graphcore/bert-large-ipu"):
        read("me/none-such")  # offline: the hub is not asked


def graph(**values):
    return IPUConfig.from_dict(values)


@given(stages=st.integers(1, 16), steps=st.integers(1, 40))
def test_training_needs_a_micro_batch_for_each_forward_and_backward_stage(stages, steps):
    config = graph(layers_per_ipu=[1] * stages, gradient_accumulation_steps=steps)
    if steps >= 2 * stages - 1:
        enforce(program_rules(config.training, auto_round_num_ipus=True))
    else:
        with pytest.raises(UserError, match=f"the {2 * stages - 1} training stages"):
            enforce(program_rules(config.training, auto_round_num_ipus=True))


@given(stages=st.integers(1, 16), replicas=st.integers(1, 16), rounds=st.booleans())
def test_ipus_come_in_powers_of_two_up_to_64(stages, replicas, rounds):
    config = graph(
        layers_per_ipu=[1] * stages,
        replication_factor=replicas,
        gradient_accumulation_steps=2 * stages,
    )
    count = stages * replicas
    if count <= 64 and (rounds or count in (1, 2, 4, 8, 16, 32, 64)):
        enforce(program_rules(config.training, rounds))
    else:
        with pytest.raises(UserError, match=f"is {count} "):
            enforce(program_rules(config.training, rounds))


def test_pipelined_inference_needs_iterations_and_sharded_none():
    config = graph(layers_per_ipu=[3, 3], inference_device_iterations=1)
    with pytest.raises(UserError, match="cannot fill the 2 stages of inference"):
        enforce(program_rules(config.inference))
    enforce(
        program_rules(graph(layers_per_ipu=[3, 3], sharded_execution_for_inference=True).inference)
    )


def test_data_must_fill_one_call():
    training = graph(gradient_accumulation_steps=64, replication_factor=4).training
    enforce(enough_data_rule(256, 1, training))
    with pytest.raises(UserError, match="255 examples, but one call of the IPUs needs 256"):
        enforce(enough_data_rule(255, 1, training))


@given(st.lists(st.sampled_from([-1, 0, 1, 2, 3]), min_size=1, max_size=5), st.integers(1, 12))
def test_training_and_inference_place_layers_as_the_partition_does(layers, count):
    blocks = ["embed", *(f"layers.{i}" for i in range(count)), "head"]
    config = graph(layers_per_ipu=layers)
    for found in (config.training, config.inference):
        assert _placed(blocks, found.shape.layers_per_stage) == _placed(blocks, layers)


def _placed(blocks, layers):
    try:
        return partition(blocks, layers)
    except UserError as error:
        return str(error)
