import json

import numpy as np
import pytest
from model_helpers import make_trainer

from lightning_ipu_bert import SquadDataModule, UserError


def test_use_in_python_needs_no_trainer(quickstart, cache_dir):
    data = SquadDataModule(
        train_file=str(quickstart / "train.json"),
        validation_file=str(quickstart / "validation.json"),
        tokenizer_name_or_path=str(quickstart / "tokenizer"),
        max_length=128,
        doc_stride=32,
        cache_dir=cache_dir,
    )
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[0] == 16
    assert sum(len(b["feature"]) for b in data.val_dataloader()) == 600


def test_batches_of_training_and_evaluation_have_their_own_sizes(make_data):
    data = make_data(micro_batch_size=3, eval_micro_batch_size=5)
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))["feature"]) == 3
    assert len(next(iter(data.val_dataloader()))["feature"]) == 5


def order_of(batches):
    return [i for batch in batches for i in batch["feature"].tolist()]


def test_evaluation_sorts_by_length_and_evaluates_every_feature_once(make_data):
    data = make_data()
    data.setup("validate")
    batches = list(data.val_dataloader())
    lengths = [int(n) for batch in batches for n in batch["attention_mask"].sum(1)]
    assert lengths == sorted(lengths, reverse=True)
    features = data.split("validation").features
    assert sorted(order_of(batches)) == list(range(len(features)))
    for batch in batches:
        for index, ids, mask in zip(
            *(batch[n] for n in ("feature", "input_ids", "attention_mask"))
        ):
            assert ids[mask.bool()].tolist() == features[int(index)]["input_ids"]


@pytest.mark.parametrize("changes", [{"limit_val_batches": 2}, {"limit_val_batches": 0.5}])
def test_a_part_of_an_evaluation_is_in_the_order_of_the_file(make_data, changes, tmp_path):
    data = make_data()
    data.trainer = make_trainer(tmp_path, **changes)
    data.setup("validate")
    order = order_of(data.val_dataloader())
    assert order == list(range(len(data.split("validation").features)))


def test_batches_are_padded_to_a_multiple_but_not_beyond_the_longest_window(make_data):
    data = make_data(pad_to_multiple_of=16)
    data.setup("validate")
    longest = data.hparams["max_length"]
    for batch in data.val_dataloader():
        length, tokens = batch["input_ids"].shape[1], int(batch["attention_mask"].sum(1).max())
        assert length == min(-(-tokens // 16) * 16, longest)


def test_the_quickstart_needs_no_file_and_no_tokenizer(tmp_path):
    data = SquadDataModule(
        dataset_name="quickstart", max_length=128, doc_stride=32, cache_dir=str(tmp_path)
    )
    data.setup("validate")
    assert len(data.split("validation").question_set.questions) == 600
    assert len(data.tokenizer) == 900


def test_files_come_before_the_data_set(tmp_path, quickstart):
    file = quickstart / "validation.json"
    data = SquadDataModule(
        dataset_name="quickstart",
        predict_file=str(file),
        max_length=128,
        doc_stride=32,
        cache_dir=str(tmp_path),
    )
    data.setup("predict")
    ids = [q.id for q in data.split("predict").question_set.questions]
    asked = json.loads(file.read_text("utf8"))["data"][0]["paragraphs"]
    assert ids == [qa["id"] for paragraph in asked for qa in paragraph["qas"]]


def test_fit_without_validation_data_does_not_validate(make_data):
    data = make_data(validation_file=None)
    data.setup("fit")
    assert not data.val_dataloader()


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_a_verb_without_data_names_the_options(verb):
    split = {"fit": "train", "validate": "validation"}.get(verb, verb)
    with pytest.raises(UserError, match=rf"Pass --data\.{split}_file or --data\.dataset_name"):
        SquadDataModule(tokenizer_name_or_path="x").setup(verb)


def test_without_tokenizer_the_options_are_named(quickstart):
    data = SquadDataModule(validation_file=str(quickstart / "validation.json"))
    with pytest.raises(UserError, match=r"Set --data\.tokenizer_name_or_path"):
        data.setup("validate")


def test_a_tokenizer_that_is_none_is_named(quickstart):
    data = SquadDataModule(
        validation_file=str(quickstart / "validation.json"), tokenizer_name_or_path="./nowhere"
    )
    with pytest.raises(
        UserError, match=r"No tokenizer could be loaded from '\./nowhere'"
    ) as caught:
        data.setup("validate")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_stride": 128}, "doc_stride=128 does not fit max_length=128"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be an integer of at least 1"),
        ({"max_answer_length": 0}, "max_answer_length=0 must be an integer of at least 1"),
    ],
)
def test_bad_numbers_are_refused(make_data, changes, message):
    with pytest.raises(UserError, match=message):
        make_data(**changes)


def test_right_logits_score_100_and_wrong_ones_less(make_data):
    data = make_data()
    features = data.split("validation").features
    width = max(len(row) for row in features["input_ids"])
    starts, ends = np.zeros((2, len(features), width), np.float32)
    rows = np.arange(len(features))
    starts[rows, features["start_positions"]] = ends[rows, features["end_positions"]] = 9
    right = [(rows, starts, ends)]
    assert data.scores("validation", right) == {"exact_match": 100.0, "f1": 100.0}
    assert data.scores("validation", [(rows, ends * 0, ends)])["exact_match"] < 100
    # Half of the windows: the questions that were not asked do not count.
    half = [(rows[:100], starts[:100], ends[:100])]
    assert data.scores("validation", half)["exact_match"] == 100.0
