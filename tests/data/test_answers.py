import numpy as np
import pytest
from answer_loop import imitated_logits, passage_logits, usual_loop, with_offset_mapping
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_ipu_bert.data.answers import AnswerRules, Windows, decode
from lightning_ipu_bert.data.feature_cache import build_dataset
from lightning_ipu_bert.data.formats import read_files
from lightning_ipu_bert.data.logits import Logits, join_logits
from lightning_ipu_bert.data.questions import Question, QuestionSet
from lightning_ipu_bert.data.records import Rules
from lightning_ipu_bert.data.settings import Windowing


@pytest.fixture(scope="module")
def split(quickstart):
    """The corpus in windows so short that most questions have several."""
    tokenizer = AutoTokenizer.from_pretrained(str(quickstart / "tokenizer"))
    question_set = read_files([str(quickstart / "validation.json")], Rules())
    return question_set, build_dataset(question_set, tokenizer, Windowing(36, 8))


def test_answers_equal_the_usual_loop(split):
    question_set, features = split
    logits, rules = imitated_logits(features), AnswerRules()
    answers = decode(logits, Windows.of(features), rules)
    rows = [with_offset_mapping(row) for row in features]
    texts, n_best = usual_loop(question_set, rows, passage_logits(rows, logits), rules)
    assert len(features) > 1.5 * len(question_set.questions)
    assert answers.texts(question_set) == texts
    ours = answers.n_best(question_set)
    for key, candidates in n_best.items():
        ours_scores = [c["score"] for c in ours[key]]
        assert ours_scores == pytest.approx([c["score"] for c in candidates], rel=1e-5)
        ours_probabilities = [c["probability"] for c in ours[key]]
        assert ours_probabilities == pytest.approx(
            [c["probability"] for c in candidates], rel=1e-4, abs=1e-7
        )


def test_real_questions_are_answered_as_by_the_usual_loop(squad_dir, bert_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(bert_dir))
    question_set = read_files([str(squad_dir / "validation.json")], Rules())
    features = build_dataset(question_set, tokenizer, Windowing())
    logits, rules = imitated_logits(features), AnswerRules()
    texts = decode(logits, Windows.of(features), rules).texts(question_set)
    rows = [with_offset_mapping(row) for row in features]
    assert len(texts) == 1199
    assert texts == usual_loop(question_set, rows, passage_logits(rows, logits), rules)[0]


PASSAGE = "aa bb cc dd ee ff"


def two_windows():
    """One question about six words, four of them in each of two windows: a b c d | c d e f."""
    question_set = QuestionSet([PASSAGE], [Question("q", "?", 0, ())])
    starts = np.array([0, 3, 6, 9, 6, 9, 12, 15])
    windows = Windows(
        question=np.array([0, 0]),
        context_start=np.array([2, 2]),
        passage_counts=np.array([4, 4]),
        firsts=np.array([0, 4]),
        char_starts=starts,
        char_ends=starts + 2,
    )
    return question_set, windows


def logits_of(*windows, width=8):
    """Logits of each window: {"cls": x, (first, last): (start logit, end logit)}."""
    starts = np.full((len(windows), width), -10, np.float32)
    ends = np.full((len(windows), width), -10, np.float32)
    for row, entries in enumerate(windows):
        for place, (start, end) in entries.items():
            first, last = (0, 0) if place == "cls" else place
            starts[row, first], ends[row, last] = start, end
    return Logits(np.arange(len(windows)), starts, ends)


def answer(logits, **rules):
    question_set, windows = two_windows()
    return decode(logits, windows, AnswerRules(**rules)).texts(question_set)["q"]


def test_the_best_window_wins():
    logits = logits_of({(2, 3): (4, 4)}, {(4, 5): (5, 5)})
    assert answer(logits) == "ee ff"


def test_only_tokens_of_the_passage_are_answered():
    # Question, separators and padding have the largest logits, and more of them than n_best.
    logits = logits_of({(3, 4): (1, 1)}, {})
    for plane in (logits.starts, logits.ends):
        plane[:, [0, 1, 6, 7]] = 100
    assert answer(logits, n_best=2) == "bb cc"


