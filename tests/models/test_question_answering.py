import asyncio

import lightning.pytorch as pl
import pytest
import torch
from model_helpers import Losses, make_trainer
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForQuestionAnswering, Trainer

from lightning_ipu_bert import BertForQuestionAnsweringModule, UserError
from lightning_ipu_bert.data.loaders import Collator
from lightning_ipu_bert.models.bert import NETWORK_INPUTS, span_loss
from lightning_ipu_bert.training.optimizer import decay_groups, learning_rate_schedule


@pytest.fixture
def batch(make_data):
    data = make_data()
    data.setup("validate")
    return next(iter(data.val_dataloader()))


def test_logits_and_loss_equal_hugging_faces(make_module, batch):
    module = make_module(fast_kernels=False).eval()
    network = BertForQuestionAnswering(module.bert_config).eval()
    network.load_state_dict(module.state_dict())  # same names, none missing
    inputs = {name: batch[name] for name in NETWORK_INPUTS}
    labels = {name: batch[name] for name in ("start_positions", "end_positions")}
    theirs, ours = network(**inputs, **labels), module(**inputs)
    assert torch.equal(ours.start_logits, theirs.start_logits)
    assert torch.equal(ours.end_logits, theirs.end_logits)
    assert torch.equal(span_loss(ours, batch), theirs.loss)


def test_to_huggingface_gives_the_same_logits(make_module, batch):
    module = make_module(fast_kernels=False).eval()
    inputs = {name: batch[name] for name in NETWORK_INPUTS}
    assert torch.equal(module.to_huggingface()(**inputs).end_logits, module(**inputs).end_logits)


def test_a_bert_config_builds_random_weights():
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    module = BertForQuestionAnsweringModule(config=config)
    assert module.bert_config.vocab_size == 50
    assert module.hparams["config"]["hidden_size"] == 16
    assert isinstance(module.hparams["config"], dict)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", "float32"), ("bf16-true", "bfloat16")]
)
def test_the_precision_flag_decides_the_dtype_and_not_the_checkpoint(
    make_module, make_data, tmp_path, precision, dtype
):
    stored = make_module().to_huggingface().half()
    stored.save_pretrained(tmp_path / "half")
    module = BertForQuestionAnsweringModule(str(tmp_path / "half"))
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    seen = []

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.extend(str(p.dtype) for p in pl_module.parameters())

    trainer = make_trainer(tmp_path, Spy(), max_steps=1, precision=precision, limit_val_batches=0)
    trainer.fit(module, datamodule=make_data())
    assert set(seen) == {f"torch.{dtype}"}


def test_real_float16_weights_train_in_float32(bert_dir):
    module = BertForQuestionAnsweringModule(str(bert_dir))
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not module.has_trained_head


def test_a_loaded_checkpoint_trains_with_dropout(make_module, tmp_path):
    make_module(dropout=0.5).to_huggingface().save_pretrained(tmp_path)
    module = BertForQuestionAnsweringModule(str(tmp_path))
    assert all(part.training for part in module.modules())
    tokens = torch.ones(1, 8, dtype=torch.long)
    assert not torch.equal(module(tokens).start_logits, module(tokens).start_logits)


def test_config_changes_fields_of_the_checkpoint(make_module, tmp_path):
    make_module(dropout=0.5).to_huggingface().save_pretrained(tmp_path)
    module = BertForQuestionAnsweringModule(str(tmp_path), {"hidden_dropout_prob": 0.25})
    assert module.bert_config.hidden_dropout_prob == 0.25
    assert module.bert_config.hidden_size == 32


