"""The training and the inference programs of a run, which share IPUs and weights."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Callable, Dict, Optional

from lightning_ipu_bert._compat.poptorch import unwrap
from lightning_ipu_bert.strategies.ipu.program.changes import Modes
from lightning_ipu_bert.strategies.ipu.program.compiled import CompiledProgram
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch
from lightning_ipu_bert.strategies.pipelined import PipelinedModule


class WeightVersions:
    """Tracks which copies of the weights are up to date: on the host and in the programs."""

    def __init__(self) -> None:
        """Start with equal weights everywhere, and no inference program."""
        self._current = 0
        self._inference: Dict[Modes, int] = {}
        self._host_is_newer = False

    def trained(self) -> None:
        """Record an update by the training program."""
        self._current += 1

    def host_changed(self) -> None:
        """Record that weights were loaded into the module on the host."""
        self._current += 1
        self._host_is_newer = True

    def training_is_stale(self) -> bool:
        """Return whether the training program has older weights than the host."""
        return self._host_is_newer

    def inference_is_stale(self, modes: Modes) -> bool:
        """Return whether an inference program has older weights than the host."""
        return self._inference.get(modes) != self._current

    def copied_to_training(self) -> None:
        """Record a copy from the host to the training program."""
        self._host_is_newer = False

    def copied_to_inference(self, modes: Modes) -> None:
        """Record a copy from the host to an inference program."""
        self._inference[modes] = self._current


class ProgramPair:
    """The training program, and an inference program for each combination of modes.

    Weights are copied only if they are stale.
    """

    def __init__(self, module: PipelinedModule, ipus_together: int) -> None:
        """Create the pair without programs.

        Args:
            module: Holds the weights on the host.
            ipus_together: IPUs needed to attach both programs at the same time.
        """
        self.module = module
        self.training: Optional[CompiledProgram] = None
        self.inference: Dict[Modes, CompiledProgram] = {}
        """By the modes that they were compiled with."""
        self._ipus_together = ipus_together
        self._both_fit: Optional[bool] = None
        self.versions = WeightVersions()

    def to_host(self) -> None:
        """Copy the weights to the host if they are newer on the IPUs."""
        if self.training is not None and self.training.poplar.isCompiled():
            self.training.poplar.copyWeightsToHostIfNeeded()

    def use_training(self, program: CompiledProgram) -> None:
        """Attach the training program, and copy the weights to it if they are stale."""
        fresh = self._attach(program)
        if self.versions.training_is_stale() and not fresh:
            program.poplar.copyWeightsToDevice()
        self.versions.copied_to_training()

    def use_inference(self, program: CompiledProgram) -> None:
        """Attach an inference program, and copy the weights to it if they are stale."""
        self.to_host()
        fresh = self._attach(program)  # attaching copies the weights
        if not fresh and self.versions.inference_is_stale(program.modes):
            program.poplar.copyWeightsToDevice()
        self.versions.copied_to_inference(program.modes)

    def compile_training(self, make: Callable[[], CompiledProgram]) -> CompiledProgram:
        """Compile the training program, which copies the weights to it."""
        self._make_room_for(None)
        unwrap(self.module)
        self.training = make()
        self.versions.copied_to_training()
        return self.training

    def compile_inference(
        self, modes: Modes, make: Callable[[], CompiledProgram]
    ) -> CompiledProgram:
        """Compile an inference program for some modes, which copies the weights to it."""
        self.to_host()
        for other in self.inference.values():
            other.detach()
        self._make_room_for(None)
        self.inference[modes] = make()
        self.versions.copied_to_inference(modes)
        return self.inference[modes]

    def _attach(self, program: CompiledProgram) -> bool:
        self._make_room_for(program)
        return program.attach()

    def _make_room_for(self, program: Optional[CompiledProgram]) -> None:
        """Detach other programs: all inference programs but one, and what does not fit."""
        for other in (self.training, *self.inference.values()):
            if other is None or other is program:
                continue
            infers = program is not None and not program.config.training
            if (infers and not other.config.training) or not self._fit_together():
                other.detach()

    def _fit_together(self) -> bool:
        if self._both_fit is None:  # queried once: it is slow, and needed for each batch
            poptorch = import_poptorch()
            needed = 1 << (self._ipus_together - 1).bit_length()
            self._both_fit = bool(poptorch.ipuHardwareIsAvailable(needed))
        return self._both_fit

    def destroy(self) -> None:
        """Copy the weights to the host and destroy both programs."""
        with ExitStack() as stack:  # a failure must not skip the remaining steps
            stack.callback(unwrap, self.module)
            for program in (*self.inference.values(), self.training):
                if program is not None:
                    stack.callback(program.poplar.destroy)
        self.training = None
        self.inference.clear()
