"""Loading of trained models from a checkpoint, a folder or a hub name."""

from __future__ import annotations

from typing import NamedTuple, Optional

from transformers import PreTrainedTokenizerBase

from lightning_ipu_bert.checkpoint_file import IPU_KEY, read_checkpoint
from lightning_ipu_bert.data.answers import AnswerRules
from lightning_ipu_bert.data.settings import Windowing
from lightning_ipu_bert.data.tokenizer import load_tokenizer
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.models.question_answering import BertForQuestionAnsweringModule
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig


class TrainedModel(NamedTuple):
    """A model with everything required to answer questions."""

    module: BertForQuestionAnsweringModule
    tokenizer: PreTrainedTokenizerBase
    windowing: Windowing
    rules: AnswerRules
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
    module = BertForQuestionAnsweringModule(name_or_path)
    if not module.has_trained_head:
        raise UserError(
            f"'{name_or_path}' has no question answering head: its answers would be random. "
            "Fine-tune it with the verb fit and pass the checkpoint."
        )
    max_length = min(Windowing().max_length, module.bert_config.max_position_embeddings)
    windowing = Windowing(max_length, min(Windowing().doc_stride, max_length // 3))
    return TrainedModel(module.eval(), load_tokenizer(name_or_path), windowing, AnswerRules())


def _from_checkpoint(path: str) -> TrainedModel:
    checkpoint = read_checkpoint(path)  # raises an error if it is not a checkpoint
    try:
        module = BertForQuestionAnsweringModule.load_from_checkpoint(path, map_location="cpu")
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"'{path}' is a checkpoint of another model: {str(error).splitlines()[0]} "
            "Pass one of BertForQuestionAnsweringModule."
        ) from error
    if module.tokenizer is None:
        raise UserError(
            f"Checkpoint '{path}' has no tokenizer: it was not trained with a SquadDataModule. "
            "Export its weights with module.to_huggingface() and add a tokenizer to the folder."
        )
    settings = module.data_settings
    rules = AnswerRules(**{k: settings[k] for k in AnswerRules._fields if k in settings})
    windowing = Windowing(**{k: settings[k] for k in Windowing._fields if k in settings})
    on_ipus = checkpoint.get(IPU_KEY)
    ipu_config = IPUConfig.from_dict(on_ipus["config"]) if on_ipus else None
    return TrainedModel(module.eval(), module.tokenizer, windowing, rules, ipu_config)
