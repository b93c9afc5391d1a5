"""Loading of trained models from a checkpoint, a folder or a hub name."""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional

from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerBase

from lightning_ipu_bert.checkpoint_file import (
    DATA_SETTINGS_KEY,
    IPU_KEY,
    MODEL_SETTINGS_KEY,
    SCORES_KEY,
    TOKENIZER_KEY,
    read_checkpoint,
)
from lightning_ipu_bert.data.answers import AnswerRules
from lightning_ipu_bert.data.settings import Windowing
from lightning_ipu_bert.data.tokenizer import load_tokenizer, tokenizer_from_files
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.models.bert_network import build_network
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig


class TrainedModel(NamedTuple):
    """A model with everything required to answer questions; Lightning is not."""

    network: BertForQuestionAnswering
    """On the CPU, in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    windowing: Windowing
    rules: AnswerRules
    scores: Dict[str, float]
    """Evaluated with exactly these weights, by name."""
    ipu_config: Optional[IPUConfig] = None
    """Configuration if it was trained on IPUs."""


def load_trained(name_or_path: str) -> TrainedModel:
    """Load a model that was trained for question answering onto the CPU.

    Args:
        name_or_path: A ``.ckpt`` file of this package, a Hugging Face folder or a hub name.

    Raises:
        UserError: If it does not exist, cannot be loaded, or its head is not trained.
    """
    if name_or_path.endswith(".ckpt"):
        return _from_checkpoint(name_or_path)
    network, has_trained_head = build_network(name_or_path, None)
    if not has_trained_head:
        raise UserError(
            f"'{name_or_path}' has no question answering head: its answers would be random. "
            "Fine-tune it with the verb fit and pass the checkpoint."
        )
    max_length = min(Windowing().max_length, network.config.max_position_embeddings)
    windowing = Windowing(max_length, min(Windowing().doc_stride, max_length // 3))
    tokenizer = load_tokenizer(name_or_path)
    return TrainedModel(_evaluating(network), tokenizer, windowing, AnswerRules(), {})


def _from_checkpoint(path: str) -> TrainedModel:
    checkpoint = read_checkpoint(path)  # raises an error if it is not a checkpoint
    try:
        config = checkpoint[MODEL_SETTINGS_KEY]["config"]
        network = BertForQuestionAnswering(BertConfig(**config))
        network.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"'{path}' is a checkpoint of another model: {str(error).splitlines()[0]} "
            "Pass one of BertForQuestionAnsweringModule."
        ) from error
    if not checkpoint.get(TOKENIZER_KEY):
        raise UserError(
            f"Checkpoint '{path}' has no tokenizer: it was not trained with a SquadDataModule. "
            "Export its weights with module.to_huggingface() and add a tokenizer to the folder."
        )
    settings = checkpoint.get(DATA_SETTINGS_KEY, {})
    rules = AnswerRules(**{k: settings[k] for k in AnswerRules._fields if k in settings})
    windowing = Windowing(**{k: settings[k] for k in Windowing._fields if k in settings})
    on_ipus = checkpoint.get(IPU_KEY)
    ipu_config = IPUConfig.from_dict(on_ipus["config"]) if on_ipus else None
    tokenizer = tokenizer_from_files(checkpoint[TOKENIZER_KEY])
    scores = checkpoint.get(SCORES_KEY, {})
    return TrainedModel(_evaluating(network), tokenizer, windowing, rules, scores, ipu_config)


def _evaluating(network: BertForQuestionAnswering) -> BertForQuestionAnswering:
    network.train(False)  # eval() is untyped in transformers
    return network
