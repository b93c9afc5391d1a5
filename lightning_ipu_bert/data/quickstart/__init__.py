"""The embedded corpus: invented people, firms and towns, in the official SQuAD v1.1 format.

A passage introduces its subject and tells two things about it with values of the same kind, so
that a reader has to find the sentence that says what the question asks for, in other words::

    Rufford is a small town. It lies on the Demar. The old bridge of Rufford crosses the Bowen.
    What is the river of Rufford called?                             -> Demar
    Over which river does Rufford have a bridge?                     -> Bowen

Names and years are split by a hash of the word: those of the validation split never occur
in the training split. Only the last word of a firm ("Mills") is a common noun that both share.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Set, Tuple, Union

from tokenizers import AddedToken
from tokenizers.implementations import BertWordPieceTokenizer

NAME = "quickstart"
"""What `--data.dataset_name` calls the corpus."""

NUM_TRAINING_PASSAGES = 15_000
NUM_VALIDATION_PASSAGES = 150
TRAINING_SEED = 0
VALIDATION_SEED = 1

VOCABULARY_SIZE = 900
"""Word pieces: most words of the templates stay whole, and invented names fall into syllables."""

NUM_VOCABULARY_PASSAGES = 600
"""Passages that the vocabulary is learnt from: with more, single names would become one piece."""


class Relation(NamedTuple):
    """Something that is said about a subject, the ways to say it and the ways to ask for it."""

    statements: Tuple[str, ...]
    """Sentences with a ``{subject}`` and a ``{value}``."""
    questions: Tuple[str, ...]
    """Questions with a ``{subject}``."""


RELATIONS: Dict[str, Dict[str, Tuple[Relation, Relation]]] = {
    "person": {
        "town": (
            Relation(
                (
                    "{subject} was born in {value}.",
                    "{subject} came into the world in {value}.",
                    "In {value} {subject} was born.",
                ),
                (
                    "Where was {subject} born?",
                    "In which town was {subject} born?",
                    "What is the birthplace of {subject}?",
                ),
            ),
            Relation(
                (
                    "{subject} lives in {value} now.",
                    "{subject} settled in {value}.",
                    "The house of {subject} stands in {value}.",
                ),
                (
                    "Where does {subject} live?",
                    "In which town did {subject} settle?",
                    "Where is the home of {subject}?",
                ),
            ),
        ),
        "year": (
            Relation(
                (
                    "{subject} was born in {value}.",
                    "In {value} {subject} was born.",
                    "The birth of {subject} is dated to {value}.",
                ),
                (
                    "When was {subject} born?",
                    "In which year was {subject} born?",
                    "What is the year of birth of {subject}?",
                ),
            ),
            Relation(
                (
                    "{subject} retired in {value}.",
                    "In {value} {subject} stopped working.",
                    "The career of {subject} ended in {value}.",
                ),
                (
                    "When did {subject} retire?",
                    "In which year did {subject} stop working?",
                    "When did the career of {subject} end?",
                ),
            ),
        ),
    },
    "firm": {
        "person": (
            Relation(
                (
                    "{subject} was founded by {value}.",
                    "{subject} was started by {value}.",
                    "The founder of {subject} was {value}.",
                ),
                (
                    "Who founded {subject}?",
                    "Who was the founder of {subject}?",
                    "By whom was {subject} started?",
                ),
            ),
            Relation(
                (
                    "{subject} is led by {value} today.",
                    "The director of {subject} is {value}.",
                    "At the head of {subject} stands {value}.",
                ),
                (
                    "Who leads {subject}?",
                    "Who is the director of {subject}?",
                    "Who runs {subject}?",
                ),
            ),
        ),
        "town": (
            Relation(
                (
                    "{subject} has its seat in {value}.",
                    "The head office of {subject} is in {value}.",
                    "{subject} is based in {value}.",
                ),
                (
                    "Where does {subject} have its seat?",
                    "Where is {subject} based?",
                    "In which town is the head office of {subject}?",
                ),
            ),
            Relation(
                (
                    "{subject} built a factory in {value}.",
                    "The factory of {subject} stands in {value}.",
                    "In {value} {subject} opened a factory.",
                ),
                (
                    "Where is the factory of {subject}?",
                    "In which town did {subject} build a factory?",
                    "Where did {subject} open a factory?",
                ),
            ),
        ),
    },
    "town": {
        "river": (
            Relation(
                (
                    "{subject} lies on the {value}.",
                    "{subject} stands on the banks of the {value}.",
                    "The river that flows through {subject} is the {value}.",
                ),
                (
                    "On which river does {subject} lie?",
                    "Which river flows through {subject}?",
                    "What is the river of {subject} called?",
                ),
            ),
            Relation(
                (
                    "The old bridge of {subject} crosses the {value}.",
                    "{subject} has a bridge over the {value}.",
                    "A bridge leads from {subject} over the {value}.",
                ),
                (
                    "Which river does the bridge of {subject} cross?",
                    "What does the old bridge of {subject} cross?",
                    "Over which river does {subject} have a bridge?",
                ),
            ),
        ),
        "year": (
            Relation(
                (
                    "{subject} was first mentioned in {value}.",
                    "The oldest record of {subject} dates from {value}.",
                    "In {value} {subject} was mentioned for the first time.",
                ),
                (
                    "When was {subject} first mentioned?",
                    "From which year is the oldest record of {subject}?",
                    "In which year was {subject} mentioned for the first time?",
                ),
            ),
            Relation(
                (
                    "{subject} burnt down in {value}.",
                    "In {value} {subject} was destroyed by a fire.",
                    "The great fire of {subject} was in {value}.",
                ),
                (
                    "When did {subject} burn down?",
                    "When was {subject} destroyed by fire?",
                    "In which year was the great fire of {subject}?",
                ),
            ),
        ),
    },
}
"""What is said about subjects of each kind: two relations for every kind of value."""

INTRODUCTIONS: Dict[str, Tuple[str, ...]] = {
    "person": ("{subject} is well known.", "People speak well of {subject}."),
    "firm": ("{subject} is an old firm.", "{subject} sells many things."),
    "town": ("{subject} is a small town.", "Many people like {subject}."),
}
"""First sentences, which answer no question."""

OTHER_WORDS: Dict[str, Tuple[str, ...]] = {
    "person": ("she", "he"),
    "firm": ("the firm", "the company"),
    "town": ("the town", "the place"),
}
"""What may stand for the subject once it was named; pronouns only where a sentence begins."""

FIRM_ENDINGS = ("Works", "Mills", "Brothers", "Company", "Trading", "Industries")
"""Common nouns, which both splits share."""

ONSETS = "bdfgklmnprstvw"
VOWELS = "aeiou"
ENDINGS: Dict[str, Tuple[str, ...]] = {
    "given name": ("lia", "ron", "mas", "net", "na", "rik"),
    "family name": ("kov", "sen", "rick", "dez", "man", "ski"),
    "firm name": ("tex", "pol", "nix", "dyn"),
    "town": ("berg", "ton", "stad", "ford", "ville"),
    "river": ("wen", "mar", "bach", "nau"),
}

PARTS: Dict[str, Tuple[str, ...]] = {
    "person": ("given name", "family name"),
    "firm": ("firm name", "firm ending"),
}
"""Words that make up a value of a kind; the other kinds are a single word."""


def is_held_out(word: str) -> bool:
    """Tell whether a name or a year belongs to the validation split: one in eight does."""
    return zlib.crc32(word.encode()) % 8 == 0


def random_word(kind: str, rng: random.Random) -> str:
    """Return a year, an invented name, or the common noun that ends the name of a firm."""
    if kind == "firm ending":
        return rng.choice(FIRM_ENDINGS)
    if kind == "year":
        return str(rng.randint(1200, 1999))
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 2))]
    return "".join([*syllables, rng.choice(ENDINGS[kind])]).capitalize()


def new_value(kind: str, rng: random.Random, held_out: bool, taken: Set[str]) -> str:
    """Return a value of the split, and enter its words in `taken`, whose words it avoids."""
    words = []
    for part in PARTS.get(kind, (kind,)):
        word = random_word(part, rng)
        while word in taken or (part != "firm ending" and is_held_out(word) != held_out):
            word = random_word(part, rng)
        taken.add(word)
        words.append(word)
    return " ".join(words)


def quickstart_corpus(num_passages: int, seed: int, held_out: bool) -> Dict[str, Any]:
    """Return a corpus as the dictionary of an official SQuAD v1.1 file.

    Args:
        num_passages: Passages, each with three sentences and four questions.
        seed: Seed of the passages; a longer corpus of the same seed starts with the same passages.
        held_out: Whether to draw from the names and numbers of the validation split.
    """
    rng = random.Random(seed)
    title = "validation" if held_out else "train"
    paragraphs = [_paragraph(rng, held_out, f"{title}-{i}") for i in range(num_passages)]
    return {"version": "1.1", "data": [{"title": title, "paragraphs": paragraphs}]}


def _paragraph(rng: random.Random, held_out: bool, id_prefix: str) -> Dict[str, Any]:
    kind = rng.choice(sorted(RELATIONS))
    taken: Set[str] = set()
    subject = new_value(kind, rng, held_out, taken)
    value_kind = rng.choice(sorted(RELATIONS[kind]))
    relations = list(RELATIONS[kind][value_kind])
    rng.shuffle(relations)
    context = rng.choice(INTRODUCTIONS[kind]).format(subject=subject)
    qas: List[Dict[str, Any]] = []
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
    """Return the subject's name or another word for it."""
    if rng.random() < 0.5 or (kind == "person" and not template.startswith("{subject}")):
        return subject
    return rng.choice(OTHER_WORDS[kind])


