"""Readers: official SQuAD JSON files and data sets of the Hugging Face hub, checked line by line.

Both end in a `QuestionSet`. Whatever is wrong with the input is found here, before anything
expensive, and said in one line with file, place and rule.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ipu_bert.data.questions import Answer, Question, QuestionSet
from lightning_ipu_bert.errors import UserError


class Rules(NamedTuple):
    """What a split must fulfil."""

    version_2: bool = False
    """Questions without an answer are allowed, as in SQuAD v2.0."""
    answers_required: bool = True
    """Every question must state its answers (or, with `version_2`, that it has none)."""
    skip_misplaced_answers: bool = False
    """Leave out answers that do not stand where they claim to, instead of refusing the file."""


class _Record(NamedTuple):
    """One question as it stands in a file; `place` says where, for messages."""

    place: str
    id: str
    question: str
    context: str
    answers: Optional[List[Answer]]


def read_files(paths: Sequence[str], rules: Rules) -> QuestionSet:
    """Read official SQuAD JSON files, v1.1 or v2.0, as one split.

    Args:
        paths: One or several files.
        rules: What the questions must fulfil.

    Raises:
        UserError: If a file is missing, is no JSON, has another shape, or breaks a rule.
    """
    return _collect((record for path in paths for record in _file_records(path)), rules)


def read_hub(name: str, config: Optional[str], split: str, rules: Rules) -> QuestionSet:
    """Read a data set with SQuAD's columns through `datasets.load_dataset`.

    Args:
        name: Hub name or local folder, e.g. ``squad`` or ``squad_v2``.
        config: Configuration of the data set, if it has several.
        split: Split of the data set, e.g. ``validation``.
        rules: What the questions must fulfil.

    Raises:
        UserError: If data set or split are unknown, a column is missing, or a rule is broken.
    """
    return _collect(_hub_records(name, config, split), rules)


def _collect(records: Iterator[_Record], rules: Rules) -> QuestionSet:
    result = QuestionSet()
    passage_index: Dict[str, int] = {}
    place_of_id: Dict[str, str] = {}
    misplaced: List[str] = []
    for record in records:
        _check_record(record, rules, place_of_id)
        right = [a for a in record.answers or () if _stands_in(record.context, a)]
        wrong = [a for a in record.answers or () if a not in right]
        misplaced += [_describe_misplaced(record, answer) for answer in wrong]
        if wrong and not right:
            continue
        passage = passage_index.setdefault(record.context, len(passage_index))
        if passage == len(result.passages):
            result.passages.append(record.context)
        result.questions.append(Question(record.id, record.question, passage, tuple(right)))
    _report_misplaced(misplaced, len(place_of_id) - len(result.questions), rules)
    if not result.questions:
        raise UserError("The data hold no question at all. Give at least one.")
    return result


def _stands_in(context: str, answer: Answer) -> bool:
    return bool(answer.text) and answer.start >= 0 and context.startswith(answer.text, answer.start)


def _check_record(record: _Record, rules: Rules, place_of_id: Dict[str, str]) -> None:
    if record.id in place_of_id:
        raise UserError(
            f"{record.place}: the id '{record.id}' was used before, at {place_of_id[record.id]}. "
            "Ids must be unique in a split: rename one or drop the repetition."
        )
    place_of_id[record.id] = record.place
    if not record.context.strip():
        raise UserError(
            f"{record.place}: the context of question '{record.id}' is empty. "
            "Every question needs a passage: add it or remove the question."
        )
    if record.answers is None and rules.answers_required:
        raise UserError(
            f"{record.place}: question '{record.id}' has no 'answers'. Training and evaluation "
            "need them: add them, or give the file as --data.predict_file."
        )
    if record.answers == [] and rules.answers_required and not rules.version_2:
        raise UserError(
            f"{record.place}: question '{record.id}' is marked as having no answer, as only SQuAD "
            "v2.0 allows. Set --data.version_2 true to read such data."
        )


def _describe_misplaced(record: _Record, answer: Answer) -> str:
    found = record.context[max(answer.start, 0) : max(answer.start, 0) + len(answer.text)]
    return (
        f"{record.place} (id '{record.id}'): {answer.text!r} should start at character "
        f"{answer.start}, where {found!r} stands"
    )


def _report_misplaced(misplaced: List[str], dropped_questions: int, rules: Rules) -> None:
    if not misplaced:
        return
    first = "; ".join(misplaced[:3])
    if not rules.skip_misplaced_answers:
        raise UserError(
            f"{len(misplaced)} answers do not stand at their answer_start, e.g. {first}. "
            "Correct them, or set --data.skip_misplaced_answers true to leave them out."
        )
    rank_zero_info(
        f"Skipped {len(misplaced)} misplaced answers and with them {dropped_questions} questions "
        f"that have no other: {first}"
    )


# --- official JSON ---------------------------------------------------------------------------


def _file_records(path: str) -> Iterator[_Record]:
    name = Path(path).name
    for a, article in enumerate(_field(_load_json(path), "data", list, path)):
        for p, paragraph in enumerate(_field(article, "paragraphs", list, f"{name}: data[{a}]")):
            place = f"{name}: data[{a}].paragraphs[{p}]"
            context = _field(paragraph, "context", str, place)
            for q, qa in enumerate(_field(paragraph, "qas", list, place)):
                yield _qa_record(qa, context, f"{place}.qas[{q}]")


def _load_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Give a readable text file.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno}, column {error.colno} is not JSON ({error.msg}). "
            "Give a file in the official SQuAD format."
        ) from None


def _field(holder: Any, key: str, kind: type, place: str) -> Any:
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, kind):
        names = {list: "a list", str: "a text", int: "a whole number"}
        raise UserError(
            f"{place}: '{key}' is missing or is not {names[kind]}. The official SQuAD format is "
            "data[].paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}}}."
        )
    return value


def _qa_record(qa: Any, context: str, place: str) -> _Record:
    answers: Optional[List[Answer]] = None
    if isinstance(qa, dict) and ("answers" in qa or qa.get("is_impossible")):
        # SQuAD v2.0 files list a plausible but wrong answer under another key; it never counts.
        listed = [] if qa.get("is_impossible") else _field(qa, "answers", list, place)
        answers = [
            Answer(
                _field(answer, "text", str, f"{place}.answers[{i}]"),
                _field(answer, "answer_start", int, f"{place}.answers[{i}]"),
            )
            for i, answer in enumerate(listed)
        ]
    question = _field(qa, "question", str, place)
    return _Record(place, _field(qa, "id", str, place), question, context, answers)


# --- hub data sets ---------------------------------------------------------------------------


def _hub_records(name: str, config: Optional[str], split: str) -> Iterator[_Record]:
    dataset = _load_hub(name, config, split)
    missing = [c for c in ("id", "question", "context") if c not in dataset.column_names]
    if missing:
        raise UserError(
            f"Data set '{name}' lacks the columns {missing}; it has {dataset.column_names}. "
            "Give one with SQuAD's columns: id, question, context, answers."
        )
    for row, item in enumerate(dataset):
        answers = item.get("answers")
        listed = answers and list(zip(answers["text"], answers["answer_start"]))
        known = None if answers is None else [Answer(text, start) for text, start in listed]
        place = f"{name}[{split}][{row}]"
        yield _Record(place, str(item["id"]), item["question"], item["context"], known)


def _load_hub(name: str, config: Optional[str], split: str) -> Any:
    import datasets  # takes a second to import

    splits = _explained(name, lambda: datasets.get_dataset_split_names(name, config))
    if split not in splits:
        raise UserError(
            f"Data set '{name}' has no split '{split}'; it has {sorted(splits)}. "
            "Name one of them, e.g. --data.train_split."
        )
    return _explained(name, lambda: datasets.load_dataset(name, config, split=split))


def _explained(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:
        # `datasets` has a family of errors for one cause; its own first line says which.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Data set '{name}' cannot be loaded: {reason} Check the name, or give files with "
            "--data.train_file and --data.validation_file."
        ) from error
