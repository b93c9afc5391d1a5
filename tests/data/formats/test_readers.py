import json

import pytest

from lightning_ipu_bert import UserError
from lightning_ipu_bert.data import formats, hub
from lightning_ipu_bert.data.formats import read_files
from lightning_ipu_bert.data.records import Rules, collect

CONTEXT = "Ada was born in London. She wrote the first program."


def qa(**changes):
    return {
        "id": "q1",
        "question": "Where was Ada born?",
        "answers": [{"text": "London", "answer_start": 16}],
        **changes,
    }


def squad(*qas, context=CONTEXT):
    return {"data": [{"title": "Ada", "paragraphs": [{"context": context, "qas": list(qas)}]}]}


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf8")
        return str(path)

    return write


def test_questions_of_a_paragraph_share_its_text(write):
    second = qa(id="q2", question="Who wrote?", answers=[{"text": "Ada", "answer_start": 0}])
    result = read_files([write(squad(qa(), second))], Rules())
    assert result.passages == [CONTEXT]
    assert [(q.id, q.passage, q.answers[0].text) for q in result.questions] == [
        ("q1", 0, "London"),
        ("q2", 0, "Ada"),
    ]


def test_several_files_are_one_split(write):
    files = [write(squad(qa()), "a.json"), write(squad(qa(id="q2")), "b.json")]
    assert [q.id for q in read_files(files, Rules()).questions] == ["q1", "q2"]


def test_a_v2_file_keeps_questions_without_answer_and_ignores_plausible_ones(write):
    impossible = qa(
        id="q2",
        answers=[],
        is_impossible=True,
        plausible_answers=[{"text": "London", "answer_start": 16}],
    )
    result = read_files([write(squad(qa(), impossible))], Rules(version_2=True))
    assert [len(q.answers) for q in result.questions] == [1, 0]


def test_data_to_predict_need_no_answers(write):
    asked = {"id": "q1", "question": "Where was Ada born?"}
    result = read_files([write(squad(asked))], Rules(answers_required=False))
    assert result.questions[0].answers == ()


BAD = {
    "no JSON": ('{"data": [', r"data\.json: line 1, column 11 is not JSON"),
    "another shape": ({"rows": []}, r"data\.json: 'data' is missing or is not a list"),
    "a list": ([1], r"data\.json: 'data' is missing"),
    "no text": (
        squad(qa(question=None)),
        r"data\.json: data\[0\]\.paragraphs\[0\]\.qas\[0\]: 'question' is missing or is not a",
    ),
    "no answers": (
        squad({"id": "q1", "question": "Where?"}),
        r"data\.json: data\[0\]\.paragraphs\[0\]\.qas\[0\]: question 'q1' has no 'answers'",
    ),
    "no answer_start": (
        squad(qa(answers=[{"text": "London"}])),
        r"qas\[0\]\.answers\[0\]: 'answer_start' is missing or is not an integer",
    ),
    "twice the same id": (
        squad(qa(), qa()),
        r"data\.json: .*qas\[1\]: the id 'q1' is a duplicate of data\.json: .*qas\[0\]\.",
    ),
    "empty context": (squad(qa(), context=" \n"), r"data\.json: .*the context .* is empty"),
    "v2 without version_2": (
        squad(qa(answers=[], is_impossible=True)),
        r"data\.json: .*'q1' .* only SQuAD v2\.0 allows\. Set --data\.version_2 true",
    ),
    "no question": ({"data": []}, "contains no questions"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_with_file_place_and_rule(write, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read_files([write(content)], Rules())
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.json: the file does not exist"):
        read_files(["nowhere.json"], Rules())


def misplaced(count):
    return [
        qa(id=f"bad{i}", answers=[{"text": "London", "answer_start": start}])
        for i, start in zip(range(count), (3, -36, 99, 17, 15))
    ]


def test_misplaced_answers_are_counted_and_three_are_shown(write):
    with pytest.raises(UserError) as caught:
        read_files([write(squad(qa(), *misplaced(5)))], Rules())
    message = str(caught.value)
    assert message.startswith("5 answers are not at their answer_start")
    assert [f"bad{i}" in message for i in range(5)] == [True, True, True, False, False]
    assert "--data.skip_misplaced_answers true" in message


def test_misplaced_answers_can_be_skipped_and_are_counted(write, caplog):
    half_right = qa(
        id="half",
        answers=[{"text": "London", "answer_start": 0}, {"text": "London", "answer_start": 16}],
    )
    rules = Rules(skip_misplaced_answers=True)
    with caplog.at_level("INFO"):
        result = read_files([write(squad(qa(), half_right, *misplaced(5)))], rules)
    assert [q.id for q in result.questions] == ["q1", "half"]
    assert len(result.questions[1].answers) == 1
    assert "Skipped 6 misplaced answers, and 5 questions" in caplog.text


@pytest.fixture
def hub_folder(tmp_path):
    """A dataset with the columns of SQuAD, as `load_dataset` finds it in a folder."""
    rows = [
        {
            "id": f"{split}{i}",
            "title": "Ada",
            "context": CONTEXT,
            "question": "Where was Ada born?",
            "answers": {"text": ["London"], "answer_start": [16]},
        }
        for split in ("train", "validation")
        for i in range(2)
    ]
    folder = tmp_path / "hub"
    folder.mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps(row) for row in rows if row["id"].startswith(split)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), "utf8")
    return str(folder)


def test_a_hub_data_set_reads_like_a_file(hub_folder):
    result = collect(hub.records(hub_folder, None, "validation"), Rules())
    assert [q.id for q in result.questions] == ["validation0", "validation1"]
    assert result.passages == [CONTEXT]
    assert result.questions[0].answers[0].start == 16


def test_an_unknown_split_is_named_with_the_known_ones(hub_folder):
    with pytest.raises(UserError, match=r"no split 'dev'; it has \['train', 'validation'\]"):
        collect(hub.records(hub_folder, None, "dev"), Rules())


def test_an_unknown_data_set_is_one_line():
    with pytest.raises(UserError, match=r"Dataset '\./no/such/folder' cannot be loaded") as caught:
        collect(hub.records("./no/such/folder", None, "train"), Rules())
    assert "\n" not in str(caught.value)


def test_missing_columns_are_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"id": "1", "text": "x"}', "utf8")
    with pytest.raises(UserError, match=r"lacks the columns \['question', 'context'\]"):
        collect(hub.records(str(tmp_path), None, "train"), Rules())


TABS = """
from pathlib import Path

from lightning_ipu_bert.data.file_format import FileFormat
from lightning_ipu_bert.data.questions import Answer
from lightning_ipu_bert.data.records import Record


def records(path):
    for number, line in enumerate(Path(path).read_text("utf8").splitlines(), 1):
        id, question, context, text, start = line.split("\\t")
        yield Record(f"{path}: line {number}", id, question, context, [Answer(text, int(start))])


FORMAT = FileFormat((".tsv",), records)
"""


def test_a_new_format_is_one_file(write, tmp_path, monkeypatch):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "tabs.py").write_text(TABS)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "room")])
    lines = write(f"q1\tWhere was Ada born?\t{CONTEXT}\tLondon\t16\n", "more.TSV")
    assert read_files([lines], Rules()) == read_files([write(squad(qa()))], Rules())
    wrong = write(f"q1\tWhere?\t{CONTEXT}\tLondon\t17\n", "wrong.tsv")
    with pytest.raises(UserError, match=r"wrong.tsv: line 1 \(id 'q1'\): 'London' should start"):
        read_files([wrong], Rules())
