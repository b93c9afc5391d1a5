"""Stages on IPUs: tracing, placement, and that annotations are removed."""

from contextlib import suppress

import lightning.pytorch as pl
import poptorch
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ipu_runs import ipu_strategy, ipu_trainer, loader, with_adamw
from models import make_model
from torch import nn

from lightning_ipu_bert import IPUConfig, UserError
from lightning_ipu_bert.pipeline.blocks import outline_of
from lightning_ipu_bert.pipeline.plan import partition, resolve
from lightning_ipu_bert.strategies.ipu.program.annotations import (
    annotated,
    lookup_in_parts,
    serialized,
)


class Graphs(pl.Callback):
    """Keeps the compiled graphs of a run."""

    def on_train_end(self, trainer, pl_module):
        programs = trainer.strategy.run.executor.programs
        self.training = programs.training.poplar._graph
        self.inference = next(iter(programs.inference.values())).poplar._graph
        self.names = [name for name, _ in programs.training.poplar._model.named_parameters()]


def compiled(tmp_path, **plan):
    module, examples = with_adamw("bert")
    graphs = Graphs()
    trainer = ipu_trainer(tmp_path, graphs, strategy=ipu_strategy(**plan))
    trainer.fit(module, loader(examples), loader(examples))
    return module, graphs


def test_blocks_lie_where_the_partition_says_in_both_pipelines(tmp_path):
    module, graphs = compiled(
        tmp_path,
        layers_per_stage=[1, 2, 2, 1],
        gradient_accumulation_steps=8,
        ipu_config={"inference_layers_per_ipu": [4, 2], "inference_device_iterations": 2},
    )
    blocks = module.pipeline_blocks()
    for graph, layers in ((graphs.training, [1, 2, 2, 1]), (graphs.inference, [4, 2])):
        expected = [
            (name, ipu) for ipu, names in enumerate(partition(blocks, layers)) for name in names
        ]
        assert graph.blocks == expected
        assert graph.num_stages == len(layers)


def test_every_layer_but_the_last_is_a_recomputation_checkpoint(tmp_path):
    _, graphs = compiled(tmp_path, recompute_checkpoint_every_layer=True)
    assert graphs.training.recomputation_checkpoints == 5
    assert graphs.inference.recomputation_checkpoints == 0
    _, graphs = compiled(tmp_path)
    assert graphs.training.recomputation_checkpoints == 0


def test_parameters_are_named_as_in_the_module(tmp_path):
    module, graphs = compiled(tmp_path)
    assert graphs.names == [name for name, _ in module.named_parameters()]


def test_annotations_end_with_the_trace_even_if_it_fails():
    module, _ = make_model("bert")
    config = IPUConfig.from_dict({"layers_per_ipu": [3, 3], "embedding_serialization_factor": 2})
    program = config.training
    plan = resolve(outline_of(module), program.shape, None, recompute=True)
    with suppress(KeyError), annotated(module, plan, program):
        assert any(m._forward_pre_hooks for m in module.modules())
        raise KeyError
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    assert not any("forward" in vars(m) for m in module.modules())


@given(
    factor=st.sampled_from([1, 2, 3, 4, 6, 12]),
    padding=st.sampled_from([None, 0, 5, 11]),
    ids=st.lists(st.integers(0, 11), min_size=1, max_size=20),
)
def test_a_table_read_in_parts_gives_the_same_rows_and_gradients(factor, padding, ids):
    torch.manual_seed(0)
    table = nn.Embedding(12, 3, padding_idx=padding)
    ids = torch.tensor(ids)
    weights = torch.randn(len(ids), 3)
    found = []
    for look_up in (table, lambda i: lookup_in_parts(table, factor, i)):
        table.zero_grad()
        rows = look_up(ids)
        (rows * weights).sum().backward()
        found.append((rows.detach(), table.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1])


def test_a_factor_that_does_not_divide_the_vocabulary_is_refused_with_those_that_do():
    message = r"does not divide the 30522 rows .* Use 1 or 2 or 3 or 6"
    with pytest.raises(UserError, match=message), serialized(nn.Embedding(30522, 1), 4):
        pass


def test_serialization_changes_the_program_and_not_the_module(tmp_path):
    module, graphs = compiled(tmp_path, ipu_config={"embedding_serialization_factor": 2})
    plain_module, plain = compiled(tmp_path)
    lookups = [
        sum(op.function is torch.ops.aten.embedding.default for op in found.training.operations)
        for found in (graphs, plain)
    ]
    assert lookups[0] == lookups[1] + 1
    assert list(module.state_dict()) == list(plain_module.state_dict())


def test_what_is_made_on_the_modules_device_is_made_where_it_is_traced(tmp_path):
    seen = []

    module, examples = make_model("language model")

    class Looks(type(module)):
        def stage_forward(self, blocks, hidden, batch):
            seen.append(self.device == batch["tokens"].device)
            return super().stage_forward(blocks, hidden, batch)

    module.__class__ = Looks
    ipu_trainer(tmp_path).fit(module, loader(examples))
    assert seen == [True]  # traced once
    assert module.device == torch.device("cpu")


def test_metrics_and_steps_stay_on_the_host(tmp_path):
    module, examples = make_model("language model")
    steps = []

    class Counts(type(module)):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    module.__class__ = Counts
    trainer = ipu_trainer(tmp_path)
    trainer.fit(module, loader(examples))
    assert steps == [0, 1, 2]  # ran for every batch, though the graph was traced once
    assert poptorch.device.COUNTS["compilations"] == 1


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_blocks_stay_in_the_mode_that_they_were_put_into(tmp_path):
    module, examples = make_model("language model")
    module.layers[1].eval()
    ipu_trainer(tmp_path).fit(module, loader(examples), loader(examples))
    modes = [layer.training for layer in module.layers]
    assert modes == [True, False, True, True, True, True]
