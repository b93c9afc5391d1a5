"""Whole runs by config: the shipped YAMLs, the console, compiling alone, and other people's use."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import lightning.pytorch as pl
import poptorch
import pytest
import torch
import yaml
from forked_script import run_script
from ipu_runs import ipu_strategy, ipu_trainer, loader, with_adamw
from language_model import LanguageModel, Sentences
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from model_helpers import needs_pipelining
from models import GLOBAL_BATCH, make_model

from lightning_ipu_bert import IPUAccelerator, IPUStrategy, PipelineParallelStrategy
from lightning_ipu_bert.cli import main
from lightning_ipu_bert.commands.export import export
from lightning_ipu_bert.commands.trainer_verbs import shipped_configs
from lightning_ipu_bert.pipeline.ipu.file import read_values
from lightning_ipu_bert.pipeline.ipu.program import program_rules
from lightning_ipu_bert.pipeline.plan import layer_rules

pytestmark = pytest.mark.slow

CLI = Path(__file__).parents[2] / "cli_script.py"

CONFIGS = sorted(
    path.stem
    for path in shipped_configs().glob("*.yaml")
    if "IPUStrategy" in path.read_text("utf8")
)
TINY = [
    *("--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]


def test_there_are_configs_for_all_pods():
    assert CONFIGS == [
        "bert_base_squad_pod16",
        "bert_base_squad_pod4",
        "bert_large_squad_8x2",
        "bert_large_squad_pod16",
        "ipu_debug",
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_keep_all_rules(name):

    text = yaml.safe_load((shipped_configs() / f"{name}.yaml").read_text("utf8"))
    config = IPUStrategy(**text["trainer"]["strategy"]["init_args"]).ipu_config
    layers = {"bert_large": 24, "bert_base_": 12, "ipu_debug": 2}[name[:10].rstrip("s")]
    blocks = ["embeddings", *(f"layer.{i}" for i in range(layers)), "head"]
    for program in (config.training, config.inference):
        assert not list(program_rules(program))
        assert not list(layer_rules(blocks, program.shape.layers_per_stage))
    assert (
        config.training.shape.num_devices
        == {"pod16": 16, "_pod4": 4, "d_8x2": 16, "debug": 2}[name[-5:]]
    )


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_debug_config_trains_saves_validates_predicts_and_exports(in_folder, cache_dir, caplog):
    data = ["--data.cache_dir", cache_dir]
    main(["fit", "--config", "ipu_debug", *data, *TINY])
    assert "Encoder 0" in caplog.text
    assert "Compiled/loaded the training program in" in caplog.text
    assert "Total optimization steps: 3" in caplog.text
    assert "Training speed" in caplog.text
    checkpoint = "runs/ipu_debug/best.ckpt"
    assert read_values(in_folder / "runs" / "ipu_debug")["layers_per_ipu"] == [1, 1]

    few = ["--config", "ipu_debug", "--ckpt_path", checkpoint, *data]
    quiet = ["--trainer.enable_progress_bar", "false"]
    main(["validate", *few, "--trainer.limit_val_batches", "2", *quiet])
    main(["predict", *few, "--trainer.limit_predict_batches", "2", *quiet])
    written = list(in_folder.rglob("predictions.json"))
    assert len(json.loads(written[0].read_text())) == 16  # 2 calls of 4 x 2 iterations

    folder = export(checkpoint, "exported")
    assert read_values(folder)["layers_per_ipu"] == [1, 1]


@needs_pipelining
def test_the_flags_of_the_error_run_the_same_plan_without_ipus(in_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "poptorch", None)
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "ipu_debug", *TINY])
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    flags = re.search(r"without IPUs: (.*) \(on GPUs", line).group(1)
    words = ["fit", "--config", "ipu_debug", *TINY, *shlex.split(flags)]
    done = run_script(CLI, *words, folder=in_folder, timeout=240)
    assert done.returncode == 0, done.output
    assert "(3 steps)" in done.output


@pytest.mark.parametrize("name", CONFIGS)
def test_a_yaml_moves_between_strategies_by_its_class_path(name):
    """Nothing else is changed: same stages, replicas and global batch."""
    text = yaml.safe_load((shipped_configs() / f"{name}.yaml").read_text("utf8"))
    given = text["trainer"]["strategy"]["init_args"]
    ranks, ipus = PipelineParallelStrategy(**given).config, IPUStrategy(**given).ipu_config
    assert ranks.shape.layers_per_stage == ipus.training.shape.layers_per_stage
    assert ranks.shape.num_devices == ipus.training.shape.num_devices
    found, expected = ranks.shape.batches, ipus.training.shape.batches
    micro = text["data"]["micro_batch_size"]
    assert found.global_batch_size(micro) == expected.global_batch_size(micro)
    assert found.replication_factor == expected.replication_factor
    shared = ("recompute_checkpoint_every_layer", "replicated_tensor_sharding")
    for field in (*shared, "optimizer_state_offchip"):
        assert vars(ranks)[field] == vars(ipus)[field], field


def test_a_file_is_overridden_and_says_so(tmp_path, caplog):
    (tmp_path / "ipu_config.json").write_text(
        json.dumps(
            {
                "layers_per_ipu": [3, 3],
                "gradient_accumulation_steps": 16,
                "inference_device_iterations": 2,
                "use_popdist": True,
            }
        )
    )
    strategy = IPUStrategy(gradient_accumulation_steps=4, ipu_config=str(tmp_path))
    module, examples = make_model("language model")
    ipu_trainer(tmp_path, strategy=strategy).fit(module, loader(examples))
    assert "Overriding IPU config: gradient_accumulation_steps=4" in caplog.text
    assert "IPU config: use_popdist=True has no effect" in caplog.text


def test_what_is_the_same_is_not_said(tmp_path, caplog):
    given = {
        "layers_per_stage": [2, 4],
        "replication_factor": {"pod4": 2, "pod16": 8},
        "gradient_accumulation_steps": 4,
        "inference_device_iterations": 2,
    }
    strategy = IPUStrategy(
        layers_per_stage=[3, 3], replication_factor=2, ipu_config=given, pod_type="pod4"
    )
    module, examples = make_model("language model")
    ipu_trainer(tmp_path, strategy=strategy).fit(module, loader(examples))
    said = [r.message for r in caplog.records if "Overriding" in r.message]
    assert said == ["Overriding IPU config: layers_per_stage=[3, 3]"]


def test_one_replica_shards_nothing_and_says_so(tmp_path, caplog):
    strategy = ipu_strategy(replication_factor=1, replicated_tensor_sharding=True)
    module, examples = make_model("language model")
    ipu_trainer(tmp_path, strategy=strategy).fit(module, loader(examples))
    assert "replicated_tensor_sharding has no effect with replication_factor=1" in caplog.text


def test_compile_only_compiles_both_programs_and_trains_nothing(tmp_path, ipus, caplog):
    ipus.size = 0  # an offline target needs none
    module, examples = with_adamw("bert")
    before = {name: p.clone() for name, p in module.named_parameters()}
    strategy = ipu_strategy(
        compile_only=True, ipu_config={"executable_cache_dir": str(tmp_path / "cache")}
    )
    trainer = ipu_trainer(tmp_path, strategy=strategy, num_sanity_val_steps=2)
    with pytest.raises(SystemExit) as ended:
        trainer.fit(module, loader(examples), loader(examples))
    assert ended.value.code in (0, None)
    assert poptorch.device.COUNTS["compilations"] == 2
    assert "nothing was run" in caplog.text
    assert all((p == before[name]).all() for name, p in module.named_parameters())


def test_compile_only_compiles_for_what_the_steps_run(tmp_path):
    """Batches are cast, changed by hooks and cut by steps before they are run."""

    class Changes(LanguageModel):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "weight": torch.ones(len(batch["tokens"]), 1)}

        def training_step(self, batch, batch_idx):
            return self.run_loss({**batch, "tokens": batch["tokens"][:, :7]})

        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.run_output({"tokens": batch["tokens"]})

    class Look(pl.Callback):
        def on_exception(self, trainer, pl_module, exception):
            programs = trainer.strategy.run.executor.programs
            shapes.extend(p.shapes for p in (programs.training, *programs.inference.values()))

    shapes, data = [], Sentences(GLOBAL_BATCH)
    strategy = ipu_strategy(compile_only=True)
    trainer = ipu_trainer(tmp_path, Look(), strategy=strategy, precision="16-true")
    with pytest.raises(SystemExit):
        trainer.fit(Changes(), loader(data), [loader(data), loader(data)])
    weight, tokens = ((1,), torch.float32), torch.int64
    assert shapes == [[((7,), tokens), weight], [((13,), tokens)]]


def test_compile_only_evaluates_nothing(tmp_path, ipus):
    ipus.size = 0
    module, examples = with_adamw("bert")
    trainer = ipu_trainer(tmp_path, strategy=ipu_strategy(compile_only=True))
    with pytest.raises(SystemExit):
        trainer.validate(module, loader(examples))
    assert poptorch.device.COUNTS["compilations"] == 1


def test_options_can_be_edited_before_they_are_used(tmp_path):
    seen = []

    def edit(options, training):
        seen.append(training)
        options._Popart.set("decomposeGradSum", True)

    module, examples = make_model("language model")
    trainer = ipu_trainer(tmp_path, strategy=ipu_strategy(edit_options=edit))
    trainer.fit(module, loader(examples), loader(examples))
    assert seen == [True, False]


def test_a_folder_for_profiles_is_named_while_the_run_lasts(tmp_path, monkeypatch):
    monkeypatch.delenv("POPLAR_ENGINE_OPTIONS", raising=False)
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, *args):
            seen.append(json.loads(os.environ["POPLAR_ENGINE_OPTIONS"])["autoReport.directory"])

    module, examples = make_model("language model")
    strategy = ipu_strategy(ipu_config={"profile_dir": "reports"})
    ipu_trainer(tmp_path, Look(), strategy=strategy).fit(module, loader(examples))
    assert seen == ["reports"]
    assert "POPLAR_ENGINE_OPTIONS" not in os.environ


def test_early_stopping_and_best_checkpoints_follow_what_is_logged(tmp_path):
    module, examples = with_adamw("bert")
    stop = EarlyStopping("val/loss", patience=1, mode="max", min_delta=100.0)
    keeper = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss")
    trainer = ipu_trainer(tmp_path, stop, keeper, max_epochs=9)
    trainer.fit(module, loader(examples), loader(examples))
    assert trainer.current_epoch == 2
    assert keeper.best_model_path == str(tmp_path / "best.ckpt")


def test_a_failing_step_gives_the_ipus_back_and_the_weights_are_whole(tmp_path, ipus):
    class Fails(pl.Callback):
        def on_train_batch_end(self, *args):
            raise MemoryError("no memory")

    module, examples = with_adamw("bert")
    with pytest.raises(MemoryError):
        ipu_trainer(tmp_path, Fails()).fit(module, loader(examples))
    assert ipus.held == 0
    assert {type(p) for p in module.parameters()} == {torch.nn.Parameter}


def test_the_accelerator_and_the_strategy_are_there_by_name():
    from lightning.pytorch.accelerators import AcceleratorRegistry
    from lightning.pytorch.strategies import StrategyRegistry

    assert type(AcceleratorRegistry.get("ipu")) is IPUAccelerator
    assert type(StrategyRegistry.get("ipu_pipeline")) is IPUStrategy
    assert IPUAccelerator().get_device_stats(0) == {}
