import json
import re
import shlex
import sys

import pytest
import torch
import yaml
from official_scores import score

from lightning_ipu_bert.cli import main
from lightning_ipu_bert.commands.trainer_verbs import find_config, shipped_configs
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.strategies.distributed.launch.launcher import ScriptLauncher

CONFIGS = sorted(shipped_configs().glob("*.yaml"))
TINY_MODEL = [
    "--model.config.hidden_size=32",
    "--model.config.num_hidden_layers=1",
    "--model.config.intermediate_size=32",
]
# In this process: ranks are started as the command line that runs now, which is pytest's.
ALONE = ["--trainer.strategy=auto", "--trainer.devices=1"]
SHORT = [
    *ALONE,
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=2",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
]


@pytest.fixture
def run(tmp_path, monkeypatch, cache_dir, capsys):
    """Run a verb in an empty folder; give what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        main(list(words))
        return capsys.readouterr().out

    run.data = [f"--data.cache_dir={cache_dir}"]
    return run


@pytest.fixture
def trained(run):
    """A checkpoint of the quickstart after three updates."""
    run("fit", "--config=quickstart", *run.data, *TINY_MODEL, *SHORT)
    return "runs/quickstart/best.ckpt"


@pytest.fixture
def refused(capsys):
    """Run a verb that must end with exit code 2 and one line; give the line."""

    def refused(*words):
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        assert caught.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:], lines
        return lines[-1]

    return refused


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_parses(run, config, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(config), "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(config.read_text("utf8"))
    assert printed["data"].items() >= written["data"].items()
    assert printed["model"].items() >= written["model"].items()


def test_a_name_that_is_no_file_is_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert find_config(name) == str(shipped_configs() / "quickstart.yaml")
    (tmp_path / "quickstart.yaml").write_text("")
    assert find_config("quickstart.yaml") == "quickstart.yaml"
    assert find_config("nothing.yaml") == "nothing.yaml"


def test_configs_merge_and_the_environment_counts(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "more.yaml").write_text("data: {micro_batch_size: 7}\nmodel: {warmup_steps: 3}")
    monkeypatch.setenv("PL_FIT__MODEL__WEIGHT_DECAY", "0.5")
    with pytest.raises(SystemExit):
        main(["fit", "--config=quickstart", "--config=more.yaml", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["micro_batch_size"] == 7
    assert printed["data"]["dataset_name"] == "quickstart"
    assert printed["model"]["warmup_steps"] == 3
    monkeypatch.delenv("PL_FIT__MODEL__WEIGHT_DECAY")
    with pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["weight_decay"] == 0.01


@pytest.mark.parametrize("verb", ["", "fit", "validate", "test", "predict", "ask", "export"])
def test_help_describes_every_option(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*verb.split(), "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    said = {
        "": "'export' it as a Hugging Face folder",
        "ask": "one or more questions, each quoted",
        "export": "New folder for model, tokenizer and model card.",
    }
    assert (
        said.get(verb, "Maximum number of tokens of a feature: question, window of the passage")
        in text
    )
    if verb == "fit":
        assert "Peak learning rate of AdamW." in text
        assert "Whether to also write start and end logits." in text


REFUSED = {
    "fit --trainer.max_steps abc": "Expected a <class 'int'>. Got value: abc",
    "fit --data.no_such_option 1": "no_such_option",
    "fit --config nowhere.yaml": "nowhere.yaml",
    "fit --config quickstart --trainer.precision 7-true": "7-true",
    "fit --config quickstart --trainer.strategy nothing": "nothing",
    "fit --config quickstart --data.doc_stride 128": "doc_stride=128 does not fit",
    "fit --config quickstart --model.lr_schedule wavy": "wavy",
    "fit": "There is no model",
    "validate --ckpt_path nowhere.ckpt": "Checkpoint 'nowhere.ckpt' does not exist",
    "ask --model nowhere.ckpt --question Q --context C": "Checkpoint 'nowhere.ckpt' does not exist",
    "ask --model ./nowhere --question Q --context C": "No model could be loaded from './nowhere'",
    "ask --question Q --context C": "model",
    "ask --model x": "There is no question",
    "export --ckpt_path nowhere.ckpt --output_dir out": "does not exist",
    "nonsense": "nonsense",
}


@pytest.mark.parametrize("command", REFUSED)
def test_errors_of_values_are_one_line_and_exit_code_2(run, refused, command):
    assert REFUSED[command] in refused(*shlex.split(command))


PLAN = "--trainer.strategy.init_args."
REFUSED_PIPELINES = {
    f"{PLAN}schedule 1f2b": "schedule='1f2b' is unknown. Did you mean '1f1b'?",
    f"{PLAN}schedule zero-bubble": "Did you mean 'zero_bubble'?",
    f"{PLAN}layers_per_stage [1,9]": "layers_per_stage=[1, 9] places 10 layers",
    f"{PLAN}gradient_accumulation_steps 1": "gradient_accumulation_steps=1 is too few",
    "--trainer.devices 3": "Set devices to 2",
    "--trainer.accumulate_grad_batches 2": "accumulate_grad_batches=2 must be 1",
    "--trainer.precision 64-true": "precision='64-true' is not supported",
    "--data.micro_batch_size 0": "micro_batch_size=0",
    "--data.train_file nowhere.json": "nowhere.json: the file does not exist",
}


@pytest.mark.parametrize("words", REFUSED_PIPELINES)
def test_what_cannot_be_a_pipeline_is_refused_before_processes_start(
    run, refused, words, monkeypatch
):
    def start(_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(ScriptLauncher, "_call_children_scripts", start)
    line = refused("fit", "--config=quickstart", *run.data, *shlex.split(words))
    assert REFUSED_PIPELINES[words] in line


def test_a_torch_without_pipelines_is_refused(run, refused, monkeypatch):
    monkeypatch.setattr(
        "lightning_ipu_bert.strategies.distributed.checks.has_pipelining", lambda: False
    )
    line = refused("fit", "--config=quickstart", *run.data)
    assert f"torch {torch.__version__} is too old for pipelining" in line
    words = line[line.index("--trainer") : -1]  # what it advises works
    run("fit", "--config=quickstart", *run.data, *shlex.split(words), *TINY_MODEL, *SHORT)


def test_help_describes_the_plan(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.strategy.help=lightning_ipu_bert.PipelineParallelStrategy"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Number of copies of the pipeline; each processes its own shard of the data." in text
    assert "Pipeline schedule: gpipe, 1f1b" in text
    assert "Timeout of communication between ranks." in text


def test_what_is_no_checkpoint_is_refused(run, refused, tmp_path):
    (tmp_path / "broken.ckpt").write_text("nothing")
    for command in (
        "ask --model broken.ckpt --question Q --context C",
        "validate --config quickstart --ckpt_path broken.ckpt",
    ):
        assert "'broken.ckpt' is not a checkpoint" in refused(*shlex.split(command))


def test_validate_and_test_need_only_the_checkpoint(run, trained, quickstart):
    file = str(quickstart / "validation.json")
    quiet = [*run.data, "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    out = run("validate", "--ckpt_path", trained, "--data.validation_file", file, *quiet)
    assert "val/exact_match" in out
    out = run("test", "--ckpt_path", trained, "--data.test_file", file, *quiet)
    assert "test/f1" in out


def test_predict_writes_what_the_official_script_scores(run, trained, quickstart, tmp_path):
    file = quickstart / "validation.json"
    quiet = [*run.data, "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    run(
        *("predict", "--ckpt_path", trained, "--data.predict_file", str(file)),
        *("--predictions.output_dir=out", "--predictions.write_logits=true", *quiet),
    )
    predictions = json.loads((tmp_path / "out/predictions.json").read_text("utf8"))
    n_best = json.loads((tmp_path / "out/nbest_predictions.json").read_text("utf8"))
    assert len(predictions) == 600
    assert all(n_best[i][0]["text"] == text for i, text in predictions.items())
    assert set(next(iter(n_best.values()))[0]) == {"text", "score", "probability", "start", "end"}
    official = score(json.loads(file.read_text("utf8")), predictions)
    out = run("validate", "--ckpt_path", trained, "--data.validation_file", str(file), *quiet)
    # The frame of Lightning's table is another one where rich is not installed.
    shown = float(re.search(r"val/f1\W+([\d.]+)", out).group(1))
    assert shown == pytest.approx(official["f1"], abs=0.01)
    assert (tmp_path / "out/logits.npz").exists()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_the_checkpoint_decides_and_says_so_where_options_differ(run, trained, quickstart, caplog):
    quiet = [*run.data, "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    words = ["validate", "--ckpt_path", trained, *quiet, "--trainer.limit_val_batches=1"]
    words += ["--data.validation_file", str(quickstart / "validation.json")]
    with caplog.at_level("INFO"):
        run(*words)
    assert "Using settings of the checkpoint" not in caplog.text
    with caplog.at_level("INFO"):
        run(*words, "--model.learning_rate=0.5", "--data.max_length=64")
    said = [
        r.getMessage()
        for r in caplog.records
        if "Using settings of the checkpoint" in r.getMessage()
    ]
    assert len(said) == 1
    assert "learning_rate=0.002 (given: 0.5)" in said[0]
    assert "max_length=128 (given: 64)" in said[0]
    assert "weight_decay" not in said[0]


def test_evaluation_has_the_precision_of_the_training(run, quickstart, caplog):
    words = [*run.data, *TINY_MODEL, *SHORT]
    run("fit", "--config=quickstart", *words, "--trainer.precision=bf16-mixed")
    words = ["validate", "--ckpt_path=runs/quickstart/best.ckpt", *run.data, *SHORT[-2:]]
    words += ["--data.validation_file", str(quickstart / "validation.json")]
    for given in ([], ["--trainer.precision=32-true"]):
        caplog.clear()
        with caplog.at_level("INFO"):
            run(*words, *given)
        assert ("Using precision=bf16-mixed of the checkpoint" in caplog.text) == (not given)
        assert ("bfloat16 Automatic Mixed Precision" in caplog.text) == (not given)


def test_fit_goes_on_from_a_checkpoint(run, trained):
    run(
        *("fit", "--config=quickstart", "--ckpt_path", trained, *run.data, *TINY_MODEL, *SHORT),
        "--trainer.max_epochs=2",
    )
    checkpoint = torch.load(trained, weights_only=True)
    assert checkpoint["global_step"] in (3, 6)  # the better of both


def test_the_config_of_a_run_repeats_it(run, trained, tmp_path, capsys):
    saved = tmp_path / "runs/quickstart/config.yaml"
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(saved), "--print_config"])
    assert caught.value.code == 0
    capsys.readouterr()


@pytest.fixture
def parsed(monkeypatch):
    """Parse the words of a verb; give the options of the Trainer."""
    found = []
    monkeypatch.setattr(
        "lightning_ipu_bert.commands.trainer_verbs.QuestionAnsweringCLI.instantiate_classes",
        lambda cli: found.append(cli.config[cli.config.subcommand].trainer) or sys.exit(),
    )

    def parsed(*words):
        with pytest.raises(SystemExit):
            main(["fit", "--trainer.default_root_dir=folder", *words])
        return found.pop()

    return parsed


def test_a_run_logs_and_saves_in_its_folder(parsed):
    trainer = parsed("--data.validation_file=v.json")
    assert trainer.logger.class_path.endswith("CSVLogger")
    assert trainer.logger.init_args.save_dir == "folder"
    (callback,) = trainer.callbacks
    assert callback.init_args.dirpath == "folder"
    assert (callback.init_args.filename, callback.init_args.monitor) == ("best", "val/f1")
    assert callback.init_args.save_last
    (callback,) = parsed().callbacks  # nothing validates: there is no best one
    assert callback.init_args.get("monitor") is None
    assert callback.init_args.save_last


def test_a_config_overrides_what_a_run_logs_and_saves(parsed):
    trainer = parsed("--trainer.logger=false", "--trainer.callbacks=[]")
    assert trainer.logger is False
    assert trainer.callbacks == []
    trainer = parsed("--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.filename=mine")
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    assert callbacks[0].init_args.filename == "mine"
    assert callbacks[0].init_args.dirpath == "folder"
    own = parsed("--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.dirpath=other")
    callbacks = own.callbacks if isinstance(own.callbacks, list) else [own.callbacks]
    assert callbacks[0].init_args.dirpath == "other"


def test_debug_shows_the_traceback_of_an_error_of_a_value(refused):
    words = ["validate", "--ckpt_path", "nowhere.ckpt"]
    assert "nowhere.ckpt" in refused(*words)
    with pytest.raises(UserError, match=r"nowhere\.ckpt"):
        main([*words, "--debug"])