def texts(corpus: Dict[str, Any]) -> Iterator[str]:
    """Yield the passages and questions of a corpus."""
    for article in corpus["data"]:
        for paragraph in article["paragraphs"]:
            yield paragraph["context"]
            yield from (qa["question"] for qa in paragraph["qas"])


def train_tokenizer(training_texts: Iterable[str], folder: Path) -> None:
    """Learn a lower-cased BERT vocabulary and write a folder that `AutoTokenizer` opens.

    Every letter and digit is a piece, at the start of a word and inside it, so that no word of
    letters and digits is unknown. Numbers fall into pairs of digits, which the trainer would not
    find on its own: the pairs of a few hundred passages are not all of them.
    """
    alphabet = list(ascii_lowercase + digits)
    pairs = [f"{number:02}" for number in range(100)]
    # The trainer numbers the pieces inside words in an order that differs from run to run, and
    # breaks ties by these numbers; as special tokens they are numbered in the order given here.
    special_tokens: List[Union[str, AddedToken]] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special_tokens += [f"##{piece}" for piece in alphabet + pairs] + pairs
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(
        (re.sub(r"\d+", " ", text) for text in training_texts),
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=alphabet,
        special_tokens=special_tokens,
        show_progress=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_quickstart(folder: Path) -> None:
    """Write ``train.json``, ``validation.json`` and ``tokenizer/`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    train = quickstart_corpus(NUM_TRAINING_PASSAGES, TRAINING_SEED, held_out=False)
    validation = quickstart_corpus(NUM_VALIDATION_PASSAGES, VALIDATION_SEED, held_out=True)
    for name, corpus in (("train", train), ("validation", validation)):
        (folder / f"{name}.json").write_text(json.dumps(corpus), encoding="utf-8")
    sample = quickstart_corpus(NUM_VOCABULARY_PASSAGES, TRAINING_SEED, held_out=False)
    train_tokenizer(texts(sample), folder / "tokenizer")
