"""The verb `ask`: answers questions on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch

from lightning_ipu_bert.commands.loading import TrainedModel, load_trained
from lightning_ipu_bert.commands.parser import command_parser
from lightning_ipu_bert.data.answers import Windows, decode
from lightning_ipu_bert.data.feature_columns import build_columns
from lightning_ipu_bert.data.feature_table import FeatureTable
from lightning_ipu_bert.data.loaders import Collator
from lightning_ipu_bert.data.logits import join_logits
from lightning_ipu_bert.data.questions import Question, QuestionSet
from lightning_ipu_bert.data.settings import windowing_rules
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.models.bert import NETWORK_INPUTS
from lightning_ipu_bert.pipeline.rules import enforce

WINDOWS_PER_BATCH = 16
MARGIN = 200
"""Characters of the passage shown before and after the answer."""


def answer_questions(
    model: TrainedModel, questions: Sequence[str], context: str
) -> List[Dict[str, object]]:
    """Answer questions about a passage.

    Args:
        model: From `load_trained`.
        questions: The questions.
        context: The passage, of any length.

    Returns:
        For each question: ``question``, ``answer``, ``probability`` (among the ranked candidates),
        ``score`` (sum of the logits), and ``start`` and ``end`` in characters of the passage.

    Raises:
        UserError: If the passage is empty or a question is too long.
    """
    if not context.strip():
        raise UserError("The context is empty. Pass a passage with --context or --context_file.")
    asked = [Question(str(i), text, 0, ()) for i, text in enumerate(questions)]
    question_set = QuestionSet([context], asked)
    enforce(windowing_rules(model.windowing))
    features = build_columns(question_set, model.tokenizer, model.windowing)
    table = FeatureTable(features)
    collate = Collator(model.tokenizer.pad_token_id)
    parts = []
    for first in range(0, len(table), WINDOWS_PER_BATCH):
        rows = range(first, min(first + WINDOWS_PER_BATCH, len(table)))
        batch = collate(table.__getitems__(list(rows)))
        with torch.no_grad():
            output = model.network(**{name: batch[name] for name in NETWORK_INPUTS})
        parts.append((batch["feature"], output.start_logits, output.end_logits))
    ranked = decode(join_logits(parts), Windows.of(features), model.rules).n_best(question_set)
    results = []
    for question in asked:
        best = ranked[question.id][0]
        results.append({"question": question.text, "answer": best.pop("text"), **best})
    return results


def main(args: Sequence[str]) -> None:
    """Run `ask` with command line arguments."""
    parser = command_parser("ask", "Ask a trained model questions about a passage.")
    parser.add_argument(
        "--model", required=True, help="checkpoint (.ckpt), Hugging Face folder or hub name"
    )
    parser.add_argument("--question", nargs="+", help="one or more questions, each quoted")
    parser.add_argument(
        "--question_file", help="file with one question per line; - is standard input"
    )
    parser.add_argument("--context", help="the passage")
    parser.add_argument("--context_file", help="file with the passage; - is standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options = parser.parse_args(list(args))
    questions = options.question or _read("question", options.question_file).splitlines()
    questions = [question for question in questions if question.strip()]
    if not questions:
        raise UserError(
            "There is no question. Pass --question, or a file with one question per line."
        )
    context = options.context or _read("context", options.context_file)
    for result in answer_questions(load_trained(options.model), questions, context):
        print(json.dumps(result, ensure_ascii=False) if options.json else _show(result, context))


def _read(name: str, file: Optional[str]) -> str:
    if file is None:
        raise UserError(
            f"There is no {name}. Pass --{name} or --{name}_file (- for standard input)."
        )
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text("utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{name}_file {file} cannot be read: {error}. Check the path.") from error


def _show(result: Dict[str, Any], context: str) -> str:
    """Return question, answer, score, and the passage with the answer highlighted."""
    start, end = result["start"], result["end"]
    lines = [
        result["question"].strip(),
        f"  {result['answer'] or '(no answer in this passage)'}",
        f"  probability {result['probability']:.3f}, score {result['score']:.2f}",
    ]
    if end > start:
        left, right = max(start - MARGIN, 0), min(end + MARGIN, len(context))
        before = "..." * (left > 0) + context[left:start]
        after = context[end:right] + "..." * (right < len(context))
        lines.append("  " + " ".join(f"{before}{_mark(context[start:end])}{after}".split()))
    return "\n".join(lines)


def _mark(text: str) -> str:
    return f"\033[1;7m{text}\033[0m" if sys.stdout.isatty() else f">>{text}<<"
