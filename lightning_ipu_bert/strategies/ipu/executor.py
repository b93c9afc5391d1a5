"""Runs batches on IPUs: two compiled graphs, one that trains and one that evaluates."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import cached_property
from typing import Any, Callable, List, Optional, Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.pipeline.ipu_config import IPUConfig
from lightning_ipu_bert.pipeline.partition import partition
from lightning_ipu_bert.strategies.bridge import bridged_to
from lightning_ipu_bert.strategies.ipu.annotations import annotated
from lightning_ipu_bert.strategies.ipu.compiled_graph import (
    CompiledGraph,
    examples_of,
    joined,
    normal,
    padded,
)
from lightning_ipu_bert.strategies.ipu.losses import mean_loss, refuse_factor
from lightning_ipu_bert.strategies.ipu.network import (
    BatchLayout,
    InferenceNetwork,
    TrainingNetwork,
    tensors_of,
)
from lightning_ipu_bert.strategies.ipu.offline import CompiledOffline
from lightning_ipu_bert.strategies.ipu.optimizer import IPUOptimizer
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch
from lightning_ipu_bert.strategies.micro_batches import count_examples


class IPUExecutor:
    """Runs a model's batches; see `pipeline.interface.PipelineExecutor`."""

    def __init__(
        self,
        module: Any,
        config: IPUConfig,
        make_options: Callable[[bool], Any],
        batch_sizes: Callable[[bool], Optional[int]],
        offline: bool = False,
    ) -> None:
        """Create an executor; nothing is compiled yet.

        Args:
            module: The LightningModule.
            config: How it runs.
            make_options: Returns `poptorch.Options` for training or inference.
            batch_sizes: Returns the examples of a call, as far as loaders have told.
            offline: Compile and run nothing.
        """
        self.module = module
        self.config = config
        self.optimizer: Optional[IPUOptimizer] = None
        self.training: Optional[CompiledGraph] = None
        self.inference: Optional[CompiledGraph] = None
        self.loaded_rng_state: Optional[List[int]] = None
        """Of a checkpoint, until there is a program to take it."""
        self.loaded_num_ipus: Optional[int] = None
        self.compile_seconds = 0.0
        self.ran_in_step = False
        """Whether this training step has updated the weights; the strategy takes it back."""
        self._make_options = make_options
        self._batch_sizes = batch_sizes
        self._offline = offline
        self._weights_version = 0
        """Grows with every update; the inference graph remembers which one it has."""
        self._inference_has = -1
        self._host_is_newer = False
        """Whether weights were loaded that the training graph has not."""

    # --- runs -------------------------------------------------------------------------------------

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch; with gradients on, the weights are updated now."""
        if not torch.is_grad_enabled():
            loss: Tensor = self.module.pipeline_loss(self.output(batch), batch)
            return loss
        tensors = tensors_of(batch)
        if self.ran_in_step:
            raise UserError(
                "run_loss was called twice in a training step, and on IPUs each call is a weight "
                "update. Call it once, and put everything into pipeline_loss."
            )
        graph = self.training or self.compile_training(batch)
        graph.check(batch, tensors)
        if len(tensors[0]) != graph.batch_size:
            raise UserError(
                f"A training batch has {len(tensors[0])} examples, and a call takes "
                f"{graph.batch_size}. Let the loader drop a last batch that is not full."
            )
        if self._offline:
            raise CompiledOffline
        fresh = self._attach(graph)
        if self._host_is_newer and not fresh:
            graph.poplar.copyWeightsToDevice()
        self._host_is_newer = False
        assert self.optimizer is not None
        self.optimizer.refresh(graph.poplar)  # once attached, so that it is sent at once
        result = graph.poplar(*tensors)
        self._weights_version += 1
        self.ran_in_step = True
        return bridged_to(mean_loss(result, self.config), refuse_factor)

    def output(self, batch: Any) -> Any:
        """Return the output of the last block for every example of a batch."""
        if self.module.trainer.training and torch.is_grad_enabled():
            raise UserError(
                "run_output in a training step would change programs on the IPUs for every batch. "
                "Log from the loss, or evaluate in validation_step."
            )
        with torch.inference_mode(False), torch.no_grad():
            tensors = normal(tensors_of(batch))
            graph = self.inference or self.compile_inference(batch)
            graph.check(batch, tensors)
            if self._offline:
                raise CompiledOffline
            self._give_weights_to(graph)
            examples = len(tensors[0])
            parts = [
                graph.poplar(*padded(tensors, first, graph.batch_size))
                for first in range(0, examples, graph.batch_size)
            ]
        return joined(parts, examples)

    # --- weights ----------------------------------------------------------------------------------

    def copy_weights_to_host(self) -> None:
        """Bring the host's weights up to date, if they are not."""
        if self.training is not None and self.training.poplar.isCompiled():
            self.training.poplar.copyWeightsToHostIfNeeded()

    def weights_were_loaded(self) -> None:
        """Let the next runs take the host's weights: somebody has loaded others into the module."""
        self._weights_version += 1
        self._host_is_newer = True

    def _give_weights_to(self, graph: CompiledGraph) -> None:
        """Attach the inference graph and bring its weights up to date, if they are not."""
        self.copy_weights_to_host()
        fresh = self._attach(graph)  # attaching uploads what the host has
        if not fresh and self._inference_has != self._weights_version:
            graph.poplar.copyWeightsToDevice()
        self._inference_has = self._weights_version

    # --- IPUs -------------------------------------------------------------------------------------

    def _attach(self, graph: CompiledGraph) -> bool:
        """Attach a graph; return whether it was not before. The weights go there with it."""
        self._make_room_for(graph)
        fresh = not graph.poplar.isAttachedToDevice()
        if fresh:
            graph.poplar.attachToDevice()
        return fresh

    def _make_room_for(self, graph: Optional[CompiledGraph]) -> None:
        """Let all other graphs give way, if there are too few IPUs for both."""
        for other in (self.training, self.inference):
            if other is not None and other is not graph and not self._both_fit:
                other.detach()

    @cached_property  # asking takes a while, and this is asked for each batch
    def _both_fit(self) -> bool:
        together = self.config.training.num_ipus + self.config.inference.num_ipus
        needed = 1 << (together - 1).bit_length()
        return bool(import_poptorch().ipuHardwareIsAvailable(needed))

    def destroy(self) -> None:
        """Free both programs; the weights come to the host first."""
        with ExitStack() as stack:  # what fails does not keep the rest
            stack.callback(unwrap, self.module)
            for graph in (self.inference, self.training):
                if graph is not None:
                    stack.callback(graph.poplar.destroy)
        self.training = self.inference = None

    # --- compilation ------------------------------------------------------------------------------

    def compile_training(self, batch: Any) -> CompiledGraph:
        """Compile what trains, for batches like this one."""
        assert self.optimizer is not None
        poptorch = import_poptorch()
        self._make_room_for(None)
        unwrap(self.module)
        layout = BatchLayout.of(batch)
        network = TrainingNetwork(self.module, layout)
        poplar = poptorch.trainingModel(
            network, options=self._make_options(True), optimizer=self.optimizer.poptorch
        )
        graph = CompiledGraph(self.config.training, poplar, count_examples(batch), layout)
        self._compile(graph, tensors_of(batch))
        self.training = graph
        self._host_is_newer = False  # compiling has uploaded the weights
        self.optimizer.write_loaded_state()
        self._restore_rng_state(graph)
        return graph

    def compile_inference(self, batch: Any) -> CompiledGraph:
        """Compile what evaluates, for batches like this one."""
        poptorch = import_poptorch()
        self.copy_weights_to_host()
        self._make_room_for(None)
        layout = BatchLayout.of(batch)
        network = InferenceNetwork(self.module, layout)
        poplar = poptorch.inferenceModel(network, options=self._make_options(False))
        calls = self.config.inference.micro_batches_per_call
        size = self._batch_sizes(False) or -(-count_examples(batch) // calls) * calls
        graph = CompiledGraph(self.config.inference, poplar, size, layout)
        self._compile(graph, padded(normal(tensors_of(batch)), 0, size))
        self.inference = graph
        self._inference_has = self._weights_version  # compiling has uploaded them
        return graph

    def _compile(self, graph: CompiledGraph, tensors: Sequence[Tensor]) -> None:
        plan, config = graph.graph, self.config
        stages = partition(self.module.pipeline_blocks(), plan.layers_per_ipu)
        graph.shapes = examples_of(tensors)
        recompute = plan.training and config.recompute_checkpoint_every_layer
        begin = time.perf_counter()
        with annotated(self.module, stages, recompute, plan.embedding_serialization_factor):
            graph.poplar.compile(*tensors)
        seconds = time.perf_counter() - begin
        self.compile_seconds += seconds
        kind = "training" if plan.training else "inference"
        rank_zero_info(f"Compiled/loaded the {kind} program in {seconds:.1f} s")

    def rng_state(self) -> Optional[List[int]]:
        """Return the state of the IPUs' random numbers, or None before there is one."""
        if self.training is None or self._offline:
            return self.loaded_rng_state
        state: Optional[List[int]] = self.training.poplar.rng_state
        return state

    def _restore_rng_state(self, graph: CompiledGraph) -> None:
        state, self.loaded_rng_state = self.loaded_rng_state, None
        if state is None or self._offline:
            return
        if self.loaded_num_ipus != graph.graph.num_ipus:
            rank_zero_info(
                "The random state of the checkpoint belongs to another number of IPUs; only its "
                "seed is taken over. Dropout masks differ from those of an uninterrupted run."
            )
            state = state[:1]
        graph.poplar.rng_state = state


def unwrap(module: torch.nn.Module) -> None:
    """Give parameters and buffers their own classes back.

    PopTorch gives them classes that fetch weights when they are looked at, takes these away in
    `destroy`, and gives them back whenever another program is compiled (`_impl._wrapper_registry`);
    the next training program then refuses the buffers.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        if type(tensor).__name__ in ("PoptorchParameter", "PoptorchBuffer"):
            tensor.__class__ = type(tensor).__bases__[0]
