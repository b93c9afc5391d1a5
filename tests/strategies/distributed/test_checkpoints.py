"""Checkpoints are layout-independent: saved on one layout and resumed on any other."""

import json
import warnings

import pytest
import torch
from model_helpers import Losses, make_trainer, needs_pipelining
from ranks import run_ranks
from transformers import BertForQuestionAnswering

from lightning_ipu_bert import BertForQuestionAnsweringModule, PipelineParallelStrategy
from lightning_ipu_bert.cli import main

pytestmark = [pytest.mark.slow, needs_pipelining]
GLOBAL_BATCH, SAVED_AFTER, STEPS = 16, 3, 6
LAYOUTS = {
    "plain": None,
    "1x1": {"layers_per_stage": [4]},
    "4x1": {"layers_per_stage": [1, 1, 1, 1]},
    "1x2": {"layers_per_stage": [4], "replication_factor": 2},
    "2x2 with RTS": {
        "layers_per_stage": [1, 3],
        "replication_factor": 2,
        "replicated_tensor_sharding": True,
    },
}


class SaveOnce(Losses):
    """Saves in the middle of the epoch, on all ranks."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        if self.path and trainer.global_step == SAVED_AFTER:
            trainer.save_checkpoint(self.path)


def train_bert(make_module, make_data, folder, plan, dropout=0.0, save_to=None, resume_from=None):
    """Train to the last step; return loss and learning rate of every step, and the weights."""
    warnings.simplefilter("ignore")
    torch.manual_seed(4)
    module = make_module(
        dropout, learning_rate=1e-3, warmup_ratio=0.5, config_changes={"num_hidden_layers": 4}
    )
    saver, micro_batch_size = SaveOnce(save_to), GLOBAL_BATCH
    if plan:
        plan = {"gradient_accumulation_steps": 4, **plan}
        micro_batch_size = GLOBAL_BATCH // 4 // plan.get("replication_factor", 1)
    trainer = make_trainer(folder, saver, plan=plan, max_steps=STEPS)
    # The softmax over a window counts its padding, whose length must not depend on the layout.
    data = make_data(micro_batch_size=micro_batch_size, pad_to_max_length=True)
    trainer.limit_val_batches = 0
    trainer.fit(module, data, ckpt_path=resume_from)
    assert trainer.global_step == STEPS
    return saver.losses, saver.logged_rates, {k: v.clone() for k, v in module.state_dict().items()}


def run(plan, *args, **options):
    world = PipelineParallelStrategy(gradient_accumulation_steps=4, **plan).config.shape.num_devices
    return run_ranks(world, _train_with, plan, args, options)


def _train_with(plan, args, options):
    return train_bert(*args, plan, **options)


def mean_losses(results, plan):
    """Mean over the replicas of the losses that each of them saw."""
    replicas = (plan or {}).get("replication_factor", 1)
    firsts = results[:: len(results) // replicas]
    return torch.tensor([losses for losses, _, _ in firsts]).mean(0).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture
def uninterrupted(make_module, make_data, folder):
    return train_bert(make_module, make_data, folder, None)


@pytest.fixture
def saved(make_module, make_data, folder):
    """A checkpoint of 2x2 with RTS from the middle of an epoch."""
    path = folder / "2x2.ckpt"
    if not path.exists():
        plan = LAYOUTS["2x2 with RTS"]
        run(plan, make_module, make_data, folder, save_to=path)
    return path


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_any_layout_goes_on_as_if_there_had_been_no_break(
    layout, uninterrupted, saved, make_module, make_data, folder
):
    plan = LAYOUTS[layout]
    args, options = (make_module, make_data, folder), {"resume_from": saved}
    results = run(plan, *args, **options) if plan else [train_bert(*args, None, **options)]
    losses, rates, _ = uninterrupted
    assert mean_losses(results, plan) == pytest.approx(losses[SAVED_AFTER:], rel=1e-5)
    assert all(seen == rates[SAVED_AFTER:] for _, seen, _ in results)


def test_a_plain_checkpoint_goes_on_with_rts(uninterrupted, make_module, make_data, folder):
    path = folder / "plain.ckpt"
    train_bert(make_module, make_data, folder, None, save_to=path)
    plan = LAYOUTS["2x2 with RTS"]
    results = run(plan, make_module, make_data, folder, resume_from=path)
    assert mean_losses(results, plan) == pytest.approx(uninterrupted[0][SAVED_AFTER:], rel=1e-5)


def test_dropout_is_repeated_on_the_same_layout(make_module, make_data, folder):
    plan = LAYOUTS["2x2 with RTS"]
    path = folder / "dropout.ckpt"
    args = (make_module, make_data, folder)
    whole = run(plan, *args, dropout=0.2, save_to=path)
    again = run(plan, *args, dropout=0.2, resume_from=path)
    assert mean_losses(again, plan) == mean_losses(whole, plan)[SAVED_AFTER:]


def test_it_is_the_checkpoint_of_a_plain_model(saved, make_module, make_data, folder):
    checkpoint = torch.load(saved, weights_only=True)
    plain = torch.load(_plain(make_module, make_data, folder), weights_only=True)
    assert list(checkpoint["state_dict"]) == list(plain["state_dict"])
    ours, theirs = checkpoint["optimizer_states"][0], plain["optimizer_states"][0]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, entries in theirs["state"].items():
        for key, value in entries.items():
            assert ours["state"][index][key].shape == value.shape
    module = BertForQuestionAnsweringModule.load_from_checkpoint(saved, map_location="cpu")
    assert set(module.to_huggingface().state_dict()) == set(checkpoint["state_dict"])
    assert module.tokenizer is not None


def _plain(make_module, make_data, folder):
    path = folder / "plain.ckpt"
    if not path.exists():
        train_bert(make_module, make_data, folder, None, save_to=path)
    return path


def test_ask_and_export_take_it(saved, tmp_path, monkeypatch, capsys):
    """From another folder, in one process, from nothing but the file."""
    monkeypatch.chdir(tmp_path)
    main(["export", "--ckpt_path", str(saved), "--output_dir", "exported"])
    network = BertForQuestionAnswering.from_pretrained("exported")
    checkpoint = torch.load(saved, weights_only=True)
    exported = network.state_dict()
    assert all(
        torch.equal(exported[name], value) for name, value in checkpoint["state_dict"].items()
    )
    capsys.readouterr()
    passage = "Dora Lind founded Velmar in 1921."
    words = ["--question", "Who founded Velmar?", "--context", passage, "--json"]
    main(["ask", "--model", str(saved), *words])
    answer = json.loads(capsys.readouterr().out)
    assert passage[answer["start"] : answer["end"]] == answer["answer"] != ""
