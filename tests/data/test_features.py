import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_ipu_bert import UserError
from lightning_ipu_bert.data.feature_cache import build_dataset
from lightning_ipu_bert.data.feature_columns import flat_column
from lightning_ipu_bert.data.features import answer_token_spans, smallest_spans
from lightning_ipu_bert.data.formats import read_files
from lightning_ipu_bert.data.questions import Answer, Question, QuestionSet
from lightning_ipu_bert.data.records import Rules
from lightning_ipu_bert.data.settings import Windowing, windowing_rules
from lightning_ipu_bert.data.tokenized import TokenizedTexts
from lightning_ipu_bert.pipeline.rules import enforce


def usual_features(tokenizer, question_set, windowing):
    """What Hugging Face's tokenizer makes of the pairs."""
    return tokenizer(
        [q.text.lstrip() for q in question_set.questions],
        [question_set.passage_of(q) for q in question_set.questions],
        truncation="only_second",
        max_length=windowing.max_length,
        stride=windowing.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=False,
    )


def smallest_by_trying(tokens, first_char, last_char):
    """The shortest run of tokens that covers both characters; the first one of equals."""
    starts = [i for i, (a, b) in enumerate(tokens) if a <= first_char < b]
    ends = [i for i, (a, b) in enumerate(tokens) if a <= last_char < b]
    runs = [(e - s, s, e) for s in starts for e in ends if s <= e]
    return min(runs)[1:] if runs else (-1, -1)


def check_spans(question_set, features):
    """Compare every feature's span with the one found by trying all."""
    held = 0
    for row in features:
        question = question_set.questions[row["question"]]
        passage, answer = question_set.passage_of(question), question.answers[0]
        tokens = list(zip(row["offset_starts"], row["offset_ends"]))
        inside = range(answer.start, answer.start + len(answer.text))
        solid = [c for c in inside if not passage[c].isspace()]
        expected = smallest_by_trying(tokens, solid[0], solid[-1])
        first = row["context_start"]
        found = (row["start_positions"], row["end_positions"])
        assert found == ((0, 0) if expected[0] < 0 else tuple(first + e for e in expected))
        held += expected[0] >= 0
    return held


@pytest.mark.parametrize("windowing", [Windowing(128, 32), Windowing(40, 8), Windowing(33, 0)])
def test_features_equal_hugging_faces(quickstart, windowing):
    tokenizer = AutoTokenizer.from_pretrained(str(quickstart / "tokenizer"))
    question_set = read_files([str(quickstart / "validation.json")], Rules())
    ours = build_dataset(question_set, tokenizer, windowing)
    usual = usual_features(tokenizer, question_set, windowing)
    assert list(ours["input_ids"]) == usual["input_ids"]
    assert list(ours["token_type_ids"]) == usual["token_type_ids"]
    assert list(ours["question"]) == usual["overflow_to_sample_mapping"]
    assert list(ours["feature"]) == list(range(len(ours)))
    for row, offsets in zip(ours, usual["offset_mapping"]):
        inside = offsets[row["context_start"] : -1]
        assert list(zip(row["offset_starts"], row["offset_ends"])) == inside
    assert check_spans(question_set, ours) > 0


def test_the_question_is_stripped_on_the_left_only(quickstart):
    tokenizer = AutoTokenizer.from_pretrained(str(quickstart / "tokenizer"))
    question_set = QuestionSet(["Ada was here."], [Question("1", "  Who? ", 0, ())])
    ours = build_dataset(question_set, tokenizer, Windowing(32, 8))
    assert ours[0]["input_ids"] == tokenizer("Who? ", "Ada was here.")["input_ids"]


def test_real_squad_gives_8580_features_with_the_smallest_spans(squad_dir, bert_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(bert_dir))
    question_set = read_files([str(squad_dir / "train.json")], Rules())
    features = build_dataset(question_set, tokenizer, Windowing())
    assert len(question_set.questions) == 8375
    assert len(features) == 8580
    assert check_spans(question_set, features) >= 8375
    usual = usual_features(tokenizer, question_set, Windowing())
    assert np.array_equal(flat_column(features, "input_ids"), np.concatenate(usual["input_ids"]))


