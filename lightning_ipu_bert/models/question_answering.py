"""`BertForQuestionAnsweringModule`: extractive question answering with BERT."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import count_saved_batch, datamodule_of, trainer_of
from lightning_ipu_bert.checkpoint_file import ORIGIN_KEY, PRECISION_KEY, SCORES_KEY, TOKENIZER_KEY
from lightning_ipu_bert.data.squad import SquadDataModule
from lightning_ipu_bert.data.tokenizer import tokenizer_from_files, tokenizer_to_files
from lightning_ipu_bert.models.bert import BatchLogits, SpanLogits, on_host, run_blocks, span_loss
from lightning_ipu_bert.models.bert_network import architecture_of, build_network
from lightning_ipu_bert.models.bert_settings import LABELS, BertSettings, bert_blocks, input_rules
from lightning_ipu_bert.models.fast_bert import use_fast_layers
from lightning_ipu_bert.models.squad_report import squad_report
from lightning_ipu_bert.pipeline.facts import facts_of
from lightning_ipu_bert.pipeline.progress import progress_rules
from lightning_ipu_bert.pipeline.protocol import PipelineModule
from lightning_ipu_bert.pipeline.rules import enforce
from lightning_ipu_bert.training.allocator import KeepFreedMemory
from lightning_ipu_bert.training.callbacks import missing_callbacks
from lightning_ipu_bert.training.checkpoint_io import write_atomically
from lightning_ipu_bert.training.fused import use_fused_steps
from lightning_ipu_bert.training.gather import all_gather_objects
from lightning_ipu_bert.training.optimizer import adamw, scheduled
from lightning_ipu_bert.training.settings import learning_rate_rules

Batch = Dict[str, Tensor]
PROCESS_SETTINGS = ("fast_kernels", "keep_freed_memory")
"""Arguments about this process, which checkpoints do not contain."""


class BertForQuestionAnsweringModule(PipelineModule, pl.LightningModule):
    """LightningModule of BERT for extractive question answering, evaluated by exact match and F1.

    Parameters have the names of `BertForQuestionAnswering` in transformers (``bert...`` and
    ``qa_outputs...``), in the module and in checkpoints. Checkpoints are self-contained: they
    include the architecture and the tokenizer.
    """

    block_labels = LABELS

    def __init__(
        self,
        model_name_or_path: Optional[str] = None,
        config: Union[Dict[str, Any], BertConfig, None] = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        lr_schedule: str = "linear",
        warmup_ratio: float = 0.0,
        warmup_steps: int = 0,
        fast_kernels: bool = True,
        keep_freed_memory: bool = True,
    ) -> None:
        """Create the network.

        Args:
            model_name_or_path: Folder or hub name of a pretrained BERT; null uses random weights.
            config: Fields of BertConfig that override those of the pretrained model or the
                defaults, e.g. {hidden_dropout_prob: 0.0}.
            learning_rate: Peak learning rate of AdamW.
            weight_decay: Weight decay of all weights except biases and LayerNorm.
            lr_schedule: Schedule after warm-up: linear or cosine (to 0 at the end of the run) or
                constant.
            warmup_ratio: Fraction of all updates in which the learning rate increases from 0.
            warmup_steps: Number of warm-up updates; overrides warmup_ratio.
            fast_kernels: Whether CPUs use the kernels of this package: layers with their own
                backward, dropout from random words, fused AdamW; false uses those of transformers
                and torch.
            keep_freed_memory: Whether the process keeps freed memory on CPUs, for the next step;
                it holds until the process ends.

        Raises:
            UserError: If no BERT can be created from the arguments, or a value is out of range.
        """
        super().__init__()
        enforce(learning_rate_rules(learning_rate, lr_schedule, warmup_ratio, warmup_steps))
        self.save_hyperparameters(ignore=["config", *PROCESS_SETTINGS])
        network, self.has_trained_head = build_network(model_name_or_path, config)
        self.bert_config: BertConfig = network.config
        self.bert, self.qa_outputs = network.bert, network.qa_outputs
        self.fast_kernels, self.keep_freed_memory = fast_kernels, keep_freed_memory
        use_fast_layers(self.bert, fast_kernels)
        # Plain values only: Lightning loads checkpoints with torch's weights_only.
        self.save_hyperparameters({"config": architecture_of(network.config) if config else None})
        self.tokenizer: Optional[PreTrainedTokenizerBase] = None
        self.data_settings: Dict[str, Any] = {}
        self._origin = model_name_or_path
        self._logits: List[BatchLogits] = []
        self._scores: Dict[str, float] = {}
        self._scores_step = -1

    @override
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        token_type_ids: Optional[Tensor] = None,
    ) -> SpanLogits:
        """Return the start and end logits of all tokens.

        Args:
            input_ids: [B, S]
            attention_mask: [B, S], 1 for tokens and 0 for padding.
            token_type_ids: [B, S], 0 for the question and 1 for the passage.
        """
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        batch = {"input_ids": input_ids, **{k: v for k, v in given.items() if v is not None}}
        logits: SpanLogits = self.stage_forward(self.pipeline_blocks(), None, batch)
        return logits

    @override
    def pipeline_blocks(self) -> List[str]:
        """Return embeddings, layers and head; see `PipelineModule`."""
        return bert_blocks(self.bert_config.num_hidden_layers)

    @override
    def stage_forward(self, blocks: Sequence[str], hidden: Any, batch: Mapping[str, Tensor]) -> Any:
        """Run some blocks; see `run_blocks`."""
        return run_blocks(self, self.bert_config, blocks, hidden, batch)

    @override
    def pipeline_loss(self, output: SpanLogits, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a micro-batch; see `span_loss`."""
        return span_loss(output, batch)

    def to_huggingface(self) -> BertForQuestionAnswering:
        """Return the model of transformers with a copy of the weights."""
        network = BertForQuestionAnswering(self.bert_config)
        network.load_state_dict(self.state_dict())
        network.train(False)
        return network

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss: Tensor = self.run_loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        schedule: Any = self.lr_schedulers()
        self.log("lr", schedule.get_last_lr()[0], prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss and store the logits for the scores."""
        self._evaluation_step(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss and store the logits for the scores, as test/..."""
        self._evaluation_step(batch, "test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> BatchLogits:
        """Return feature indices and logits; `PredictionWriter` turns them into answers."""
        return on_host(batch, self.run_output(batch))

    def _evaluation_step(self, batch: Batch, prefix: str) -> None:
        logits = self.run_output(batch)
        loss, examples = span_loss(logits, batch), len(batch["input_ids"])
        self.log(f"{prefix}/loss", loss, prog_bar=True, batch_size=examples, sync_dist=True)
        self._logits.append(on_host(batch, logits))

    @override
    def on_validation_epoch_end(self) -> None:
        """Log val/exact_match and val/f1."""
        self._log_scores("val", "validation")

    @override
    def on_test_epoch_end(self) -> None:
        """Log test/exact_match and test/f1."""
        self._log_scores("test", "test")

    def _log_scores(self, prefix: str, split: str) -> None:
        parts, self._logits = self._logits, []
        data = datamodule_of(self.trainer)
        if not isinstance(data, SquadDataModule):
            return  # without a SquadDataModule there are no answers to compare
        # The windows of a question may be on several devices.
        group = facts_of(self.trainer).data_group
        all_parts = [part for rank_parts in all_gather_objects(parts, group) for part in rank_parts]
        scores = {f"{prefix}/{k}": v for k, v in data.scores(split, all_parts).items()}
        self.log_dict(scores, prog_bar=True, sync_dist=True)  # equal on all devices
        if not self.trainer.sanity_checking:
            self._scores, self._scores_step = scores, self.trainer.global_step

    @override
    def configure_optimizers(self) -> Any:
        """Return AdamW and a learning rate schedule that steps after every update."""
        optimizer = adamw(self, self.hparams["learning_rate"], self.hparams["weight_decay"])
        if self.fast_kernels:
            use_fused_steps(optimizer)
        names = ("lr_schedule", "warmup_ratio", "warmup_steps")
        settings = [self.hparams[name] for name in names]
        return scheduled(optimizer, self.estimated_updates(), *settings)

    @override
    def setup(self, stage: str) -> None:
        """Set the tokenizer from the data, choose kernels, and write checkpoints atomically."""
        data = datamodule_of(self.trainer)
        if isinstance(data, SquadDataModule):
            self.tokenizer = data.tokenizer
            sizes = {name: vars(self.bert_config)[name] for name in BertSettings._fields}
            max_length = data.splits.windowing.max_length
            enforce(input_rules(BertSettings(**sizes), len(data.tokenizer), max_length))
        can_be_fast = not facts_of(self.trainer).splits_backward
        use_fast_layers(self.bert, self.fast_kernels and can_be_fast)
        write_atomically(self.trainer)

    @override
    def configure_callbacks(self) -> List[pl.Callback]:
        """Return the default callbacks, without those that the Trainer already has."""
        memory = [KeepFreedMemory()] if self.keep_freed_memory else []
        return missing_callbacks(self.trainer, squad_report(), *memory)

    @override
    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        """Add architecture, tokenizer, precision and scores to the checkpoint."""
        hyper_parameters = checkpoint.setdefault(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        checkpoint.update({ORIGIN_KEY: self._origin, PRECISION_KEY: str(self.trainer.precision)})
        hyper_parameters.update(model_name_or_path=None, config=architecture_of(self.bert_config))
        if self.tokenizer is not None:
            checkpoint[TOKENIZER_KEY] = tokenizer_to_files(self.tokenizer)
        if self._scores_step == self.trainer.global_step:
            checkpoint[SCORES_KEY] = dict(self._scores)

    @override
    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        """Load the tokenizer and the scores from the checkpoint."""
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            enforce(progress_rules(checkpoint, facts_of(trainer).updates_per_batch))
        count_saved_batch(checkpoint)
        if checkpoint.get(TOKENIZER_KEY):
            self.tokenizer = tokenizer_from_files(checkpoint[TOKENIZER_KEY])
        self._scores = checkpoint.get(SCORES_KEY, {})
        self._origin = checkpoint.get(ORIGIN_KEY)
        self.data_settings = checkpoint.get(SquadDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})

    @property
    def scores(self) -> Dict[str, float]:
        """The last evaluation scores, by name."""
        return dict(self._scores)
