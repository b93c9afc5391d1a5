"""Records: questions of any source, which are validated and collected into a `QuestionSet`.

Invalid input raises an error here, before any expensive work, in one line with file, position and
rule.
"""

from __future__ import annotations

from typing import Dict, Iterable, List, NamedTuple, Optional

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_ipu_bert.data.questions import Answer, Question, QuestionSet
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.files import collections_paused


class Rules(NamedTuple):
    """Rules for the questions of a split."""

    version_2: bool = False
    """Whether unanswerable questions are allowed, as in SQuAD v2.0."""
    answers_required: bool = True
    """Whether every question must have answers (or, with `version_2`, be marked unanswerable)."""
    skip_misplaced_answers: bool = False
    """Whether to skip answers that are not at their answer_start, instead of raising an error."""


class Record(NamedTuple):
    """A question as read from a file or dataset, before validation."""

    location: str
    """Position in the source, for messages, e.g. ``dev.json: data[0].paragraphs[3].qas[1]``."""
    id: str
    question: str
    context: str
    answers: Optional[List[Answer]]
    """None if not given; empty if the question is marked unanswerable."""


@collections_paused()
def collect(records: Iterable[Record], rules: Rules) -> QuestionSet:
    """Validate records and collect them into a `QuestionSet`.

    Raises:
        UserError: If a record is invalid, or there are no records.
    """
    result = QuestionSet()
    passage_index: Dict[str, int] = {}
    location_of_id: Dict[str, str] = {}
    misplaced: List[str] = []
    for record in records:
        _check_record(record, rules, location_of_id)
        answers = record.answers or ()
        right = tuple(a for a in answers if _is_in_place(record.context, a))
        if len(right) < len(answers):
            misplaced += [_describe_misplaced(record, a) for a in answers if a not in right]
            if not right:
                continue
        passage = passage_index.setdefault(record.context, len(passage_index))
        if passage == len(result.passages):
            result.passages.append(record.context)
        result.questions.append(Question(record.id, record.question, passage, right))
    _report_misplaced(misplaced, len(location_of_id) - len(result.questions), rules)
    if not result.questions:
        raise UserError("The data contains no questions. Pass at least one.")
    return result


def _is_in_place(context: str, answer: Answer) -> bool:
    return bool(answer.text) and answer.start >= 0 and context.startswith(answer.text, answer.start)


def _check_record(record: Record, rules: Rules, location_of_id: Dict[str, str]) -> None:
    if record.id in location_of_id:
        raise UserError(
            f"{record.location}: the id '{record.id}' is a duplicate of "
            f"{location_of_id[record.id]}. Ids must be unique in a split: rename or remove one."
        )
    location_of_id[record.id] = record.location
    if not record.context.strip():
        raise UserError(
            f"{record.location}: the context of question '{record.id}' is empty. "
            "Every question needs a passage: add it or remove the question."
        )
    if record.answers is None and rules.answers_required:
        raise UserError(
            f"{record.location}: question '{record.id}' has no 'answers'. Training and evaluation "
            "need them: add them, or pass the file as --data.predict_file."
        )
    if record.answers == [] and rules.answers_required and not rules.version_2:
        raise UserError(
            f"{record.location}: question '{record.id}' is marked unanswerable, which only SQuAD "
            "v2.0 allows. Set --data.version_2 true to read such data."
        )


def _describe_misplaced(record: Record, answer: Answer) -> str:
    found = record.context[max(answer.start, 0) : max(answer.start, 0) + len(answer.text)]
    return (
        f"{record.location} (id '{record.id}'): {answer.text!r} should start at character "
        f"{answer.start}, but there is {found!r}"
    )


def _report_misplaced(misplaced: List[str], dropped_questions: int, rules: Rules) -> None:
    if not misplaced:
        return
    first = "; ".join(misplaced[:3])
    if not rules.skip_misplaced_answers:
        raise UserError(
            f"{len(misplaced)} answers are not at their answer_start, e.g. {first}. "
            "Correct them, or set --data.skip_misplaced_answers true to skip them."
        )
    rank_zero_info(
        f"Skipped {len(misplaced)} misplaced answers, and {dropped_questions} questions that have "
        f"no other answer: {first}"
    )