def test_the_documented_example(bert_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(bert_dir))
    context = "Institutes of technology in Venezuela were developed in the 1950s"
    asked = Question("1", "When were Institutes of technology developed?", 0, ())
    features = build_dataset(QuestionSet([context], [asked]), tokenizer, Windowing(32, 16))
    assert list(features["input_ids"]) == [
        [101, 2043, 2020, 12769, 1997, 2974, 2764, 1029, 102]  # noqa: RUF005
        + [12769, 1997, 2974, 1999, 8326, 2020, 2764, 1999, 1996, 4856, 102]
    ]


@st.composite
def tokens_and_answer(draw):
    """Tokens with gaps and with characters that several tokens share, and an answer over them."""
    tokens, position = [], 0
    for _ in range(draw(st.integers(1, 12))):
        position += draw(st.integers(0, 2))
        width = draw(st.integers(1, 3))
        tokens += [(position, position + width)] * draw(st.integers(1, 3))
        position += width
    start = draw(st.integers(0, position - 1))
    length = draw(st.integers(1, position - start))
    lower = draw(st.integers(0, len(tokens) - 1))
    return tokens, start, length, lower, draw(st.integers(lower + 1, len(tokens)))


@given(tokens_and_answer())
def test_the_span_is_the_smallest_that_covers_the_answer(case):
    tokens, start, length, lower, upper = case
    chars = np.array(tokens)
    passages = TokenizedTexts(np.zeros(len(tokens)), np.array([len(tokens)]), *chars.T)
    question = Question("1", "?", 0, (Answer("x" * length, start),))
    spans = answer_token_spans([question], passages, np.array([0]))
    zero = np.array([0])
    first, last = smallest_spans(spans, zero, np.array([lower]), np.array([upper]))

    covered = [c for c in range(start, start + length) if any(a <= c < b for a, b in tokens)]
    expected = (-1, -1)
    if covered:
        found = smallest_by_trying(tokens[lower:upper], covered[0], covered[-1])
        expected = (found[0] + lower, found[1] + lower) if found[0] >= 0 else found
    assert last[0] - first[0] == expected[1] - expected[0]
    assert (first[0] < 0) == (expected[0] < 0)
    if first[0] >= 0:
        assert lower <= first[0] <= last[0] < upper
        assert tokens[first[0]][0] <= covered[0]
        assert covered[-1] < tokens[last[0]][1]


def test_a_question_too_long_for_the_window_is_named(quickstart):
    tokenizer = AutoTokenizer.from_pretrained(str(quickstart / "tokenizer"))
    passage = "one two three four five six seven eight nine ten eleven twelve. " * 4
    asked = [Question("short", "Who?", 0, ()), Question("long", "who " * 14, 0, ())]
    with pytest.raises(UserError, match=r"Question 'long' \('who who .* Raise max_length"):
        build_dataset(QuestionSet([passage], asked), tokenizer, Windowing(32, 16))


def test_a_long_question_is_fine_where_the_passage_needs_no_second_window(quickstart):
    tokenizer = AutoTokenizer.from_pretrained(str(quickstart / "tokenizer"))
    asked = [Question("long", "who " * 20, 0, ())]
    features = build_dataset(QuestionSet(["It is me."], asked), tokenizer, Windowing(32, 16))
    assert len(features) == 1


@pytest.mark.parametrize("windowing", [Windowing(384, 384), Windowing(32, 28), Windowing(32, -1)])
def test_a_stride_that_does_not_fit_is_refused_with_those_that_do(windowing):
    with pytest.raises(UserError, match=r"doc_stride=.* Set doc_stride to 0\.\."):
        enforce(windowing_rules(windowing))


def test_a_passage_that_the_tokenizer_does_not_see_is_named(quickstart):
    tokenizer = AutoTokenizer.from_pretrained(str(quickstart / "tokenizer"))
    question_set = QuestionSet(["\u200b"], [Question("1", "Who?", 0, ())])
    with pytest.raises(UserError, match="context of question '1' has no character"):
        build_dataset(question_set, tokenizer, Windowing(32, 8))
