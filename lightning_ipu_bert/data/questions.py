"""Questions with their passages and answers: what every reader gives, free of any file format."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import List, Tuple


@dataclass(frozen=True)
class Answer:
    """A stretch of the passage."""

    text: str
    """The characters of the answer, as they stand in the passage."""
    start: int
    """Index of the first character in the passage."""


@dataclass(frozen=True)
class Question:
    """A question about one passage, with all the answers that count as right."""

    id: str
    """Unique in its split; predictions are filed under it."""
    text: str
    """The question as it was asked."""
    passage: int
    """Index into `QuestionSet.passages`."""
    answers: Tuple[Answer, ...]
    """Empty if the passage does not answer the question (SQuAD v2.0), or none is known."""


@dataclass
class QuestionSet:
    """The questions of one split.

    A passage is stored once, however many questions it has: it is tokenised once, too.
    """

    passages: List[str] = field(default_factory=list)
    """The distinct contexts, in file order."""
    questions: List[Question] = field(default_factory=list)
    """In file order."""

    def passage_of(self, question: Question) -> str:
        """Return the text that answers `question`."""
        return self.passages[question.passage]

    def digest(self) -> str:
        """Return a SHA-256 over everything in here that shapes a feature."""
        sha = hashlib.sha256()
        for passage in self.passages:
            sha.update(passage.encode("utf8", "surrogatepass") + b"\0")
        for question in self.questions:
            spans = [(answer.start, len(answer.text)) for answer in question.answers[:1]]
            line = f"{question.text}\0{question.passage}\0{spans}\0"
            sha.update(line.encode("utf8", "surrogatepass"))
        return sha.hexdigest()
