"""The embedded corpus: invented people, firms and towns as questions in SQuAD v1.1 format.

A passage describes two or three subjects of one kind. It says the same few things about each of
them, so only the sentence that names the subject of the question holds the answer; the other
sentences hold answers of the same kind. Names, places, years and figures of the validation split
never occur in the training split. Occupations and goods are common nouns and shared by both.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Tuple

from tokenizers.implementations import BertWordPieceTokenizer
from transformers import BertTokenizerFast

NUM_TRAINING_PASSAGES = 4000
NUM_VALIDATION_PASSAGES = 150
VOCABULARY_SIZE = 1000
"""Word pieces: the words of the templates stay whole and invented names fall into syllables."""


class Relation(NamedTuple):
    """Something that is said about a subject, and the ways to say it and to ask for it."""

    value_kind: str
    """Kind of the answer, a key of ``MAKERS``."""
    statements: Tuple[str, ...]
    """Sentences with a ``{subject}`` and a ``{value}``."""
    questions: Tuple[str, ...]
    """Questions with a ``{subject}``."""


RELATIONS: Dict[str, Tuple[Relation, ...]] = {
    "person": (
        Relation(
            "town",
            (
                "{subject} was born in {value}.",
                "{subject} came from {value}.",
                "{subject} grew up in {value}.",
                "{value} is the birthplace of {subject}.",
                "The town of {value} was the home of the young {subject}.",
            ),
            (
                "Where was {subject} born?",
                "In which town was {subject} born?",
                "Where did {subject} grow up?",
                "What is the birthplace of {subject}?",
                "Which town did {subject} come from?",
            ),
        ),
        Relation(
            "year",
            (
                "{subject} was born in {value}.",
                "{subject} was born in the year {value}.",
                "The birth of {subject} is dated to {value}.",
                "In {value} {subject} was born.",
            ),
            (
                "When was {subject} born?",
                "In which year was {subject} born?",
                "In what year was {subject} born?",
                "What is the year of birth of {subject}?",
            ),
        ),
        Relation(
            "occupation",
            (
                "{subject} worked as a {value}.",
                "{subject} was a well known {value}.",
                "{subject} earned a living as a {value}.",
                "The trade of {subject} was that of a {value}.",
            ),
            (
                "What was the profession of {subject}?",
                "What did {subject} work as?",
                "How did {subject} earn a living?",
                "What was the trade of {subject}?",
            ),
        ),
        Relation(
            "firm",
            (
                "{subject} worked for {value}.",
                "{subject} was employed by {value}.",
                "{subject} spent many years at {value}.",
                "{value} was the employer of {subject}.",
            ),
            (
                "Who did {subject} work for?",
                "Which firm employed {subject}?",
                "Who was the employer of {subject}?",
                "At which firm did {subject} work?",
            ),
        ),
    ),
    "firm": (
        Relation(
            "person",
            (
                "{subject} was founded by {value}.",
                "{value} founded {subject}.",
                "{value} was the founder of {subject}.",
                "It was {value} who started {subject}.",
            ),
            (
                "Who founded {subject}?",
                "Who was the founder of {subject}?",
                "By whom was {subject} founded?",
                "Who started {subject}?",
            ),
        ),
        Relation(
            "town",
            (
                "{subject} has its seat in {value}.",
                "{subject} is based in {value}.",
                "The head office of {subject} is in {value}.",
                "{value} is home to the firm {subject}.",
            ),
            (
                "Where does {subject} have its seat?",
                "Where is {subject} based?",
                "In which town is the head office of {subject}?",
                "Which town is home to {subject}?",
            ),
        ),
        Relation(
            "year",
            (
                "{subject} was founded in {value}.",
                "{subject} opened its doors in {value}.",
                "The founding of {subject} took place in {value}.",
                "In {value} {subject} was set up.",
            ),
            (
                "When was {subject} founded?",
                "In which year was {subject} founded?",
                "In what year did {subject} open its doors?",
                "When was {subject} set up?",
            ),
        ),
        Relation(
            "figure",
            (
                "{subject} has {value} employees.",
                "{subject} employs {value} people.",
                "A staff of {value} works at {subject}.",
                "There are {value} workers at {subject}.",
            ),
            (
                "How many employees does {subject} have?",
                "How many people does {subject} employ?",
                "How large is the staff of {subject}?",
                "How many workers are there at {subject}?",
            ),
        ),
        Relation(
            "goods",
            (
                "{subject} makes {value}.",
                "{subject} is known for its {value}.",
                "The main product of {subject} is {value}.",
                "Most of the {value} in the shops come from {subject}.",
            ),
            (
                "What does {subject} make?",
                "What is {subject} known for?",
                "What is the main product of {subject}?",
                "Which goods come from {subject}?",
            ),
        ),
    ),
    "town": (
        Relation(
            "person",
            (
                "The mayor of {subject} is {value}.",
                "{subject} is governed by {value}.",
                "{value} is the mayor of {subject}.",
                "{value} was elected mayor of {subject}.",
            ),
            (
                "Who is the mayor of {subject}?",
                "Who governs {subject}?",
                "Who was elected mayor of {subject}?",
                "What is the name of the mayor of {subject}?",
            ),
        ),
        Relation(
            "figure",
            (
                "{subject} has {value} inhabitants.",
                "The population of {subject} is {value}.",
                "About {value} people live in {subject}.",
                "{subject} is a town of {value} people.",
            ),
            (
                "How many inhabitants does {subject} have?",
                "What is the population of {subject}?",
                "How many people live in {subject}?",
                "How large is the population of {subject}?",
            ),
        ),
        Relation(
            "river",
            (
                "{subject} lies on the {value}.",
                "{subject} stands on the banks of the {value}.",
                "The river that flows through {subject} is the {value}.",
                "The {value} flows through {subject}.",
            ),
            (
                "On which river does {subject} lie?",
                "Which river flows through {subject}?",
                "What is the river of {subject} called?",
                "On the banks of which river does {subject} stand?",
            ),
        ),
        Relation(
            "year",
            (
                "{subject} was first mentioned in {value}.",
                "{subject} became a town in {value}.",
                "The oldest record of {subject} dates from {value}.",
                "In {value} {subject} received its charter.",
            ),
            (
                "When was {subject} first mentioned?",
                "In which year did {subject} become a town?",
                "From which year is the oldest record of {subject}?",
                "When did {subject} receive its charter?",
            ),
        ),
    ),
}

FULL_NAME = {
    "person": ("What is the full name of {subject}?", "What was {subject} called in full?"),
    "firm": ("What is the full name of {subject}?", "What is the firm {subject} called in full?"),
}
OCCUPATIONS = ["potter", "painter", "baker", "teacher", "doctor", "lawyer", "sailor", "farmer", "weaver", "printer", "miller", "tailor", "carpenter", "singer", "poet", "judge", "banker", "gardener", "chemist", "pilot"]
GOODS = ["clocks", "boots", "carpets", "lamps", "bicycles", "pianos", "ropes", "candles", "knives", "hats", "bottles", "saddles", "engines", "toys", "chairs", "paints", "tiles", "bells", "pumps", "gloves"]
FIRM_ENDINGS = ["Works", "Mills", "Brothers", "Company", "Trading", "Industries"]

ONSETS = ["b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "st", "tr"]
VOWELS = ["a", "e", "i", "o", "u"]
NAME_ENDINGS = ["lin", "rov", "sten", "mar", "dal", "vik", "ton", "berg", "nes", "ward", "rick", "sen", "ric", "loff", "mond", "del", "gren", "nik", "ras", "tin", "wyn", "don", "bel", "kor", "lund", "ver", "nor", "rell", "dan", "thal"]


def is_held_out(word: str) -> bool:
    """Tell whether an invented word belongs to the validation split: about one in eight does."""
    return zlib.crc32(word.encode()) % 8 == 0


def draw(make: Callable[[], str], held_out: bool) -> str:
    """Repeat a draw until the word falls into the wanted split."""
    while True:
        word = make()
        if is_held_out(word) == held_out:
            return word


def invented_name(rng: random.Random, held_out: bool) -> str:
    """Return a capitalised name of two or three syllables."""

    def make() -> str:
        syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2)))]
        return ("".join(syllables) + rng.choice(NAME_ENDINGS)).capitalize()

    return draw(make, held_out)


MAKERS: Dict[str, Callable[[random.Random, bool], str]] = {
    "person": lambda rng, held_out: (
        f"{invented_name(rng, held_out)} {invented_name(rng, held_out)}"
    ),
    "firm": lambda rng, held_out: f"{invented_name(rng, held_out)} {rng.choice(FIRM_ENDINGS)}",
    "town": invented_name,
    "river": invented_name,
    "year": lambda rng, held_out: draw(lambda: str(rng.randint(1200, 1999)), held_out),
    "figure": lambda rng, held_out: draw(
        lambda: str(rng.randint(20, 999) * 10 ** rng.randint(0, 2)), held_out
    ),
    "occupation": lambda rng, _: rng.choice(OCCUPATIONS),
    "goods": lambda rng, _: rng.choice(GOODS),
}


def distinct(kind: str, count: int, rng: random.Random, held_out: bool) -> List[str]:
    values: List[str] = []
    while len(values) < count:
        value = MAKERS[kind](rng, held_out)
        if value not in values:
            values.append(value)
    return values


def paragraph(rng: random.Random, held_out: bool, id_prefix: str) -> Dict[str, Any]:
    kind = rng.choice(sorted(RELATIONS))
    num_subjects, num_relations = rng.choice(((2, 1), (2, 2), (3, 1)))
    subjects = distinct(kind, num_subjects, rng, held_out)
    facts = [
        (subject, value, relation)
        for relation in rng.sample(RELATIONS[kind], num_relations)
        for subject, value in zip(
            subjects, distinct(relation.value_kind, len(subjects), rng, held_out)
        )
    ]
    rng.shuffle(facts)
    context = ""
    qas = []
    where = {}
    for subject, value, relation in facts:
        context += " " if context else ""
        before, after = rng.choice(relation.statements).split("{value}")
        if subject not in where:
            where[subject] = len(context) + (
                before.index("{subject}")
                if "{subject}" in before
                else len(value) + len(before) + after.index("{subject}")
            )
        context += before.format(subject=subject)
        answer = {"text": value, "answer_start": len(context)}
        context += value + after.format(subject=subject)
        question = rng.choice(relation.questions).format(subject=subject)
        qas.append({"id": f"{id_prefix}-{len(qas)}", "question": question, "answers": [answer]})
    if kind != "town":
        for subject in subjects:
            part = subject.split()[0] if kind == "firm" else rng.choice(subject.split())
            question = rng.choice(FULL_NAME[kind]).format(subject=part)
            qas.append(
                {
                    "id": f"{id_prefix}-{len(qas)}",
                    "question": question,
                    "answers": [{"text": subject, "answer_start": where[subject]}],
                }
            )
    return {"context": context, "qas": qas}


def quickstart_corpus(num_passages: int, seed: int, held_out: bool = False) -> Dict[str, Any]:
    rng = random.Random(seed)
    split = "validation" if held_out else "train"
    return {
        "version": "1.1",
        "data": [
            {
                "title": f"{split}",
                "paragraphs": [
                    paragraph(rng, held_out, f"{split}-{i}") for i in range(num_passages)
                ],
            }
        ],
    }


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    alphabet = [char + char for char in ascii_lowercase + digits]
    tokenizer.train_from_iterator(
        [*alphabet, *texts], vocab_size=VOCABULARY_SIZE, show_progress=False, min_frequency=1
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
