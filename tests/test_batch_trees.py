"""Batches of any structure are cut along their examples."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from lightning_ipu_bert import UserError
from lightning_ipu_bert.examples import count_examples, split_batch
from lightning_ipu_bert.strategies.distributed.loaders import check_examples


class Pair(NamedTuple):
    x: object
    y: object


def parts_of(batch, size=2):
    return split_batch(batch, count_examples(batch), size)


def test_entries_of_examples_are_cut_and_everything_else_is_whole():
    x = torch.arange(8).reshape(4, 2)
    batch = {
        "x": x,
        "array": np.arange(4),
        "texts": ("a", "b", "c", "d"),
        "names": ["a", "b", "c", "d"],
        "targets": [{"boxes": torch.ones(i, 4)} for i in (1, 4, 2, 4)],
        "images": [torch.ones(3, i, i) for i in range(4)],
        "table": torch.ones(7, 7),
        "scale": 0.5,
        "sizes": (2, 3),
    }
    first, second = parts_of(batch)
    assert torch.equal(second["x"], x[2:])
    assert second["array"].tolist() == [2, 3]
    assert first["texts"] == ("a", "b")
    assert second["names"] == ["c", "d"]
    assert [len(target["boxes"]) for target in second["targets"]] == [2, 4]
    assert [image.shape[1] for image in second["images"]] == [2, 3]
    for part in (first, second):
        assert part["table"].shape == (7, 7)
        assert (part["scale"], part["sizes"]) == (0.5, (2, 3))


@pytest.mark.parametrize("kind", [list, tuple, lambda columns: Pair(*columns)])
def test_columns_of_as_many_examples_as_there_are_columns_are_cut_each(kind):
    x, y = torch.arange(6).reshape(2, 3), torch.tensor([5, 6])
    for index, part in enumerate(split_batch(kind((x, y)), 2, 1)):
        assert type(part) is type(kind((x, y)))
        assert torch.equal(part[0], x[index : index + 1])
        assert torch.equal(part[1], y[index : index + 1])


def test_arrays_are_counted_where_there_is_no_tensor():
    assert count_examples({"scale": 1.0, "x": np.ones((5, 2))}) == 5
    assert count_examples([np.ones(3), torch.ones(4)]) == 4
    with pytest.raises(UserError, match="has no tensor"):
        count_examples({"x": np.float64(1.0), "y": "text"})


def loader(batch_size):
    return torch.utils.data.DataLoader(range(100), batch_size)


TIME_FIRST = torch.zeros(12, 8)


@pytest.mark.parametrize(
    ("batch", "is_first"),
    [
        (TIME_FIRST, False),
        ({"x": TIME_FIRST, "y": torch.zeros(8)}, False),
        ({"x": TIME_FIRST[:5], "y": torch.zeros(8)}, True),
        ({"y": torch.zeros(8), "x": TIME_FIRST}, False),
        ([[torch.zeros(3, 5, 5)] * 8, torch.zeros(8)], True),
    ],
)
def test_another_first_dimension_than_the_examples_is_refused(batch, is_first):
    with pytest.raises(UserError, match=r"batch_size=8 has a tensor of shape .* batch_first=True"):
        check_examples(batch, loader(8), is_first)


@pytest.mark.parametrize(
    ("batch", "is_first"),
    [
        ({"x": torch.zeros(8, 12), "table": torch.zeros(30, 2)}, True),
        ({"x": torch.zeros(5, 12), "table": torch.zeros(8)}, False),  # the last batch
        ({"x": torch.zeros(5, 12)}, True),  # examples that a collate function left out
        ({"text": "nothing"}, True),
    ],
)
def test_other_batches_are_not(batch, is_first):
    check_examples(batch, loader(8), is_first)
