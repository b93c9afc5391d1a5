"""Questions with passages and answers, independent of the file format."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import List, NamedTuple, Tuple


class Answer(NamedTuple):
    """An answer, as a span of the passage."""

    text: str
    """Text of the answer, as in the passage."""
    start: int
    """Index of the first character in the passage."""


class Question(NamedTuple):
    """A question about a passage, with all correct answers."""

    id: str
    """Unique within the split; the key of predictions."""
    text: str
    """Text of the question."""
    passage: int
    """Index into `QuestionSet.passages`."""
    answers: Tuple[Answer, ...]
    """Empty if the question is unanswerable (SQuAD v2.0), or the answers are unknown."""


@dataclass
class QuestionSet:
    """The questions of one split.

    A passage with several questions is stored and tokenized once.
    """

    passages: List[str] = field(default_factory=list)
    """The distinct contexts, in file order."""
    questions: List[Question] = field(default_factory=list)
    """In file order."""

    def passage_of(self, question: Question) -> str:
        """Return the passage of a question."""
        return self.passages[question.passage]

    def digest(self) -> str:
        """Return a SHA-256 of all contents that affect features."""
        sha = hashlib.sha256()
        for passage in self.passages:
            sha.update(passage.encode("utf8", "surrogatepass") + b"\0")
        for question in self.questions:
            spans = [(answer.start, len(answer.text)) for answer in question.answers[:1]]
            line = f"{question.text}\0{question.passage}\0{spans}\0"
            sha.update(line.encode("utf8", "surrogatepass"))
        return sha.hexdigest()
