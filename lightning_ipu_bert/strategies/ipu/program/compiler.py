"""Compilation of the programs of a model."""

from __future__ import annotations

import time
from typing import Callable, List, Optional, Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_ipu_bert.examples import count_examples
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.pipeline.plan import Plan
from lightning_ipu_bert.pipeline.protocol import has_own_weights
from lightning_ipu_bert.strategies.ipu.program.annotations import annotated
from lightning_ipu_bert.strategies.ipu.program.compiled import (
    CompiledProgram,
    examples_of,
    normal,
    padded,
)
from lightning_ipu_bert.strategies.ipu.program.network import (
    BatchLayout,
    InferenceNetwork,
    TracedNetwork,
    TrainingNetwork,
    batch_tensors,
)
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch
from lightning_ipu_bert.strategies.pipelined import PipelinedModule


class ProgramCompiler:
    """Compiles programs for the batches of a run."""

    def __init__(
        self,
        module: PipelinedModule,
        config: IPUConfig,
        plan: Plan,
        make_options: Callable[[bool, bool], object],
        batch_sizes: Callable[[bool], Optional[int]],
    ) -> None:
        """Create a compiler.

        Args:
            module: The LightningModule.
            config: The configuration.
            plan: The plan of the run.
            make_options: Returns `poptorch.Options`, given whether they are for training, and
                whether the output is returned.
            batch_sizes: Returns the examples per call of the loaders for training or inference.
        """
        self.seconds = 0.0
        """Compilation time so far."""
        self._module = module
        self._config = config
        self._plan = plan
        self._make_options = make_options
        self._batch_sizes = batch_sizes

    def training(
        self,
        batch: object,
        inputs: Callable[[List[Tensor]], List[Tensor]],
        optimizer: object,
        returns_output: bool,
    ) -> CompiledProgram:
        """Compile the training program.

        Args:
            batch: A batch like those that the program will run on.
            inputs: Returns the inputs of the program for the tensors of the batch.
            optimizer: The PopTorch optimizer.
            returns_output: Whether a call returns the output of the last block, too.
        """
        layout, weighted = BatchLayout.of(batch), has_own_weights(self._module)
        network = TrainingNetwork(self._module, layout, weighted, returns_output)
        poplar = import_poptorch().trainingModel(
            network, options=self._make_options(True, returns_output), optimizer=optimizer
        )
        config, examples = self._config.training, count_examples(batch)
        program = CompiledProgram(config, poplar, examples, layout, self._module)
        program.returns_output = returns_output
        tensors = batch_tensors(batch)
        return self._compiled(program, network, tensors, inputs(tensors))

    def inference(self, batch: object) -> CompiledProgram:
        """Compile an inference program for the current modes of the module.

        Args:
            batch: A batch like those that the program will run on.
        """
        layout, config = BatchLayout.of(batch), self._config.inference
        network = InferenceNetwork(self._module, layout)
        options = self._make_options(False, True)
        poplar = import_poptorch().inferenceModel(network, options=options)
        calls = config.shape.batches.micro_batches_per_call
        size = self._batch_sizes(False) or -(-count_examples(batch) // calls) * calls
        program = CompiledProgram(config, poplar, size, layout, self._module)
        tensors = padded(normal(batch_tensors(batch)), 0, size)
        return self._compiled(program, network, tensors, tensors)

    def _compiled(
        self,
        program: CompiledProgram,
        network: TracedNetwork,
        tensors: Sequence[Tensor],
        inputs: Sequence[Tensor],
    ) -> CompiledProgram:
        program.shapes = examples_of(tensors)
        begin = time.perf_counter()
        with annotated(self._module, self._plan, program.config), program.constants.of_a_trace():
            program.poplar.compile(*inputs)
        program.scalars = network.scalars
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        kind = "training" if program.config.training else "inference"
        rank_zero_info(f"Compiled/loaded the {kind} program in {seconds:.1f} s")
        return program
