import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lightning_ipu_bert.data.quickstart.corpus import (
    FIRM_ENDINGS,
    INTRODUCTIONS,
    OTHER_WORDS,
    RELATIONS,
    quickstart_corpus,
    texts,
)
from lightning_ipu_bert.data.quickstart.folder import (
    VOCABULARY_SIZE,
    train_tokenizer,
    write_quickstart,
)

PACKAGE = Path(__file__).parents[2] / "lightning_ipu_bert"
TRAIN = quickstart_corpus(1500, seed=0, held_out=False)
VALIDATION = quickstart_corpus(150, seed=1, held_out=True)


def passages(corpus):
    return (paragraph for article in corpus["data"] for paragraph in article["paragraphs"])


def questions(corpus):
    for passage in passages(corpus):
        for qa in passage["qas"]:
            yield passage["context"], qa, qa["answers"][0]


def templates():
    for kind, relations_of in RELATIONS.items():
        yield from INTRODUCTIONS[kind] + OTHER_WORDS[kind]
        for relations in relations_of.values():
            for relation in relations:
                yield from relation.statements + relation.questions


def names_and_numbers(corpus):
    """Words of the answers and subjects, without the common nouns that both splits share."""
    shared = {word.lower() for text in templates() for word in re.findall(r"\w+", text)}
    shared |= {word.lower() for word in FIRM_ENDINGS}
    words = {word for text in texts(corpus) for word in re.findall(r"\w+", text)}
    return {word for word in words if word.lower() not in shared}


@pytest.mark.parametrize("corpus", [TRAIN, VALIDATION])
def test_every_answer_stands_where_answer_start_says(corpus):
    for context, _, answer in questions(corpus):
        start = answer["answer_start"]
        assert context[start : start + len(answer["text"])] == answer["text"]


@pytest.mark.parametrize("corpus", [TRAIN, VALIDATION])
def test_question_ids_are_unique(corpus):
    ids = [qa["id"] for _, qa, _ in questions(corpus)]
    assert len(ids) == len(set(ids))


def test_same_seed_gives_the_same_files_in_another_process(tmp_path):
    script = (
        "import hashlib, json, pathlib, sys, types\n"
        "package = types.ModuleType('lightning_ipu_bert')\n"
        "package.__path__ = [sys.argv[2]]\n"
        "sys.modules['lightning_ipu_bert'] = package  # without torch, which is not needed\n"
        "from lightning_ipu_bert.data.quickstart.corpus import quickstart_corpus, texts\n"
        "from lightning_ipu_bert.data.quickstart.folder import train_tokenizer\n"
        "corpus = quickstart_corpus(300, seed=0, held_out=False)\n"
        "train_tokenizer(texts(corpus), pathlib.Path(sys.argv[1]))\n"
        "print(hashlib.sha256(json.dumps(corpus).encode()).hexdigest())\n"
    )
    vocabularies = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        digest = subprocess.run(
            [sys.executable, "-c", script, str(folder), str(PACKAGE)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.strip()
        corpus = quickstart_corpus(300, seed=0, held_out=False)
        assert digest == hashlib.sha256(json.dumps(corpus).encode()).hexdigest()
        vocabularies.append((folder / "vocab.txt").read_bytes())
    assert vocabularies[0] == vocabularies[1]


def test_names_and_numbers_of_the_validation_split_are_unseen_in_training():
    held_out = names_and_numbers(VALIDATION)
    assert len(held_out) > 300
    assert held_out.isdisjoint(names_and_numbers(TRAIN))


@pytest.mark.parametrize("corpus", [TRAIN, VALIDATION])
def test_every_answer_competes_with_another_of_its_kind(corpus):
    for passage in passages(corpus):
        assert len(re.findall(r"\. ", passage["context"])) == 2  # three sentences
        answers = [qa["answers"][0]["text"] for qa in passage["qas"]]
        assert len(answers) == 4
        assert len(set(answers)) == 2  # two values, each asked for in two ways
        assert len({qa["question"] for qa in passage["qas"]}) == 4
        assert len({answer.isdigit() for answer in answers}) == 1
        assert len({len(answer.split()) for answer in answers}) == 1


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "tokenizer"
    train_tokenizer(texts(quickstart_corpus(600, seed=0, held_out=False)), folder)
    return folder


def test_tokenizer_opens_as_a_fast_lower_casing_bert_tokenizer(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    assert tokenizer.is_fast
    assert len(tokenizer) == VOCABULARY_SIZE
    assert tokenizer.tokenize("BORN") == tokenizer.tokenize("born")
    pair = tokenizer("Where?", "Here.")
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    end_of_question = tokens.index("[SEP]")
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    assert pair["token_type_ids"] == [
        int(position > end_of_question) for position in range(len(tokens))
    ]


def test_tokenizer_knows_every_word_of_the_validation_split(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    for text in [*texts(VALIDATION), "zyxwvutsrqponmlkjihgfedcba 0987654321"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert re.findall(r"\w+", decoded) == re.findall(r"\w+", text.lower())


def test_unseen_names_fall_into_several_pieces(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    pieces = [len(tokenizer.tokenize(name)) for name in names_and_numbers(VALIDATION)]
    assert sum(count > 1 for count in pieces) > 0.95 * len(pieces)


def test_what_is_written_is_in_the_official_format(tmp_path):
    write_quickstart(tmp_path)
    for name, count in (("train", 60_000), ("validation", 600)):
        content = json.loads((tmp_path / f"{name}.json").read_text("utf8"))
        assert sum(1 for _ in questions(content)) == count
    assert (tmp_path / "tokenizer" / "vocab.txt").exists()


@pytest.mark.parametrize(
    ("corpus", "digest"), [(TRAIN, "fce995f7b70d"), (VALIDATION, "59acf2efc543")]
)
def test_the_corpus_is_the_one_of_the_results(corpus, digest):
    """On every Python; a change requires new measurements."""
    assert hashlib.sha256(json.dumps(corpus).encode()).hexdigest().startswith(digest)
