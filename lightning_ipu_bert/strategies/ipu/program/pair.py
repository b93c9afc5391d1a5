"""The two programs of a run: they take turns on the IPUs, and have the same weights."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Callable, Optional

from torch import nn

from lightning_ipu_bert._compat.poptorch import unwrap
from lightning_ipu_bert.strategies.ipu.program.compiled import CompiledProgram
from lightning_ipu_bert.strategies.ipu.sdk import import_poptorch


class ProgramPair:
    """Training and inference. No copy of the weights is made that nobody needs."""

    def __init__(self, module: nn.Module, ipus_together: int) -> None:
        """Hold no program yet.

        Args:
            module: Has the host's copy of the weights.
            ipus_together: What both programs need at the same time.
        """
        self.module = module
        self.training: Optional[CompiledProgram] = None
        self.inference: Optional[CompiledProgram] = None
        self._ipus_together = ipus_together
        self._both_fit: Optional[bool] = None
        self._version = 0
        """Grows with every change of the weights."""
        self._inference_has = -1
        self._host_is_newer = False
        """Whether weights were loaded that the training program has not."""

    def to_host(self) -> None:
        """Bring the host's weights up to date, if they are not."""
        if self.training is not None and self.training.poplar.isCompiled():
            self.training.poplar.copyWeightsToHostIfNeeded()

    def host_changed(self) -> None:
        """Let the next runs take the host's weights: somebody has loaded others into the module."""
        self._version += 1
        self._host_is_newer = True

    def use_training(self, program: CompiledProgram) -> None:
        """Attach the training program, and bring its weights up to date, if they are not."""
        fresh = self._attach(program)
        if self._host_is_newer and not fresh:
            program.poplar.copyWeightsToDevice()
        self._host_is_newer = False

    def trained(self) -> None:
        """Note that a call has updated the weights."""
        self._version += 1

    def use_inference(self, program: CompiledProgram) -> None:
        """Attach the inference program, and bring its weights up to date, if they are not."""
        self.to_host()
        fresh = self._attach(program)  # attaching uploads what the host has
        if not fresh and self._inference_has != self._version:
            program.poplar.copyWeightsToDevice()
        self._inference_has = self._version

    def compile_training(self, make: Callable[[], CompiledProgram]) -> CompiledProgram:
        """Compile and keep the program that trains; compiling uploads the weights."""
        self._make_room_for(None)
        unwrap(self.module)
        self.training = make()
        self._host_is_newer = False
        return self.training

    def compile_inference(self, make: Callable[[], CompiledProgram]) -> CompiledProgram:
        """Compile and keep the program that evaluates; compiling uploads the weights."""
        self.to_host()
        self._make_room_for(None)
        self.inference = make()
        self._inference_has = self._version
        return self.inference

    def _attach(self, program: CompiledProgram) -> bool:
        self._make_room_for(program)
        return program.attach()

    def _make_room_for(self, program: Optional[CompiledProgram]) -> None:
        """Let the other programs give way, if there are too few IPUs for both."""
        for other in (self.training, self.inference):
            if other is not None and other is not program and not self._fit_together():
                other.detach()

    def _fit_together(self) -> bool:
        if self._both_fit is None:  # asking takes a while, and this is asked for each batch
            poptorch: Any = import_poptorch()
            needed = 1 << (self._ipus_together - 1).bit_length()
            self._both_fit = bool(poptorch.ipuHardwareIsAvailable(needed))
        return self._both_fit

    def destroy(self) -> None:
        """Free both programs; the weights come to the host first."""
        with ExitStack() as stack:  # what fails does not keep the rest
            stack.callback(unwrap, self.module)
            for program in (self.inference, self.training):
                if program is not None:
                    stack.callback(program.poplar.destroy)
        self.training = self.inference = None