def test_decay_groups_are_those_of_hugging_faces_trainer(make_module, tmp_path):
    from transformers import TrainingArguments

    module = make_module()
    trainer = Trainer(
        module.to_huggingface(), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    )
    decayed, rest = decay_groups(module, 0.01)
    names = {id(p): name for name, p in module.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == set(
        trainer.get_decay_parameter_names(module.to_huggingface())
    )
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    assert len(decayed["params"]) + len(rest["params"]) == len(list(module.parameters()))


def rates(name, warmup, total, learning_rate=2e-4):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    schedule = learning_rate_schedule(optimizer, name, warmup, total)
    values = []
    for _ in range(total):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return [*values, schedule.get_last_lr()[0]]


def test_the_recipes_learning_rate_after_25_of_690_steps():
    assert rates("linear", 0, 690)[25] == 1.9275362318840579e-04


def test_schedules_rise_and_fall_as_they_say():
    linear, cosine, constant = (rates(n, 10, 110, 1.0) for n in ("linear", "cosine", "constant"))
    for values in (linear, cosine, constant):
        assert values[:11] == pytest.approx([i / 10 for i in range(11)])
    assert linear[60] == pytest.approx(0.5)
    assert cosine[60] == pytest.approx(0.5)
    assert linear[110] == cosine[110] == pytest.approx(0, abs=1e-9)
    assert set(constant[10:]) == {1.0}


@pytest.mark.parametrize(
    ("changes", "first"), [({"warmup_ratio": 0.5}, 4), ({"warmup_steps": 2}, 2)]
)
def test_warm_up_by_ratio_or_steps_over_all_updates(
    make_module, make_data, tmp_path, changes, first
):
    history = Losses()
    trainer = make_trainer(tmp_path, history, max_steps=8, limit_val_batches=0)
    trainer.fit(make_module(learning_rate=1.0e-3, **changes), datamodule=make_data())
    highest = max(range(8), key=lambda i: history.logged_rates[i])
    assert highest == first
    assert history.logged_rates[first] == pytest.approx(1e-3)


def test_accumulation_counts_updates(make_module, make_data, tmp_path):
    # 2 batches of 4 make one update of 8: 6 batches, 3 updates, and a rate that falls thrice.
    history = Losses()
    trainer = make_trainer(
        tmp_path,
        history,
        max_epochs=1,
        limit_train_batches=6,
        accumulate_grad_batches=2,
        limit_val_batches=0,
    )
    trainer.fit(make_module(learning_rate=3.0), datamodule=make_data())
    assert trainer.global_step == 3
    assert history.logged_rates == pytest.approx([3, 3, 2, 2, 1, 1])


def test_what_is_logged(make_module, make_data, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    trainer = make_trainer(
        tmp_path,
        pl.callbacks.ModelCheckpoint(tmp_path, monitor="val/f1", mode="max"),
        pl.callbacks.EarlyStopping("val/loss"),
        max_steps=4,
        limit_val_batches=3,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path),
        val_check_interval=2,
    )
    trainer.fit(make_module(), datamodule=make_data())
    logged = {"train/loss", "lr", "examples/s", "tokens/s"}
    evaluated = {"val/loss", "val/exact_match", "val/f1"}
    assert logged | evaluated <= set(trainer.callback_metrics)
    assert logged | evaluated <= set(trainer.progress_bar_metrics)
    columns = set(
        (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().split("\n")[0].split(",")
    )
    assert logged | evaluated <= columns
    assert 0 <= trainer.callback_metrics["val/f1"] <= 100
    assert trainer.checkpoint_callback.best_model_score is not None


def test_tokens_per_second_leave_out_the_padding(make_module, make_data, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    data = make_data(pad_to_max_length=True, micro_batch_size=8)
    trainer.fit(make_module(), datamodule=data)
    batch = next(iter(data.train_dataloader()))
    metrics = trainer.callback_metrics
    per_example = float(metrics["tokens/s"] / metrics["examples/s"])
    assert per_example == pytest.approx(batch["attention_mask"].sum().item() / 8, rel=1e-5)
    assert per_example < 128


def test_the_summary_tells_time_speed_loss_scores_and_where_the_checkpoint_lies(
    make_module, make_data, tmp_path, caplog
):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path / "here")
    history = Losses()
    limits = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 2}
    trainer = make_trainer(tmp_path, checkpoint, history, **limits)
    with caplog.at_level("INFO"):
        trainer.fit(make_module(), datamodule=make_data())
    text = caplog.text
    for word in ("Run time", "examples/s", "steps/s (3 steps)", "val/exact_match", "val/f1"):
        assert word in text
    assert f"Train loss      {sum(history.losses) / 3:.4f} (mean)" in text
    assert f"Checkpoint      {checkpoint.best_model_path}" in text
    assert "python -m lightning_ipu_bert ask --model" in text


def test_fit_twice_validate_after_fit_and_test(make_module, make_data, tmp_path):
    module, data = make_module(), make_data()
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=2)
    trainer.fit(module, datamodule=data)
    first = trainer.validate(module, datamodule=data)[0]
    assert set(first) == {"val/loss", "val/exact_match", "val/f1"}
    again = make_trainer(tmp_path, max_steps=2, limit_val_batches=2)
    again.fit(module, datamodule=data)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4
    tested = make_data(test_file=list(data.splits.sources.files["validation"]))
    assert "test/f1" in trainer.test(module, datamodule=tested)[0]


def test_it_runs_inside_a_running_event_loop_as_in_a_notebook_cell(
    make_module, make_data, tmp_path
):
    module, data = make_module(), make_data()

    async def cell():
        trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=1)
        trainer.fit(module, data)
        return trainer.validate(module, data, verbose=False)

    assert "val/f1" in asyncio.run(cell())[0]


def test_somebody_elses_loaders_log_the_loss_alone(make_module, make_data, tmp_path):
    data = make_data()
    features = data.split("validation").features.select(range(8))
    loader = DataLoader(features, 4, collate_fn=Collator(0))
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(make_module(), loader, loader)
    assert "val/loss" in trainer.callback_metrics
    assert "val/f1" not in trainer.callback_metrics


BAD_VALUES = [
    ({}, "There is no model"),
    (
        {"config": {"hidden_size": 10, "num_attention_heads": 3}},
        "hidden_size=10 must be divisible by",
    ),
    ({"model_name_or_path": "./no/such/folder"}, r"No model could be loaded from '\./no"),
    ({"config": {"vocab_size": 9}, "learning_rate": 0}, "learning_rate=0 must be above 0"),
    ({"config": {"vocab_size": 9}, "lr_schedule": "wavy"}, "lr_schedule='wavy' is unknown"),
    ({"config": {"vocab_size": 9}, "warmup_ratio": 1.5}, "warmup_ratio=1.5 must be"),
    ({"config": {"vocab_size": 9}, "warmup_steps": -1}, "warmup_steps=-1 must be"),
]


@pytest.mark.parametrize(("options", "message"), BAD_VALUES)
def test_bad_values_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        BertForQuestionAnsweringModule(**options)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_bert_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(UserError, match="is a roberta model, but only BERT is supported"):
        BertForQuestionAnsweringModule(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 50}, "The tokenizer has .* tokens, but the model has a vocab_size of 50"),
        ({"max_position_embeddings": 64}, "max_length=128 exceeds the 64 positions of the model"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(make_data, tmp_path, config, message):
    module = BertForQuestionAnsweringModule(
        config={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, **config}
    )
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=make_data())
