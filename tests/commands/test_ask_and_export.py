import io
import json
import subprocess
import sys

import pytest
import torch
from model_helpers import make_trainer
from transformers import AutoTokenizer, BertForQuestionAnswering

from lightning_ipu_bert import UserError
from lightning_ipu_bert.cli import main
from lightning_ipu_bert.commands.ask import answer_questions
from lightning_ipu_bert.commands.export import export
from lightning_ipu_bert.commands.loading import load_trained

CONTEXT = "Rufford is a small town. It lies on the Demar. " * 20
QUESTIONS = ["Which river flows through Rufford?", "What is Rufford?"]


@pytest.fixture
def checkpoint(make_module, make_data, tmp_path):
    """A checkpoint with measured scores."""
    module, data = make_module(), make_data()
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=2)
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    return str(tmp_path / "one.ckpt")


def test_answers_stand_in_the_passage(checkpoint):
    results = answer_questions(load_trained(checkpoint), QUESTIONS, CONTEXT)
    assert [r["question"] for r in results] == QUESTIONS
    for result in results:
        assert CONTEXT[result["start"] : result["end"]] == result["answer"]
        assert 0 < result["probability"] <= 1


def test_the_windows_are_those_of_the_training(checkpoint):
    assert load_trained(checkpoint).windowing == (128, 32)


def test_an_exported_folder_answers_alike(checkpoint, tmp_path):
    folder = str(export(checkpoint, str(tmp_path / "out")))
    ours, theirs = (
        answer_questions(load_trained(model), QUESTIONS, CONTEXT[:90])
        for model in (checkpoint, folder)
    )
    assert ours == theirs


def ask(capsys, *words):
    main(["ask", *words])
    return capsys.readouterr().out


def test_json_is_one_object_a_line(checkpoint, capsys):
    out = ask(
        capsys, "--model", checkpoint, "--question", *QUESTIONS, "--context", CONTEXT, "--json"
    )
    results = [json.loads(line) for line in out.splitlines()]
    assert [r["question"] for r in results] == QUESTIONS
    assert set(results[0]) == {"question", "answer", "score", "probability", "start", "end"}


def test_people_see_answer_score_and_place(checkpoint, capsys):
    result = answer_questions(load_trained(checkpoint), QUESTIONS[:1], CONTEXT)[0]
    out = ask(capsys, "--model", checkpoint, "--question", QUESTIONS[0], "--context", CONTEXT)
    lines = out.splitlines()
    assert lines[:2] == [QUESTIONS[0], f"  {result['answer']}"]
    assert lines[2] == f"  probability {result['probability']:.3f}, score {result['score']:.2f}"
    assert f">>{result['answer']}<<" in lines[3]


def test_question_and_context_come_from_files_or_standard_input(
    checkpoint, capsys, tmp_path, monkeypatch
):
    (tmp_path / "context.txt").write_text(CONTEXT, "utf8")
    plain = ask(capsys, "--model", checkpoint, "--question", *QUESTIONS, "--context", CONTEXT)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(QUESTIONS)))
    words = ["--question_file", "-", "--context_file", str(tmp_path / "context.txt")]
    assert ask(capsys, "--model", checkpoint, *words) == plain
    monkeypatch.setattr("sys.stdin", io.StringIO(CONTEXT))
    words = ["--question", *QUESTIONS, "--context_file", "-"]
    assert ask(capsys, "--model", checkpoint, *words) == plain


def test_it_starts_without_lightning(checkpoint):
    """What it imports takes most of the time until its answer."""
    script = (
        "import sys\n"
        "from lightning_ipu_bert.cli import main\n"
        "main(sys.argv[1:])\n"
        "heavy = {'lightning', 'datasets', 'torchmetrics', 'transformers.trainer'}\n"
        "sys.exit(f'{heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    )
    words = ["ask", "--model", checkpoint, "--question", QUESTIONS[0], "--context", CONTEXT]
    done = subprocess.run([sys.executable, "-c", script, *words], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def test_a_plain_bert_is_not_asked(make_module, tmp_path):
    make_module().to_huggingface().bert.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no question answering head"):
        load_trained(str(tmp_path))


def test_an_empty_context_is_refused(checkpoint):
    with pytest.raises(UserError, match="The context is empty"):
        answer_questions(load_trained(checkpoint), QUESTIONS, " ")


def test_an_exported_folder_has_identical_logits_tokenizer_and_card(checkpoint, tmp_path):
    folder = export(checkpoint, str(tmp_path / "out"))
    model = load_trained(checkpoint)
    inputs = model.tokenizer(QUESTIONS[0], CONTEXT[:60], return_tensors="pt")
    network = BertForQuestionAnswering.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs, ours = network(**inputs), model.network(**inputs)
    assert torch.equal(theirs.start_logits, ours.start_logits)
    assert torch.equal(theirs.end_logits, ours.end_logits)
    assert (
        AutoTokenizer.from_pretrained(folder)(QUESTIONS)["input_ids"]
        == (model.tokenizer(QUESTIONS)["input_ids"])
    )
    card = (folder / "README.md").read_text("utf8")
    assert f"| F1 | {model.scores['val/f1']:.2f} |" in card
    assert "pipeline_tag: question-answering" in card


def test_the_pipeline_opens_the_folder_where_transformers_has_it(checkpoint, tmp_path):
    from transformers.pipelines import SUPPORTED_TASKS, pipeline

    if "question-answering" not in SUPPORTED_TASKS:
        pytest.skip("this transformers has no question-answering pipeline (5.x removed it)")
    folder = export(checkpoint, str(tmp_path / "out"))
    answer = pipeline("question-answering", str(folder))(
        question=QUESTIONS[0], context=CONTEXT[:60]
    )
    assert answer["answer"]


def test_a_folder_that_holds_something_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        export(checkpoint, str(tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_failed_export_leaves_no_folder(checkpoint, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("lightning_ipu_bert.commands.export.model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        export(checkpoint, str(tmp_path / "out"))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_a_push_creates_the_repository_and_uploads_the_folder(checkpoint, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append(("create", name, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, folder_path))

    monkeypatch.setattr("lightning_ipu_bert.commands.export.HfApi", Api)
    out = str(tmp_path / "out")
    main(["export", "--ckpt_path", checkpoint, "--output_dir", out, "--push_to_hub", "me/model"])
    assert calls == [("create", "me/model", True), ("upload", "me/model", out)]
