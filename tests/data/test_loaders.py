from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ipu_bert.data.feature_cache import cached_features
from lightning_ipu_bert.data.feature_table import FeatureTable
from lightning_ipu_bert.data.formats import read_files
from lightning_ipu_bert.data.loaders import Collator, ResumableDataLoader, TrainingSampler
from lightning_ipu_bert.data.records import Rules
from lightning_ipu_bert.data.settings import Windowing
from lightning_ipu_bert.data.tokenizer import load_tokenizer


def feature(index, length):
    return {
        "input_ids": list(range(1, length + 1)),
        "token_type_ids": [0] * (length - 1) + [1],
        "start_positions": 1,
        "end_positions": length - 1,
        "feature": index,
    }


def test_a_batch_is_as_long_as_its_longest_feature():
    batch = Collator(pad_token_id=9)([feature(0, 3), feature(1, 5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert batch["end_positions"].tolist() == [2, 4]
    assert batch["feature"].tolist() == [0, 1]


def test_a_batch_of_fixed_length_is_padded_to_it():
    batch = Collator(pad_token_id=0, length=8)([feature(0, 3)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, 8)


@pytest.mark.parametrize(("longest", "padded"), [(3, 8), (8, 8), (9, 16), (17, 20), (20, 20)])
def test_padding_to_a_multiple_ends_at_the_largest_length(longest, padded):
    collate = Collator(pad_token_id=0, multiple_of=8, max_length=20)
    assert collate([feature(0, longest)])["input_ids"].shape == (1, padded)


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 3),
)
def test_the_replicas_share_all_features_evenly(lengths, batch_size, replicas, grouped, epoch):
    shares = []
    for rank in range(replicas):
        sampler = TrainingSampler(lengths, batch_size, grouped, replicas, rank, seed=7)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    drawn = Counter(index for share in shares for index in share)
    assert set(drawn) == set(range(len(lengths)))
    # Only what fills the last round up comes twice.
    assert sum(drawn.values()) - len(lengths) < replicas


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = TrainingSampler([5] * 50, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_grouping_by_length_saves_padding():
    lengths = torch.randint(10, 384, (2000,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(grouped):
        order = list(TrainingSampler(lengths, 16, grouped))
        batches = [order[i : i + 16] for i in range(0, len(order), 16)]
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)

    assert padded(True) < 1.05 * sum(lengths)
    assert padded(False) > 1.5 * sum(lengths)


def make_loader(grouped=True, workers=0):
    lengths = [3 + i % 7 for i in range(22)]
    features = [feature(i, length) for i, length in enumerate(lengths)]
    sampler = TrainingSampler(lengths, 4, grouped, seed=1)
    return ResumableDataLoader(
        features, 4, sampler=sampler, collate_fn=Collator(0), num_workers=workers
    )


def drawn(batches):
    return [batch["feature"].tolist() for batch in batches]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 6), st.integers(0, 2), st.booleans())
def test_a_resumed_loader_goes_on_where_the_first_one_stopped(done, epoch, grouped):
    first = make_loader(grouped)
    first.sampler.set_epoch(epoch)
    batches = []
    for batch in first:
        if len(batches) == done:
            break
        batches.append(batch)
        state = first.state_dict()
    if not done:
        return
    resumed = make_loader(grouped)
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(epoch)
    rest = drawn(resumed)
    whole = make_loader(grouped)
    whole.sampler.set_epoch(epoch)
    if done == len(whole):  # the epoch was over: the next one is drawn whole
        assert rest == drawn(whole)
    else:
        assert drawn(batches) + rest == drawn(whole)
        assert resumed.state_dict() == {"epoch": epoch, "batches": len(whole)}
    assert len(resumed) == len(whole)
    again = drawn(resumed)
    assert again == drawn(whole)


def test_the_state_of_another_epoch_is_not_applied():
    loader = make_loader()
    loader.load_state_dict({"epoch": 0, "batches": 3})
    loader.sampler.set_epoch(1)
    assert len(drawn(loader)) == len(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_counts_batches_handed_out_not_prefetched(workers):
    loader = make_loader(workers=workers)
    batches = iter(loader)
    next(batches)
    assert loader.state_dict() == {"epoch": 0, "batches": 1}


@pytest.fixture(scope="module")
def table(quickstart, cache_dir):
    question_set = read_files([str(quickstart / "validation.json")], Rules())
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    windowing = Windowing(max_length=48, doc_stride=8)
    return FeatureTable(cached_features(question_set, tokenizer, windowing, Path(cache_dir)))


@given(
    data=st.data(), length=st.sampled_from([None, 20, 48, 60]), multiple=st.sampled_from([1, 8, 16])
)
def test_rows_cut_from_arrays_equal_rows_of_the_dataset(table, data, length, multiple):
    """`Collator` pads the lists of a dataset row by row; a table cuts them from flat arrays."""
    rows = data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=9))
    collate = Collator(7, length, multiple, max_length=48)
    expected, found = collate([table[row] for row in rows]), collate(table.__getitems__(rows))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.dtype == torch.int64
        assert torch.equal(values, expected[name]), name
