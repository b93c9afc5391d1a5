"""Broadcasts of Python objects with tensors, in two collectives.

`torch.distributed.broadcast_object_list` pickles the content of tensors, too; here it is appended
to the pickled structure as raw bytes.
"""

from __future__ import annotations

import io
import pickle
from typing import List, NamedTuple, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

ALIGNMENT = 16
"""Tensors start at multiples of this many bytes, as views of any dtype require."""


class _Content(NamedTuple):
    """Place of a tensor in a message."""

    begin: int
    end: int
    shape: Tuple[int, ...]
    dtype: torch.dtype


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.parts: List[Tensor] = []
        self.size = 0

    @override
    def persistent_id(self, value: object) -> object:
        """Replace plain tensors by their place; all others are pickled."""
        if type(value) is not Tensor or value.requires_grad or value.is_meta:
            return None
        if value.layout != torch.strided or value.is_quantized:
            return None
        # To host memory: the device of this rank is not the one of the others.
        content = value.cpu().contiguous().reshape(-1).view(torch.uint8)
        place = _Content(self.size, self.size + len(content), tuple(value.shape), value.dtype)
        self.parts += [content, content.new_zeros(-len(content) % ALIGNMENT)]
        self.size = place.end + len(self.parts[-1])
        return place


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, content: Tensor) -> None:
        super().__init__(file)
        self.content = content

    @override
    def persistent_load(self, place: _Content) -> Tensor:
        return self.content[place.begin : place.end].view(place.dtype).reshape(place.shape)


def pack(value: object) -> Tuple[Tensor, Tensor]:
    """Return a value as bytes: the pickled structure, and the content of its tensors.

    Raises:
        Exception: Of any kind, if the value cannot be pickled.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    structure = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return structure, torch.cat(pickler.parts) if pickler.parts else structure.new_empty(0)


def unpack(structure: Tensor, content: Tensor) -> object:
    """Return the value; its tensors share the memory of `content`."""
    value: object = _Unpickler(io.BytesIO(structure.numpy().tobytes()), content).load()
    return value


def send(packed: Tuple[Tensor, Tensor], group: dist.ProcessGroup) -> None:
    """Broadcast a packed value to the other ranks of a group of CPU tensors.

    Args:
        packed: From `pack`.
        group: The group; this rank is its first.
    """
    source = dist.get_global_rank(group, 0)
    dist.broadcast(torch.tensor([len(part) for part in packed]), source, group)
    dist.broadcast(torch.cat(packed), source, group)


def receive(group: dist.ProcessGroup) -> object:
    """Return the value that the first rank of a group sends."""
    source, sizes = dist.get_global_rank(group, 0), torch.zeros(2, dtype=torch.int64)
    dist.broadcast(sizes, source, group)
    message = torch.empty(int(sizes.sum()), dtype=torch.uint8)
    dist.broadcast(message, source, group)
    size = int(sizes[0])
    return unpack(message[:size], message[size:].clone())  # a copy: aligned
