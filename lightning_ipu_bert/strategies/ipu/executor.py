"""Executor on IPUs, with a training program and inference programs."""

from __future__ import annotations

from functools import partial
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.examples import join_outputs
from lightning_ipu_bert.global_loss import loss_of
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.pipeline.protocol import has_own_weights
from lightning_ipu_bert.strategies.bridge import bridged_to
from lightning_ipu_bert.strategies.ipu.program.changes import (
    HostTensors,
    mode_rule,
    modes_of,
)
from lightning_ipu_bert.strategies.ipu.program.compiled import (
    CompiledProgram,
    as_float32,
    joined_scalars,
    normal,
    padded,
)
from lightning_ipu_bert.strategies.ipu.program.compiler import ProgramCompiler
from lightning_ipu_bert.strategies.ipu.program.loss_weights import LossWeights
from lightning_ipu_bert.strategies.ipu.program.losses import mean_loss, refuse_factor
from lightning_ipu_bert.strategies.ipu.program.network import (
    batch_tensors,
)
from lightning_ipu_bert.strategies.ipu.program.offline import CompiledOffline
from lightning_ipu_bert.strategies.ipu.program.optimizer import IPUOptimizer
from lightning_ipu_bert.strategies.ipu.program.pair import ProgramPair
from lightning_ipu_bert.strategies.ipu.program.random_state import RandomState
from lightning_ipu_bert.strategies.pipelined import PipelinedModule


