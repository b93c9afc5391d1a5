"""Executor on IPUs, with two compiled programs: training and inference."""

from __future__ import annotations

import time
from typing import Any, Callable, List, Optional, Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.examples import count_examples, join_outputs
from lightning_ipu_bert.global_loss import loss_of
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.pipeline.ipu.program import ProgramConfig
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.protocol import has_own_weights
from lightning_ipu_bert.strategies.bridge import bridged_to
from lightning_ipu_bert.strategies.ipu.program.annotations import annotated
from lightning_ipu_bert.strategies.ipu.program.compiled import (
    CompiledProgram,
    as_float32,
    examples_of,
    normal,
    padded,
)
from lightning_ipu_bert.strategies.ipu.program.loss_weights import LossWeights
from lightning_ipu_bert.strategies.ipu.program.losses import mean_loss, refuse_factor
from lightning_ipu_bert.strategies.ipu.program.network import (
    BatchLayout,
    InferenceNetwork,
    TrainingNetwork,
    batch_tensors,
)
from lightning_ipu_bert.strategies.ipu.program.offline import CompiledOffline
from lightning_ipu_bert.strategies.ipu.program.optimizer import IPUOptimizer
from lightning_ipu_bert.strategies.ipu.program.pair import ProgramPair
from lightning_ipu_bert.strategies.ipu.program.random_state import RandomState
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch


class IPUExecutor:
    """Runs the programs of a model; see `pipeline.protocol.PipelineExecutor`."""

    def __init__(
        self,
        module: Any,
        config: IPUConfig,
        plan: Plan,
        make_options: Callable[[bool], object],
        batch_sizes: Callable[[bool], Optional[int]],
        random_state: RandomState,
        offline: bool = False,
    ) -> None:
        """Create an executor; programs are compiled on first use.

        Args:
            module: The LightningModule.
            config: The configuration.
            plan: The plan of the run.
            make_options: Returns `poptorch.Options` for training or inference.
            batch_sizes: Returns the examples per call of the loaders for training or inference.
            random_state: Random state of a checkpoint and of this run.
            offline: Compile without running.
        """
        self.module = module
        self.config = config
        self.plan = plan
        together = config.training.shape.num_devices + config.inference.shape.num_devices
        self.programs = ProgramPair(module, together)
        self.optimizer: Optional[IPUOptimizer] = None
        self.random_state = random_state
        self.compile_seconds = 0.0
        self.ran_in_step = False
        """Whether the current training step has updated the weights."""
        self._make_options = make_options
        self._batch_sizes = batch_sizes
        self._offline = offline
        self._loss_weights = LossWeights(module, config.training.shape.batches)

    def loss(self, batch: object) -> Tensor:
        """Return the mean loss of a batch; if gradients are enabled, update the weights."""
        if not torch.is_grad_enabled():
            return loss_of(self.module, self.output(batch), batch, has_own_weights(self.module))
        tensors = batch_tensors(batch)
        if self.ran_in_step:
            raise UserError(
                "run_loss was called twice in a training step, but on IPUs each call is a weight "
                "update. Call it once, and compute the full loss in pipeline_loss."
            )
        program = self.programs.training or self.compile_training(batch)
        program.check(batch, tensors)
        if len(tensors[0]) != program.batch_size:
            raise UserError(
                f"A training batch has {len(tensors[0])} examples, but a call needs "
                f"{program.batch_size}. Set drop_last=True in the loader."
            )
        if self._offline:
            raise CompiledOffline
        self.programs.use_training(program)
        assert self.optimizer is not None
        self.optimizer.refresh(program.poplar)  # after attaching, so that it is sent immediately
        result = program.poplar(*self._inputs(batch, tensors))
        self.programs.versions.trained()
        self.ran_in_step = True
        return bridged_to(mean_loss(result, self.config), refuse_factor)

    def output(self, batch: object) -> object:
        """Return the output of the last block for every example of a batch."""
        if self.module.trainer.training and torch.is_grad_enabled():
            raise UserError(
                "run_output in a training step would switch programs on the IPUs for every batch. "
                "Log values of the loss, or evaluate in validation_step."
            )
        with torch.inference_mode(False), torch.no_grad():
            tensors = normal(batch_tensors(batch))
            program = self.programs.inference or self.compile_inference(batch)
            program.check(batch, tensors)
            if self._offline:
                raise CompiledOffline
            self.programs.use_inference(program)
            examples, size = len(tensors[0]), program.batch_size
            parts = [
                as_float32(program.poplar(*padded(tensors, first, size)))
                for first in range(0, examples, size)
            ]
        return join_outputs(parts, examples=examples)

    def compile_training(self, batch: object) -> CompiledProgram:
        """Compile the training program for batches like this one."""
        program = self.programs.compile_training(lambda: self._make_training(batch))
        assert self.optimizer is not None
        self.optimizer.write_loaded_state()
        if not self._offline:
            self.random_state.restore(program.poplar, program.config.shape.num_devices)
        return program

    def compile_inference(self, batch: object) -> CompiledProgram:
        """Compile the inference program for batches like this one."""
        return self.programs.compile_inference(lambda: self._make_inference(batch))

    def _make_training(self, batch: object) -> CompiledProgram:
        assert self.optimizer is not None
        layout = BatchLayout.of(batch)
        poplar = import_poptorch().trainingModel(
            TrainingNetwork(self.module, layout, has_own_weights(self.module)),
            options=self._make_options(True),
            optimizer=self.optimizer.poptorch,
        )
        program = CompiledProgram(self.config.training, poplar, count_examples(batch), layout)
        tensors = batch_tensors(batch)
        return self._compiled(program, tensors, self._inputs(batch, tensors))

    def _make_inference(self, batch: object) -> CompiledProgram:
        layout, config = BatchLayout.of(batch), self.config.inference
        network = InferenceNetwork(self.module, layout)
        poplar = import_poptorch().inferenceModel(network, options=self._make_options(False))
        calls = config.shape.batches.micro_batches_per_call
        size = self._batch_sizes(False) or -(-count_examples(batch) // calls) * calls
        program = CompiledProgram(config, poplar, size, layout)
        tensors = padded(normal(batch_tensors(batch)), 0, size)
        return self._compiled(program, tensors, tensors)

    def _inputs(self, batch: object, tensors: List[Tensor]) -> List[Tensor]:
        """Return the inputs of the training program for a batch."""
        if not has_own_weights(self.module):
            return tensors
        return self._loss_weights.inputs(batch, tensors)

    def _compiled(
        self, program: CompiledProgram, tensors: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> CompiledProgram:
        config: ProgramConfig = program.config
        program.shapes = examples_of(tensors)
        begin = time.perf_counter()
        with annotated(self.module, self.plan, config):
            program.poplar.compile(*inputs)
        seconds = time.perf_counter() - begin
        self.compile_seconds += seconds
        kind = "training" if config.training else "inference"
        rank_zero_info(f"Compiled/loaded the {kind} program in {seconds:.1f} s")
        return program

    def rng_state(self) -> Optional[List[int]]:
        """Return the random state of the IPUs, or None before there is one."""
        training = self.programs.training
        poplar = None if training is None or self._offline else training.poplar
        return self.random_state.of(poplar)

    def destroy(self) -> None:
        """Copy the weights to the host and destroy both programs."""
        self.programs.destroy()
