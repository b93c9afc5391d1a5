"""The verb `export`: writes a checkpoint as a Hugging Face folder, and optionally uploads it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from lightning_ipu_bert.commands.loading import TrainedModel, load_trained
from lightning_ipu_bert.commands.parser import command_parser
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu.file import save_ipu_config

METRICS = {"exact_match": "Exact match", "f1": "F1"}


def export(ckpt_path: str, output_dir: str, push_to_hub: Optional[str] = None) -> Path:
    """Write a checkpoint as a folder for `from_pretrained` of transformers.

    Args:
        ckpt_path: Checkpoint written by fit.
        output_dir: New folder for model, tokenizer and model card.
        push_to_hub: Hub repository to upload the folder to, e.g. me/bert-squad.

    Returns:
        The folder.

    Raises:
        UserError: If the folder is not empty, or the checkpoint cannot be loaded.
    """
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {output_dir} is not empty. Pass a new folder, or empty it.")
    model = load_trained(ckpt_path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        model.network.save_pretrained(partial)
        model.tokenizer.save_pretrained(partial)
        model_card(model, folder.name).save(partial / "README.md")
        if model.ipu_config is not None:
            save_ipu_config(model.ipu_config, partial)
        os.replace(partial, folder)  # also replaces an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if push_to_hub:
        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=push_to_hub, folder_path=str(folder))
    return folder


def model_card(model: TrainedModel, name: str) -> ModelCard:
    """Return a model card with the scores of exactly these weights."""
    scores = {key.split("/")[-1]: value for key, value in model.scores.items()}
    measured = {key: scores[key] for key in METRICS if key in scores}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="question-answering",
        tags=["lightning_ipu_bert"],
        model_name=name,
        eval_results=_eval_results(measured),
    )
    rows = "".join(f"| {METRICS[key]} | {value:.2f} |\n" for key, value in measured.items())
    table = f"| metric | value |\n|---|---:|\n{rows}" if measured else "No scores were measured.\n"
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        "BERT for extractive question answering, fine-tuned with lightning_ipu_bert.\n\n"
        f"## Scores on the validation data\n\n{table}\n## Use\n\n"
        "```python\nfrom transformers import AutoTokenizer, BertForQuestionAnswering\n\n"
        f'model = BertForQuestionAnswering.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n'
        f"Windows of {model.windowing.max_length} tokens, stride {model.windowing.doc_stride}.\n"
    )


def main(args: Sequence[str]) -> None:
    """Run `export` with command line arguments."""
    parser = command_parser("export", "Write a checkpoint as a Hugging Face folder.")
    parser.add_function_arguments(export)
    options = parser.parse_args(list(args))
    print(f"Exported to {export(**options.as_dict())}")


def _eval_results(measured: Dict[str, float]) -> Optional[List[EvalResult]]:
    results = [
        EvalResult(
            task_type="question-answering",
            dataset_type="validation",
            dataset_name="validation data",
            metric_type=key,
            metric_name=METRICS[key],
            metric_value=round(value, 4),
        )
        for key, value in measured.items()
    ]
    return results or None
