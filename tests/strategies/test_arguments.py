"""Arguments of strategies, and facts about them."""

import inspect
import re
import shlex
from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy
from model_helpers import needs_pipelining

from lightning_ipu_bert import IPUStrategy, PipelineParallelStrategy, UserError
from lightning_ipu_bert.cli import main
from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.facts import StrategyFacts, facts_of

STRATEGIES = [PipelineParallelStrategy, IPUStrategy]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_plan_is_named_and_given_by_name_only(strategy):
    parameters = inspect.signature(strategy).parameters
    assert set(vars(PipelineConfig())) <= set(parameters)
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError):
        strategy([3, 3])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("layer_per_stage", "layers_per_stage"),
        ("replication_facter", "replication_factor"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("replicated_sharding", "replicated_tensor_sharding"),
    ],
)
def test_a_misspelled_argument_names_the_nearest(strategy, wrong, right):
    with pytest.raises(TypeError, match=f"has no argument '{wrong}'. Did you mean '{right}'"):
        strategy(**{wrong: 1})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_misspelled_field_of_the_ipu_config_names_the_nearest(strategy):
    with pytest.raises(UserError, match="Did you mean 'layers_per_ipu'"):
        strategy(ipu_config={"layer_per_ipu": [1]})


MISSPELLED = {
    "--trainer.strategy.init_args.layer_per_stage [1,1]": "layers_per_stage",
    "--config wrong.yaml": "data.micro_batch_size",
    "--data.microbatch_size 2": "data.micro_batch_size",
    "--model.lerning_rate 0.1": "model.learning_rate",
}


@needs_pipelining
@pytest.mark.parametrize("words", MISSPELLED)
def test_the_command_line_names_the_nearest(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text("data: {microbatch_size: 2}")
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config=quickstart", *shlex.split(words)])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"Did you mean '{MISSPELLED[words]}'?")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_help_shows_every_argument_with_its_description(strategy, capsys):
    name = f"lightning_ipu_bert.{strategy.__name__}"
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--trainer.strategy.help", name])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for argument in inspect.signature(strategy).parameters:
        assert re.search(rf"--trainer\.strategy\.(init_args\.)?{argument} ", text)
    assert "Micro-batches of a replica per weight update." in text


def test_facts_of_foreign_strategies_are_the_defaults():
    assert facts_of(None) == StrategyFacts()
    trainer = SimpleNamespace(strategy=SingleDeviceStrategy())
    assert facts_of(trainer) == StrategyFacts()
    trainer.strategy.facts = {"micro_batches_per_batch": 8}  # of another package, with another type
    assert facts_of(trainer) == StrategyFacts()


def test_facts_of_ours():
    plan = {"layers_per_stage": [3, 3], "gradient_accumulation_steps": 4}
    ranks = SimpleNamespace(strategy=PipelineParallelStrategy(**plan))
    assert facts_of(ranks) == StrategyFacts(micro_batches_per_batch=4, holds_interrupts=True)
    config = {"device_iterations": 2}
    ipus = SimpleNamespace(strategy=IPUStrategy(**plan, ipu_config=config))
    assert facts_of(ipus) == StrategyFacts(4, 2, static_shapes=True, holds_interrupts=True)
