"""What a checkpoint says of its tokenizer is written nowhere but in a folder of ours."""

import shlex
from pathlib import PurePosixPath, PureWindowsPath

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ipu_bert import UserError
from lightning_ipu_bert.checkpoint_file import TOKENIZER_KEY
from lightning_ipu_bert.cli import main
from lightning_ipu_bert.data.tokenizer import (
    PLAIN_NAME,
    check_file_names,
    load_tokenizer,
    tokenizer_from_files,
    tokenizer_to_files,
)

BAD_NAMES = [
    "{outside}",
    "../escaped.json",
    "a/../../escaped.json",
    "folder/tokenizer.json",
    "..",
    ".",
    "",
    ".bashrc",
    "..\\escaped.json",
    "C:escaped.json",
    "new\nline",
    "n" * 300,
]


@pytest.fixture
def files(quickstart):
    return tokenizer_to_files(load_tokenizer(str(quickstart / "tokenizer")))


@pytest.fixture
def planted(make_module, make_data, files, tmp_path):
    """Save a checkpoint that holds one more tokenizer file, of any name."""

    def plant(name):
        module, data = make_module(), make_data()
        checkpoint = {
            "state_dict": module.state_dict(),
            "hyper_parameters": dict(module.hparams),
            "datamodule_hyper_parameters": dict(data.hparams),
            "pytorch-lightning_version": pl.__version__,
            TOKENIZER_KEY: {**files, name: "planted"},
        }
        torch.save(checkpoint, tmp_path / "planted.ckpt")
        return tmp_path / "planted.ckpt"

    return plant


def test_a_tokenizer_survives_its_files(files, quickstart):
    text = "Who founded Velmar in 1921?"
    before = load_tokenizer(str(quickstart / "tokenizer"))(text)
    assert tokenizer_from_files(files)(text) == before


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere_are_refused_before_anything_is_written(name, files, tmp_path):
    name = name.format(outside=tmp_path / "outside.json")
    with pytest.raises(UserError, match="must be a plain file name") as error:
        tokenizer_from_files({name: "planted", **files})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@given(st.from_regex(PLAIN_NAME, fullmatch=True))
def test_a_plain_name_stays_in_its_folder_on_every_system(name):
    for path in (PurePosixPath("/folder") / name, PureWindowsPath("C:/folder") / name):
        assert path.parent.name == "folder"
        assert path.name == name


@given(st.tuples(st.text(max_size=9), st.sampled_from("/\\:\0"), st.text(max_size=9)).map("".join))
def test_a_name_with_a_separator_is_refused(name):
    with pytest.raises(UserError, match="must be a plain file name"):
        check_file_names({name: "text"})


@pytest.mark.parametrize(
    "command",
    [
        "ask --model {} --question Q --context C",
        "export --ckpt_path {} --output_dir out",
        "validate --trainer.logger false --ckpt_path {} --data.validation_file validation.json",
        "predict --trainer.logger false --ckpt_path {} --data.predict_file validation.json",
        "test --trainer.logger false --ckpt_path {} --data.test_file validation.json",
        "fit --config quickstart --ckpt_path {} --trainer.strategy auto --trainer.devices 1",
    ],
)
def test_every_verb_refuses_them(command, planted, tmp_path, monkeypatch, quickstart, capsys):
    home = tmp_path / "home"
    home.mkdir()
    (home / "validation.json").write_bytes((quickstart / "validation.json").read_bytes())
    outside = tmp_path / "outside.json"
    path = planted(str(outside))
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command.format(path)))
    assert ended.value.code == 2
    assert "must be a plain file name" in capsys.readouterr().err.splitlines()[-1]
    assert not outside.exists()
