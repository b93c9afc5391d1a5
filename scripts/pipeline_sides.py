"""The sides that bench_pipeline.py lets train in turn: strategy, plain Lightning, a bare loop."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import lightning.pytorch as pl
import tests_path  # noqa: F401
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import collect, start_ranks
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForQuestionAnswering
from typing_extensions import override

from lightning_ipu_bert import BertForQuestionAnsweringModule, PipelineParallelStrategy
from lightning_ipu_bert.training.optimizer import decay_groups

LENGTH, MICRO_BATCHES = 384, 16
MINILM: Dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BERT_LARGE: Dict[str, Any] = {
    **MINILM,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def now() -> float:
    """Return the time when all work is done, that of a GPU too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Turns(NamedTuple):
    """Whose turn it is: all processes of all sides meet at the barrier between two turns."""

    barrier: Any
    turn: int
    sides: int
    rounds: int
    updates: int
    """Updates in a turn."""

    def begin(self) -> float:
        for _ in range(self.turn):
            self.barrier.wait()
        return now()

    def end(self, begin: float) -> float:
        seconds = now() - begin
        for _ in range(self.turn, self.sides):
            self.barrier.wait()
        return seconds


class Side(NamedTuple):
    """One of those that train in turn."""

    ranks: int
    train: Callable[..., List[float]]
    """Takes turns and options, and returns the seconds of each of its turns."""
    options: Dict[str, Any]


def compare(sides: Sequence[Side], pairs: int, updates: int) -> List[List[float]]:
    """Let sides train in turn; return the seconds of their turns, but for the first, cold one."""
    barrier = mp.get_context("fork").Barrier(sum(side.ranks for side in sides), timeout=600)
    started = []
    for turn, side in enumerate(sides):
        turns = Turns(barrier, turn, len(sides), pairs + 1, updates)
        started.append(start_ranks(side.ranks, _train, side, turns))
    return [collect(ranks, timeout=3600)[0][1:] for ranks in started]


def _train(side: Side, turns: Turns) -> List[float]:
    return side.train(turns, **side.options)


class InTurn(pl.Callback):
    """Lets a Trainer train when its turn comes, and takes the time."""

    def __init__(self, turns: Turns, batches: int) -> None:
        self.turns, self.batches = turns, batches
        self.seconds: List[float] = []

    @override
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.batches == 0:
            self.begin = self.turns.begin()

    @override
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.batches == self.batches - 1:
            self.seconds.append(self.turns.end(self.begin))


def make_batch(examples: int, vocabulary: int, length: int = LENGTH) -> Dict[str, Tensor]:
    """Return a batch of random tokens without padding."""
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(0, vocabulary, (examples, length), generator=generator),
        "token_type_ids": torch.zeros(examples, length, dtype=torch.long),
        "attention_mask": torch.ones(examples, length, dtype=torch.long),
        "start_positions": torch.randint(0, length, (examples,), generator=generator),
        "end_positions": torch.randint(0, length, (examples,), generator=generator),
        "feature": torch.arange(examples),
    }


def fit(
    size: Dict[str, Any],
    examples: int,
    batches: int,
    plan: Optional[Dict[str, Any]],
    callbacks: Sequence[pl.Callback],
    length: int = LENGTH,
    **options: Any,
) -> None:
    """Train on one batch again and again, as one of a plan's ranks or without a plan."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module = BertForQuestionAnsweringModule(config=size, learning_rate=1e-4)
    batch = make_batch(examples, module.bert_config.vocab_size, length)
    numbers: Any = range(batches)
    loader = DataLoader(numbers, batch_size=None, collate_fn=lambda _: batch)
    strategy = PipelineParallelStrategy(**plan) if plan else None
    with tempfile.TemporaryDirectory() as folder:
        recipe: Dict[str, Any] = {
            "accelerator": "cpu",
            "devices": strategy.config.shape.num_devices if strategy else 1,
            "strategy": strategy or "auto",
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
        }
        pl.Trainer(**{**recipe, **options}).fit(module, loader)


def by_strategy(
    turns: Turns,
    layers: Sequence[int],
    micro_batch: int,
    size: Dict[str, Any],
    schedule: str = "1f1b",
    **options: Any,
) -> List[float]:
    """Train by `PipelineParallelStrategy`."""
    plan = {
        "layers_per_stage": list(layers),
        "gradient_accumulation_steps": MICRO_BATCHES,
        "schedule": schedule,
    }
    in_turn = InTurn(turns, turns.updates)
    batches = turns.rounds * turns.updates
    fit(size, MICRO_BATCHES * micro_batch, batches, plan, [in_turn], **options)
    return in_turn.seconds


def by_plain_lightning(
    turns: Turns, parts: int, micro_batch: int, size: Dict[str, Any], threads: int, **options: Any
) -> List[float]:
    """Train in one process, an update in so many parts."""
    torch.set_num_threads(threads)
    in_turn = InTurn(turns, turns.updates * parts)
    batches, examples = turns.rounds * turns.updates * parts, MICRO_BATCHES * micro_batch // parts
    fit(size, examples, batches, None, [in_turn], accumulate_grad_batches=parts, **options)
    return in_turn.seconds


class BareStage(nn.Module):
    """Some layers of Hugging Face's model, as one would cut it by hand for torch's schedules."""

    def __init__(self, network: BertForQuestionAnswering, layers: Sequence[int], rank: int) -> None:
        super().__init__()
        begin = sum(layers[:rank])
        self.embeddings = network.bert.embeddings if rank == 0 else None
        self.layers = network.bert.encoder.layer[begin : begin + layers[rank]]
        self.head = network.qa_outputs if rank == len(layers) - 1 else None

    @override
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.embeddings is not None:
            hidden = self.embeddings(hidden)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden if self.head is None else self.head(hidden)


def span_loss(logits: Tensor, target: Tensor) -> Tensor:
    start, end = logits.unbind(-1)
    return (cross_entropy(start, target[:, 0]) + cross_entropy(end, target[:, 1])) / 2


def by_bare_loop(
    turns: Turns, layers: Sequence[int], micro_batch: int, size: Dict[str, Any]
) -> List[float]:
    """Train by torch's schedule and optimizer alone."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=len(layers))
    torch.manual_seed(0)
    network = BertForQuestionAnswering(BertConfig(**size))
    module = BareStage(network, layers, rank)
    hidden = torch.zeros(micro_batch, LENGTH, size["hidden_size"], requires_grad=True)
    logits = torch.zeros(micro_batch, LENGTH, 2, requires_grad=True)
    tokens = torch.zeros(micro_batch, LENGTH, dtype=torch.long)
    stage = PipelineStage(
        *(module, rank, len(layers), torch.device("cpu")),
        input_args=(hidden if rank else tokens,),
        output_args=(hidden if module.head is None else logits,),
    )
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=span_loss)
    optimizer = torch.optim.AdamW(decay_groups(module, 0.01), lr=1e-4)
    batch = make_batch(MICRO_BATCHES * micro_batch, network.config.vocab_size)
    mask = batch["attention_mask"][:, None, None, :].bool()
    target = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)
    seconds = []
    for _ in range(turns.rounds):
        begin = turns.begin()
        for _ in range(turns.updates):
            optimizer.zero_grad()
            given = () if rank else (batch["input_ids"],)
            more: Dict[str, Any] = {} if module.head is None else {"target": target}
            schedule.step(*given, mask=mask, return_outputs=False, **more)
            optimizer.step()
        seconds.append(turns.end(begin))
    dist.destroy_process_group()
    return seconds