def test_an_answer_is_not_longer_than_allowed():
    logits = logits_of({(2, 5): (9, 9), (3, 4): (2, 2)}, {})
    assert answer(logits) == "aa bb cc dd"
    assert answer(logits, max_answer_length=3) != "aa bb cc dd"
    assert len(answer(logits, max_answer_length=2).split()) <= 2


def test_without_any_allowed_span_the_answer_is_empty():
    # With one start and one end tried, the end stands before the start.
    logits = logits_of({(5, 2): (9, 9)}, {(5, 2): (9, 9)})
    assert answer(logits, n_best=1) == ""


def test_the_null_score_is_the_minimum_over_the_windows():
    # The answer stands in the second window only, whose [CLS] is low; the first window, which does
    # not hold it, says "nothing here" loudly. A maximum would give the empty answer.
    logits = logits_of({"cls": (9, 9)}, {"cls": (1, 1), (4, 4): (4, 4)})
    assert answer(logits, version_2=True) == "ee"
    logits = logits_of({"cls": (9, 9)}, {"cls": (5, 5), (4, 4): (4, 4)})
    assert answer(logits, version_2=True) == ""


def test_the_threshold_shifts_the_balance():
    logits = logits_of({"cls": (5, 5)}, {"cls": (5, 5), (4, 4): (4, 4)})
    assert answer(logits, version_2=True, null_score_threshold=1.0) == ""
    assert answer(logits, version_2=True, null_score_threshold=3.0) == "ee"
    assert answer(logits) == "ee"


def test_the_null_answer_is_listed_with_its_own_score():
    question_set, windows = two_windows()
    logits = logits_of({"cls": (5, 5)}, {"cls": (5, 5), (4, 4): (4, 4)})
    rules = AnswerRules(version_2=True, null_score_threshold=3.0)
    listed = decode(logits, windows, rules).n_best(question_set)["q"]
    assert [c["text"] for c in listed[:2]] == ["ee", ""]
    assert listed[1]["score"] == pytest.approx(10)
    assert sum(c["probability"] for c in listed) == pytest.approx(1)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_the_answer_is_the_best_of_all_allowed_spans(seed, n_best, longest, version_2):
    rng = np.random.default_rng(seed)
    planes = [rng.normal(size=(2, 8)).astype(np.float32) for _ in range(2)]
    logits = Logits(np.arange(2), *planes)
    question_set, windows = two_windows()
    rules = AnswerRules(longest, n_best, version_2)
    tried = []
    for w in range(2):
        inside = range(2, 6)
        starts = sorted(inside, key=lambda t: -planes[0][w, t])[:n_best]
        ends = sorted(inside, key=lambda t: -planes[1][w, t])[:n_best]
        for s in starts:
            for e in ends:
                if s <= e < s + longest:
                    first = windows.char_starts[4 * w + s - 2]
                    behind = windows.char_ends[4 * w + e - 2]
                    tried.append((planes[0][w, s] + planes[1][w, e], PASSAGE[first:behind]))
    if version_2 or not tried:
        tried.append(((planes[0][:, 0] + planes[1][:, 0]).min(), ""))
    best = decode(logits, windows, rules).texts(question_set)["q"]
    assert best == max(tried)[1]


def test_batches_of_different_length_and_repeated_windows_join():
    first = (np.array([3, 1]), np.ones((2, 3)), np.ones((2, 3)))
    second = (np.array([1, 2]), np.full((2, 5), 2.0), np.full((2, 5), 2.0))
    logits = join_logits([first, second])
    assert logits.features.tolist() == [1, 2, 3]
    assert logits.starts.shape == (3, 5)
    assert logits.starts[0].tolist() == [1, 1, 1, -np.inf, -np.inf]
    assert logits.starts[1].tolist() == [2] * 5


def test_no_windows_give_no_answers():
    question_set, windows = two_windows()
    assert decode(join_logits([]), windows, AnswerRules()).texts(question_set) == {}
