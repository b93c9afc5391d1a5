"""The quickstart corpus as a folder: two SQuAD files and a trained tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Iterable, List, Union

from tokenizers import AddedToken
from tokenizers.implementations import BertWordPieceTokenizer

from lightning_ipu_bert.data.quickstart.corpus import quickstart_corpus, texts
from lightning_ipu_bert.files import built_once, collections_paused

NAME = "quickstart"
"""Name of the corpus for `--data.dataset_name`."""

NUM_TRAINING_PASSAGES = 15_000
NUM_VALIDATION_PASSAGES = 150
TRAINING_SEED = 0
VALIDATION_SEED = 1

VOCABULARY_SIZE = 900
"""Word pieces: most words of the templates are one token, invented names are split."""

NUM_VOCABULARY_PASSAGES = 600
"""Passages for the vocabulary: with more, names would become single tokens."""


def quickstart_folder(cache_dir: Path) -> Path:
    """Return the folder of the corpus, which is written on first access."""
    return built_once(cache_dir / folder_name(), write_quickstart)


def folder_name() -> str:
    """Return the name of the folder in a cache, which differs if the corpus does."""
    sources = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".json"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    return f"{NAME}-{digest}"


@collections_paused()
def write_quickstart(folder: Path, training_passages: int = NUM_TRAINING_PASSAGES) -> None:
    """Write ``train.json``, ``validation.json`` and ``tokenizer/`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    train = quickstart_corpus(training_passages, TRAINING_SEED, held_out=False)
    validation = quickstart_corpus(NUM_VALIDATION_PASSAGES, VALIDATION_SEED, held_out=True)
    for name, corpus in (("train", train), ("validation", validation)):
        (folder / f"{name}.json").write_text(json.dumps(corpus), encoding="utf-8")
    sample = quickstart_corpus(NUM_VOCABULARY_PASSAGES, TRAINING_SEED, held_out=False)
    train_tokenizer(texts(sample), folder / "tokenizer")


def train_tokenizer(training_texts: Iterable[str], folder: Path) -> None:
    """Train a lower-case BERT vocabulary and write a folder for `AutoTokenizer`.

    Every letter and digit is a token, at the start of a word and inside it, so that no alphanumeric
    word is unknown. Numbers are split into pairs of digits, all of which are added explicitly:
    a few hundred passages do not contain all pairs.
    """
    alphabet = list(ascii_lowercase + digits)
    pairs = [f"{number:02}" for number in range(100)]
    # The trainer assigns ids to pieces inside words in an order that differs between runs, and
    # breaks ties by these ids; special tokens are assigned ids in the order given here.
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
