"""Parameters and buffers of a module that are in no block: a temperature, a mask."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Dict, Iterator, List, Tuple

from torch import Tensor, nn

from lightning_ipu_bert.pipeline.blocks import block_of
from lightning_ipu_bert.strategies.pipelined import PipelinedModule


class OutsideTensors:
    """Tensors outside of blocks, which a network has under its own names.

    While it is traced, they are on the IPUs, and the LightningModule must use those.
    """

    def __init__(self, module: PipelinedModule, network: nn.Module) -> None:
        """Register the tensors in a network.

        Args:
            module: The LightningModule.
            network: The network that is traced, with the blocks of the module.
        """
        self._buffers = list(_buffers_outside_blocks(module))
        for index, (owner, name) in enumerate(self._buffers):
            network.register_buffer(f"outside_{index}", owner.get_buffer(name))
        self._parameters: List[Tuple[nn.Module, str, str]] = []
        names = names_of_parameters(module)
        for name in (n for n in names.values() if block_of(n, module.pipeline_blocks()) is None):
            path, _, last = name.rpartition(".")
            owner = module.get_submodule(path)
            container(network, path).register_parameter(last, owner.get_parameter(last))
            self._parameters.append((owner, path, last))

    @contextmanager
    def lent_by(self, network: nn.Module) -> Iterator[None]:
        """Replace the tensors of the module by those of a network within the context."""
        with ExitStack() as undo:
            for index, (owner, name) in enumerate(self._buffers):
                undo.callback(setattr, owner, name, owner.get_buffer(name))
                setattr(owner, name, network.get_buffer(f"outside_{index}"))
            for owner, path, last in self._parameters:
                # While it is traced, the parameter of the network may be a plain tensor.
                lent, own = (_parameters(part) for part in (network.get_submodule(path), owner))
                undo.callback(own.__setitem__, last, own[last])
                own[last] = lent[last]
            yield


def names_of_parameters(module: PipelinedModule) -> Dict[int, str]:
    """Return the name of every parameter in a network, by id: in a block, if it has one there."""
    blocks = module.pipeline_blocks()
    names: Dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in names or block_of(names[id(parameter)], blocks) is None:
            names[id(parameter)] = name
    return names


def container(root: nn.Module, path: str) -> nn.Module:
    """Return the submodule of a path, which is created where it does not exist."""
    owner = root
    for part in path.split(".") if path else ():
        if part not in dict(owner.named_children()):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    return owner


def _parameters(module: nn.Module) -> Dict[str, Tensor]:
    parameters: Dict[str, Tensor] = vars(module)["_parameters"]
    return parameters


def _buffers_outside_blocks(module: PipelinedModule) -> Iterator[Tuple[nn.Module, str]]:
    """Yield the buffers outside of blocks: the owning submodule and the name of the buffer."""
    inside = {
        id(part)
        for block in module.pipeline_blocks()
        for part in module.get_submodule(block).modules()
    }
    for owner in module.modules():
        if id(owner) not in inside:
            for name, _ in owner.named_buffers(recurse=False):
                yield owner, name
