"""Settings of the data that a plan depends on. No torch: a plan does not require it."""

from __future__ import annotations

from typing import Any, Iterator, Mapping, NamedTuple

from lightning_ipu_bert.pipeline.rules import Violation, count_rule

SPECIAL_TOKENS = 3
"""[CLS], [SEP] after the question and [SEP] after the passage."""


class Windowing(NamedTuple):
    """How passages are split into windows.

    Source:
        Devlin et al., run_squad.py of BERT (max_seq_length, doc_stride).
    """

    max_length: int = 384
    """Tokens in a feature, special tokens included."""
    doc_stride: int = 128
    """Overlap of consecutive windows in passage tokens."""


class BatchSettings(NamedTuple):
    """Features per batch on one device."""

    micro_batch_size: int = 16
    """Features per training batch; on a pipeline, per micro-batch."""
    eval_micro_batch_size: int = 32
    """Features per batch of validation, test and predict."""


class DataSettings(NamedTuple):
    """The settings of the data that a plan depends on."""

    windowing: Windowing = Windowing()
    batches: BatchSettings = BatchSettings()


def settings_of(data: Mapping[str, Any]) -> DataSettings:
    """Return the settings from the arguments of a data module; other arguments are ignored."""
    return DataSettings(
        Windowing(**{k: data[k] for k in Windowing._fields if k in data}),
        BatchSettings(**{k: data[k] for k in BatchSettings._fields if k in data}),
    )


def data_rules(settings: DataSettings) -> Iterator[Violation]:
    """Counts must be at least 1, and the stride must fit the windows."""
    for name, value in settings.batches._asdict().items():
        yield from count_rule(name, value)
    yield from windowing_rules(settings.windowing)


def windowing_rules(windowing: Windowing) -> Iterator[Violation]:
    """A window must have room for special tokens, a question and new passage tokens."""
    yield from count_rule("max_length", windowing.max_length)
    longest = windowing.max_length - SPECIAL_TOKENS - 2
    if not 0 <= windowing.doc_stride <= longest:
        yield Violation(
            "doc_stride",
            windowing.doc_stride,
            f"does not fit max_length={windowing.max_length}: a window must have room for a "
            "question and new passage tokens",
            f"Set doc_stride to 0..{max(longest, 0)}, or a larger max_length.",
        )
