import official_scores
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ipu_bert.data.metrics import squad_scores
from lightning_ipu_bert.data.questions import Answer, Question, QuestionSet

WORDS = st.lists(st.sampled_from(["the", "a", "Red", "red,", "house", "1950s", "x-y"]), max_size=4)
ANSWERS = st.lists(WORDS.map(" ".join), max_size=3)


@given(st.lists(st.tuples(WORDS.map(" ".join), ANSWERS), min_size=1, max_size=5))
def test_scores_equal_the_official_definition(cases):
    questions = [
        Question(str(i), "?", 0, tuple(Answer(text, 0) for text in answers))
        for i, (_, answers) in enumerate(cases)
    ]
    predictions = {str(i): prediction for i, (prediction, _) in enumerate(cases)}
    qas = [
        {"id": q.id, "answers": [{"text": a.text} for a in q.answers if a.text]} for q in questions
    ]
    official = official_scores.score({"data": [{"paragraphs": [{"qas": qas}]}]}, predictions)
    texts = [
        Question(q.id, q.text, 0, tuple(a for a in q.answers if official_scores.normalize(a.text)))
        for q in questions
    ]
    ours = squad_scores(QuestionSet(["x"], texts), predictions)
    assert ours["exact_match"] == pytest.approx(official["exact_match"], abs=0.01)
    assert ours["f1"] == pytest.approx(official["f1"], abs=0.01)


def test_known_scores():
    question = Question("1", "?", 0, (Answer("the 1950s", 0), Answer("in the 1950s", 0)))
    question_set = QuestionSet(["x"], [question])
    assert squad_scores(question_set, {"1": "1950s"}) == {"exact_match": 100.0, "f1": 100.0}
    assert squad_scores(question_set, {"1": "late 1950s"})["exact_match"] == 0.0
    assert squad_scores(question_set, {"1": "late 1950s"})["f1"] == pytest.approx(200 / 3)


def test_an_empty_answer_is_right_where_there_is_none():
    question_set = QuestionSet(["x"], [Question("1", "?", 0, ())])
    assert squad_scores(question_set, {"1": ""}) == {"exact_match": 100.0, "f1": 100.0}
    assert squad_scores(question_set, {"1": "x"}) == {"exact_match": 0.0, "f1": 0.0}
