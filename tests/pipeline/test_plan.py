import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.batches import BatchAlgebra
from lightning_ipu_bert.pipeline.blocks import ModuleOutline, block_rules
from lightning_ipu_bert.pipeline.plan import PipelineShape, find_layers, partition, resolve
from lightning_ipu_bert.pipeline.rules import enforce
from lightning_ipu_bert.pipeline.table import device_allocation


def bert(layers):
    return ["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(layers)), "qa_outputs"]


LABELS = {
    "bert.embeddings": "Embedding",
    "bert.encoder.layer": "Encoder",
    "qa_outputs": "QA Outputs",
}


def test_device_allocation_of_bert_large():
    table = device_allocation(partition(bert(24), [3, 7, 7, 7]), LABELS)
    rows = [line.split(maxsplit=1) for line in table.splitlines()[3:-1]]
    assert rows == [
        ["0", "Embedding, Encoder 0-2"],
        ["1", "Encoder 3-9"],
        ["2", "Encoder 10-16"],
        ["3", "Encoder 17-23, QA Outputs"],
    ]


def test_blocks_without_a_label_keep_their_names():
    table = device_allocation([["embed", "layer.0"], ["layer.1", "layer.2", "head"]], {})
    assert "0  embed, layer 0" in table
    assert "1  layer 1-2, head" in table


@pytest.mark.parametrize(
    ("layers_per_stage", "layers", "resolved"),
    [
        ([-1], 24, [24]),
        ([-1, -1, -1], 24, [8, 8, 8]),
        ([-1, -1, -1, -1], 6, [1, 1, 1, 3]),  # the remainder on the last wildcard
        ([3, -1, 7, -1], 24, [3, 7, 7, 7]),
        ([0, 4, 4, 4], 12, [0, 4, 4, 4]),
        ([-1, 12], 12, [0, 12]),
    ],
)
def test_wildcards_share_the_rest(layers_per_stage, layers, resolved):
    blocks = [f"layers.{i}" for i in range(layers)]
    if 0 in resolved:
        blocks = ["embed", *blocks]
    placed = [
        sum("layers" in name for name in stage) for stage in partition(blocks, layers_per_stage)
    ]
    assert placed == resolved


def test_zeros_at_the_ends_hold_the_blocks_around_the_layers():
    stages = partition(bert(12), [0, 6, 6, 0])
    assert stages[0] == ("bert.embeddings",)
    assert stages[3] == ("qa_outputs",)


counts = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(counts, st.integers(0, 3), st.integers(0, 3))
def test_every_block_is_placed_once_in_forward_order(layers_per_stage, before, behind):
    names = [f"layers.{i}" for i in range(sum(layers_per_stage))]
    # Names of one letter: no run of numbers may be taken for layers but the layers.
    blocks = [*"abc"[:before], *names, *"xyz"[:behind]]
    stages = partition(blocks, layers_per_stage)
    assert [name for stage in stages for name in stage] == blocks
    layers = [sum(name in names for name in stage) for stage in stages]
    assert layers == layers_per_stage


def test_layers_are_the_longest_numbered_run():
    assert find_layers(["0", "1", "2"]) == ("0", "1", "2")
    assert find_layers(["c.0", "c.1", "h.0", "h.1", "h.2", "head"]) == ("h.0", "h.1", "h.2")
    assert find_layers(["conv1", "conv2"]) == ()


@pytest.mark.parametrize(
    ("layers_per_stage", "parts"),
    [
        ([3, 4], ["[3, 4] places 7 layers", "has 6"]),
        ([3, 2], ["places 5 layers", "-1"]),
        ([7, -1], ["places 7 layers"]),
        ([3, 0, 3], ["leaves stage 1 without a block"]),
    ],
)
def test_wrong_numbers_are_named_with_the_way_out(layers_per_stage, parts):
    with pytest.raises(UserError) as error:
        partition(bert(6), layers_per_stage)
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


def outline(layers, *tied):
    """BERT with a weight in every block, and names that share one parameter."""
    blocks = tuple(bert(layers))
    names = [f"{block}.weight" for block in blocks]
    free = {name: (name,) for name in names if name not in tied}
    parameters = {**free, **({tied[0]: tied} if tied else {})}
    return ModuleOutline("Model", blocks, parameters, {}, frozenset(blocks))


def test_a_misspelled_block_is_named():
    names = outline(2)
    wrong = names._replace(blocks=(*names.blocks[:-1], "qa_output"))
    with pytest.raises(UserError, match=r"returns 'qa_output', which .* mean 'qa_outputs'\?"):
        enforce(block_rules(wrong))


def shape(layers_per_stage, steps=4, replicas=1, **changes):
    return PipelineShape(tuple(layers_per_stage), BatchAlgebra(steps, replicas), **changes)


def test_a_plan_says_which_stages_hold_a_parameter():
    plan = resolve(outline(4), shape([1, 3]), None)
    assert plan.stages_of("bert.embeddings.weight") == (0,)
    assert plan.stages_of("bert.encoder.layer.0.weight") == (0,)
    assert plan.stages_of("bert.encoder.layer.3.weight") == (1,)
    assert plan.stages_of("qa_outputs.weight") == (1,)
    assert plan.stages_of("bert.encoder.layer.3.some_buffer") == (1,)
    assert plan.stages_of("metric.total") == ()  # in no block


def test_tied_parameters_are_held_by_several_stages():
    plan = resolve(outline(4, "bert.embeddings.weight", "qa_outputs.weight"), shape([2, 2]), None)
    assert plan.stages_of("bert.embeddings.weight") == (0, 1)
    assert plan.stages_of("qa_outputs.weight") == (0, 1)


def test_training_and_inference_may_be_cut_differently():
    plan = resolve(outline(4), shape([1, 3]), shape([2, 1, 1], steps=1))
    assert [len(stage) for stage in plan.of(training=True).stages] == [2, 4]
    assert [len(stage) for stage in plan.of(training=False).stages] == [3, 1, 2]
    assert plan.main is plan.training
    only = resolve(outline(4), None, shape([2, 1, 1]))
    assert only.main is only.inference


def test_looped_stages_and_their_ranks():
    plan = resolve(outline(4), shape([1, 1, 1, 1], stages_per_rank=2), None).main
    assert plan.ranks_per_replica == 2
    assert [plan.stages_on(rank) for rank in range(2)] == [[0, 2], [1, 3]]
    assert [plan.rank_of(stage) for stage in range(4)] == [0, 1, 0, 1]


def test_sharding_needs_replicas_and_says_so():
    alone = resolve(outline(4), shape([2, 2]), None, replicated_tensor_sharding=True)
    assert not alone.shards_optimizer
    assert "replicated_tensor_sharding has no effect" in next(alone.lines())
    shared = resolve(outline(4), shape([2, 2], replicas=2), None, replicated_tensor_sharding=True)
    assert shared.shards_optimizer
    (table,) = shared.lines()
    assert table.startswith("Device Allocation")


def test_a_plan_is_frozen():
    plan = resolve(outline(4), shape([2, 2]), None)
    with pytest.raises(AttributeError):
        plan.schedule = "gpipe"
