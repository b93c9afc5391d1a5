"""Settings of the data that other parts compute with. No torch: a plan is made without it."""

from __future__ import annotations

from typing import Any, Iterator, Mapping, NamedTuple

from lightning_ipu_bert.pipeline.rules import Violation, count_rule

SPECIAL_TOKENS = 3
"""[CLS], [SEP] after the question and [SEP] after the passage."""


class Windowing(NamedTuple):
    """How long passages are cut. Source: Devlin et al., BERT's run_squad.py (max_seq_length)."""

    max_length: int = 384
    """Tokens in a feature, special tokens included."""
    doc_stride: int = 128
    """Passage tokens that two neighbouring windows share."""


class BatchSettings(NamedTuple):
    """Features in a batch on one device."""

    micro_batch_size: int = 16
    """Features in a training batch; on a pipeline, in each micro-batch."""
    eval_micro_batch_size: int = 32
    """The same in validation, test and predict."""


class DataSettings(NamedTuple):
    """What a plan needs to know of the data."""

    windowing: Windowing = Windowing()
    batches: BatchSettings = BatchSettings()


def settings_of(data: Mapping[str, Any]) -> DataSettings:
    """Return the settings of a data module from its arguments by name; others are left alone."""
    return DataSettings(
        Windowing(**{k: data[k] for k in Windowing._fields if k in data}),
        BatchSettings(**{k: data[k] for k in BatchSettings._fields if k in data}),
    )


def data_rules(settings: DataSettings) -> Iterator[Violation]:
    """Counts are at least 1, and windows move on."""
    for name, value in settings.batches._asdict().items():
        yield from count_rule(name, value)
    yield from windowing_rules(settings.windowing)


def windowing_rules(windowing: Windowing) -> Iterator[Violation]:
    """A window holds the special tokens, a question's token and a passage's token of its own."""
    yield from count_rule("max_length", windowing.max_length)
    longest = windowing.max_length - SPECIAL_TOKENS - 2
    if not 0 <= windowing.doc_stride <= longest:
        yield Violation(
            "doc_stride",
            windowing.doc_stride,
            f"does not fit max_length={windowing.max_length}: windows must move on and hold a "
            "question too",
            f"Set doc_stride to 0..{max(longest, 0)}, or a larger max_length.",
        )
