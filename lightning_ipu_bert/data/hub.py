"""Datasets from the Hugging Face hub, or local folders in the same format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Iterator, Optional, TypeVar

from lightning_ipu_bert.data.questions import Answer
from lightning_ipu_bert.data.records import Record
from lightning_ipu_bert.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")


def records(name: str, config: Optional[str], split: str) -> Iterator[Record]:
    """Yield the questions of a dataset with the columns of SQuAD, using `datasets.load_dataset`.

    Args:
        name: Hub name or local folder, e.g. ``squad`` or ``squad_v2``.
        config: Configuration of the dataset, if it has several.
        split: Split of the dataset, e.g. ``validation``.

    Raises:
        UserError: If the dataset or split is unknown, or a column is missing.
    """
    dataset = _load_hub(name, config, split)
    missing = [c for c in ("id", "question", "context") if c not in dataset.column_names]
    if missing:
        raise UserError(
            f"Dataset '{name}' lacks the columns {missing}; it has {dataset.column_names}. "
            "Use one with the columns of SQuAD: id, question, context, answers."
        )
    for row, item in enumerate(dataset):
        answers = item.get("answers")
        listed = answers and list(zip(answers["text"], answers["answer_start"]))
        known = None if answers is None else [Answer(text, start) for text, start in listed]
        place = f"{name}[{split}][{row}]"
        yield Record(place, str(item["id"]), item["question"], item["context"], known)


def _load_hub(name: str, config: Optional[str], split: str) -> Dataset:
    import datasets  # takes a second to import

    splits = _explained(name, lambda: datasets.get_dataset_split_names(name, config))
    if split not in splits:
        raise UserError(
            f"Dataset '{name}' has no split '{split}'; it has {sorted(splits)}. "
            "Select one of them, e.g. by --data.train_split."
        )
    return _explained(name, lambda: datasets.load_dataset(name, config, split=split))


def _explained(name: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except (OSError, ValueError) as error:
        # `datasets` raises various errors for the same cause; the first line has the reason.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Dataset '{name}' cannot be loaded: {reason} Check the name, or pass files with "
            "--data.train_file and --data.validation_file."
        ) from error
