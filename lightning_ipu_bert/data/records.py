"""Records: the questions of any source one by one, checked and collected into a `QuestionSet`.

Whatever is wrong with the input is found here, before anything expensive, and said in one line with
file, place and rule.
"""

from __future__ import annotations

from typing import Dict, Iterable, List, NamedTuple, Optional

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


class Record(NamedTuple):
    """One question as it stands in a file or data set, before any check."""

    place: str
    """Where it stands, for messages, e.g. ``dev.json: data[0].paragraphs[3].qas[1]``."""
    id: str
    question: str
    context: str
    answers: Optional[List[Answer]]
    """None if none are given; empty if the question is said to have none."""


def collect(records: Iterable[Record], rules: Rules) -> QuestionSet:
    """Check records and make them the questions of a split.

    Raises:
        UserError: If a record breaks a rule, or there is none.
    """
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


def _check_record(record: Record, rules: Rules, place_of_id: Dict[str, str]) -> None:
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


def _describe_misplaced(record: Record, answer: Answer) -> str:
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