class IPUExecutor:
    """Runs the programs of a model; see `pipeline.protocol.PipelineExecutor`."""

    def __init__(
        self,
        module: PipelinedModule,
        config: IPUConfig,
        compiler: ProgramCompiler,
        random_state: RandomState,
        offline: bool = False,
    ) -> None:
        """Create an executor; programs are compiled on first use.

        Args:
            module: The LightningModule.
            config: The configuration.
            compiler: Compiles the programs.
            random_state: Random state of a checkpoint and of this run.
            offline: Compile without running.
        """
        self.module = module
        self.config = config
        together = config.training.shape.num_devices + config.inference.shape.num_devices
        self.programs = ProgramPair(module, together)
        self.optimizer: Optional[IPUOptimizer] = None
        self.host_tensors: Optional[HostTensors] = None
        """Weights and buffers on the host, once a program is compiled."""
        self.random_state = random_state
        self.ran_in_step = False
        """Whether the current training step has updated the weights."""
        self._compiler = compiler
        self._offline = offline
        self._loss_weights = LossWeights(module, config.training.shape.batches)

    @property
    def compile_seconds(self) -> float:
        """Compilation time so far."""
        return self._compiler.seconds

    def loss(self, batch: object) -> Tensor:
        """Return the mean loss of a batch; if gradients are enabled, update the weights."""
        return self._loss(batch, returns_output=False)[0]

    def loss_and_output(self, batch: object) -> Tuple[Tensor, object]:
        """Return the loss, as `loss` does, and the output for every example of the batch."""
        return self._loss(batch, returns_output=True)

    def _loss(self, batch: object, returns_output: bool) -> Tuple[Tensor, object]:
        if not torch.is_grad_enabled():
            output = self.output(batch)
            return loss_of(self.module, output, batch, has_own_weights(self.module)), output
        tensors = batch_tensors(batch)
        if self.ran_in_step:
            raise UserError(
                "run_loss was called twice in a training step, but on IPUs each call is a weight "
                "update. Call it once, and compute the full loss in pipeline_loss."
            )
        program = self.programs.training or self.compile_training(batch, returns_output)
        self._check_training(program, batch, tensors, returns_output)
        if self._offline:
            raise CompiledOffline
        self._use_changes_on_host()
        self.programs.use_training(program)
        assert self.optimizer is not None
        self.optimizer.refresh(program.poplar)  # after attaching, so that it is sent immediately
        result = program.poplar(*self._inputs(batch, tensors))
        self.programs.versions.trained()
        self.ran_in_step = True
        losses, output = result if program.returns_output else (result, None)
        output_mode = "all" if program.returns_output else self.config.output_mode
        loss = mean_loss(losses, output_mode, self.config)
        return bridged_to(loss, refuse_factor), self._whole([output], program, len(tensors[0]))

    def _check_training(
        self, program: CompiledProgram, batch: object, tensors: List[Tensor], returns_output: bool
    ) -> None:
        program.check(batch, tensors)
        mode_rule(self.module, program.modes)
        assert self.host_tensors is not None
        assert self.optimizer is not None
        self.host_tensors.check_trained()
        self.optimizer.check_groups()
        if len(tensors[0]) != program.batch_size:
            raise UserError(
                f"A training batch has {len(tensors[0])} examples, but a call needs "
                f"{program.batch_size}. Set drop_last=True in the loader."
            )
        if returns_output and not program.returns_output:
            raise UserError(
                "run_loss(batch, return_output=True) needs a training program that returns the "
                "output, but the first step did not request it. Pass return_output=True in every "
                "training step."
            )

    def _use_changes_on_host(self) -> None:
        """Send weights and buffers to the IPUs again if they were modified on the host."""
        if self.host_tensors is not None and self.host_tensors.changed():
            self.programs.versions.host_changed()

    def output(self, batch: object) -> object:
        """Return the output of the last block for every example of a batch."""
        if self.module.trainer.training and torch.is_grad_enabled():
            raise UserError(
                "run_output in a training step would switch programs on the IPUs for every batch. "
                "Use loss, output = self.run_loss(batch, return_output=True), or evaluate in "
                "validation_step."
            )
        with torch.inference_mode(False), torch.no_grad():
            tensors = normal(batch_tensors(batch))
            modes = modes_of(self.module)
            program = self.programs.inference.get(modes) or self.compile_inference(batch)
            program.check(batch, tensors)
            if self._offline:
                raise CompiledOffline
            self._use_changes_on_host()
            self.programs.use_inference(program)
            examples, size = len(tensors[0]), program.batch_size
            parts = [
                program.poplar(*padded(tensors, first, size)) for first in range(0, examples, size)
            ]
        return self._whole(parts, program, examples)

    def _whole(self, parts: List[object], program: CompiledProgram, examples: int) -> object:
        """Return the output for all examples of a batch from those of calls."""
        if not program.returns_output:
            return None
        calls = program.config.shape.batches.micro_batches_per_call
        micro_batch = program.batch_size // calls
        whole = []
        for number, part in enumerate(parts):
            given = min(examples - number * program.batch_size, program.batch_size)
            used = -(-given // micro_batch)
            whole.append(joined_scalars(as_float32(part), program.scalars, used))
        return join_outputs(whole, examples=examples)

    def compile_training(self, batch: object, returns_output: bool = False) -> CompiledProgram:
        """Compile the training program for batches like this one."""
        assert self.optimizer is not None
        optimizer = self.optimizer
        self.host_tensors = self.host_tensors or HostTensors(self.module)
        self.host_tensors.note_trained()
        program = self.programs.compile_training(
            lambda: self._compiler.training(
                batch, partial(self._inputs, batch), optimizer.poptorch, returns_output
            )
        )
        optimizer.write_loaded_state()
        if not self._offline:
            self.random_state.restore(program.poplar, program.config.shape.num_devices)
        return program

    def compile_inference(self, batch: object) -> CompiledProgram:
        """Compile the inference program for batches like this one, and the current modes."""
        self.host_tensors = self.host_tensors or HostTensors(self.module)
        return self.programs.compile_inference(
            modes_of(self.module), lambda: self._compiler.inference(batch)
        )

    def _inputs(self, batch: object, tensors: List[Tensor]) -> List[Tensor]:
        """Return the inputs of the training program for a batch."""
        if not has_own_weights(self.module):
            return tensors
        return self._loss_weights.inputs(batch, tensors)

    def rng_state(self) -> Optional[List[int]]:
        """Return the random state of the IPUs, or None before there is one."""
        training = self.programs.training
        poplar = None if training is None or self._offline else training.poplar
        return self.random_state.of(poplar)

    def destroy(self) -> None:
        """Copy the weights to the host and destroy both programs."""
        self.programs.destroy()
