"""Passages and questions of the corpus, sampled from templates.json."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Set, Tuple, TypedDict

TEMPLATES: Dict[str, Any] = json.loads(Path(__file__).with_name("templates.json").read_text("utf8"))


class SquadAnswer(TypedDict):
    """An answer in a SQuAD file."""

    text: str
    answer_start: int


class SquadQuestion(TypedDict):
    """A question in a SQuAD file."""

    id: str
    question: str
    answers: List[SquadAnswer]


class SquadParagraph(TypedDict):
    """A passage in a SQuAD file."""

    context: str
    qas: List[SquadQuestion]


class SquadArticle(TypedDict):
    """An article in a SQuAD file."""

    title: str
    paragraphs: List[SquadParagraph]


class SquadFile(TypedDict):
    """An official SQuAD v1.1 file."""

    version: str
    data: List[SquadArticle]


class Relation(NamedTuple):
    """A fact about a subject: phrasings as statement and as question."""

    statements: Tuple[str, ...]
    """Sentences with a ``{subject}`` and a ``{value}``."""
    questions: Tuple[str, ...]
    """Questions with a ``{subject}``."""


RELATIONS: Dict[str, Dict[str, List[Relation]]] = {
    kind: {value: [Relation(**relation) for relation in two] for value, two in of_kind.items()}
    for kind, of_kind in TEMPLATES["relations"].items()
}
"""Relations of each kind of subject: two for every kind of value."""

INTRODUCTIONS: Dict[str, List[str]] = TEMPLATES["introductions"]
"""First sentences, which do not answer any question."""

OTHER_WORDS: Dict[str, List[str]] = TEMPLATES["other_words"]
"""References to a subject that was named; pronouns only at the start of a sentence."""

FIRM_ENDINGS: List[str] = TEMPLATES["firm_endings"]
"""Common nouns, which both splits share."""

PARTS: Dict[str, List[str]] = TEMPLATES["parts"]
"""Words of a value by kind; other kinds are a single word."""


def is_held_out(word: str) -> bool:
    """Return whether a name or a year is in the validation split, as one in eight."""
    return zlib.crc32(word.encode()) % 8 == 0


def random_word(kind: str, rng: random.Random) -> str:
    """Return a year, an invented name, or the common noun that ends the name of a firm."""
    if kind == "firm ending":
        return rng.choice(FIRM_ENDINGS)
    if kind == "year":
        return str(rng.randint(1200, 1999))
    syllables = [
        rng.choice(TEMPLATES["onsets"]) + rng.choice(TEMPLATES["vowels"])
        for _ in range(rng.randint(1, 2))
    ]
    return "".join([*syllables, rng.choice(TEMPLATES["endings"][kind])]).capitalize()


def new_value(kind: str, rng: random.Random, held_out: bool, taken: Set[str]) -> str:
    """Return a value of the split without words in `taken`, and add its words to `taken`."""
    words = []
    for part in PARTS.get(kind, [kind]):
        word = random_word(part, rng)
        while word in taken or (part != "firm ending" and is_held_out(word) != held_out):
            word = random_word(part, rng)
        taken.add(word)
        words.append(word)
    return " ".join(words)


def quickstart_corpus(num_passages: int, seed: int, held_out: bool) -> SquadFile:
    """Return a corpus as the dictionary of an official SQuAD v1.1 file.

    Args:
        num_passages: Number of passages, each with three sentences and four questions.
        seed: Seed of the passages; a longer corpus of the same seed starts with the same passages.
        held_out: Whether to use the names and years of the validation split.
    """
    rng = random.Random(seed)
    title = "validation" if held_out else "train"
    paragraphs = [_paragraph(rng, held_out, f"{title}-{i}") for i in range(num_passages)]
    return {"version": "1.1", "data": [{"title": title, "paragraphs": paragraphs}]}


def _paragraph(rng: random.Random, held_out: bool, id_prefix: str) -> SquadParagraph:
    kind = rng.choice(sorted(RELATIONS))
    taken: Set[str] = set()
    subject = new_value(kind, rng, held_out, taken)
    value_kind = rng.choice(sorted(RELATIONS[kind]))
    relations = list(RELATIONS[kind][value_kind])
    rng.shuffle(relations)
    context = rng.choice(INTRODUCTIONS[kind]).format(subject=subject)
    qas: List[SquadQuestion] = []
    for relation in relations:
        value = new_value(value_kind, rng, held_out, taken)
        template = rng.choice(relation.statements)
        named = _named(template, subject, kind, rng)
        before, after = template.replace("{subject}", named).split("{value}")
        before = f"{context} {before[:1].upper()}{before[1:]}"
        for question in rng.sample(relation.questions, 2):
            qas.append(
                {
                    "id": f"{id_prefix}-{len(qas)}",
                    "question": question.format(subject=subject),
                    "answers": [{"text": value, "answer_start": len(before)}],
                }
            )
        context = before + value + after
    return {"context": context, "qas": qas}


def _named(template: str, subject: str, kind: str, rng: random.Random) -> str:
    """Return the name of the subject or a reference to it."""
    if rng.random() < 0.5 or (kind == "person" and not template.startswith("{subject}")):
        return subject
    return rng.choice(OTHER_WORDS[kind])


def texts(corpus: SquadFile) -> Iterator[str]:
    """Yield the passages and questions of a corpus."""
    for article in corpus["data"]:
        for paragraph in article["paragraphs"]:
            yield paragraph["context"]
            yield from (qa["question"] for qa in paragraph["qas"])
