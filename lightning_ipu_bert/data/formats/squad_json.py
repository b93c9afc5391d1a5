"""The official JSON format of SQuAD, v1.1 and v2.0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator, List, Optional

from lightning_ipu_bert.data.file_format import FileFormat
from lightning_ipu_bert.data.questions import Answer
from lightning_ipu_bert.data.records import Record
from lightning_ipu_bert.errors import UserError


def records(path: str) -> Iterator[Record]:
    """Yield the questions of a SQuAD file, v1.1 or v2.0.

    Raises:
        UserError: If the file is missing, is not JSON, or has another structure.
    """
    name = Path(path).name
    for a, article in enumerate(_field(_load_json(path), "data", list, path)):
        for p, paragraph in enumerate(_field(article, "paragraphs", list, f"{name}: data[{a}]")):
            location = f"{name}: data[{a}].paragraphs[{p}]"
            context = _field(paragraph, "context", str, location)
            for q, qa in enumerate(_field(paragraph, "qas", list, location)):
                yield _qa_record(qa, context, f"{location}.qas[{q}]")


def _load_json(path: str) -> object:
    try:
        return json.loads(Path(path).read_text(encoding="utf8"))
    except FileNotFoundError:
        raise UserError(f"{path}: the file does not exist. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Pass a readable text file.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno}, column {error.colno} is not JSON ({error.msg}). "
            "Pass a file in the official SQuAD format."
        ) from None


def _field(parent: object, key: str, kind: type, location: str) -> Any:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, kind):
        names = {list: "a list", str: "a string", int: "an integer"}
        raise UserError(
            f"{location}: '{key}' is missing or is not {names[kind]}. The official SQuAD format is "
            "data[].paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}}}."
        )
    return value


def _qa_record(qa: Any, context: str, location: str) -> Record:
    answers: Optional[List[Answer]] = None
    if isinstance(qa, dict) and ("answers" in qa or qa.get("is_impossible")):
        # Plausible but wrong answers of SQuAD v2.0 are under another key, which is ignored.
        listed = [] if qa.get("is_impossible") else _field(qa, "answers", list, location)
        answers = [_answer(answer, location, i) for i, answer in enumerate(listed)]
    question = _field(qa, "question", str, location)
    return Record(location, _field(qa, "id", str, location), question, context, answers)


def _answer(answer: object, location: str, index: int) -> Answer:
    location = f"{location}.answers[{index}]"
    text = _field(answer, "text", str, location)
    return Answer(text, _field(answer, "answer_start", int, location))


FORMAT = FileFormat((".json",), records)
